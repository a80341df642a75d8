"""Poses of the toy world's figures: the named and the held-out ones, random ones, and the words for their limbs."""

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Pose:
    """Limb directions in degrees: 0 hangs down, 90 points outwards, 180 points up; negative points inwards.

    Arms and legs are (upper left, lower left, upper right, lower right), left and right as seen in the picture.
    """

    arms: tuple[float, float, float, float]
    legs: tuple[float, float, float, float]
    rotation: float = 0.0


POSES = {
    "stands": Pose((14, 10, 14, 10), (8, 8, 8, 8)),
    "salutes": Pose((12, 8, 82, -150), (6, 6, 6, 6)),
    "raises one arm": Pose((12, 8, 172, 176), (8, 8, 8, 8)),
    "raises both arms": Pose((150, 162, 150, 162), (10, 10, 10, 10)),
    "prays": Pose((24, -135, 24, -135), (6, 6, 6, 6)),
    "sits": Pose((20, 10, 25, 30), (-82, -84, 82, 86)),
    "meditates": Pose((38, 22, 38, 22), (80, -82, 80, -82)),
    "squats": Pose((60, -30, 60, -30), (74, -12, 74, -12)),
    "does a handstand": Pose((168, 172, 168, 172), (10, 8, 10, 8), 180),
    "kicks": Pose((50, 62, 50, 62), (4, 4, 84, 86)),
    "flexes": Pose((88, 176, 88, 176), (12, 12, 12, 12)),
    "lies down": Pose((14, 10, 14, 10), (6, 6, 6, 6), 90),
}
HELD_OUT_POSES = {
    "tpose": Pose((90, 90, 90, 90), (7, 7, 7, 7)),
    "akimbo": Pose((46, -52, 46, -52), (10, 10, 10, 10)),
    "star": Pose((132, 132, 132, 132), (36, 36, 36, 36)),
    "dab": Pose((122, 122, 104, -104), (10, 10, 10, 10)),
    "splits": Pose((100, 100, 100, 100), (82, 82, 82, 82)),
}


def jittered(rng: random.Random, pose: Pose) -> Pose:
    """The pose as somebody else would do it."""
    return Pose(
        tuple(angle + rng.gauss(0, 5) for angle in pose.arms),
        tuple(angle + rng.gauss(0, 4) for angle in pose.legs),
        pose.rotation + rng.gauss(0, 3),
    )


def random_pose(rng: random.Random) -> Pose:
    """A pose that comes close to none with a name, held out or not."""
    # A pose that happens to be one of the named or held-out actions would teach it under another caption; what only
    # comes close to one is left out, too.
    while True:
        pose = _any_pose(rng)
        if not any(alike(pose, other, arms=22, legs=40) for other in (POSES | HELD_OUT_POSES).values()):
            return pose


def _any_pose(rng: random.Random) -> Pose:
    def arm() -> tuple[float, float]:
        upper = rng.uniform(5, 178)
        return upper, upper + rng.choice((0, 0, 0, -100, 90, -140, 60)) + rng.uniform(-15, 15)

    left, right = arm(), arm()
    if rng.random() < 0.4:
        right = left
    kind = rng.random()
    if kind < 0.45:
        upper = (rng.uniform(5, 12),) * 2
    elif kind < 0.6:
        upper = (rng.uniform(20, 80),) * 2
    else:
        upper = (rng.uniform(0, 50), rng.uniform(0, 50))
    lower = tuple(angle + rng.choice((0, 0, 0, -40)) for angle in upper)
    return Pose((*left, *right), (upper[0], lower[0], upper[1], lower[1]))


def alike(pose: Pose, other: Pose, arms: float = 20, legs: float = 25) -> bool:
    """Whether a pose, or its mirror image, looks like the other one: no arm or leg differs by as many degrees."""
    turn = abs((pose.rotation - other.rotation + 180) % 360 - 180)
    mirrored = Pose((*pose.arms[2:], *pose.arms[:2]), (*pose.legs[2:], *pose.legs[:2]))
    return turn < 25 and any(
        max(abs((a - b + 180) % 360 - 180) for a, b in zip(seen.arms, other.arms)) < arms
        and max(abs(a - b) for a, b in zip(seen.legs, other.legs)) < legs
        for seen in (pose, mirrored)
    )


def random_pose_text(rng: random.Random, pose: Pose) -> str:
    """Words about the limbs, sometimes about all of them."""
    kind = rng.random()
    if kind < 0.25:
        return "poses"
    left, right = _arm_words(*pose.arms[:2]), _arm_words(*pose.arms[2:])
    legs = _leg_words(pose.legs)
    if left == right:
        return f"poses with arms {left}" + (f" and legs {legs}" if kind < 0.7 else "")
    if kind < 0.35:
        return f"poses with legs {legs}"
    if kind < 0.5:
        side, words = rng.choice((("left", left), ("right", right)))
        return f"poses with {side} arm {words}"
    return f"poses with left arm {left} and right arm {right}"


def _arm_words(upper: float, lower: float) -> str:
    if abs((upper - lower + 180) % 360 - 180) > 50:
        lower = (lower + 180) % 360 - 180
        return "bent " + ("up" if abs(lower) > 125 else "down" if abs(lower) < 50 else "in" if lower < 0 else "out")
    for limit, word in ((30, "down"), (62, "low"), (112, "out"), (152, "high")):
        if upper < limit:
            return word
    return "up"


def _leg_words(legs: tuple[float, float, float, float]) -> str:
    if legs[0] - legs[1] > 20 or legs[2] - legs[3] > 20:
        return "bent"
    spread = legs[0] + legs[2]
    return "together" if spread < 25 else "apart" if spread < 80 else "wide"
