"""What a table is made of: ways to get a concept into a prompt, things to teach, questions to ask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ...kernels.exemplars import Exemplar
from ...kernels.gradient_rules import GradientRule, PlainGradient
from ...kernels.layout_guidance import LayoutGuidance
from ...kernels.layouts import Layout
from ...kernels.losses import LossTerm
from ...kernels.weight_plan import WeightPlan

# The concept's placeholder in prompts.
NAME = "it"


@dataclass(frozen=True)
class Row:
    """One way to get the concept into the prompt.

    layout, rule, steps, use_masks, loss_terms, weights, steps_each_stage: as in training; layout None: nothing is
    learned, words stand in the prompt. exemplars: how many pictures it learns from. tuned_as: the row whose learning
    rate it takes; its own when empty. judged_by_words: the target is what those words say. guidance: of the layout,
    while painting; guided: how many of a question's things get a box. painter: "sampled"; for tail rows also
    "first pass" and "reference", every other question alone.
    """

    name: str
    layout: Layout | None = None
    rule: GradientRule = field(default_factory=PlainGradient)
    steps: int = 200
    exemplars: int = 10
    use_masks: bool = False
    tuned_as: str = ""
    judged_by_words: bool = False
    loss_terms: tuple[LossTerm, ...] = ()
    weights: WeightPlan | None = None
    steps_each_stage: int = 0
    guidance: LayoutGuidance | None = None
    guided: int = 2
    painter: str = "sampled"


@dataclass(frozen=True)
class Question:
    """A prompt with <it> in it, and the heads of the judge's reading that it asks for.

    things: the words of it that have a place of their own in a layout, from left to right.
    """

    prompt: str
    wanted: Mapping[str, str]
    things: tuple[str, ...] = ()


class Table(Protocol):
    """One comparison. targets: what is taught. columns: what `score` tells.

    tuning_column: for each target, the learning rate that is best in it on the other targets is taken.
    """

    name: str
    rows: Sequence[Row]
    columns: Sequence[str]
    tuning_column: str
    targets: Sequence[str]

    def init_word(self, target: str) -> str:
        """The word that learned vectors start from."""
        ...

    def exemplars(self, row: Row, target: str, seed: int) -> list[Exemplar]:
        """As many pictures to learn the target from as the row wants."""
        ...

    def questions(self, target: str) -> list[Question]:
        """What to paint, with <it>."""
        ...

    def words(self, target: str) -> str:
        """What a row that learns nothing writes in the place of <it>."""
        ...

    def score(self, question: Question, target: str, reading: Mapping[str, str]) -> dict[str, bool]:
        """By column, whether the judge's reading of a picture is what was wanted."""
        ...


def article(noun: str) -> str:
    """The noun with its article."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"
