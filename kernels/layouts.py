"""Where a concept's vectors go: which vector each reader of the prompt gets.

A reader is (layer, K or V, timestep). Published layouts are points of one small space:
one token (Textual Inversion), one per layer (P+, ADI), one per stage of denoising (ProSpect), per stage with K and V
apart (SeFi-IDE).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from .backbone import Layer

GRANULARITIES = ("prompt", "block", "layer")


@dataclass(frozen=True)
class Layout:
    """How finely a concept is divided, before it is bound to a model.

    granularity: "prompt" - all layers share a vector; "block" - one for each block of the U-Net that holds
    cross-attention (16 in SD1/2, 11 in SDXL); "layer" - one for each cross-attention layer (16 and 70).
    tokens: vectors written one after another at the placeholder. stages: equal parts of the timestep range, stage
    floor(stages * t / T). split_kv: separate vectors for keys and for values.
    Raises ValueError for values outside these.
    """

    granularity: str = "prompt"
    tokens: int = 1
    stages: int = 1
    split_kv: bool = False

    def __post_init__(self) -> None:
        if self.granularity not in GRANULARITIES:
            raise ValueError(f"A layout's granularity is one of {GRANULARITIES}, not {self.granularity!r}.")
        if self.tokens < 1 or self.stages < 1:
            raise ValueError("A layout needs at least one token and one stage.")

    def bind(self, layers: Sequence[Layer]) -> BoundLayout:
        """The slot table of this layout on a model with these cross-attention layers."""
        names = {"prompt": [()] * len(layers), "block": [layer[:2] for layer in layers], "layer": list(layers)}
        groups = {name: number for number, name in enumerate(dict.fromkeys(names[self.granularity]))}
        return BoundLayout(self, tuple(groups[name] for name in names[self.granularity]))

    def to_dict(self) -> dict[str, str | int | bool]:
        """The layout as plain values, for metadata; Layout(**values) reads it back."""
        return asdict(self)


@dataclass(frozen=True)
class BoundLayout:
    """A layout on a given model. group: for each layer in execution order the number of its group of layers."""

    layout: Layout
    group: tuple[int, ...]

    @property
    def slots(self) -> int:
        """Number of distinct slots; a concept has `layout.tokens` vectors in each."""
        return self.layout.stages * self._sides * (max(self.group) + 1)

    @property
    def _sides(self) -> int:
        return 2 if self.layout.split_kv else 1

    def table(self, stage: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Slots of all layers in a stage: one L-tuple for K, one for V."""
        groups = max(self.group) + 1
        first = stage * self._sides * groups
        key = tuple(first + g for g in self.group)
        value = tuple(k + groups for k in key) if self.layout.split_kv else key
        return key, value

    def stage(self, t: int, timesteps: int) -> int:
        """The stage of timestep t out of `timesteps`: floor(stages * t / timesteps) (ProSpect, SeFi-IDE)."""
        return self.layout.stages * t // timesteps
