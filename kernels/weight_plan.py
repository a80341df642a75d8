"""Weights of the U-Net that learn along with a concept: Custom Diffusion, DreamBooth, LoRA."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from .backbone import Backbone


@dataclass(frozen=True)
class WeightPlan:
    """Which weights learn along. rank: of low-rank changes (LoRA); 0 for full matrices."""

    part: str
    rank: int = 0

    def bind(self, backbone: Backbone) -> AdaptedWeights:
        """The weights of this model."""
        raise NotImplementedError


class AdaptedWeights:
    """Where learned changes of weights go in one model."""

    def start(self, seed: int) -> dict[str, Tensor]:
        """Changes that change nothing yet, float32, by name."""
        return {}

    @contextmanager
    def applied(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """While open, the model computes with its own weights and these changes, differentiable in them."""
        yield

    def patches(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The changes under the names of core's LoRA loader."""
        return {}


NO_WEIGHTS = AdaptedWeights()
