"""What pictures show, as vectors: DINO from the artist's folder, or a CLIP Vision model of ComfyUI's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...kernels.features import build_dino, similarities
from .segmenters import ModelFiles, evictable, load

DINO_FILES = ModelFiles(
    ("dino",), "dino_deitsmall16_pretrain.pth", "https://github.com/facebookresearch/dino#pretrained-models"
)
DINO_BYTES_PER_PICTURE = 200e6  # of activations: twelve layers of 785 patches at most; estimated, not measured


def by_dino(file: str, pictures: Sequence[Tensor], to: Sequence[Tensor]) -> list[float]:
    """Mean cosine of each picture (H, W, 3) with the pictures `to`, by the DINO of a file in models/dino."""
    network, _ = build_dino(DINO_FILES.read(file))
    model = evictable(network)
    module = load(model, int(DINO_BYTES_PER_PICTURE))
    vectors = [torch.cat([module(one[None].to(model.load_device)) for one in batch]) for batch in (pictures, to)]
    return similarities(*vectors)


def by_clip(clip_vision: Any, pictures: Sequence[Tensor], to: Sequence[Tensor]) -> list[float]:
    """The same by the image embedding of a CLIP_VISION."""
    vectors = [
        torch.cat([clip_vision.encode_image(one[None])["image_embeds"].float() for one in batch])
        for batch in (pictures, to)
    ]
    return similarities(*vectors)
