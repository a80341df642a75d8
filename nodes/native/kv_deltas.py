"""Changes of the cross-attention's K and V weights that each prediction of a batch brings along.

LoRAs and deltas that touch nothing but attn2's to_k and to_v, as Custom Diffusion's, need no weights exchanged: K of a
prediction is W c + dW c, and dW c is added to its rows of the batch alone. Clones that differ in nothing else share a
forward.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import comfy.lora
import comfy.utils
import torch
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

KEY_AND_VALUE = (".attn2.to_k.weight", ".attn2.to_v.weight")
PLAIN = (torch.float32, torch.float16, torch.bfloat16)


def only_key_and_value(models: Iterable[ModelPatcher]) -> bool:
    """Whether the MODELs patch no weights but unquantised ones of the cross-attention's K and V."""
    return all(
        name.endswith(KEY_AND_VALUE) and comfy.utils.get_attr(model.model, name).dtype in PLAIN
        for model in models
        for name in model.patches
    )


def weight_deltas(model: ModelPatcher, device: torch.device) -> dict[str, Tensor]:
    """What MODEL's patches add to each weight they touch, whichever clone of it is loaded now; on `device`."""
    deltas = {}
    for name, ((weight, _), *patches) in model.get_key_patches().items():
        if patches:
            base = weight.to(device, torch.float32)
            patched = comfy.lora.calculate_weight(patches, base.clone(), name)
            deltas[name] = (patched - base).to(model.model.get_dtype_inference())
    return deltas


@contextmanager
def carried(model: BaseModel, chunks: Sequence[Mapping[str, Tensor]]) -> Iterator[None]:
    """While open, each chunk of the batch computes with its own deltas {weight name: dW}, of which some are empty."""
    hooks = []
    try:
        for name in {name for deltas in chunks for name in deltas}:
            module = comfy.utils.get_attr(model, name.removesuffix(".weight"))
            add = partial(_add, [deltas.get(name) for deltas in chunks])
            hooks.append(module.register_forward_hook(add))
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _add(deltas: Sequence[Tensor | None], _module: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> Tensor:
    rows = zip(deltas, given[0].chunk(len(deltas)), out.chunk(len(deltas)), strict=True)
    return torch.cat([o if dW is None else o + nn.functional.linear(c, dW.to(c)).to(o) for dW, c, o in rows])
