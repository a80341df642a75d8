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
from .gradient_rules import GradientRule, MaskedTriples
from .layouts import BoundLayout, Layout
from .losses import Learning, LossTerm
from .objective import Objective
from .prompts import BLANK, PLACEHOLDER, fill_blank, parse_prompt
from .run_state import DAMAGED_RUN, FORMAT_VERSION, RunState, run_fingerprint
from .sampling import paint
from .state_file import StateFile
from .token_generator import FREE, FreeVectors, TokenGenerator
from .training import TrainingSettings, train
from .weight_plan import NO_WEIGHTS, AdaptedWeights, WeightPlan

DESCRIBE_EVERY = 100  # steps
LONGEST_NAME = 100  # paths have an end


class Report(Protocol):
    """How a run tells what it does. `step` may raise to cancel; the run keeps its work and can be resumed."""

    stop_requested: bool

    def step(self, step: int, loss_history: Sequence[float], stats: dict[str, float]) -> None:
        """`step` steps are done."""
        ...

    def samples(self, image_grid: Tensor) -> None:
        """New sample pictures in one (H, W, 3) picture."""
        ...


class ConceptReport(Report, Protocol):
    """A report that also has room for words."""

    def say(self, lines: Sequence[str]) -> None:
        """What the loss terms have to tell, a line each; instead of what they told before."""
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

    name: its placeholder. init_word: a word of one piece whose embedding every vector starts from; for tail rows, the
    words that the placeholder reads as. loss_terms: beside the denoising loss. weights: that learn along.
    """

    name: str
    init_word: str
    exemplars: Sequence[Exemplar]
    layout: Layout
    rule: GradientRule
    settings: TrainingSettings
    samples: SamplePlan = SamplePlan()
    loss_terms: Sequence[LossTerm] = ()
    weights: WeightPlan | None = None

    def __post_init__(self) -> None:
        if not PLACEHOLDER.fullmatch(f"<{self.name}>"):
            raise ValueError(f'The name "{self.name}" must be of letters, digits, dots, dashes and underscores.')
        if len(self.name) > LONGEST_NAME:
            raise ValueError(
                f"The name has {len(self.name)} letters, too many for the folder named after it: choose one of at "
                f"most {LONGEST_NAME}."
            )
        check_exemplars(self.exemplars)
        self.rule.check(self.exemplars)
        if self.weights is not None and isinstance(self.rule, MaskedTriples):
            raise ValueError(
                "The gradient mask chooses channels of the concept's vectors and has no say over weights: disconnect "
                "the gradient rule or the weights."
            )
        if self.layout.generated and (self.settings.steps_each_stage or not self.rule.moves_all):
            raise ValueError(
                "Generated vectors move together, so none of them can be held still: choose free vectors in Token "
                "Layout, or set steps_each_stage to 0 and mask the gradient instead of the update."
            )
        if self.settings.steps_each_stage and self.layout.stages == 1:
            raise ValueError(
                "With steps_each_stage each stage learns at a noise level of its own, and a single stage at the lowest "
                "alone: set stages in Token Layout to the number of sampling steps, or steps_each_stage to 0."
            )
        for prompt in self.samples.prompts:
            parse_prompt(prompt.replace(BLANK, f"<{self.name}>"), [self.name])

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.settings.total_steps(self.layout)

    def fingerprint(self, backbone: Backbone) -> str:
        """The run's name on disk: everything that decides the result, except how many steps it is to have.

        Where stages learn after the shared steps, the number of those decides it, too.
        """
        pictures = {}
        for i, e in enumerate(self.exemplars):
            pictures |= {f"{i}": e.image} | {f"{i}.{j}": picture for j, picture in enumerate(e.other_actions)}
            pictures |= {} if e.mask is None else {f"{i}.mask": e.mask}
        settings = asdict(self.settings)
        if not self.settings.steps_each_stage:
            del settings["steps"]
        decisions = {
            **settings,
            "name": self.name,
            "init_word": self.init_word,
            "captions": "\n".join(e.caption for e in self.exemplars),
            "layout": str(self.layout),
            "rule": str(self.rule),
            "loss_terms": "\n".join(map(str, self.loss_terms)),
            "weights": str(self.weights),
            "model": backbone.fingerprint(),
            "format_version": FORMAT_VERSION,
        }
        return run_fingerprint(decisions, pictures)

    def initial_state(self, backbone: Backbone, layout: BoundLayout, adapted: AdaptedWeights) -> RunState:
        """Step 0. Raises ValueError when the init word is not one piece for the model's tokenizer."""
        weights = adapted.start(self.settings.seed)
        words = backbone.token_vectors(self.init_word)
        if self.layout.place != "word":
            shape = (layout.slots, self.layout.tokens)
            zeros = {tower: v.new_zeros(*shape, v.shape[-1]) for tower, v in words.items()}
            return RunState.start(zeros, weights)
        for tower, vectors in words.items():
            if len(vectors) != 1:
                raise ValueError(
                    f'The init word "{self.init_word}" is {len(vectors)} pieces for text encoder {tower}; it must be '
                    'one: choose a common word such as "action" or "person".'
                )
        return RunState.start(new_vectors(words, layout.slots, self.layout.tokens), weights)

    def learn(
        self, backbone: Backbone, folder: Path, report: ConceptReport, start_fresh: bool = False
    ) -> tuple[Concept, RunState, Tensor | None]:
        """Train to the end, from where an earlier run with the same decisions was left.

        folder: where runs are kept, each in a folder of its own. start_fresh: forget an earlier run.
        Returns the concept, the state with its history, and the last sample pictures (P, H, W, 3) or None.
        Raises ValueError, before training, when the folder cannot be written and when the earlier run has more steps
        than this one is to have; whatever interrupts the run later, its last finished step is saved.
        """
        layout = self.layout.bind(backbone.layers, self.init_word)
        adapted = self.weights.bind(backbone) if self.weights else NO_WEIGHTS
        prompts = tuple(fill_blank(e.caption, self.name) for e in self.exemplars)
        objective = Objective.of(self.loss_terms, Learning(backbone, self.name, layout, self.init_word, prompts))
        here = folder / f"{self.name}_{self.fingerprint(backbone)}"
        state_file, samples_file = StateFile(here / "state.safetensors"), here / "samples.safetensors"
        state = state_file.open(
            lambda file: RunState.load(file, backbone.device),
            lambda: self.initial_state(backbone, layout, adapted),
            self.total_steps,
            start_fresh,
        )
        if start_fresh:
            samples_file.unlink(missing_ok=True)

        report.say(objective.describe(state.vectors, state.memory))
        paint_samples = self._painter(backbone, layout, adapted, state, report, samples_file)
        if state.step < self.total_steps and state.stopped_short_of != self.total_steps:
            state.stopped_short_of = 0
            if state.step == 0:
                paint_samples()

            def after_step(state: RunState) -> bool:
                report.step(state.step, state.losses, {key: values[-1] for key, values in state.stats.items()})
                if self.samples.every and state.step % self.samples.every == 0 and state.step < self.total_steps:
                    paint_samples()
                if state.step % DESCRIBE_EVERY == 0:
                    report.say(objective.describe(state.vectors, state.memory))
                state_file.save_when_due(state)
                return report.stop_requested

            try:
                data = encode_exemplars(backbone, self.exemplars, self.name)
                train(
                    backbone,
                    data,
                    self.name,
                    layout,
                    self.rule,
                    self.settings,
                    state,
                    after_step,
                    objective,
                    adapted,
                    self._source(backbone, layout),
                )
                state.stopped_short_of = self.total_steps if state.step < self.total_steps else 0
            finally:
                state_file.save(state)
        report.say(objective.describe(state.vectors, state.memory))
        return self._concept(backbone, state, adapted), state, paint_samples()

    def _source(self, backbone: Backbone, layout: BoundLayout) -> FreeVectors | TokenGenerator:
        if not self.layout.generated:
            return FREE
        words = {tower: v.expand(self.layout.tokens, -1) for tower, v in backbone.token_vectors(self.init_word).items()}
        return TokenGenerator(words, layout.slots, self.settings.seed)

    def _painter(
        self,
        backbone: Backbone,
        layout: BoundLayout,
        adapted: AdaptedWeights,
        state: RunState,
        report: Report,
        file: Path,
    ) -> Callable[[], Tensor | None]:
        """A function that paints the sample pictures (P, H, W, 3) of this moment, unless `file` already holds them."""
        size = tuple(self.exemplars[0].image.shape[:2])
        plan = self.samples
        prompts = [parse_prompt(p.replace(BLANK, f"<{self.name}>"), [self.name]) for p in plan.prompts]

        def paint_samples() -> Tensor | None:
            if not prompts:
                return None
            header = {"plan": str(plan), "step": str(state.step)}
            if not file.exists() or read_safetensors(file, DAMAGED_RUN)[1] != header:
                vectors, layouts = {self.name: state.vectors}, {self.name: layout}
                with adapted.applied(state.weights):
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

    def _concept(self, backbone: Backbone, state: RunState, adapted: AdaptedWeights) -> Concept:
        metadata = {
            "method": str(self.rule),
            "init_word": self.init_word,
            "steps": str(state.step),
            **{key: str(value) for key, value in asdict(self.settings).items() if key != "steps"},
            **({"loss_terms": "; ".join(map(str, self.loss_terms))} if self.loss_terms else {}),
            **({"weights": str(self.weights)} if self.weights else {}),
        }
        vectors = {tower: v.detach().cpu().clone() for tower, v in state.vectors.items()}
        layers, weights = tuple(backbone.layers), adapted.patches(state.weights)
        return Concept(self.name, vectors, self.layout, backbone.family, layers, metadata, weights)
