"""ADI's Table 1 in the toy world: five actions that the model has never seen, by subjects that are in no exemplar."""

from __future__ import annotations

from collections.abc import Mapping

from ...kernels.exemplars import Exemplar
from ...kernels.gradient_mask import GradientMask
from ...kernels.gradient_rules import MaskedTriples
from ...kernels.layouts import Layout
from ...toyworld.exemplars import exemplar_scenes, other_action_scenes
from ...toyworld.render import render
from ...toyworld.vocabulary import HELD_OUT_ACTIONS, caption
from .pictures import to_image
from .table import NAME, Question, Row, article

SUBJECTS = ("panda", "cat", "rabbit", "bear", "frog", "penguin", "alien", "skeleton")
PLACES = ("on grass", "at night")
ALTERNATIVES = 4
ADI = "ADI"
# The best that the model's own words say.
WORDS = {
    "tpose": "poses with arms out and legs together",
    "akimbo": "poses with arms bent in and legs together",
    "star": "poses with arms high and legs apart",
    "dab": "poses with left arm high and right arm bent in",
    "splits": "poses with arms out and legs wide",
}


def _masked(name: str, **mask: str) -> Row:
    return Row(name, Layout("layer"), MaskedTriples(GradientMask(**mask)), tuned_as="" if name == ADI else ADI)


class Actions:
    """A held-out action from ten pictures of four subjects; painted for eight others."""

    name = "actions"
    columns = ("action", "subject", "total")
    tuning_column = "total"
    targets = HELD_OUT_ACTIONS
    rows = (
        Row("no training (words)"),
        Row("Textual Inversion", Layout("prompt")),
        Row("P+ (per layer, no mask)", Layout("layer")),
        _masked(ADI),
        _masked("ADI, random mask", strategy="random"),
        _masked("ADI, context-different mask only", merge="context only"),
        _masked("ADI, action-different mask only", merge="action only"),
        _masked("ADI, union", merge="union"),
        _masked("ADI, reversed", strategy="reversed"),
        Row("oracle token (500 pictures)", Layout("prompt"), steps=600, exemplars=500, tuned_as="Textual Inversion"),
    )

    def init_word(self, _target: str) -> str:
        return "poses"

    def exemplars(self, row: Row, target: str, seed: int) -> list[Exemplar]:
        """With triples, each picture beside the same figure at the same place doing something else."""
        alternatives = ALTERNATIVES if isinstance(row.rule, MaskedTriples) else 0
        exemplars = []
        for number, scene in enumerate(exemplar_scenes(target, row.exemplars, seed)):
            others = tuple(to_image(render(other)) for other in other_action_scenes(scene, alternatives, number))
            exemplars.append(Exemplar(to_image(render(scene)), caption(scene, action_text="{}"), None, others))
        return exemplars

    def questions(self, target: str) -> list[Question]:
        return [
            Question(f"{article(subject)} <{NAME}> {place}", {"action": target, "subject": subject})
            for place in PLACES
            for subject in SUBJECTS
        ]

    def words(self, target: str) -> str:
        return WORDS[target]

    def score(self, question: Question, _target: str, reading: Mapping[str, str]) -> dict[str, bool]:
        action, subject = (reading[head] == question.wanted[head] for head in ("action", "subject"))
        return {"action": action, "subject": subject, "total": action and subject}
