"""Null-text surgery on a diffusers U-Net: what it replaces is gone, and a third party sees an ordinary U-Net."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .backbone import Layer
from .diffusers_attention import transformer_blocks
from .nulltext import ConceptModel, Look

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

# A residual block has a norm2, too, and keeps it.
TEXT_WEIGHT = re.compile(r"transformer_blocks\.\d+\.(attn2|norm2)\.")


def is_text_weight(name: str) -> bool:
    """Whether a weight, by its diffusers name, has no place in a null-text model: cross-attention and its norm."""
    return TEXT_WEIGHT.search(name) is not None


class NullTextAttention(nn.Module):
    """Stands where cross-attention was and gives F_null at every position (Eq. 6), whatever it is asked."""

    def __init__(self, feature: Tensor) -> None:
        """feature: (C,)."""
        super().__init__()
        self.register_buffer("feature", feature.detach().clone())

    def forward(self, hidden_states: Tensor, *_args: Any, **_options: Any) -> Tensor:
        """(B, h * w, C) like hidden_states."""
        return self.feature.to(hidden_states).expand_as(hidden_states)


@contextmanager
def watch_unet(unet: UNet2DConditionModel, look: Look) -> Iterator[None]:
    """See `nulltext.Watch`: partial(watch_unet, unet) is one."""

    def showing(layer: Layer):
        return lambda _module, _inputs, output: look(layer, output)

    handles = [block.attn2.register_forward_hook(showing(layer)) for layer, block in transformer_blocks(unet)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def remove_cross_attention(unet: UNet2DConditionModel, features: Mapping[Layer, Tensor]) -> None:
    """Null-text surgery in place: each attn2 becomes its constant feature (a buffer, no parameter), norm2 goes.

    features: (C,) for each layer of `unet`. The model still takes encoder_hidden_states, and ignores them.
    """
    for layer, block in transformer_blocks(unet):
        weight = block.norm2.weight
        block.attn2 = NullTextAttention(features[layer].to(weight.device, weight.dtype))
        block.norm2 = nn.Identity()


@torch.no_grad()
def make_concept_model(unet: UNet2DConditionModel, model: ConceptModel, family: str) -> None:
    """Turn a diffusers U-Net of the base into the concept model, in place.

    family: of the U-Net ("sd1", "sd2", "sdxl", "toy"). Raises ValueError when `model` was made of another.
    """
    widths = {layer: len(block.norm2.weight) for layer, block in transformer_blocks(unet)}
    parameters = dict(unet.named_parameters())
    model.check_fits(family, widths, {name: tuple(weight.shape) for name, weight in parameters.items()})
    for name, delta in model.deltas.items():
        parameters[name].add_(delta.to(parameters[name]))
    remove_cross_attention(unet, model.features)
