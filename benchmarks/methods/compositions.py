"""A learned subject and something that the model knows, both in one prompt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ...kernels.anchor_loss import AnchorLoss
from ...kernels.attention_loss import SubjectAttentionLoss
from ...kernels.exemplars import Exemplar
from ...kernels.layout_guidance import LayoutGuidance
from ...kernels.layouts import Layout
from ...kernels.weight_plan import KEY_AND_VALUE, WHOLE_UNET, WeightPlan
from ...toyworld.exemplars import subject_scenes
from ...toyworld.render import render
from ...toyworld.vocabulary import HELD_OUT_SUBJECTS, NONE, caption
from .pictures import to_image
from .subjects import INIT_WORDS
from .table import NAME, Question, Row, article

PLACES = ("on grass", "on white", "at night")
COMPANIONS = ("panda", "rabbit", "ninja", "penguin", "cat", "alien", "skeleton")
OBJECTS = ("ball", "box", "cup", "flower", "tree")

TI = "Textual Inversion"
PAPER_LAMBDA, DREAMBOOTH_LAMBDA = 0.95, 0.6  # of TI and Custom Diffusion, and of DreamBooth (appendix)


def anchors(lam: float) -> tuple[AnchorLoss, ...]:
    """The anchor loss over what the toy world knows, in the place of COCO's names."""
    return (AnchorLoss(lam, source="words", words=(*COMPANIONS, *OBJECTS)),)


def with_weights(method: str, weights: WeightPlan, lam: float) -> tuple[Row, ...]:
    """The ladder of the paper's Table 1 for a method that trains weights along with the word."""
    row = Row(method, Layout("prompt"), weights=weights)
    as_row = replace(row, tuned_as=method)
    return (
        row,
        replace(as_row, name=f"{method}, + anchors", loss_terms=anchors(lam)),
        replace(as_row, name=f"{method}, + layout", guidance=LayoutGuidance()),
        replace(as_row, name=f"{method}, + both", loss_terms=anchors(lam), guidance=LayoutGuidance()),
    )


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
        Row(TI, Layout("prompt")),
        Row("no training, + layout", judged_by_words=True, guidance=LayoutGuidance()),
        *(
            Row(f"Textual Inversion, + anchors, lambda {lam:g}", Layout("prompt"), loss_terms=anchors(lam), tuned_as=TI)
            for lam in (0.25, 0.5, 0.75, 0.95)
        ),
        Row("Textual Inversion, + layout", Layout("prompt"), guidance=LayoutGuidance(), tuned_as=TI),
        Row(
            "Textual Inversion, + layout of the concept alone",
            Layout("prompt"),
            guidance=LayoutGuidance(),
            guided=1,
            tuned_as=TI,
        ),
        Row(
            "Textual Inversion, + both",
            Layout("prompt"),
            loss_terms=anchors(PAPER_LAMBDA),
            guidance=LayoutGuidance(),
            tuned_as=TI,
        ),
        Row("SeFi-IDE", Layout("prompt", stages=5, split_kv=True), loss_terms=(SubjectAttentionLoss(),)),
        *with_weights("Custom Diffusion", WeightPlan(KEY_AND_VALUE, learning_rate=3e-3), PAPER_LAMBDA),
        *with_weights("DreamBooth", WeightPlan(WHOLE_UNET, learning_rate=3e-4), DREAMBOOTH_LAMBDA),
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
            Question(
                f"a <{NAME}> and {article(other)} stands {place}",
                {"second": other, "object": NONE},
                (f"<{NAME}>", other),
            )
            for place in PLACES
            for other in COMPANIONS
        ]
        objects = [
            Question(
                f"a <{NAME}> stands {place} with a {thing} on the right",
                {"second": NONE, "object": thing},
                (f"<{NAME}>", thing),
            )
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
