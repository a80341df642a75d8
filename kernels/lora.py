"""Low-rank additions to frozen linear layers (LoRA, Hu et al. 2021, arXiv 2106.09685).

W x + B A x with A (r, in) and B (out, r); the weights W are never touched. In LoRA's terms alpha = r: the scale is 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# What LoRA files call A and B of a layer.
DOWN, UP = "lora_down.weight", "lora_up.weight"


def start_low_rank(linears: Mapping[str, nn.Linear], rank: int, seed: int, device: torch.device) -> dict[str, Tensor]:
    """Additions that add nothing yet, because B = 0: {"name.lora_down.weight": A, "name.lora_up.weight": B}, float32.

    rank: r, cut to what a layer can hold. seed: of A's Gaussian start. device: where A and B live.
    """
    generator = torch.Generator().manual_seed(seed)
    additions = {}
    for name, linear in linears.items():
        r = min(rank, linear.in_features, linear.out_features)
        start = torch.randn(r, linear.in_features, generator=generator) * linear.in_features**-0.5
        additions[f"{name}.{DOWN}"] = start.to(device)
        additions[f"{name}.{UP}"] = torch.zeros(linear.out_features, r, device=device)
    return additions


@contextmanager
def low_rank_added(linears: Mapping[str, nn.Linear], additions: Mapping[str, Tensor]) -> Iterator[None]:
    """While open, layers that have an addition give W x + B A x, differentiable in A and B; then all is as before.

    additions: as from `start_low_rank`; those of other names are left out.
    """
    hooks = [
        linear.register_forward_hook(_adding(additions[f"{name}.{DOWN}"], additions[f"{name}.{UP}"]))
        for name, linear in linears.items()
        if f"{name}.{UP}" in additions
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _adding(down: Tensor, up: Tensor) -> Callable[[nn.Module, tuple[Tensor], Tensor], Tensor]:
    def add(_module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        return output + F.linear(F.linear(inputs[0].to(down.dtype), down), up).to(output.dtype)

    return add
