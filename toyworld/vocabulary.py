"""What the toy world contains, what is held out of training, and the sentences that describe it."""

import random
from dataclasses import dataclass

from .poses import HELD_OUT_POSES, POSES, Pose, jittered, random_pose, random_pose_text

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
        pose = random_pose(rng)
        return pose, random_pose_text(rng, pose)
    return jittered(rng, (POSES | HELD_OUT_POSES)[action]), action


def _with_article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"
