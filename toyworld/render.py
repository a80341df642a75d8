"""Draw a scene: the picture and the mask of its figures."""

import random

import numpy as np
from PIL import Image

from .backdrop import SIZE, SUPERSAMPLING, Sheet, draw_background, draw_object, shade
from .figure import Figure
from .vocabulary import Character, Scene

_CANVAS = (SIZE * SUPERSAMPLING, SIZE * SUPERSAMPLING)


def render(scene: Scene) -> np.ndarray:
    """The picture: uint8 (64, 64, 3)."""
    return render_with_mask(scene)[0]


def figure_mask(scene: Scene) -> np.ndarray:
    """How much of each pixel the figures cover, an object in front of them too: uint8 (64, 64), 255 for all of it."""
    return render_with_mask(scene)[1]


def render_with_mask(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """The picture and the figures' mask, drawn once."""
    # The scene carries its own seed, so that the same scene is the same picture wherever it is drawn.
    rng = random.Random(scene.seed)
    picture = Image.new("RGB", _CANVAS)
    mask = Image.new("L", _CANVAS)
    sheet = Sheet(picture)
    draw_background(sheet, scene, rng)
    if not scene.object_in_front:
        draw_object(sheet, scene, rng)
    for character in scene.characters:
        _shadow(sheet, picture, character)
        Figure(character, picture, mask).draw()
    if scene.object_in_front:
        draw_object(sheet, scene, rng)
    return _at_final_size(picture), _at_final_size(mask)


def render_empty(scene: Scene) -> np.ndarray:
    """The scene's place and object without its figures: uint8 (64, 64, 3)."""
    rng = random.Random(scene.seed)
    picture = Image.new("RGB", _CANVAS)
    sheet = Sheet(picture)
    draw_background(sheet, scene, rng)
    draw_object(sheet, scene, rng)
    return _at_final_size(picture)


def _at_final_size(image: Image.Image) -> np.ndarray:
    return np.asarray(image.resize((SIZE, SIZE), Image.BOX))


def _shadow(sheet: Sheet, picture: Image.Image, character: Character) -> None:
    x, y = character.x * SUPERSAMPLING, character.ground * SUPERSAMPLING
    ground = picture.getpixel((int(x), min(int(y) + 2 * SUPERSAMPLING, _CANVAS[1] - 1)))
    half_width, half_height = 11 * character.scale * SUPERSAMPLING, 1.7 * SUPERSAMPLING
    sheet.draw.ellipse([x - half_width, y - half_height, x + half_width, y + half_height], fill=shade(ground, 0.74))


def picture_grid(pictures: list[np.ndarray], columns: int, zoom: int = 2) -> Image.Image:
    """Pictures side by side, for looking at."""
    cell = SIZE + 2
    rows = (len(pictures) + columns - 1) // columns
    sheet = np.zeros((rows * cell, columns * cell, 3), np.uint8)
    for index, picture in enumerate(pictures):
        row, column = divmod(index, columns)
        sheet[row * cell : row * cell + SIZE, column * cell : column * cell + SIZE] = picture
    return Image.fromarray(sheet).resize((columns * cell * zoom, rows * cell * zoom), Image.NEAREST)
