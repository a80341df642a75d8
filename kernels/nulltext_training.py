"""Training a concept model: plain denoising on pictures of one domain, no text (arXiv 2312.08195, section 4.1).

One loop for one device or many: each worker takes its share of every batch, gradients are averaged over workers, and
every random number is a function of (seed, step) alone. So the weights do not depend on how the work is shared out,
beyond the order of sums.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from .course import draw_timesteps
from .files import read_safetensors, write_safetensors
from .latent_cache import LatentCache
from .losses import Prediction, denoising_loss
from .run_state import DAMAGED_RUN, FORMAT_VERSION, RunState
from .schedule import NoiseSchedule
from .training import draw_anchors, step_generator

PredictNoise = Callable[[Tensor, Tensor], Tensor]
"""eps_theta(x_t (B, C, h, w), t (B,)) of a model without text."""


@dataclass(frozen=True)
class NullTextSettings:
    """Numbers of a run (paper, appendix D, and released configuration; METHODS 5.5). Raising `steps` continues it, and
    changing `accumulation` does.

    learning_rate, weight_decay: of AdamW. batch_size: pictures a step, over all workers. accumulation: parts in which
    a worker computes its share. clip: largest norm of the gradient. ema_decay: of the averaged weights, which are the
    result; it rises to this value as (1 + n) / (10 + n) over the steps n. mirror: show every other picture mirrored.
    """

    steps: int = 10_000
    learning_rate: float = 1e-5
    weight_decay: float = 0.01
    batch_size: int = 32
    accumulation: int = 1
    clip: float = 1.0
    ema_decay: float = 0.9999
    mirror: bool = True
    seed: int = 0

    def check(self, workers: int) -> None:
        """Raise ValueError when a batch cannot be shared out evenly: shares then would weigh differently."""
        if self.batch_size % (workers * self.accumulation):
            raise ValueError(
                f"A batch of {self.batch_size} pictures cannot be shared out evenly among {workers} workers in "
                f"{self.accumulation} parts each: make the batch size a multiple of {workers * self.accumulation}."
            )


class Workers(Protocol):
    """Who shares the work of a step. rank: of this worker in 0..count-1."""

    rank: int
    count: int

    def exchange(self, last: bool) -> AbstractContextManager:
        """Around the forward and backward pass of one part; after the last, gradients are means over workers."""
        ...

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a scalar over workers."""
        ...


class Alone:
    """One worker."""

    rank = 0
    count = 1

    def exchange(self, last: bool) -> AbstractContextManager:
        return nullcontext()

    def mean(self, value: Tensor) -> Tensor:
        return value


ALONE = Alone()


@dataclass
class ModelState(RunState):
    """A RunState whose `vectors` are the weights of a network by diffusers' names, beside their moving averages.

    The weights are the leaf tensors that the network computes with, not copies of them.
    """

    averages: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def start(cls, weights: Mapping[str, Tensor]) -> ModelState:
        """A run at step 0 from the weights as they are."""
        return cls(dict(weights), averages={name: weight.detach().clone() for name, weight in weights.items()})

    def save(self, path: Path) -> None:
        """Write the state to `path`. Raises ValueError naming the folder when it cannot be written."""
        tensors = {f"weight/{name}": weight for name, weight in self.vectors.items()}
        tensors |= {f"average/{name}": average for name, average in self.averages.items()}
        tensors |= {f"{key}/{name}": v for name, moments in self.moments.items() for key, v in moments.items()}
        tensors |= {f"stats/{name}": torch.tensor(v, dtype=torch.float64) for name, v in self.stats.items()}
        tensors["losses"] = torch.tensor(self.losses, dtype=torch.float64)
        header = {"step": self.step, "stopped_short_of": self.stopped_short_of, "format_version": FORMAT_VERSION}
        on_cpu = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        write_safetensors(path, on_cpu, {key: str(value) for key, value in header.items()})

    @classmethod
    def load(cls, path: Path, weights: Mapping[str, Tensor]) -> ModelState:
        """Read a state into `weights`. Raises ValueError naming the file when it is damaged."""
        tensors, header = read_safetensors(path, DAMAGED_RUN)
        losses = tensors.pop("losses").tolist()
        groups: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            group, name = key.split("/", 1)
            groups.setdefault(group, {})[name] = tensor
        saved, averages, stats = (groups.pop(group, {}) for group in ("weight", "average", "stats"))
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(saved[name])
        moments: dict[str, dict[str, Tensor]] = {}
        for key, group in groups.items():
            for name, tensor in group.items():
                moments.setdefault(name, {})[key] = tensor  # the optimiser brings it to the device
        return cls(
            dict(weights),
            int(header["step"]),
            moments,
            int(header["stopped_short_of"]),
            losses,
            {name: values.tolist() for name, values in stats.items()},
            averages={name: averages[name].to(weight.device) for name, weight in weights.items()},
        )


def train_null_text(
    predict_noise: PredictNoise,
    schedule: NoiseSchedule,
    latents: LatentCache,
    settings: NullTextSettings,
    state: ModelState,
    after_step: Callable[[ModelState], bool],
    workers: Workers = ALONE,
    gradient_scale: float = 1.0,
) -> None:
    """Train the weights of `state` in place from `state.step` to `settings.steps`.

    gradient_scale: see Backbone. after_step: sees the state after each step; returns True to stop early; may raise to
    cancel. Whenever this function is left, by whichever way, `state` is that of the last finished step, so a run
    resumed from it equals one never interrupted, bit for bit.

    Raises ValueError when the loss or the gradient is not finite.
    """
    optimizer = state.make_optimizer(settings.learning_rate, settings.weight_decay)
    weights = list(state.vectors.values())
    device = weights[0].device
    shape = latents.read(0, mirrored=False).shape
    while state.step < settings.steps:
        # The whole batch's random numbers on every worker, so that they do not depend on how it is shared out.
        generator = step_generator(settings.seed, state.step, "batch")
        pictures = draw_anchors(len(latents), settings.batch_size, generator)
        mirrored = torch.rand(settings.batch_size, generator=generator) < (0.5 if settings.mirror else 0.0)
        t = draw_timesteps("uniform", (settings.batch_size,), len(schedule), generator)
        eps = torch.randn((settings.batch_size, *shape), generator=generator)

        # ||eps - eps_theta(x_t, t)||^2 over this worker's share, part by part.
        share = torch.arange(settings.batch_size)[workers.rank :: workers.count]
        optimizer.zero_grad()
        loss = torch.zeros((), device=device)
        parts = share.chunk(settings.accumulation)
        for number, part in enumerate(parts, start=1):
            x_0 = torch.stack([latents.read(pictures[i], bool(mirrored[i])) for i in part.tolist()]).to(device)
            t_part, eps_part = t[part].to(device), eps[part].to(device)
            with workers.exchange(last=number == len(parts)):
                eps_hat = predict_noise(schedule.add_noise(x_0, t_part, eps_part), t_part)
                part_loss = denoising_loss(Prediction(eps_part, eps_hat, t_part)).mean() / len(parts)
                (part_loss * gradient_scale).backward()
            loss += part_loss.detach()
        loss = workers.mean(loss)

        # Clip, step, and follow with the averages.
        if gradient_scale != 1:
            for weight in weights:
                weight.grad /= gradient_scale
        norm = torch.nn.utils.clip_grad_norm_(weights, settings.clip)
        if not (loss.isfinite() and norm.isfinite()):
            kept = f"; the weights of step {state.step} are kept: set steps to {state.step} to get them"
            raise ValueError(
                f"The loss is not finite at step {state.step + 1}{kept if state.step else ''}. To get further, start "
                "with a lower learning rate, or compute in bf16 or fp32 instead of fp16."
            )
        optimizer.step()
        decay = min(settings.ema_decay, (1 + state.step) / (10 + state.step))
        with torch.no_grad():
            for name, average in state.averages.items():
                average.lerp_(state.vectors[name], 1 - decay)

        state.finish_step(loss.item(), {"gradient norm": norm.item()}, optimizer)
        if after_step(state):
            return
