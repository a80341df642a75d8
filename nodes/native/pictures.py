"""Pictures as ComfyUI passes them (IMAGE (B, H, W, C) and MASK (B, H, W) in 0..1): sizes, alpha, contact sheets."""

from __future__ import annotations

from collections.abc import Sequence

import comfy.utils
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

SHEET_CELL = 128  # pixels: large enough to judge a picture, small enough for ten rows on a screen
SHEET_GAP = 4
SHEET_HEADER = 20
PAPER, INK = (24, 26, 28), (200, 206, 212)
OUTLINE, DIMMED = (0.9, 0.62, 0.0), 0.45  # orange; what lies outside of a subject stays visible


def opaque(images: Tensor) -> Tensor:
    """(B, H, W, 3) of pictures: grey ones in colour, those with an alpha channel with white where transparent."""
    if images.shape[-1] in (1, 3):
        return images.expand(*images.shape[:-1], 3)
    color, alpha = images[..., :3], images[..., 3:4]
    return color * alpha + (1 - alpha)


def cover(images: Tensor, height: int, width: int) -> Tensor:
    """(B, height, width, 3): resized to cover that size, its middle cut out. Pictures of that size stay bit-equal."""
    if images.shape[1:3] == (height, width):
        return images
    return comfy.utils.common_upscale(images.movedim(-1, 1), width, height, "lanczos", "center").movedim(1, -1)


def cover_mask(mask: Tensor, picture_size: tuple[int, int], height: int, width: int) -> Tensor:
    """A mask (h, w) that belongs to a picture of `picture_size` (H, W), cut like `cover` cuts that picture."""
    mask = resized_mask(mask, picture_size)[None, None].float()
    return comfy.utils.common_upscale(mask, width, height, "bilinear", "center")[0, 0].clamp(0, 1)


def resized_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """A mask (h, w) at `size`; one of that size stays the same object."""
    if mask.shape == size:
        return mask
    resized = torch.nn.functional.interpolate(mask[None, None].float(), size=size, mode="bilinear", antialias=True)
    return resized[0, 0].clamp(0, 1)


def measures(mask: Tensor) -> str:
    """Width x height of a mask (h, w)."""
    return f"{mask.shape[1]} x {mask.shape[0]}"


def outlined(picture: Tensor, mask: Tensor, target: Tensor) -> Tensor:
    """A picture (H, W, 3), dimmed outside of `mask` (H, W), with the outline of another mask, `target`."""
    inside = (target >= 0.5).float()
    width = max(target.shape) // 256 + 1  # pixels: seen at any size
    grown = torch.nn.functional.max_pool2d(inside[None], 2 * width + 1, stride=1, padding=width)[0]
    dimmed = picture * (DIMMED + (1 - DIMMED) * mask[..., None])
    return torch.where((grown > inside)[..., None], torch.tensor(OUTLINE), dimmed)


def to_pil(image: Tensor) -> Image.Image:
    """A PIL picture of (H, W, 3) in 0..1."""
    return Image.fromarray((image.clamp(0, 1) * 255).round().to("cpu", torch.uint8).numpy())


def to_tensor(picture: Image.Image) -> Tensor:
    """An IMAGE (1, H, W, 3) of an RGB PIL picture."""
    return torch.from_numpy(np.asarray(picture, np.float32) / 255)[None]


def contact_sheet(rows: Sequence[Sequence[Sequence[Tensor]]], headers: Sequence[str]) -> Tensor:
    """Rows of pictures in labelled groups, as one IMAGE (1, h, w, 3).

    rows: for each row one group of pictures (H, W, 3) for each header; a group is as wide as its longest row, and
    pictures are scaled to the same height.
    """
    height, width = rows[0][0][0].shape[:2]
    cell = (max(1, round(SHEET_CELL * width / height)), SHEET_CELL)
    columns = [max(len(row[group]) for row in rows) for group in range(len(headers))]
    step = (cell[0] + SHEET_GAP, cell[1] + SHEET_GAP)
    gaps = SHEET_GAP * 2 * (len(headers) - 1)
    sheet = Image.new("RGB", (sum(columns) * step[0] + gaps, SHEET_HEADER + len(rows) * step[1]), PAPER)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(12)
    left = 0
    for group, header in enumerate(headers):
        draw.text((left + 2, 3), header, font=font, fill=INK)
        for row, groups in enumerate(rows):
            for column, picture in enumerate(groups[group]):
                place = (left + column * step[0], SHEET_HEADER + row * step[1])
                # Small pictures stay crisp when enlarged, large ones smooth when made smaller.
                kind = Image.Resampling.NEAREST if height < SHEET_CELL else Image.Resampling.LANCZOS
                sheet.paste(to_pil(picture).resize(cell, kind), place)
        left += columns[group] * step[0] + 2 * SHEET_GAP
    return to_tensor(sheet)
