"""The cross-attention layers of a diffusers U-Net: their names, and a processor that gives each its own context."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn

from .attention_recording import Recording
from .backbone import Layer, TextContext

if TYPE_CHECKING:
    from diffusers import Transformer2DModel, UNet2DConditionModel


class LayerAttention:
    """diffusers attention processor of one cross-attention layer; it knows its layer from construction on.

    `encoder_hidden_states` is a TextContext, of which it takes its own two rows, or a plain tensor, as in a stock call.
    The arithmetic is that of diffusers' AttnProcessor2_0, so equal contexts give equal bits.
    """

    def __init__(self, layer: Layer, index: int, recordings: list[Recording]) -> None:
        self.layer = layer
        self.index = index
        self.recordings = recordings

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: TextContext | Tensor,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        if isinstance(encoder_hidden_states, TextContext):
            key_source, value_source = encoder_hidden_states.sources(self.index)
        else:
            key_source = value_source = encoder_hidden_states

        batch = hidden_states.shape[0]

        def heads(x: Tensor) -> Tensor:
            return x.view(batch, -1, attn.heads, x.shape[-1] // attn.heads).transpose(1, 2)

        q = heads(attn.to_q(hidden_states))
        k = heads(attn.to_k(key_source))
        v = heads(attn.to_v(value_source))
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, k.shape[2], batch)
            attention_mask = attention_mask.view(batch, attn.heads, -1, attention_mask.shape[-1])
        for recording in self.recordings:
            recording.see(self.layer, self.index, q, k, lambda context: heads(attn.to_k(context)))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask)
        out = out.transpose(1, 2).reshape(batch, -1, attn.heads * v.shape[-1])
        for module in attn.to_out:
            out = module(out)
        return out


def transformer_blocks(unet: UNet2DConditionModel) -> Iterator[tuple[Layer, nn.Module]]:
    """The transformer blocks of a diffusers U-Net in execution order, under their LDM numbers."""

    def inside(block: str, number: int, transformer: Transformer2DModel) -> Iterator[tuple[Layer, nn.Module]]:
        for depth, module in enumerate(transformer.transformer_blocks):
            yield Layer(block, number, depth), module

    # LDM counts the first convolution, every residual block and every downsampler as an input block of its own,
    # and an upsampler with the output block before it.
    number = 1
    for level in unet.down_blocks:
        for index in range(len(level.resnets)):
            if getattr(level, "has_cross_attention", False):
                yield from inside("input", number, level.attentions[index])
            number += 1
        number += level.downsamplers is not None
    if getattr(unet.mid_block, "has_cross_attention", False):
        yield from inside("middle", 0, unet.mid_block.attentions[0])
    number = 0
    for level in unet.up_blocks:
        for index in range(len(level.resnets)):
            if getattr(level, "has_cross_attention", False):
                yield from inside("output", number, level.attentions[index])
            number += 1


def ldm_name(layer: Layer) -> str:
    """The module path of a transformer block in an LDM checkpoint."""
    block = "middle_block" if layer.block == "middle" else f"{layer.block}_blocks.{layer.number}"
    return f"{block}.1.transformer_blocks.{layer.depth}"
