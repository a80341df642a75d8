"""Where a concept's vectors go: which vector each reader of the prompt gets.

A reader is (layer, K or V, timestep). Published layouts are points of one small space:
one token (Textual Inversion), one per layer (P+, ADI), one per stage of denoising (ProSpect), per stage with K and V
apart (SeFi-IDE), the last rows of the text encoder's output per sampling step (HiFi Tuner).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from .backbone import Layer

GRANULARITIES = ("prompt", "block", "layer")
PLACES = ("word", "tail residual", "tail replace")


@dataclass(frozen=True)
class Layout:
    """How finely a concept is divided, before it is bound to a model.

    granularity: "prompt" - all layers share a vector; "block" - one for each block of the U-Net that holds
    cross-attention (16 in SD1/2, 11 in SDXL); "layer" - one for each cross-attention layer (16 and 70).
    tokens: vectors written one after another at the placeholder. stages: equal parts of the timestep range, stage
    floor(stages * t / T). split_kv: separate vectors for keys and for values.
    place: "word" - vectors are word embeddings at the placeholder. "tail residual", "tail replace" - the placeholder
    reads as the words the concept starts from, and the last `tokens` rows of the text encoder's output change: the
    vectors, kept as c_s - phi_s, are added to the prompt's own rows or to those of the empty prompt phi_s (HiFi Tuner
    3.2; the paper replaces. METHODS 4.7: only with the residual is an unlearned concept exactly the plain prompt).
    generated: while learning, the vectors are made by a small network that learns in their place (ProSpect, SeFi-IDE;
    see token_generator).
    Raises ValueError for values outside these.
    """

    granularity: str = "prompt"
    tokens: int = 1
    stages: int = 1
    split_kv: bool = False
    place: str = "word"
    generated: bool = False

    def __post_init__(self) -> None:
        if self.granularity not in GRANULARITIES:
            raise ValueError(f"A layout's granularity is one of {GRANULARITIES}, not {self.granularity!r}.")
        if self.tokens < 1 or self.stages < 1:
            raise ValueError("A layout needs at least one token and one stage.")
        if self.place not in PLACES:
            raise ValueError(f"The place of a layout is one of {PLACES}, not {self.place!r}.")
        if self.generated and self.place != "word":
            raise ValueError("Only words are generated: choose free vectors for tail rows, or another place.")

    def bind(self, layers: Sequence[Layer], words: str = "") -> BoundLayout:
        """The slot table of this layout on a model with these cross-attention layers.

        words: what the placeholder of tail rows reads as. Raises ValueError when they lack it.
        """
        if self.place != "word" and not words.strip():
            raise ValueError("Tail rows need words for their placeholder to read as: give an init word such as dog.")
        names = {"prompt": [()] * len(layers), "block": [layer[:2] for layer in layers], "layer": list(layers)}
        groups = {name: number for number, name in enumerate(dict.fromkeys(names[self.granularity]))}
        return BoundLayout(self, tuple(groups[name] for name in names[self.granularity]), words)

    def to_dict(self) -> dict[str, str | int | bool]:
        """The layout as plain values, for metadata; Layout(**values) reads it back."""
        return asdict(self)


@dataclass(frozen=True)
class BoundLayout:
    """A layout on a given model.

    group: for each layer in execution order the number of its group of layers. words: see `Layout.bind`.
    """

    layout: Layout
    group: tuple[int, ...]
    words: str = ""

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

    def slots_of(self, stages: Iterable[int]) -> list[int]:
        """The slots that any layer reads in any of `stages`, in order."""
        return sorted({slot for stage in stages for side in self.table(stage) for slot in side})

    def stage(self, t: int, timesteps: int) -> int:
        """The stage of timestep t out of `timesteps`: floor(stages * t / timesteps) (ProSpect, SeFi-IDE)."""
        return self.layout.stages * t // timesteps
