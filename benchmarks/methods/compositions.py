"""A learned subject and something that the model knows, both in one prompt."""

from __future__ import annotations

from collections.abc import Mapping

from ...kernels.exemplars import Exemplar
from ...kernels.layouts import Layout
from ...toyworld.exemplars import subject_scenes
from ...toyworld.render import render
from ...toyworld.vocabulary import HELD_OUT_SUBJECTS, NONE, caption
from .pictures import to_image
from .subjects import INIT_WORDS
from .table import NAME, Question, Row, article

PLACES = ("on grass", "on white", "at night")
COMPANIONS = ("panda", "rabbit", "ninja", "penguin", "cat", "alien", "skeleton")
OBJECTS = ("ball", "box", "cup", "flower", "tree")


class Compositions:
    """Columns: the concept and what it is composed with are both there; the concept is there.

    The row without training says how well the model composes words that it was trained on: it asks for the word that
    the concept starts from, and is judged by that word.
    """

    name = "compositions"
    columns = ("both present", "concept right")
    tuning_column = "concept right"
    targets = HELD_OUT_SUBJECTS
    rows = (
        Row("no training (a known subject's word)", judged_by_words=True),
        Row("Textual Inversion", Layout("prompt")),
    )

    def init_word(self, target: str) -> str:
        return INIT_WORDS[target]

    def exemplars(self, row: Row, target: str, seed: int) -> list[Exemplar]:
        return [
            Exemplar(to_image(render(scene)), caption(scene).replace(article(target), "a {}"))
            for scene in subject_scenes(target, row.exemplars, seed)
        ]

    def questions(self, target: str) -> list[Question]:
        pairs = [
            Question(f"a <{NAME}> and {article(other)} stands {place}", {"second": other, "object": NONE})
            for place in PLACES
            for other in COMPANIONS
        ]
        objects = [
            Question(f"a <{NAME}> stands {place} with a {thing} on the right", {"second": NONE, "object": thing})
            for place in PLACES
            for thing in OBJECTS
        ]
        return pairs + objects

    def words(self, target: str) -> str:
        return INIT_WORDS[target]

    def score(self, question: Question, target: str, reading: Mapping[str, str]) -> dict[str, bool]:
        figures = {reading["subject"], reading["second"]}
        both = figures == {target, question.wanted["second"]} and reading["object"] == question.wanted["object"]
        return {"both present": both, "concept right": target in figures}
