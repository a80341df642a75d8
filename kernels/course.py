"""In what order a run visits the timesteps, and which of a concept's slots a step may move."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .layouts import BoundLayout

TIMESTEP_SAMPLINGS = ("uniform", "early (ReVersion)")


class Course(Protocol):
    """Asked by the training loop at each step."""

    def timesteps(self, step: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Integer timesteps of `shape`, on the CPU, for a step."""
        ...

    def begin(self, step: int, vectors: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
        """Before a step: what has to be where."""
        ...

    def route(self, step: int, gradient: Tensor) -> Tensor:
        """Where the gradient (S, n, width) of a step goes."""
        ...

    def movable(self, step: int, vectors: Tensor) -> Tensor | None:
        """Which of the numbers (S, n, width) a step may move, as booleans; None for all."""
        ...


def draw_timesteps(sampling: str, shape: tuple[int, ...], timesteps: int, generator: torch.Generator) -> Tensor:
    """Integer timesteps of `shape`, on the CPU.

    "early (ReVersion)": density proportional to 1 - a cos(pi t / T), a = 0.5 (Huang et al. 2023, Eq. 5), which
    prefers the noisy timesteps where layout, pose and relations are decided.
    """
    if sampling == "uniform":
        return torch.randint(0, timesteps, shape, generator=generator)
    density = 1 - 0.5 * torch.cos(math.pi * torch.arange(timesteps) / timesteps)
    return torch.multinomial(density, math.prod(shape), replacement=True, generator=generator).view(shape)


@dataclass(frozen=True)
class AllTimesteps:
    """Every step at drawn timesteps; a slot learns from those it is read at. T = schedule_length."""

    sampling: str
    schedule_length: int

    def timesteps(self, step: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return draw_timesteps(self.sampling, shape, self.schedule_length, generator)

    def begin(self, step: int, vectors: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
        """Nothing."""

    def route(self, step: int, gradient: Tensor) -> Tensor:
        return gradient

    def movable(self, step: int, vectors: Tensor) -> Tensor | None:
        return None


@dataclass(frozen=True)
class SharedThenStagewise:
    """HiFi Tuner's two parts (arXiv 2312.00079, section 3.2 and Algorithm 1).

    For shared_steps all stages learn as one, at drawn timesteps. Then, from the noisiest stage to the cleanest, each
    starts from what the one before it became and learns for steps_each more at its own timestep, with fresh moments
    (METHODS 4.7). That is one timestep a stage: right where sampling has as many steps as there are stages.
    """

    layout: BoundLayout
    shared_steps: int
    steps_each: int
    sampling: str
    schedule_length: int

    def _stage(self, step: int) -> int | None:
        """The stage that alone learns in a step; None while all learn as one."""
        if step < self.shared_steps:
            return None
        return self.layout.layout.stages - 1 - (step - self.shared_steps) // self.steps_each

    def timesteps(self, step: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        stage = self._stage(step)
        if stage is None:
            return draw_timesteps(self.sampling, shape, self.schedule_length, generator)
        # With 50 stages of 1000 timesteps these are those of 50 DDIM steps: 981, 961, ..., 1.
        first = -(-stage * self.schedule_length // self.layout.layout.stages)
        return torch.full(shape, min(first + 1, self.schedule_length - 1))

    def begin(self, step: int, vectors: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
        stage = self._stage(step)
        if stage is None or (step - self.shared_steps) % self.steps_each:
            return
        for v in vectors.values():
            optimizer.state.pop(v, None)  # weights that learn along are no stage's own and keep their moments
        if stage + 1 < self.layout.layout.stages:
            now, before = self.layout.slots_of([stage]), self.layout.slots_of([stage + 1])
            with torch.no_grad():
                for v in vectors.values():
                    v[now] = v[before]

    def route(self, step: int, gradient: Tensor) -> Tensor:
        if self._stage(step) is not None:
            return gradient
        by_stage = gradient.unflatten(0, (self.layout.layout.stages, -1))
        return by_stage.sum(dim=0, keepdim=True).expand_as(by_stage).flatten(0, 1)

    def movable(self, step: int, vectors: Tensor) -> Tensor | None:
        stage = self._stage(step)
        if stage is None:
            return None
        mask = torch.zeros_like(vectors, dtype=torch.bool)
        mask[self.layout.slots_of([stage])] = True
        return mask
