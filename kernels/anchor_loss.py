"""The anchor loss of Compositional Inversion: a spring from a learned word to the known words it is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .anchors import (
    COCO_NAMES,
    Dictionary,
    anchor_weights,
    nearest_dictionary,
    squared_distance,
    word_dictionary,
)
from .losses import Learning, VectorTerm

CLIP_POSITIONS = 77  # over which the released code takes its mean


@dataclass(frozen=True)
class AnchorLoss:
    """(1 - lam) L_rec + lam L_anc (Eq. 10), where L_anc pulls each vector to the centroid of its anchors.

    source: where anchors come from, beside the class word - "coco", the names of COCO's classes; "words"; "nearest",
    the `neighbours` nearest words of the vocabulary; "class word", it alone, as in the released code.
    class_word: "" for the init word of the run. atoms: most anchors of a vector, c - 1 of Eq. 6; the paper does not
    give c. refresh: steps between two sparse codings.
    scale: what squared distances are divided by. "class word" - d ||e_class||^2 of the tower: the mean over d with the
    class word's length for unit, so that lam means the same for any anchors, tower and model. "paper" - the number of
    anchors n, as printed. "code" - 77 d, as released, 1/739 of the printed one at SD1's d and 80 anchors.
    Several vectors or towers count by their mean.
    """

    lam: float = 0.95
    source: str = "coco"
    words: tuple[str, ...] = ()
    neighbours: int = 80
    class_word: str = ""
    atoms: int = 3
    refresh: int = 10
    scale: str = "class word"

    def __post_init__(self) -> None:
        if self.source == "words" and not self.words:
            raise ValueError('Anchors are to come from "words", which is empty: write some, such as cat, dog, chair.')

    @property
    def denoising_weight(self) -> float:
        """1 - lam."""
        return 1 - self.lam

    def bind(self, learning: Learning) -> BoundAnchorLoss:
        """Look the anchors up.

        Raises ValueError when the class word or all the words are of several pieces, and for a layout of tail rows.
        """
        layout = learning.layout.layout
        if layout.place != "word":
            raise ValueError(
                "Anchors are words, and the vectors of tail rows are not: choose another place in Token Layout, or a "
                "null-text prior instead of Anchor Loss."
            )
        class_word = self.class_word or learning.init_word
        if self.source == "nearest":
            dictionaries = nearest_dictionary(learning.backbone, class_word, self.neighbours)
        else:
            words = {"coco": COCO_NAMES, "words": self.words, "class word": ()}[self.source]
            dictionaries = word_dictionary(learning.backbone, class_word, words)
        return BoundAnchorLoss(self, dictionaries, layout.stages > 1)


class BoundAnchorLoss(VectorTerm):
    label = "anchor : denoising"

    def __init__(self, loss: AnchorLoss, dictionaries: Mapping[str, Dictionary], staged: bool) -> None:
        """dictionaries: {tower: Dictionary}. staged: whether steps differ in the slots they read."""
        self.loss, self.weight = loss, loss.lam
        self.dictionaries, self.staged = dictionaries, staged
        self.divisors = {tower: divisor(loss.scale, d.vectors) for tower, d in dictionaries.items()}

    def value(self, vectors: Mapping[str, Tensor], step: int, memory: dict[str, Tensor]) -> Tensor:
        values = []
        for tower, dictionary in self.dictionaries.items():
            e, key = vectors[tower], memory_key(tower)
            # A code belongs to a vector, and in a layout of stages the next step reads others.
            if self.staged or step % self.loss.refresh == 0 or key not in memory:
                memory[key] = anchor_weights(e, dictionary.vectors, self.loss.atoms)
            distance = squared_distance(e, memory[key].to(e), dictionary.vectors)
            values.append(distance.mean() / self.divisors[tower])
        return torch.stack(values).mean()

    def describe(self, vectors: Mapping[str, Tensor], memory: Mapping[str, Tensor]) -> str:
        """The anchors and their weights, the mean over all vectors: "cat 0.61, dog 0.27, bear 0.12"."""
        lines = []
        for tower, dictionary in self.dictionaries.items():
            weights = None if self.staged else memory.get(memory_key(tower))
            if weights is None:
                weights = anchor_weights(vectors[tower], dictionary.vectors, self.loss.atoms)
            mean = weights.flatten(0, -2).mean(dim=0).tolist()
            shown = sorted(((w, word) for w, word in zip(mean, dictionary.words) if w >= 0.005), reverse=True)
            line = ", ".join(f"{word} {w:.2f}" for w, word in shown)
            lines.append(line if len(self.dictionaries) == 1 else f"{tower}: {line}")
        if left_out := [word for word in self.loss.words if word not in dictionary.words]:
            lines.append(f"left out, not one piece: {', '.join(left_out)}")
        return "; ".join(lines)


def divisor(scale: str, dictionary: Tensor) -> float:
    """What squared distances are divided by; see AnchorLoss. dictionary: (n, d), the class word first."""
    n, d = dictionary.shape
    return {"class word": d * dictionary[0].square().sum().item(), "paper": n, "code": CLIP_POSITIONS * d}[scale]


def memory_key(tower: str) -> str:
    """The name under which a run keeps the code of a tower's vectors."""
    return f"anchor_weights_{tower}"
