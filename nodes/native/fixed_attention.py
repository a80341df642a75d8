"""Cross-attention of one prompt seen whole, and imposed on another's, inside ComfyUI's calls of the U-Net."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ...kernels.backbone import Layer
from ...kernels.replacement import Columns, attention, fix_columns
from .patches import ATTENTION, layer_of_call, watch_cross_attention

Maps = Mapping[Layer, Tensor]
"""A prompt's attention (1, heads, h * w, T) in each layer."""

POSITIVE = 0  # where ComfyUI's guiders put the positive prompt among the prompts of a call


def seen_in(transformer_options: dict[str, Any], maps: dict[Layer, Tensor], home: torch.device) -> dict[str, Any]:
    """A copy of transformer_options with which a call of the U-Net on one prompt writes its attention into `maps`.

    home: where they are kept.
    """

    def look(extra_options: Mapping[str, Any], q: Tensor, k: Tensor, heads: int) -> None:
        maps[layer_of_call(extra_options)] = attention(by_head(q, heads), by_head(k, heads), k.shape[1]).to(home)

    return watch_cross_attention(transformer_options, look)


def check_seen(maps: Maps, layers: tuple[Layer, ...], transformer_options: Mapping[str, Any]) -> None:
    """Raise ValueError, with the name of what is in the way, unless all layers have shown their attention."""
    if missing := [layer for layer in layers if layer not in maps]:
        others = transformer_options.get("patches_replace", {}).get("attn2", {})
        other = next((others[at] for layer in missing for at in (layer, layer[:2]) if at in others), None)
        code = other if hasattr(other, "__qualname__") else type(other)
        origin = "" if other is None else f" ({code.__qualname__} of {code.__module__})"
        raise ValueError(
            f"Another node{origin} replaces the cross-attention of {len(missing)} layers of this MODEL, so it cannot "
            "be fixed there: connect the MODEL as it comes before that node, here and to 'DDIM Inversion'."
        )


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


def by_head(x: Tensor, heads: int) -> Tensor:
    """(B, n, heads * d) -> (B, heads, n, d)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)
