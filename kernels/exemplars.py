"""The pictures a concept is learned from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .backbone import Backbone
from .prompts import Prompt, fill_blank


@dataclass(frozen=True)
class Exemplar:
    """One picture of the concept.

    image: (H, W, 3) in 0..1. caption: what the picture shows, with the blank "{}" where the identifier goes and no
    word for the concept itself. mask: (H, W) in 0..1, 1 where the concept is, or None. other_actions: pictures of
    the same context (person, place) doing something else, each (H, W, 3): ADI's x^(abar,c).
    """

    image: Tensor
    caption: str
    mask: Tensor | None = None
    other_actions: tuple[Tensor, ...] = ()


def check_exemplars(exemplars: Sequence[Exemplar]) -> None:
    """Raise ValueError with a sentence when these cannot be learned from.

    None, unequal sizes, a missing blank, an empty mask.
    """
    if not exemplars:
        raise ValueError("There are no exemplars: connect at least one picture.")
    sizes = {tuple(e.image.shape) for e in exemplars}
    if len(sizes) > 1:
        raise ValueError(f"Exemplars of unequal size {sorted(sizes)}: resize them to one size first.")
    for exemplar in exemplars:
        fill_blank(exemplar.caption, "name")
    if empty := [str(i) for i, e in enumerate(exemplars, start=1) if e.mask is not None and not e.mask.any()]:
        raise ValueError(
            f"The mask of exemplar {', '.join(empty)} is empty, so there is nothing to learn from: mark the subject, "
            "or leave the masks out."
        )


@dataclass(frozen=True)
class EncodedExemplars:
    """Exemplars as the loop sees them, each picture through the VAE once.

    latents: (N, C, h, w). masks: (N, 1, h, w) or None. prompts: N captions with the placeholder. other_actions: for
    each exemplar (k, C, h, w), k may be 0.
    """

    latents: Tensor
    masks: Tensor | None
    prompts: tuple[Prompt, ...]
    other_actions: tuple[Tensor, ...]


def encode_exemplars(backbone: Backbone, exemplars: Sequence[Exemplar], name: str) -> EncodedExemplars:
    """Encode pictures and masks to latent size and put the placeholder `name` into the captions.

    Exemplars without a mask among others with one are wholly in the mask. Raises ValueError where `check_exemplars`
    does.
    """
    check_exemplars(exemplars)
    latents = torch.cat([backbone.encode_image(e.image[None].to(backbone.device)) for e in exemplars])
    masks = None
    if any(e.mask is not None for e in exemplars):
        full = torch.stack([torch.ones(e.image.shape[:2]) if e.mask is None else e.mask for e in exemplars])
        masks = torch.nn.functional.adaptive_avg_pool2d(full[:, None].to(latents), latents.shape[-2:])
    other_actions = tuple(
        backbone.encode_image(torch.stack(e.other_actions).to(backbone.device)) if e.other_actions else latents[:0]
        for e in exemplars
    )
    return EncodedExemplars(latents, masks, tuple(fill_blank(e.caption, name) for e in exemplars), other_actions)
