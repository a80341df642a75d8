"""How each subject looks: proportions in figure units (a standing man is about 43 high) and colours."""

from dataclasses import dataclass

from .backdrop import Color
from .vocabulary import HAT, NONE, POINTED_HAT

SHIRTS = {
    "red": (214, 44, 40),
    "blue": (40, 84, 214),
    "green": (30, 140, 60),
    "yellow": (240, 196, 30),
    NONE: (0, 0, 0),
}
HATS = {HAT: (104, 28, 60), POINTED_HAT: (20, 120, 150)}
SKIN = (246, 202, 166)
BLACK = (22, 22, 28)


@dataclass(frozen=True)
class Look:
    """Proportions and colours of one subject; None for a colour means the colour of its shirt."""

    skin: Color = SKIN
    shirt: Color | None = None
    sleeve: Color | None = None
    hand: Color = SKIN
    legs: Color = SKIN
    shoe: Color = BLACK
    head: float = 6.2
    head_width: float = 1.0
    torso_width: float = 11.0
    torso_height: float = 12.0
    limb: float = 5.0
    arm: float = 9.0
    leg: float = 9.5
    boxy: bool = False
    hair: Color | None = None
    ears: str = NONE
    ear_color: Color = BLACK
    outline: Color | None = None


def _plain(color: Color, **others) -> Look:
    """A subject whose body has one colour."""
    colors = dict.fromkeys(("skin", "shirt", "sleeve", "hand", "legs", "shoe"), color)
    return Look(**(colors | others))


_WHITE = (232, 232, 236)
_LIME = (176, 232, 50)
_PURPLE = (120, 50, 170)
_LAVENDER = (186, 150, 214)
_FROG = (30, 116, 58)
_BEAR = (112, 64, 30)
_PENGUIN = (26, 34, 62)
_NINJA = (26, 26, 34)
_COPPER = (184, 92, 44)
_CAT = (240, 146, 40)
_PIG = (250, 116, 146)

LOOKS = {
    "man": Look(legs=(60, 60, 84), shoe=(40, 30, 30), hair=(70, 44, 24)),
    "woman": Look(legs=(104, 58, 112), shoe=(80, 26, 56), hair=(110, 54, 20), torso_width=9),
    "robot": _plain(
        (206, 212, 220),
        sleeve=_COPPER,
        hand=_COPPER,
        legs=_COPPER,
        shoe=(96, 50, 30),
        head=6.0,
        boxy=True,
        torso_width=13,
    ),
    "alien": _plain(_LIME, head=7.8, head_width=1.15, torso_width=7, torso_height=11, limb=3.6),
    "skeleton": _plain((248, 248, 240), head=5.8, torso_width=6, limb=2.8, outline=(66, 66, 78)),
    "ninja": _plain(_NINJA),
    "panda": _plain(
        _WHITE,
        sleeve=BLACK,
        hand=BLACK,
        legs=BLACK,
        shoe=BLACK,
        head=7.2,
        torso_width=15,
        torso_height=13,
        limb=5.8,
        arm=8.5,
        leg=7.5,
        ears="round",
    ),
    "cat": _plain(
        _CAT,
        hand=(252, 232, 206),
        shoe=(252, 232, 206),
        head=6.8,
        head_width=1.1,
        torso_width=10,
        limb=4.6,
        leg=8,
        ears="point",
        ear_color=(214, 116, 24),
    ),
    "rabbit": _plain(
        _LAVENDER,
        hand=(222, 196, 240),
        shoe=(222, 196, 240),
        torso_width=10,
        limb=4.6,
        leg=8.5,
        ears="long",
        ear_color=(226, 120, 170),
    ),
    "bear": _plain(
        _BEAR,
        sleeve=(98, 54, 24),
        hand=(76, 42, 20),
        legs=(98, 54, 24),
        shoe=(76, 42, 20),
        head=7.2,
        torso_width=15,
        torso_height=13,
        limb=5.8,
        arm=8.5,
        leg=7.5,
        ears="round",
        ear_color=(98, 54, 24),
    ),
    "frog": _plain(
        _FROG,
        hand=(86, 170, 76),
        shoe=(86, 170, 76),
        head=7.0,
        head_width=1.3,
        torso_width=13,
        torso_height=11,
        limb=4.4,
        ears="eyes",
        ear_color=_FROG,
    ),
    "penguin": _plain(
        _PENGUIN, shoe=(244, 150, 30), head=6.4, torso_width=14, torso_height=14, limb=4.8, arm=8.5, leg=6.5
    ),
    "wizard": _plain(_PURPLE, skin=SKIN, hand=SKIN, legs=(90, 36, 130), shoe=(60, 30, 80)),
    "pig": _plain(
        _PIG,
        legs=(70, 190, 214),
        hand=(214, 84, 116),
        shoe=(214, 84, 116),
        head=7.0,
        torso_width=14,
        limb=5.2,
        leg=7.5,
        ears="point",
        ear_color=(224, 96, 126),
    ),
}
