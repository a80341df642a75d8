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
# These have a colour of their own and may be given another.
COLORABLE_SUBJECTS = ("robot",)
COLORS = ("red", "blue", "green", "yellow")
STRIPED, HAT, POINTED_HAT = "striped", "hat", "pointed hat"
ACCESSORIES = (STRIPED, HAT, POINTED_HAT)
ACCESSORY_SHARE = 0.3
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
COLORABLE_OBJECTS = ("ball", "box", "cup", "flower")
OBJECT_COLORS = ("red", "blue", "yellow")
HELD_OUT_OBJECTS = ("lamp",)
SIDES = ("left", "right")
NONE = "none"
RANDOM_ACTION = "random"
RANDOM_POSE_SHARE = 0.35
# Share of scenes with two subjects; random poses are a share of the others, about 28 % of all.
PAIR_SHARE = 0.2


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
# What two subjects side by side have room for.
PAIR_ACTIONS = ("stands", "salutes", "raises one arm", "raises both arms", "prays", "flexes", "sits")
# Within the 22 words between the prompt's start and end, an object needs up to seven and what stands before it eight.
LONGEST_ACTION_TEXT = 8

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
class Character:
    """One figure of a scene; x and ground (where it stands) in pixels."""

    subject: str
    color: str
    accessory: str
    pose: Pose
    scale: float
    x: float
    ground: float


@dataclass(frozen=True)
class Scene:
    """One picture of the world, down to the last random stroke; its one or two characters do the same."""

    characters: tuple[Character, ...]
    action: str
    action_text: str
    background: str
    object: str
    object_color: str
    side: str
    object_x: float
    object_in_front: bool
    seed: int

    @property
    def subject(self) -> str:
        """The subject named first."""
        return self.characters[0].subject

    @property
    def color(self) -> str:
        """The colour of the subject named first."""
        return self.characters[0].color

    @property
    def from_left(self) -> tuple[Character, ...]:
        """The characters as seen in the picture."""
        return tuple(sorted(self.characters, key=lambda character: character.x))


def draw_scene(
    rng: random.Random,
    subject: str | None = None,
    action: str | None = None,
    background: str | None = None,
    object: str | None = None,
    side: str | None = None,
    color: str | None = None,
    accessory: str | None = None,
) -> Scene:
    """Draw a scene of one subject; what is given stays as given, even where it is held out of training."""
    given = subject is not None and action is not None
    while True:
        chosen_subject = subject or rng.choice(SUBJECTS)
        chosen_action = action or (RANDOM_ACTION if rng.random() < RANDOM_POSE_SHARE else rng.choice(ACTIONS))
        if given or (chosen_subject, chosen_action) not in HELD_OUT_PAIRS:
            break
    color = _color_of(rng, chosen_subject, color)
    background = background or rng.choice(BACKGROUNDS)
    pose, text = _pose_of(rng, chosen_action)
    # Sentences about single limbs are long already.
    random_pose = chosen_action == RANDOM_ACTION
    if object is None:
        room = len(text.split()) <= LONGEST_ACTION_TEXT
        object = rng.choice(OBJECTS) if room and rng.random() < 0.6 else NONE
    side = side or rng.choice(SIDES)
    if accessory is None:
        dressed = not random_pose and rng.random() < ACCESSORY_SHARE
        accessory = rng.choice(ACCESSORIES) if dressed else NONE
    colorable = object in COLORABLE_OBJECTS and not random_pose
    object_color = rng.choice(OBJECT_COLORS) if colorable and rng.random() < 0.4 else NONE
    # The figure makes some room for the object, which may still stand before or behind it.
    direction = 0 if object == NONE else {"left": -1, "right": 1}[side]
    x = 32 - 5 * direction + rng.uniform(-3, 3)
    distance = rng.uniform(14, 28)
    character = Character(
        chosen_subject, color, accessory, pose, rng.uniform(0.94, 1.08), x, ground=rng.uniform(57, 60)
    )
    return Scene(
        characters=(character,),
        action=chosen_action,
        action_text=text,
        background=background,
        object=object,
        object_color=object_color,
        side=side,
        object_x=min(max(x + direction * distance, 8), 56),
        object_in_front=distance > 19 and rng.random() < 0.5,
        seed=rng.randrange(1 << 30),
    )


def draw_pair_scene(
    rng: random.Random,
    subjects: tuple[str, str] | None = None,
    action: str | None = None,
    background: str | None = None,
) -> Scene:
    """Draw a scene of two different subjects doing the same, either of them on the left."""
    given = subjects is not None and action is not None
    while True:
        chosen_subjects = subjects or tuple(rng.sample(SUBJECTS, 2))
        chosen_action = action or rng.choice(PAIR_ACTIONS)
        if given or not any((subject, chosen_action) in HELD_OUT_PAIRS for subject in chosen_subjects):
            break
    places = [17.0, 47.0]
    rng.shuffle(places)
    ground = rng.uniform(55, 59)
    characters = tuple(
        Character(
            subject,
            _color_of(rng, subject, None),
            NONE,
            _pose_of(rng, chosen_action)[0],
            rng.uniform(0.68, 0.78),
            x + rng.uniform(-2, 2),
            ground + rng.uniform(-1, 1),
        )
        for subject, x in zip(chosen_subjects, places)
    )
    # "a cat and a panda on grass": whoever says nothing else means that they stand there.
    unsaid = chosen_action == "stands" and rng.random() < 0.5
    return Scene(
        characters=characters,
        action=chosen_action,
        action_text="" if unsaid else chosen_action,
        background=background or rng.choice(BACKGROUNDS),
        object=NONE,
        object_color=NONE,
        side=SIDES[0],
        object_x=0.0,
        object_in_front=False,
        seed=rng.randrange(1 << 30),
    )


def draw_training_scene(rng: random.Random) -> Scene:
    """Any scene of the training vocabulary."""
    return draw_pair_scene(rng) if rng.random() < PAIR_SHARE else draw_scene(rng)


def caption(scene: Scene, action_text: str | None = None, drop_background: bool = False) -> str:
    """The sentence the model is trained with; `action_text` replaces the words for the action."""
    words = [" and ".join(_describe(character) for character in scene.characters)]
    words.append(scene.action_text if action_text is None else action_text)
    if not drop_background:
        words.append(scene.background)
    if scene.object != NONE:
        color = "" if scene.object_color == NONE else f"{scene.object_color} "
        words.append(f"with {_with_article(color + scene.object)} on the {scene.side}")
    return " ".join(word for word in words if word)


def _describe(character: Character) -> str:
    striped = f"{STRIPED} " if character.accessory == STRIPED else ""
    words = [_with_article(striped + character.subject)]
    if character.color != NONE:
        words.append(f"in {character.color}")
    if character.accessory in (HAT, POINTED_HAT):
        words.append(f"in a {character.accessory}")
    return " ".join(words)


def _color_of(rng: random.Random, subject: str, color: str | None) -> str:
    if subject in COLORED_SUBJECTS:
        return color or rng.choice(COLORS)
    if subject in COLORABLE_SUBJECTS:
        return color or (rng.choice(COLORS) if rng.random() < 0.5 else NONE)
    return NONE


def _pose_of(rng: random.Random, action: str) -> tuple[Pose, str]:
    if action == RANDOM_ACTION:
        pose = _random_pose(rng)
        return pose, _random_pose_text(rng, pose)
    return _jittered(rng, (POSES | HELD_OUT_POSES)[action]), action


def _with_article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _jittered(rng: random.Random, pose: Pose) -> Pose:
    return Pose(
        tuple(angle + rng.gauss(0, 5) for angle in pose.arms),
        tuple(angle + rng.gauss(0, 4) for angle in pose.legs),
        pose.rotation + rng.gauss(0, 3),
    )


def _random_pose(rng: random.Random) -> Pose:
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


def _random_pose_text(rng: random.Random, pose: Pose) -> str:
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
