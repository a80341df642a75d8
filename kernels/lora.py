"""Low-rank additions to frozen linear layers (LoRA, Hu et al. 2021, arXiv 2106.09685)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LowRank:
    """W x + B A x for every given layer W, with A (r, in) and B (out, r) of its own; the weights W are never touched.

    B starts at zero, so that a new LowRank changes nothing. In LoRA's terms alpha = r: the scale is 1.
    """

    def __init__(self, linears: Mapping[str, nn.Linear], rank: int, seed: int, device: torch.device) -> None:
        """linears: layers by name, as Backbone.linears() gives them. rank: r, cut to what a layer can hold.

        seed: of A's Gaussian start. device: where A and B live, in float32.
        Raises ValueError for a rank below 1, and when there is no layer.
        """
        if rank < 1:
            raise ValueError(f"The rank of a low-rank addition is at least 1, not {rank}.")
        if not linears:
            raise ValueError("The model names no linear layers to adapt: use a U-Net model (SD1.x, SD2.x, SDXL).")
        self.linears = dict(linears)
        generator = torch.Generator().manual_seed(seed)
        self.down: dict[str, Tensor] = {}
        self.up: dict[str, Tensor] = {}
        for name, linear in self.linears.items():
            r = min(rank, linear.in_features, linear.out_features)
            start = torch.randn(r, linear.in_features, generator=generator) * linear.in_features**-0.5
            self.down[name] = start.to(device).requires_grad_()
            self.up[name] = torch.zeros(linear.out_features, r, device=device).requires_grad_()

    def parameters(self) -> list[Tensor]:
        """All A and B, in the order of the layers."""
        return [tensor for name in self.linears for tensor in (self.down[name], self.up[name])]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """While open, the layers give W x + B A x, differentiable in A and B; afterwards they are as before."""
        handles = [linear.register_forward_hook(self._adding(name)) for name, linear in self.linears.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _adding(self, name: str):
        def add(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
            x = inputs[0].to(self.down[name].dtype)
            return output + F.linear(F.linear(x, self.down[name]), self.up[name]).to(output.dtype)

        return add
