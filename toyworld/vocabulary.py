"""What the toy world contains, what is held out of training, and the sentences that describe it."""

import random
from dataclasses import dataclass

SUBJECTS = (
    "man",
    "woman",
    "robot",
    "alien",
    "skeleton",
    "ninja",
    "panda",
    "cat",
    "rabbit",
    "bear",
    "frog",
    "penguin",
)
HELD_OUT_SUBJECTS = ("wizard", "pig")
COLORED_SUBJECTS = ("man", "woman")
COLORS = ("red", "blue", "green", "yellow")
BACKGROUNDS = (
    "on grass",
    "at night",
    "in a room",
    "on the beach",
    "in the snow",
    "on white",
    "on gray",
    "on pink",
)
OBJECTS = ("ball", "box", "tree", "cup", "flower")
HELD_OUT_OBJECTS = ("lamp",)
SIDES = ("left", "right")
NONE = "none"
RANDOM_ACTION = "random"
RANDOM_POSE_SHARE = 0.27


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
ACTIONS = tuple(POSES)
HELD_OUT_ACTIONS = tuple(HELD_OUT_POSES)

# Subjects and actions that are each trained, but never together.
HELD_OUT_PAIRS = frozenset(
    {
        ("panda", "does a handstand"),
        ("robot", "prays"),
        ("cat", "flexes"),
        ("woman", "kicks"),
        ("frog", "raises both arms"),
        ("alien", "squats"),
        ("penguin", "salutes"),
        ("man", "meditates"),
    }
)


@dataclass(frozen=True)
class Scene:
    """One picture of the world, down to the last random stroke."""

    subject: str
    action: str
    action_text: str
    color: str
    background: str
    object: str
    side: str
    pose: Pose
    scale: float
    x: float
    ground: float
    seed: int


def draw_scene(
    rng: random.Random,
    subject: str | None = None,
    action: str | None = None,
    background: str | None = None,
    object: str | None = None,
    side: str | None = None,
    color: str | None = None,
) -> Scene:
    """Draw a scene at random; what is given stays as given, even where it is held out of training."""
    given = subject is not None and action is not None
    while True:
        chosen_subject = subject or rng.choice(SUBJECTS)
        chosen_action = action or (RANDOM_ACTION if rng.random() < RANDOM_POSE_SHARE else rng.choice(ACTIONS))
        if given or (chosen_subject, chosen_action) not in HELD_OUT_PAIRS:
            break
    if chosen_subject in COLORED_SUBJECTS:
        color = color or rng.choice(COLORS)
    else:
        color = NONE
    background = background or rng.choice(BACKGROUNDS)
    object = object or (rng.choice(OBJECTS) if rng.random() < 0.6 else NONE)
    side = side or rng.choice(SIDES)
    if chosen_action == RANDOM_ACTION:
        pose = _random_pose(rng)
        text = _random_pose_text(rng, pose)
    else:
        pose = _jittered(rng, (POSES | HELD_OUT_POSES)[chosen_action])
        text = chosen_action
    # The figure makes room for the object.
    shift = 0.0 if object == NONE else {"left": 5.0, "right": -5.0}[side]
    return Scene(
        subject=chosen_subject,
        action=chosen_action,
        action_text=text,
        color=color,
        background=background,
        object=object,
        side=side,
        pose=pose,
        scale=rng.uniform(0.94, 1.08),
        x=32 + shift + rng.uniform(-3, 3),
        ground=rng.uniform(57, 60),
        seed=rng.randrange(1 << 30),
    )


def caption(scene: Scene, action_text: str | None = None, drop_background: bool = False) -> str:
    """The sentence the model is trained with; `action_text` replaces the words for the action."""
    words = [_with_article(scene.subject)]
    if scene.color != NONE:
        words.append(f"in {scene.color}")
    words.append(scene.action_text if action_text is None else action_text)
    if not drop_background:
        words.append(scene.background)
    if scene.object != NONE:
        words.append(f"with {_with_article(scene.object)} on the {scene.side}")
    return " ".join(words)


def _with_article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _jittered(rng: random.Random, pose: Pose) -> Pose:
    return Pose(
        tuple(angle + rng.gauss(0, 5) for angle in pose.arms),
        tuple(angle + rng.gauss(0, 4) for angle in pose.legs),
        pose.rotation + rng.gauss(0, 3),
    )


def _random_pose(rng: random.Random) -> Pose:
    # A pose that happens to be one of the named or held-out actions would teach it under another caption.
    while True:
        pose = _any_pose(rng)
        if not any(_alike(pose, other) for other in (POSES | HELD_OUT_POSES).values()):
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


def _alike(pose: Pose, other: Pose) -> bool:
    if other.rotation != 0:
        return False
    arms = max(abs((a - b + 180) % 360 - 180) for a, b in zip(pose.arms, other.arms))
    legs = max(abs(a - b) for a, b in zip(pose.legs, other.legs))
    return arms < 22 and legs < 25


def _random_pose_text(rng: random.Random, pose: Pose) -> str:
    kind = rng.random()
    if kind < 0.3:
        return "poses"
    left, right = _arm_word(*pose.arms[:2]), _arm_word(*pose.arms[2:])
    legs = "apart" if pose.legs[0] + pose.legs[2] > 50 else "together"
    if left == right:
        return f"poses with arms {left}" + (f" and legs {legs}" if kind < 0.7 else "")
    if kind < 0.42:
        return f"poses with legs {legs}"
    return f"poses with left arm {left} and right arm {right}"


def _arm_word(upper: float, lower: float) -> str:
    if abs((upper - lower + 180) % 360 - 180) > 60:
        return "bent"
    return "down" if upper < 50 else ("out" if upper < 125 else "up")
