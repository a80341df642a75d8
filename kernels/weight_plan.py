"""Weights of the U-Net that learn along with a concept: Custom Diffusion, DreamBooth, LoRA.

What is learned is the change of each weight, so that it can be put on any copy of the model and taken off again; the
model's own weights are never written. Names are those of ComfyUI's LoRA loader from the first step on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .backbone import Backbone
from .concept import WEIGHTS_PREFIX
from .full_weights import start_full, weights_changed
from .lora import low_rank_added, start_low_rank

KEY_AND_VALUE, ATTENTION, WHOLE_UNET = "cross-attention K and V", "attention", "whole U-Net"
# How the names of a part's layers end.
PARTS = {
    KEY_AND_VALUE: ("attn2.to_k", "attn2.to_v"),
    ATTENTION: tuple(f"{a}.{p}" for a in ("attn1", "attn2") for p in ("to_q", "to_k", "to_v", "to_out.0")),
    WHOLE_UNET: ("",),
}


@dataclass(frozen=True)
class WeightPlan:
    """Which weights learn along.

    part: "cross-attention K and V" (Custom Diffusion, Kumari et al. 2023), "attention", or "whole U-Net" (DreamBooth,
    Ruiz et al. 2023). rank: 0 for whole weights and biases, else that of low-rank changes (LoRA) of the part's linear
    layers. learning_rate: of AdamW.
    Raises ValueError for another part, a rank or a learning rate below 0.
    """

    part: str
    rank: int = 0
    learning_rate: float = 1e-5

    def __post_init__(self) -> None:
        if self.part not in PARTS:
            raise ValueError(f"The part of the model whose weights learn is one of {tuple(PARTS)}, not {self.part!r}.")
        if self.rank < 0 or self.learning_rate < 0:
            raise ValueError(
                f"Rank and learning rate of weights are at least 0, not {self.rank} and {self.learning_rate}."
            )

    def bind(self, backbone: Backbone) -> AdaptedWeights:
        """The weights of this model. Raises ValueError when it has no such layers."""
        layers = {
            name: layer
            for name, layer in sorted(unet_layers(backbone).items())  # one order whoever names them: A's random start
            if name.endswith(PARTS[self.part]) and (isinstance(layer, nn.Linear) or not self.rank)
        }
        if not layers:
            raise ValueError(f"The model has no layers of the {self.part}: use a U-Net model (SD1.x, SD2.x, SDXL).")
        return AdaptedWeights(layers, self.rank, self.learning_rate, backbone.device)


@dataclass(frozen=True)
class AdaptedWeights:
    """Where learned changes of weights go in one model. layers: by name; rank, learning_rate: see WeightPlan."""

    layers: Mapping[str, nn.Module]
    rank: int
    learning_rate: float
    device: torch.device

    def start(self, seed: int) -> dict[str, Tensor]:
        """Changes that change nothing yet, float32, by name. seed: of what is random in low-rank ones."""
        if self.rank:
            return start_low_rank(self.layers, self.rank, seed, self.device)
        return start_full(self.layers, self.device)

    @contextmanager
    def applied(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """While open, the model computes with its own weights and these changes, differentiable in them."""
        with low_rank_added(self.layers, weights), weights_changed(self.layers, weights):
            yield

    def patches(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The changes as a concept keeps them: in half precision where the model's own weights are."""
        is_half = all(layer.weight.dtype.itemsize == 2 for layer in self.layers.values())
        dtype = torch.float16 if is_half else torch.float32
        return {name: weight.detach().to("cpu", dtype, copy=True) for name, weight in weights.items()}


NO_WEIGHTS = AdaptedWeights({}, 0, 0.0, torch.device("cpu"))


def unet_layers(backbone: Backbone) -> dict[str, nn.Module]:
    """The modules of the U-Net that have weights, by the names under which ComfyUI's LoRA loader knows them."""
    return {f"{WEIGHTS_PREFIX}{name}": module for name, module in backbone.modules().items()}


@contextmanager
def concept_weights_applied(backbone: Backbone, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """While open, the model computes with the weights that a concept brings along (Concept.weights).

    For scripts; several concepts' may be open at once and add up. In ComfyUI, Apply Concepts does it.
    Raises ValueError when they are of another model.
    """
    layers = unet_layers(backbone)
    unknown = [name for name in weights if not name.startswith(tuple(f"{layer}." for layer in layers))]
    if unknown:
        raise ValueError(f"The learned weights are of another model: this one has no layer for {unknown[0]}.")
    on_device = {name: weight.to(backbone.device, torch.float32) for name, weight in weights.items()}
    with low_rank_added(layers, on_device), weights_changed(layers, on_device):
        yield
