"""Learning one concept from start to end: named by what decides it, saved as it goes, resumed or returned at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from .backbone import Backbone
from .concept import Concept, new_vectors
from .exemplars import Exemplar, check_exemplars, encode_exemplars
from .files import read_safetensors, write_safetensors
from .gradient_rules import GradientRule
from .layouts import BoundLayout, Layout
from .prompts import BLANK, PLACEHOLDER, parse_prompt
from .run_state import RunState, run_fingerprint
from .sampling import paint
from .training import TrainingSettings, train

SAVE_EVERY = 100  # steps


class Report(Protocol):
    """How a run tells what it does. `step` may raise to cancel; the run keeps its work and can be resumed."""

    stop_requested: bool

    def step(self, step: int, loss_history: Sequence[float], stats: dict[str, float]) -> None:
        """`step` steps are done."""
        ...

    def samples(self, image_grid: Tensor) -> None:
        """New sample pictures in one (H, W, 3) picture."""
        ...


@dataclass(frozen=True)
class SamplePlan:
    """Pictures painted while training. prompts: with the blank "{}" for the concept. every: steps; 0 for the end only.

    seed: one for all prompts and steps, so that pictures can be compared. steps, cfg, eta: of DDIM.
    """

    prompts: tuple[str, ...] = ()
    every: int = 250
    seed: int = 0
    steps: int = 20
    cfg: float = 7.5
    eta: float = 0.0


@dataclass(frozen=True)
class ConceptRun:
    """What decides a learned concept. Raises ValueError with a sentence when it cannot be learned from this.

    name: its placeholder. init_word: a word of one piece whose embedding every vector starts from.
    """

    name: str
    init_word: str
    exemplars: Sequence[Exemplar]
    layout: Layout
    rule: GradientRule
    settings: TrainingSettings
    samples: SamplePlan = SamplePlan()

    def __post_init__(self) -> None:
        if not PLACEHOLDER.fullmatch(f"<{self.name}>"):
            raise ValueError(f'The name "{self.name}" must be of letters, digits, dots, dashes and underscores.')
        check_exemplars(self.exemplars)
        self.rule.check(self.exemplars)
        for prompt in self.samples.prompts:
            parse_prompt(prompt.replace(BLANK, f"<{self.name}>"), [self.name])

    def fingerprint(self, backbone: Backbone) -> str:
        """The run's name on disk: everything that decides the result, except how many steps it is to have."""
        pictures = {}
        for i, e in enumerate(self.exemplars):
            pictures |= {f"{i}": e.image} | {f"{i}.{j}": picture for j, picture in enumerate(e.other_actions)}
            pictures |= {} if e.mask is None else {f"{i}.mask": e.mask}
        settings = {key: value for key, value in asdict(self.settings).items() if key != "steps"}
        decisions = {
            **settings,
            "name": self.name,
            "init_word": self.init_word,
            "captions": "\n".join(e.caption for e in self.exemplars),
            "layout": str(self.layout),
            "rule": str(self.rule),
            "model": backbone.fingerprint(),
        }
        return run_fingerprint(decisions, pictures)

    def initial_state(self, backbone: Backbone, layout: BoundLayout) -> RunState:
        """Step 0. Raises ValueError when the init word is not one piece for the model's tokenizer."""
        words = backbone.token_vectors(self.init_word)
        for tower, vectors in words.items():
            if len(vectors) != 1:
                raise ValueError(
                    f'The init word "{self.init_word}" is {len(vectors)} pieces for text encoder {tower}; it must be '
                    'one: choose a common word such as "action" or "person".'
                )
        return RunState.start(new_vectors(words, layout.slots, self.layout.tokens))

    def learn(
        self, backbone: Backbone, folder: Path, report: Report, start_fresh: bool = False
    ) -> tuple[Concept, RunState, Tensor | None]:
        """Train to the end, from where an earlier run with the same decisions was left.

        folder: where runs are kept, each in a folder of its own. start_fresh: forget an earlier run.
        Returns the concept, the state with its history, and the last sample pictures (P, H, W, 3) or None.
        Raises ValueError when the folder cannot be written, before training; whatever interrupts the run later, its
        last finished step is saved.
        """
        layout = self.layout.bind(backbone.layers)
        here = folder / f"{self.name}_{self.fingerprint(backbone)}"
        state_file, samples_file = here / "state.safetensors", here / "samples.safetensors"
        if state_file.exists() and not start_fresh:
            state = RunState.load(state_file, backbone.device)
        else:
            state = self.initial_state(backbone, layout)
            state.save(state_file)

        paint_samples = self._painter(backbone, layout, state, report, samples_file)
        if state.step < self.settings.steps and state.stopped_short_of < self.settings.steps:
            state.stopped_short_of = 0
            if state.step == 0:
                paint_samples()

            def after_step(state: RunState) -> bool:
                report.step(state.step, state.losses, {key: values[-1] for key, values in state.stats.items()})
                if self.samples.every and state.step % self.samples.every == 0 and state.step < self.settings.steps:
                    paint_samples()
                if state.step % SAVE_EVERY == 0:
                    state.save(state_file)
                return report.stop_requested

            try:
                data = encode_exemplars(backbone, self.exemplars, self.name)
                train(backbone, data, self.name, layout, self.rule, self.settings, state, after_step)
                state.stopped_short_of = self.settings.steps if state.step < self.settings.steps else 0
            finally:
                state.save(state_file)
        return self._concept(backbone, state), state, paint_samples()

    def _painter(
        self, backbone: Backbone, layout: BoundLayout, state: RunState, report: Report, file: Path
    ) -> Callable[[], Tensor | None]:
        """A function that paints the sample pictures (P, H, W, 3) of this moment, unless `file` already holds them."""
        size = tuple(self.exemplars[0].image.shape[:2])
        plan = self.samples
        prompts = [parse_prompt(p.replace(BLANK, f"<{self.name}>"), [self.name]) for p in plan.prompts]

        def paint_samples() -> Tensor | None:
            if not prompts:
                return None
            header = {"plan": str(plan), "step": str(state.step)}
            if not file.exists() or read_safetensors(file)[1] != header:
                vectors, layouts = {self.name: state.vectors}, {self.name: layout}
                painted = [
                    paint(backbone, [p], vectors, layouts, [plan.seed], size, plan.steps, plan.cfg, plan.eta)
                    for p in prompts
                ]
                pixels = (torch.cat(painted).cpu() * 255).round().to(torch.uint8)
                write_safetensors(file, {"samples": pixels}, header)
            pictures = read_safetensors(file)[0]["samples"].float() / 255
            report.samples(torch.cat(list(pictures), dim=1))
            return pictures

        return paint_samples

    def _concept(self, backbone: Backbone, state: RunState) -> Concept:
        metadata = {
            "method": str(self.rule),
            "init_word": self.init_word,
            "steps": str(state.step),
            **{key: str(value) for key, value in asdict(self.settings).items() if key != "steps"},
        }
        vectors = {tower: v.detach().cpu().clone() for tower, v in state.vectors.items()}
        return Concept(self.name, vectors, self.layout, backbone.family, tuple(backbone.layers), metadata)
