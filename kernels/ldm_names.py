"""The modules of a diffusers U-Net under the names they have in an LDM checkpoint, and so in ComfyUI."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

# Attention blocks have the same names inside in both; these do not.
BEFORE = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
}
AFTER = {"conv_norm_out": "out.0", "conv_out": "out.2"}
RESIDUAL_BLOCK = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def ldm_modules(unet: UNet2DConditionModel) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of all modules of a U-Net with cross-attention that have weights, input blocks first."""
    parts = dict(unet.named_modules())
    yield from ((name, parts[path]) for path, name in BEFORE.items() if path in parts)
    # How LDM counts blocks: see `diffusers_attention.transformer_blocks`.
    number = 1
    for level in unet.down_blocks:
        for index in range(len(level.resnets)):
            yield from _block(f"input_blocks.{number}", level, index)
            number += 1
        if level.downsamplers is not None:
            yield f"input_blocks.{number}.0.op", level.downsamplers[0].conv
            number += 1
    yield from _block("middle_block", unet.mid_block, 0)
    yield from _residual("middle_block.2", unet.mid_block.resnets[1])
    number = 0
    for level in unet.up_blocks:
        for index in range(len(level.resnets)):
            yield from _block(f"output_blocks.{number}", level, index)
            number += 1
        if level.upsamplers is not None:
            place = 2 if getattr(level, "has_cross_attention", False) else 1
            yield f"output_blocks.{number - 1}.{place}.conv", level.upsamplers[0].conv
    yield from ((name, parts[path]) for path, name in AFTER.items())


def _block(name: str, level: nn.Module, index: int) -> Iterator[tuple[str, nn.Module]]:
    yield from _residual(f"{name}.0", level.resnets[index])
    if getattr(level, "has_cross_attention", False):
        for path, module in level.attentions[index].named_modules():
            if has_weights(module):
                yield f"{name}.1.{path}", module


def _residual(name: str, block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for path, place in RESIDUAL_BLOCK.items():
        module = getattr(block, path, None)
        if module is not None:
            yield f"{name}.{place}", module


def has_weights(module: nn.Module) -> bool:
    """Whether a module has weights of its own, besides those of the modules inside it."""
    return next(module.parameters(recurse=False), None) is not None
