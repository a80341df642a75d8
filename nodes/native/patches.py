"""Looking into, and reaching into, the cross-attention of one call of the U-Net, through its transformer_options."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import Tensor

from ...kernels.backbone import Layer

ATTENTION = "optimized_attention_override"

TILES = (
    "Another node cuts the picture into tiles, and the attention of a tile does not say where in the picture a word "
    "looks: connect the MODEL as it comes before that node."
)


def layer_of_call(extra_options: Mapping[str, Any]) -> Layer:
    """The layer in which an attention patch is being called, from what ComfyUI tells the patch."""
    block, number = extra_options["block"]
    return Layer(block, number, extra_options["block_index"])


def check_whole(extra_options: Mapping[str, Any], latents: Tensor) -> None:
    """Raise ValueError when the U-Net is being called on a tile of `latents` (B, C, h, w)."""
    if tuple(extra_options["original_shape"][-2:]) != tuple(latents.shape[-2:]):
        raise ValueError(TILES)


def sampling_step(transformer_options: Mapping[str, Any], timestep: Tensor) -> int:
    """The step, from 0, in which the model is called at noise level `timestep` (B,); -1 above the first level.

    A sampler may evaluate between two steps: such a call belongs to the step it started from.
    """
    sigmas = transformer_options["sample_sigmas"].to(timestep)
    return int((sigmas >= timestep[0] * (1 - 1e-4)).sum()) - 1


def with_patch(transformer_options: dict[str, Any], name: str, patch: Callable, first: bool = False) -> dict[str, Any]:
    """A copy of transformer_options with one more patch of that name, behind the others or before them."""
    patches = transformer_options.get("patches", {})
    others = list(patches.get(name, []))
    return {**transformer_options, "patches": {**patches, name: [patch, *others] if first else [*others, patch]}}


def watch_cross_attention(
    transformer_options: dict[str, Any], look: Callable[[Mapping[str, Any], Tensor, Tensor, int], None]
) -> dict[str, Any]:
    """A copy of transformer_options with which every cross-attention shows its q and k, its result left alone.

    look: called with the layer's extra_options, q and k (B, tokens, heads * d) and the number of heads. The attention
    function serves self-attention too and does not know its layer: attn2_patch announces it, attn2_output_patch
    withdraws it. A function that another node installed stays in effect. Layers whose attention another node replaces
    are not seen.
    """
    inside: Mapping[str, Any] | None = None
    previous = transformer_options.get(ATTENTION)

    def enter(n: Tensor, key: Tensor, value: Tensor, extra_options: Mapping[str, Any]) -> tuple[Tensor, ...]:
        nonlocal inside
        inside = extra_options
        return n, key, value

    def leave(n: Tensor, _extra_options: Mapping[str, Any]) -> Tensor:
        nonlocal inside
        inside = None
        return n

    def attend(function: Callable, q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **kwargs: Any) -> Tensor:
        nonlocal inside
        if inside is not None:
            extra_options, inside = inside, None
            look(extra_options, q, k, heads)
        if previous is None:
            return function(q, k, v, heads, *args, **kwargs)
        return previous(function, q, k, v, heads, *args, **kwargs)

    options = with_patch(transformer_options, "attn2_patch", enter)
    options = with_patch(options, "attn2_output_patch", leave, first=True)
    return {**options, ATTENTION: attend}


def check_watched(missing: Collection[Layer], transformer_options: Mapping[str, Any]) -> None:
    """Raise ValueError, naming whose code took its place, when attention that was watched was never computed.

    missing: the layers where.
    """
    if not missing:
        return
    replacements = transformer_options.get("patches_replace", {}).get("attn2", {})
    other = next((replacements[at] for layer in missing for at in (layer, layer[:2]) if at in replacements), None)
    code = other if hasattr(other, "__qualname__") else type(other)
    origin = "" if other is None else f" ({code.__qualname__} of {code.__module__})"
    raise ValueError(
        f"Another node{origin} replaces the cross-attention of {len(missing)} layers of this MODEL, which has to be "
        "read: connect the MODEL as it comes before that node."
    )


def by_head(x: Tensor, heads: int) -> Tensor:
    """(B, n, heads * d) -> (B, heads, n, d)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)
