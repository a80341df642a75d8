"""Cross-attention of one prompt seen whole, and imposed on another's, inside ComfyUI's calls of the U-Net."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ...kernels.backbone import Layer
from ...kernels.replacement import Columns, attention, fix_columns
from .patches import ATTENTION, by_head, check_whole, layer_of_call, watch_cross_attention

Maps = Mapping[Layer, Tensor]
"""A prompt's attention (1, heads, h * w, T) in each layer."""

POSITIVE = 0  # where ComfyUI's guiders put the positive prompt among the prompts of a call


def seen_in(
    transformer_options: dict[str, Any], maps: dict[Layer, Tensor], home: torch.device, latents: Tensor
) -> dict[str, Any]:
    """A copy of transformer_options with which a call of the U-Net on one prompt writes its attention into `maps`.

    home: where they are kept. latents: (1, C, h, w) of that call, which raises ValueError when it sees a tile of them.
    """

    def look(extra_options: Mapping[str, Any], q: Tensor, k: Tensor, heads: int) -> None:
        check_whole(extra_options, latents)
        maps[layer_of_call(extra_options)] = attention(by_head(q, heads), by_head(k, heads), k.shape[1]).to(home)

    return watch_cross_attention(transformer_options, look)


def with_fixed_columns(
    transformer_options: dict[str, Any], maps: Maps, columns: Columns, renormalise: bool
) -> dict[str, Any]:
    """A copy of transformer_options with which the positive prompt's attention is fixed to `maps` in some columns.

    What other nodes do to attention stays in effect: only the difference is added to their result.
    """
    inside: Mapping[str, Any] | None = None
    previous = transformer_options.get(ATTENTION)

    def look(extra_options: Mapping[str, Any], *_: Any) -> None:
        nonlocal inside
        inside = extra_options

    def attend(function: Callable, q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **kwargs: Any) -> Tensor:
        nonlocal inside
        extra_options, inside = inside, None
        if previous is None:
            out = function(q, k, v, heads, *args, **kwargs)
        else:
            out = previous(function, q, k, v, heads, *args, **kwargs)
        if extra_options is None or POSITIVE not in extra_options["cond_or_uncond"]:
            return out
        prompts = extra_options["cond_or_uncond"]
        at = prompts.index(POSITIVE)
        a_source = maps[layer_of_call(extra_options)].to(q.device)
        tokens = a_source.shape[-1]
        own = [by_head(x.chunk(len(prompts))[at], heads) for x in (out, q, k, v)]
        fixed = fix_columns(
            own[0], attention(own[1], own[2], tokens), a_source, own[3][..., :tokens, :], columns, renormalise
        )
        parts = list(out.chunk(len(prompts)))
        parts[at] = fixed.transpose(1, 2).flatten(2)
        return torch.cat(parts)

    return watch_cross_attention({**transformer_options, ATTENTION: attend}, look)
