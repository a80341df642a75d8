"""Training one concept model from start to end: named by what decides it, saved as it goes, resumed or returned."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from .backbone import Backbone
from .concept_run import Report
from .conditioning import StagedContext
from .files import read_safetensors, write_safetensors
from .latent_cache import LatentCache
from .nulltext import ConceptModel, null_context
from .nulltext_training import ALONE, ModelState, NullTextSettings, PredictNoise, Workers, train_null_text
from .run_state import DAMAGED_RUN, FORMAT_VERSION, run_fingerprint
from .sampling import classifier_free, ddim_sample, noise_source
from .state_file import StateFile


@dataclass(frozen=True)
class DomainSamples:
    """Pictures painted while training, without any text. count: 0 for none. every: steps; 0 for the end only.

    steps, eta: of DDIM. size: width and height in pixels.
    """

    count: int = 4
    every: int = 500
    seed: int = 0
    steps: int = 25
    eta: float = 0.0
    size: int = 512


@dataclass(frozen=True)
class NullTextRun:
    """What decides a trained concept model.

    name: of the folder its state is kept in. base: the untrained form, or a trained one to go on from. latents: the
    encoded pictures.
    """

    name: str
    base: ConceptModel
    latents: LatentCache
    settings: NullTextSettings
    samples: DomainSamples = DomainSamples(count=0)

    def fingerprint(self, backbone: Backbone) -> str:
        """The run's name on disk: everything that decides the result, except how many steps it is to have."""
        # How a batch is shared out changes the order of sums only; 1 is what runs had in their names.
        settings = asdict(replace(self.settings, accumulation=1))
        del settings["steps"]
        pictures = " ".join(f"{file.parent.name}{file.stem}" for file in self.latents.files)
        features = {f"{layer}": feature for layer, feature in self.base.features.items()}
        decisions = {"pictures": pictures, "model": backbone.fingerprint(), "format_version": FORMAT_VERSION}
        return run_fingerprint({**settings, **decisions}, features)

    def learn(
        self,
        backbone: Backbone,
        weights: Mapping[str, Tensor],
        folder: Path,
        report: Report,
        predict_noise: PredictNoise | None = None,
        workers: Workers = ALONE,
        start_fresh: bool = False,
    ) -> tuple[ConceptModel, ModelState, Tensor | None]:
        """Train to the end, from where an earlier run with the same decisions was left.

        backbone: in null-text form, computing with `weights`, which are float32 leaf tensors at the values of the
        base, by diffusers' names; they are changed in place. folder: where runs are kept. predict_noise: what to
        train through instead of the backbone, for several workers. start_fresh: forget an earlier run.
        Returns the concept model of the averaged weights, the state with its history, and the last samples
        (count, H, W, 3) or None. Raises ValueError, before training, when the folder cannot be written and when the
        earlier run has more steps than this one is to have; whatever interrupts the run later, its last finished step
        is saved.
        """
        self.settings.check(workers.count)
        start = {name: weight.detach().clone().cpu() for name, weight in weights.items()}
        run = self.fingerprint(backbone)
        here = folder / f"{self.name}_{run}"
        samples_file = here / "samples.safetensors"
        state_file = StateFile(here / "state.safetensors", writes=workers.rank == 0)
        state = state_file.open(
            lambda file: ModelState.load(file, weights),
            lambda: ModelState.start(weights),
            self.settings.steps,
            start_fresh,
        )
        if start_fresh:
            samples_file.unlink(missing_ok=True)
        for number in (len(self.latents), state.step):
            if workers.mean(torch.tensor(float(number), device=backbone.device)) != number:
                raise ValueError(
                    f"The workers do not see the same files (here {len(self.latents)} pictures, step {state.step}): "
                    "give all machines one folder for the work, on a disk that they share."
                )

        null = null_context(backbone)
        predict = predict_noise or (lambda x_t, t: backbone.predict_noise(x_t, t, null.repeat(len(t))))
        paint = self._painter(backbone, state, report, samples_file)
        if state.step < self.settings.steps and state.stopped_short_of != self.settings.steps:
            state.stopped_short_of = 0

            def after_step(state: ModelState) -> bool:
                report.step(state.step, state.losses, {key: values[-1] for key, values in state.stats.items()})
                if self.samples.every and state.step % self.samples.every == 0 and state.step < self.settings.steps:
                    paint()
                state_file.save_when_due(state)
                return report.stop_requested

            try:
                train_null_text(
                    predict,
                    backbone.schedule,
                    self.latents,
                    self.settings,
                    state,
                    after_step,
                    workers,
                    backbone.gradient_scale,
                )
                state.stopped_short_of = self.settings.steps if state.step < self.settings.steps else 0
            finally:
                state_file.save(state)
        return self._concept_model(state, start, run), state, paint()

    def _painter(
        self, backbone: Backbone, state: ModelState, report: Report, file: Path
    ) -> Callable[[], Tensor | None]:
        """A function that paints the samples (count, H, W, 3) of this moment, unless `file` already holds them."""
        plan = self.samples
        seeds = [plan.seed + number for number in range(plan.count)]

        def paint() -> Tensor | None:
            if not plan.count:
                return None
            header = {"plan": str(plan), "step": str(state.step)}
            if not file.exists() or read_safetensors(file, DAMAGED_RUN)[1] != header:
                null = null_context(backbone).repeat(plan.count)
                predict_noise = classifier_free(backbone, StagedContext((0,), (null,), {}), null, cfg=1)
                draw_noise = noise_source(backbone, seeds, (plan.size, plan.size))
                with averaged(state):
                    latents = ddim_sample(backbone.schedule, predict_noise, draw_noise, plan.steps, plan.eta)
                pixels = (backbone.decode_latent(latents).cpu() * 255).round().to(torch.uint8).contiguous()
                write_safetensors(file, {"samples": pixels}, header)
            pictures = read_safetensors(file)[0]["samples"].float() / 255
            report.samples(torch.cat(list(pictures), dim=1))
            return pictures

        return paint

    def _concept_model(self, state: ModelState, start: Mapping[str, Tensor], run: str) -> ConceptModel:
        """`base` with what was learned: on top of its own deltas, where it was trained before."""
        deltas = {}
        for name, average in state.averages.items():
            delta = average.cpu() - start[name]
            if name in self.base.deltas:
                delta += self.base.deltas[name]
            deltas[name] = delta.half()
        metadata = {
            **self.base.metadata,
            **{key: str(value) for key, value in asdict(self.settings).items()},
            "steps": str(state.step),
            "pictures": str(len(self.latents)),
            "run": run,
        }
        return replace(self.base, deltas=deltas, metadata=metadata)


@contextmanager
def averaged(state: ModelState) -> Iterator[None]:
    """While open, the network computes with the averaged weights."""
    _exchange(state)
    try:
        yield
    finally:
        _exchange(state)


def _exchange(state: ModelState) -> None:
    for name, weight in state.vectors.items():
        weight.data, state.averages[name] = state.averages[name], weight.data
