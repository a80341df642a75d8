"""One cell of a table: one row teaches one target with one seed; what comes out is kept by the hash of its causes."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...kernels.concept import Concept
from ...kernels.concept_run import ConceptRun
from ...kernels.diffusers_backbone import DiffusersBackbone
from ...kernels.layout_guidance import Placement, guide_layout, phrase_positions
from ...kernels.layout_predictor import LayoutPredictor, load_predictor, word_embedding
from ...kernels.prompts import Prompt, parse_prompt
from ...kernels.sampling import paint
from ...kernels.training import TrainingSettings
from ...kernels.weight_plan import concept_weights_applied
from ...toyworld.judge import Judge, load_judge
from ...toyworld.model import load_toy
from ...toyworld.render import SIZE
from ...toyworld.weights import LAYOUT_PREDICTOR, WEIGHTS
from .actions import Actions
from .compositions import Compositions
from .referenced import ReferencedPainter
from .subjects import Subjects
from .table import NAME, Row, Table

TABLES: dict[str, Table] = {table.name: table for table in (Actions(), Subjects(), Compositions())}
# Raise it when the code changes what a cell holds: old cells are then made anew.
VERSION = 1
BATCH = 12


@dataclass(frozen=True)
class Effort:
    """How thoroughly a table is measured. questions: how many of each target's, spread evenly; None for all."""

    seeds: int = 3
    targets: int | None = None
    questions: int | None = None
    steps: int | None = None
    sampler_steps: int = 25
    learning_rates: tuple[float, ...] = (0.005, 0.01, 0.02, 0.04)
    cfg: float = 3.0
    eta: float = 1.0


QUICK = Effort(seeds=1, targets=1, questions=4, steps=4, sampler_steps=6, learning_rates=(0.02,))


@dataclass(frozen=True)
class Cell:
    """What decides a cell's pictures. row: the number of the table's row."""

    table: str
    row: int
    target: str
    seed: int
    learning_rate: float
    effort: Effort

    @property
    def way(self) -> Row:
        """The row itself."""
        return TABLES[self.table].rows[self.row]

    @property
    def steps(self) -> int:
        """Training steps."""
        return self.effort.steps or self.way.steps

    def questions(self) -> list:
        """What is painted."""
        every = TABLES[self.table].questions(self.target)[:: 1 if self.way.painter == "sampled" else 2]
        count = self.effort.questions or len(every)
        return [every[index * len(every) // count] for index in range(count)]

    def file(self, folder: Path) -> Path:
        """Where its result is, or is to be, kept."""
        causes = {
            "version": VERSION,
            "table": self.table,
            "row": str(self.way),
            "target": self.target,
            "words": None if self.way.layout else TABLES[self.table].words(self.target),
            "init_word": TABLES[self.table].init_word(self.target),
            "seed": self.seed,
            "learning_rate": self.learning_rate if self.way.layout else 0.0,
            "steps": self.steps,
            "sampler": (self.effort.sampler_steps, self.effort.cfg, self.effort.eta),
            "questions": [question.prompt for question in self.questions()],
            "weights": weights_digest(),
        }
        digest = hashlib.sha256(json.dumps(causes, sort_keys=True).encode()).hexdigest()[:16]
        return folder / f"{self.table}_{self.row}_{self.target}_{self.seed}_{digest}.npz"


@dataclass(frozen=True)
class Result:
    """A cell's pictures, uint8 (N, 64, 64, 3), and the judge's reading of each: {head: N names}."""

    pictures: np.ndarray
    reading: dict[str, list[str]]

    def save(self, file: Path) -> None:
        """Write it; a reader never sees half of the file."""
        buffer = io.BytesIO()
        np.savez_compressed(buffer, pictures=self.pictures, reading=json.dumps(self.reading))
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_bytes(buffer.getvalue())
        os.replace(temporary, file)

    @classmethod
    def load(cls, file: Path) -> Result:
        """Read it."""
        with np.load(file, allow_pickle=False) as arrays:
            return cls(arrays["pictures"], json.loads(str(arrays["reading"])))


class Silent:
    """A report that says nothing."""

    stop_requested = False

    def step(self, step: int, loss_history: Sequence[float], stats: dict[str, float]) -> None:
        """Nothing."""

    def samples(self, image_grid: Tensor) -> None:
        """Nothing."""

    def say(self, lines: Sequence[str]) -> None:
        """Nothing."""


@cache
def weights_digest() -> str:
    """A hash of the bundled weights."""
    digest = hashlib.sha256()
    for file in sorted(WEIGHTS.glob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


@cache
def layout_predictor() -> LayoutPredictor:
    """The bundled one, loaded once a process."""
    return load_predictor(WEIGHTS / LAYOUT_PREDICTOR)


@cache
def studio() -> tuple[DiffusersBackbone, Judge]:
    """The toy model and its judge, loaded once a process."""
    return DiffusersBackbone.from_toy(load_toy()), load_judge()


def scores(cell: Cell, result: Result) -> list[dict[str, bool]]:
    """For each picture, by column, whether it is right."""
    table = TABLES[cell.table]
    target = table.words(cell.target) if cell.way.judged_by_words else cell.target
    return [
        table.score(question, target, {head: names[index] for head, names in result.reading.items()})
        for index, question in enumerate(cell.questions())
    ]


def make(cell: Cell, folder: Path) -> Path:
    """Teach, paint and judge one cell, unless its file is there already. Returns the file."""
    file = cell.file(folder)
    if file.exists():
        return file
    torch.set_num_threads(1)
    backbone, judge = studio()
    table, way = TABLES[cell.table], cell.way
    questions = cell.questions()
    if way.layout is None:
        texts = [question.prompt.replace(f"<{NAME}>", table.words(cell.target)) for question in questions]
        pictures = _paint(cell, [Prompt((text,)) for text in texts], {}, {})
    else:
        concept = _learn(cell)
        prompts = [parse_prompt(question.prompt, [NAME]) for question in questions]
        with concept_weights_applied(backbone, concept.weights):
            if way.painter == "sampled":
                pictures = _paint(cell, prompts, {NAME: concept.vectors}, {NAME: concept.bound_layout()})
            else:
                pictures = _paint_along(cell, prompts, concept)
    pixels = (pictures.clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    Result(pixels, judge.read(pictures.clamp(0, 1).movedim(-1, 1))).save(file)
    return file


def _learn(cell: Cell) -> Concept:
    table, way = TABLES[cell.table], cell.way
    settings = TrainingSettings(
        steps=cell.steps,
        learning_rate=cell.learning_rate,
        seed=cell.seed,
        use_masks=way.use_masks,
        steps_each_stage=way.steps_each_stage,
    )
    run = ConceptRun(
        NAME,
        table.init_word(cell.target),
        table.exemplars(way, cell.target, cell.seed),
        way.layout,
        way.rule,
        settings,
        loss_terms=way.loss_terms,
        weights=way.weights,
    )
    with tempfile.TemporaryDirectory() as runs:
        concept, _, _ = run.learn(studio()[0], Path(runs), Silent())
    return concept


def _paint(cell: Cell, prompts: list[Prompt], vectors: dict, layouts: dict) -> Tensor:
    backbone, _ = studio()
    effort = cell.effort
    # The same start for every row: rows differ in what they learned, and in how they are painted, alone.
    seeds = [1000 * (cell.seed + 1) + index for index in range(len(prompts))]
    pictures = []
    for first in range(0, len(prompts), BATCH):
        part = slice(first, first + BATCH)
        guide = None
        if cell.way.guidance is not None:
            guide = guide_layout(backbone, _places(cell, prompts[part], vectors, part), cell.way.guidance)
        pictures.append(
            paint(
                backbone,
                prompts[part],
                vectors,
                layouts,
                seeds[part],
                (SIZE, SIZE),
                effort.sampler_steps,
                effort.cfg,
                effort.eta,
                guide=guide,
            )
        )
    return torch.cat(pictures)


def _paint_along(cell: Cell, prompts: list[Prompt], concept: Concept) -> Tensor:
    backbone, _ = studio()
    steps, cfg = cell.effort.sampler_steps, cell.effort.cfg
    painter = ReferencedPainter(backbone, concept.vectors, concept.bound_layout(), NAME, steps, cfg)
    is_guided = cell.way.painter == "reference"
    references = TABLES[cell.table].exemplars(cell.way, cell.target, cell.seed) if is_guided else []
    seeds = [1000 * (cell.seed + 1) + index for index in range(len(prompts))]
    return torch.cat([painter.paint(prompt, seed, references) for prompt, seed in zip(prompts, seeds, strict=True)])


def _places(cell: Cell, prompts: list[Prompt], vectors: dict, part: slice) -> list[list[Placement]]:
    """Of each prompt the boxes that the predictor gives its two things, a learned one by its vectors."""
    backbone, _ = studio()
    sizes = {name: next(iter(by_tower.values())).shape[1] for name, by_tower in vectors.items()}
    learned = {f"<{name}>": {t: v.flatten(0, 1) for t, v in by_tower.items()} for name, by_tower in vectors.items()}
    places = []
    for question, prompt in zip(cell.questions()[part], prompts, strict=True):
        spoken = {f"<{NAME}>": TABLES[cell.table].words(cell.target)} if not vectors else {}
        things = [spoken.get(thing, thing) for thing in question.things]
        words = [word_embedding(learned.get(thing) or backbone.token_vectors(thing)) for thing in things]
        boxes = layout_predictor().predict(*words)
        tokens = [phrase_positions(backbone, prompt, thing, sizes) for thing in things]
        both = [Placement(at, (box,)) for at, box in zip(tokens, boxes, strict=True)]
        places.append(both[: cell.way.guided])
    return places
