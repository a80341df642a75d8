"""A subject that the model has never seen, from pictures that all share a distracting background."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace

from ...kernels.attention_loss import SubjectAttentionLoss
from ...kernels.exemplars import Exemplar
from ...kernels.layouts import Layout
from ...kernels.losses import NullTextPrior
from ...toyworld.render import render_with_mask
from ...toyworld.vocabulary import HELD_OUT_SUBJECTS, NONE, draw_scene
from .pictures import to_image
from .table import NAME, Question, Row

INIT_WORDS = {"wizard": "man", "pig": "bear"}
DISTRACTION = {"background": "on the beach", "object": "tree", "side": "left"}
EXEMPLAR_ACTIONS = ("stands", "raises both arms", "squats", "salutes", "sits", "flexes")
ACTIONS = ("raises one arm", "raises both arms", "kicks", "sits", "flexes", "salutes")
PLACES = ("on grass", "at night", "in a room", "on white", "on gray", "in the snow")

TAIL_ROWS = Layout("prompt", tokens=5, place="tail residual")
PAIRS = Layout("prompt", stages=5, split_kv=True)
PRIOR = (NullTextPrior(1e-4),)


class Subjects:
    """Columns: the judge reads the subject; the action and place that the prompt names; what the exemplars had
    around the subject and the prompt did not name (their place or their object)."""

    name = "subjects"
    columns = ("subject", "prompt", "leak of background")
    tuning_column = "subject"
    targets = HELD_OUT_SUBJECTS
    rows = (
        Row("no training (the word it starts from)"),
        Row("Textual Inversion", Layout("prompt")),
        Row("Textual Inversion, masked loss", Layout("prompt"), use_masks=True),
        Row("HiFi Tuner: tail rows", TAIL_ROWS),
        Row("HiFi Tuner: + mask", TAIL_ROWS, use_masks=True),
        Row("HiFi Tuner: + prior", TAIL_ROWS, use_masks=True, loss_terms=PRIOR, tuned_as="HiFi Tuner: + mask"),
        Row(
            "HiFi Tuner: + step-wise",
            replace(TAIL_ROWS, stages=25),
            use_masks=True,
            loss_terms=PRIOR,
            steps_each_stage=4,
            tuned_as="HiFi Tuner: + mask",
        ),
        *(
            Row(
                f"HiFi Tuner: step-wise, {name}, without fresh noise",
                replace(TAIL_ROWS, stages=25),
                use_masks=True,
                loss_terms=PRIOR,
                steps_each_stage=4,
                tuned_as="HiFi Tuner: + mask",
                painter=painter,
            )
            for name, painter in (("first pass", "first pass"), ("+ reference", "reference"))
        ),
        Row("Textual Inversion, one picture", Layout("prompt"), exemplars=1),
        Row("SeFi-IDE, one picture, lambda 0", PAIRS, exemplars=1),
        *(
            Row(
                f"SeFi-IDE, one picture, lambda {weight:g}",
                PAIRS,
                exemplars=1,
                loss_terms=(SubjectAttentionLoss(weight),),
                tuned_as="SeFi-IDE, one picture, lambda 0",
            )
            for weight in (0.003, 0.05)
        ),
    )

    def init_word(self, target: str) -> str:
        return INIT_WORDS[target]

    def exemplars(self, row: Row, target: str, seed: int) -> list[Exemplar]:
        """Captions name what the subject does, and nothing around it."""
        rng = random.Random(seed)
        exemplars = []
        for number in range(row.exemplars):
            action = EXEMPLAR_ACTIONS[number % len(EXEMPLAR_ACTIONS)]
            scene = draw_scene(rng, target, action, accessory=NONE, **DISTRACTION)
            picture, mask = render_with_mask(scene)
            exemplars.append(Exemplar(to_image(picture), f"a {{}} {action}", to_image(mask)))
        return exemplars

    def questions(self, target: str) -> list[Question]:
        return [
            Question(f"a <{NAME}> {action} {place}", {"subject": target, "action": action, "background": place})
            for place in PLACES
            for action in ACTIONS
        ]

    def words(self, target: str) -> str:
        return INIT_WORDS[target]

    def score(self, question: Question, target: str, reading: Mapping[str, str]) -> dict[str, bool]:
        return {
            "subject": reading["subject"] == target,
            "prompt": all(reading[head] == question.wanted[head] for head in ("action", "background")),
            "leak of background": any(reading[head] == DISTRACTION[head] for head in ("background", "object")),
        }
