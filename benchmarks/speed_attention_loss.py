"""Cost of the subject attention loss: the second table of python -m concept_atelier.benchmarks.speed layout.

Training steps of SeFi-IDE (five stages, keys and values apart, batch 1) with the loss and without it, by turns, so that
a busy machine slows both alike. Both have the same timesteps and noise, and the U-Nets random weights. No layer is too
large to be compared at these sizes.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from typing import NamedTuple

from ..kernels.attention_loss import SubjectAttentionLoss
from ..kernels.concept import new_vectors
from ..kernels.diffusers_backbone import DiffusersBackbone, Tower
from ..kernels.gradient_rules import PlainGradient
from ..kernels.layouts import Layout
from ..kernels.losses import Learning
from ..kernels.objective import Objective
from ..kernels.run_state import RunState
from ..kernels.schedule import NoiseSchedule
from ..kernels.training import TrainingSettings, train
from ..toyworld.autoencoder import PATCH
from .speed_adi import NAME, Task, build_parts, make_exemplars

START_WORD, CLASS_WORD = "sits", "poses"  # unlike, so that there is something to pull
TERMS = {"denoising loss alone": (), "with attention loss": (SubjectAttentionLoss(),)}


class Side(NamedTuple):
    """What one training step took, at the median: seconds, and CPU seconds. stats: of every step, by name."""

    seconds: float
    cpu_seconds: float
    stats: dict[str, list[float]]


def measure(task: Task) -> dict[str, Side]:
    """Make the steps of both sides by turns, after one of each to warm up."""
    parts = build_parts(task)
    backbone = DiffusersBackbone(
        "sd1",
        parts.unet,
        [Tower("l", parts.tokenizer, parts.text_encoder)],
        parts.autoencoder,
        PATCH,
        NoiseSchedule.scaled_linear().alphas_cumprod,
    )
    data = make_exemplars(parts.unet.config.in_channels, task.latent, task.device)
    layout = Layout("prompt", stages=5, split_kv=True).bind(backbone.layers)
    learning = Learning(backbone, NAME, layout, CLASS_WORD, tuple(data.prompts))
    objectives = {side: Objective.of(terms, learning) for side, terms in TERMS.items()}
    vectors = new_vectors(backbone.token_vectors(START_WORD), layout.slots, 1)
    states = {side: RunState.start({tower: v.clone() for tower, v in vectors.items()}) for side in TERMS}
    times: dict[str, list[tuple[float, float]]] = {side: [] for side in TERMS}
    for number in range(task.steps + 1):
        until = replace(task.settings, steps=number + 1)
        for side, state in states.items():
            start = time.perf_counter(), time.process_time()
            train(backbone, data, NAME, layout, PlainGradient(), until, state, lambda _: False, objectives[side])
            times[side].append((time.perf_counter() - start[0], time.process_time() - start[1]))
    return {
        side: Side(*map(statistics.median, zip(*took[1:], strict=True)), states[side].stats)
        for side, took in times.items()
    }


def print_table(task: Task, sides: dict[str, Side]) -> float:
    """Print the table of one task; returns the ratio of CPU seconds, with the loss over without."""
    print(f"\nSeFi-IDE training step, {task.title}; median of {task.steps}")
    print(f"{'':24}{'s':>10}{'CPU s':>10}{'/ without':>10}{'of CPU s':>10}")
    without, ratio = next(iter(sides.values())), 1.0
    for name, side in sides.items():
        ratio = side.cpu_seconds / without.cpu_seconds
        print(
            f"{name:24}{side.seconds:10.3f}{side.cpu_seconds:10.3f}{side.seconds / without.seconds:10.2f}{ratio:10.2f}"
        )
    return ratio


def run(quick: bool) -> None:
    """Measure the toy model and the size of SD1.5, on the CPU."""
    settings = TrainingSettings()
    tasks = [
        Task("toy", 8, 10 if quick else 50, "cpu", settings),
        Task("sd1", 16 if quick else 32, 2 if quick else 5, "cpu", settings),
    ]
    ratios = [print_table(task, measure(task)) for task in tasks]
    print(f"\nwith attention loss / without: {', '.join(f'{ratio:.2f}' for ratio in ratios)}")
