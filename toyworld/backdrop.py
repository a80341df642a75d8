"""Backgrounds and objects, drawn on a supersampled canvas; coordinates are in pixels of the final picture."""

import math
import random

from PIL import Image, ImageDraw

from .vocabulary import NONE, OBJECT_COLORS, Scene

SIZE = 64
SUPERSAMPLING = 4

Color = tuple[int, int, int]

PLAIN = {"on white": (250, 250, 250), "on gray": (160, 160, 160), "on pink": (242, 168, 222)}
SKY_AND_GROUND = {
    "on grass": ((140, 200, 250), (112, 192, 88)),
    "at night": ((72, 84, 160), (86, 128, 108)),
    "in a room": ((190, 210, 192), (178, 132, 96)),
    "on the beach": ((150, 215, 245), (234, 210, 146)),
    "in the snow": ((176, 192, 212), (240, 246, 252)),
}
WHITE = (255, 255, 255)
WOOD = (110, 70, 36)


def shade(color: Color, factor: float) -> Color:
    """The colour made lighter or darker."""
    return tuple(max(0, min(255, int(v * factor))) for v in color)


class Sheet:
    """A canvas that takes final-picture coordinates and draws them supersampled."""

    def __init__(self, image: Image.Image):
        self.draw = ImageDraw.Draw(image)

    def circle(self, x: float, y: float, radius: float, color: Color) -> None:
        self.draw.ellipse(_scaled((x - radius, y - radius, x + radius, y + radius)), fill=color)

    def box(self, x0: float, y0: float, x1: float, y1: float, color: Color, outline: Color | None = None) -> None:
        width = SUPERSAMPLING if outline else 0
        self.draw.rectangle(_scaled((x0, y0, x1, y1)), fill=color, outline=outline, width=width)

    def ring(self, x0: float, y0: float, x1: float, y1: float, color: Color) -> None:
        self.draw.ellipse(_scaled((x0, y0, x1, y1)), outline=color, width=2 * SUPERSAMPLING)

    def polygon(self, points: list[tuple[float, float]], color: Color) -> None:
        self.draw.polygon([(x * SUPERSAMPLING, y * SUPERSAMPLING) for x, y in points], fill=color)


def _scaled(values: tuple[float, ...]) -> list[float]:
    return [v * SUPERSAMPLING for v in values]


def draw_background(sheet: Sheet, scene: Scene, rng: random.Random) -> None:
    """Fill the sheet with the scene's background."""
    brightness = rng.uniform(0.95, 1.04)
    if scene.background in PLAIN:
        color = shade(PLAIN[scene.background], min(brightness, 1.0))
        sheet.box(0, 0, SIZE, SIZE, color)
        return
    sky, ground = SKY_AND_GROUND[scene.background]
    horizon = scene.characters[0].ground - 12
    sheet.box(0, 0, SIZE, horizon, shade(sky, brightness))
    sheet.box(0, horizon, SIZE, SIZE, shade(ground, brightness))
    if scene.background == "on grass":
        x = rng.uniform(8, 56)
        sheet.circle(x, 8, 4, WHITE)
        sheet.circle(x + 5, 9, 3, WHITE)
    elif scene.background == "at night":
        sheet.circle(rng.choice((8, 56)), 9, 4.5, (250, 244, 200))
        for _ in range(6):
            sheet.circle(rng.uniform(0, SIZE), rng.uniform(0, 36), 0.7, (255, 255, 220))
    elif scene.background == "in a room":
        x = rng.choice((5, 43))
        sheet.box(x, 6, x + 16, 20, (150, 205, 245), outline=(120, 80, 50))
    elif scene.background == "on the beach":
        sheet.box(0, horizon - 8, SIZE, horizon, shade((70, 150, 200), brightness))
        sheet.circle(rng.uniform(8, 56), 8, 4, (255, 226, 90))
    else:
        for _ in range(10):
            sheet.circle(rng.uniform(0, SIZE), rng.uniform(0, 50), 0.9, WHITE)


def draw_object(sheet: Sheet, scene: Scene, rng: random.Random) -> None:
    """Draw the scene's object, if it has one, on its side."""
    if scene.object == NONE:
        return
    y = scene.characters[0].ground + 1
    k = rng.uniform(0.95, 1.1)
    # A ball of no particular colour has any; the other objects have one of their own.
    color = rng.choice(OBJECT_COLORS) if scene.object == "ball" else None
    if scene.object_color != NONE:
        color = scene.object_color
    _DRAWERS[scene.object](sheet, scene.object_x, y, k, _INKS.get(color))


def _ball(sheet: Sheet, x: float, y: float, k: float, ink: Color) -> None:
    sheet.circle(x, y - 6 * k, 6.5 * k, ink)
    sheet.box(x - 6.2 * k, y - 7.5 * k, x + 6.2 * k, y - 5 * k, WHITE)


def _box(sheet: Sheet, x: float, y: float, k: float, ink: Color | None) -> None:
    color = ink or (200, 136, 70)
    dark = shade(color, 0.5)
    sheet.box(x - 6 * k, y - 12 * k, x + 6 * k, y, color, outline=dark)
    sheet.box(x - 0.8, y - 12 * k, x + 0.8, y, dark)


def _tree(sheet: Sheet, x: float, y: float, k: float, _ink: None) -> None:
    sheet.box(x - 1.8, y - 12, x + 1.8, y, WOOD)
    sheet.polygon([(x - 8, y - 9), (x + 8, y - 9), (x, y - 31 * k)], (20, 100, 46))


def _cup(sheet: Sheet, x: float, y: float, k: float, ink: Color | None) -> None:
    color = ink or (20, 190, 204)
    sheet.ring(x + 1, y - 10, x + 8.5, y - 2, shade(color, 0.8))
    sheet.polygon([(x - 6 * k, y - 12 * k), (x + 5 * k, y - 12 * k), (x + 4 * k, y), (x - 5 * k, y)], color)


def _flower(sheet: Sheet, x: float, y: float, k: float, ink: Color | None) -> None:
    sheet.box(x - 1, y - 13 * k, x + 1, y, (30, 130, 44))
    middle = y - 15 * k
    for petal in range(5):
        angle = petal * math.tau / 5
        sheet.circle(x + 4 * math.cos(angle), middle + 4 * math.sin(angle), 3.0, ink or (226, 40, 150))
    sheet.circle(x, middle, 2.5, WHITE if ink else (255, 220, 60))


def _lamp(sheet: Sheet, x: float, y: float, _k: float, _ink: None) -> None:
    sheet.box(x - 1, y - 20, x + 1, y, (60, 60, 60))
    sheet.polygon([(x - 7, y - 17), (x + 7, y - 17), (x + 3.5, y - 28), (x - 3.5, y - 28)], (255, 140, 30))
    sheet.box(x - 4, y - 1.5, x + 4, y, (60, 60, 60))


_DRAWERS = {"ball": _ball, "box": _box, "tree": _tree, "cup": _cup, "flower": _flower, "lamp": _lamp}
_INKS = {"red": (230, 60, 60), "blue": (60, 90, 230), "yellow": (250, 200, 40)}
