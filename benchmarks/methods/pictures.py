"""Pictures as the trainer, the judge and the contact sheet want them."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ...toyworld.render import SIZE

GAP, TITLE_HEIGHT = 2, 18


def to_image(pixels: np.ndarray) -> Tensor:
    """uint8 picture or mask -> float in 0..1."""
    return torch.tensor(pixels).float() / 255


def contact_sheet(strips: list[tuple[str, np.ndarray]]) -> Image.Image:
    """Titled strips of uint8 pictures (N, 64, 64, 3), one under another."""
    cell = SIZE + GAP
    width = max(len(pictures) for _, pictures in strips) * cell
    sheet = Image.new("RGB", (width, len(strips) * (cell + TITLE_HEIGHT)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for row, (title, pictures) in enumerate(strips):
        top = row * (cell + TITLE_HEIGHT)
        draw.text((3, top + 1), title, fill="black", font=font)
        for column, picture in enumerate(pictures):
            sheet.paste(Image.fromarray(picture), (column * cell, top + TITLE_HEIGHT))
    return sheet
