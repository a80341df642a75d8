"""Maps of attention: their size in the U-Net, and as pictures in colours that colour-blind eyes tell apart."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Nine even steps of viridis (van der Walt & Smith 2015): lightness rises evenly, no red-green contrast is needed.
VIRIDIS = torch.tensor(
    [
        (68, 1, 84),
        (71, 44, 122),
        (59, 81, 139),
        (44, 113, 142),
        (33, 144, 141),
        (39, 173, 129),
        (92, 200, 99),
        (170, 220, 50),
        (253, 231, 37),
    ]
) / 255.0  # fmt: skip


def map_shape(level: int, height: int, width: int) -> tuple[int, int]:
    """(h, w) of the U-Net's maps after `level` halvings of its latents (height, width), odd sizes rounded up."""
    return -(-height // 2**level), -(-width // 2**level)


def map_level(places: int, height: int, width: int) -> int:
    """How often latents (height, width) were halved to give maps of `places` places.

    Raises ValueError when no halving gives that many.
    """
    for level in range(max(height, width).bit_length()):
        h, w = map_shape(level, height, width)
        if h * w == places:
            return level
    raise ValueError(
        f"A layer of this model attends from {places} places, which no halving of its {width} x {height} latents "
        "gives: remove the node that rescales inside the U-Net (such as Deep Shrink)."
    )


def resize(maps: Tensor, height: int, width: int) -> Tensor:
    """Maps (N, h, w) at another size (N, height, width)."""
    return F.interpolate(maps[:, None], (height, width), mode="bilinear", align_corners=False)[:, 0]


def stretch(maps: Tensor) -> Tensor:
    """Each map (N, h, w) between 0, where it is lowest, and 1, where it is highest. An even map becomes 0."""
    low, high = maps.amin(dim=(1, 2), keepdim=True), maps.amax(dim=(1, 2), keepdim=True)
    return (maps - low) / (high - low).clamp_min(1e-12)


def colour(maps: Tensor) -> Tensor:
    """Maps (N, h, w) in 0..1 as pictures (N, h, w, 3) from dark blue (0) to yellow (1)."""
    place = maps.clamp(0, 1) * (len(VIRIDIS) - 1)
    below = place.floor().long().clamp_max(len(VIRIDIS) - 2)
    palette = VIRIDIS.to(maps)
    return torch.lerp(palette[below], palette[below + 1], (place - below)[..., None])


def overlay(pictures: Tensor, maps: Tensor, opacity: float) -> Tensor:
    """Maps (N, h, w) in 0..1 laid in colour over pictures (N, h, w, 3) in 0..1. opacity: of the map, 0..1."""
    return torch.lerp(pictures, colour(maps).to(pictures), opacity)
