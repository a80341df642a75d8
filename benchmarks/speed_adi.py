"""Speed of ADI training against a plain implementation: python -m concept_atelier.benchmarks.speed adi [--quick]

Both sides make the same updates from the same random weights, pictures, timesteps and noise, each in a process of its
own, turn by turn, so that a busy machine slows both. Neither encodes pictures: the latents are given.
"""

from __future__ import annotations

import multiprocessing
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from ..kernels.concept import new_vectors
from ..kernels.course import draw_timesteps
from ..kernels.diffusers_backbone import DiffusersBackbone, Tower
from ..kernels.exemplars import EncodedExemplars
from ..kernels.gradient_mask import GradientMask
from ..kernels.gradient_rules import MaskedTriples
from ..kernels.layouts import Layout
from ..kernels.prompts import Placeholder, fill_blank
from ..kernels.run_state import RunState
from ..kernels.schedule import NoiseSchedule
from ..kernels.training import TrainingSettings, draw_anchors, step_generator, train
from ..toyworld.autoencoder import PATCH
from ..toyworld.model import ToyModel, load_toy
from .plain_adi import PlainADI

TARGET = 0.65
NAME = "action"
CAPTIONS = ("a man {} on grass", "a cat {} on sand", "a robot {} with a ball", "a bear in red {} on grass")
RULE = MaskedTriples(GradientMask())
Step = Callable[[int], None]


@dataclass(frozen=True)
class Task:
    """What is measured. model: "toy", or "sd1" for the size of SD1.5. latent: its height and width."""

    model: str
    latent: int
    steps: int
    device: str
    settings: TrainingSettings

    @property
    def precision(self) -> str:
        return "bf16" if self.device == "cuda" and self.model == "sd1" else "fp32"

    @property
    def title(self) -> str:
        name = {"toy": "toy model", "sd1": "SD1.5 size, random weights"}[self.model]
        return f"{name}, latents {self.latent} x {self.latent}, {self.precision}"


class Report(NamedTuple):
    """What one side measured: seconds and CPU seconds of each step, bytes at most held, its vectors (L, d).

    On a CPU the bytes are those of the process beyond the imported libraries, on a GPU those of tensors.
    """

    seconds: list[float]
    cpu_seconds: list[float]
    peak: int
    vectors: list[list[float]]


def build_parts(task: Task) -> ToyModel:
    """The networks of a task with random weights, the same each time."""
    parts = load_toy(random_weights=True)
    if task.model == "sd1":
        torch.manual_seed(0)
        # diffusers' defaults have SD1.5's widths, blocks and heads.
        unet = UNet2DConditionModel(sample_size=task.latent, cross_attention_dim=768)
        # CLIP-L: the vocabulary is counted in full, though the toy tokenizer names few of its pieces.
        config = CLIPTextConfig(
            vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
        )
        parts = ToyModel(unet, CLIPTextModel(config).eval(), parts.tokenizer, parts.autoencoder)
    if task.precision == "bf16":
        # The text encoder stays in fp32: it is a small part of the work, and gradients to its embeddings would suffer.
        parts.unet.to(torch.bfloat16)
    parts.unet.eval().to(task.device)
    parts.text_encoder.to(task.device)
    return parts


def make_exemplars(channels: int, latent: int, device: str) -> EncodedExemplars:
    """Random latents in place of pictures, each exemplar with one picture of another action."""
    generator = torch.Generator().manual_seed(1)
    shape = (2, len(CAPTIONS), channels, latent, latent)
    latents, others = torch.randn(shape, generator=generator).to(device)
    prompts = tuple(fill_blank(caption, NAME) for caption in CAPTIONS)
    return EncodedExemplars(latents, None, prompts, tuple(others[:, None]))


def our_side(parts: ToyModel, data: EncodedExemplars, settings: TrainingSettings) -> tuple[Step, Callable[[], Tensor]]:
    """The training loop of the pack, one step a call; and its vectors (L, d)."""
    backbone = DiffusersBackbone(
        "sd1",
        parts.unet,
        [Tower("l", parts.tokenizer, parts.text_encoder)],
        parts.autoencoder,
        PATCH,
        NoiseSchedule.scaled_linear().alphas_cumprod,
    )
    layout = Layout("layer").bind(backbone.layers)
    state = RunState.start(new_vectors(backbone.token_vectors(NAME), layout.slots, 1))

    def step(number: int) -> None:
        until = replace(settings, steps=number + 1)
        train(backbone, data, NAME, layout, RULE, until, state, after_step=lambda _: False)

    return step, lambda: state.vectors["l"].detach()[:, 0]


def plain_side(
    parts: ToyModel, data: EncodedExemplars, settings: TrainingSettings
) -> tuple[Step, Callable[[], Tensor]]:
    """The plain implementation on what the training loop would draw for the step."""
    plain = PlainADI(
        parts.unet,
        parts.text_encoder,
        parts.tokenizer,
        NAME,
        RULE.mask.beta,
        settings.learning_rate,
        settings.weight_decay,
    )

    def step(number: int) -> None:
        generator = step_generator(settings.seed, number, "batch")
        (anchor,) = draw_anchors(len(data.prompts), 1, generator)
        latents = RULE.pictures(data, anchor, step_generator(settings.seed, number, "rule")).latents
        t = draw_timesteps(settings.timestep_sampling, (1, 1), 1000, generator).view(1)
        eps = torch.randn((1, 1, *latents.shape[1:]), generator=generator).to(latents).view(1, *latents.shape[1:])
        caption = "".join("{}" if isinstance(part, Placeholder) else part for part in data.prompts[anchor].parts)
        plain.step(caption, latents, t.to(latents.device).expand(3), eps.expand_as(latents))

    return step, lambda: plain.vectors


SIDES = {"plain": plain_side, "ours": our_side}


def process_memory(field: str) -> int:
    """Bytes of this process as Linux counts them: "VmRSS", held now, or "VmHWM", held at most so far."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(re.search(rf"{field}:\s*(\d+) kB", status)[1]) * 1024


def run_side(side: str, task: Task, connection: Connection) -> None:
    """In a process of its own: build the model, then make the steps whose numbers arrive; None ends it."""
    libraries = process_memory("VmRSS") if task.device == "cpu" else 0
    parts = build_parts(task)
    data = make_exemplars(parts.unet.config.in_channels, task.latent, task.device)
    step, vectors = SIDES[side](parts, data, task.settings)
    seconds, cpu_seconds = [], []
    connection.send("built")
    for number in iter(connection.recv, None):
        start, cpu_start = time.perf_counter(), time.process_time()
        step(number)
        if task.device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
        connection.send("done")
    peak = torch.cuda.max_memory_allocated() if task.device == "cuda" else process_memory("VmHWM") - libraries
    connection.send(Report(seconds, cpu_seconds, peak, vectors().tolist()))


def measure(task: Task) -> dict[str, Report]:
    """Both sides of a task, turn by turn; the first step of each is a warm-up and not counted."""
    context = multiprocessing.get_context("spawn")
    connections, processes = {}, []
    for side in SIDES:
        connections[side], theirs = context.Pipe()
        processes.append(context.Process(target=run_side, args=(side, task, theirs), daemon=True))
        processes[-1].start()
        theirs.close()
    for connection in connections.values():
        connection.recv()
    for number in range(task.steps + 1):
        for connection in connections.values():
            connection.send(number)
            connection.recv()
    reports = {}
    for side, connection in connections.items():
        connection.send(None)
        report = connection.recv()
        reports[side] = report._replace(seconds=report.seconds[1:], cpu_seconds=report.cpu_seconds[1:])
    for process in processes:
        process.join()
    return reports


def disagreement(reports: dict[str, Report], learning_rate: float) -> float:
    """Mean distance between the two sides' vectors, in units of one full update (the learning rate)."""
    plain, ours = (torch.tensor(reports[side].vectors) for side in ("plain", "ours"))
    return (plain - ours).abs().mean().item() / learning_rate


def print_reports(task: Task, reports: dict[str, Report]) -> float:
    """Print the table of one task; returns the ratio of seconds, ours over plain."""
    rows = {
        side: (statistics.median(r.seconds), statistics.median(r.cpu_seconds), r.peak / 2**30)
        for side, r in reports.items()
    }
    ratios = [ours / plain for ours, plain in zip(rows["ours"], rows["plain"], strict=True)]
    print(f"\n{task.title}; median of {task.steps} steps")
    print(f"{'':14}{'s / step':>10}{'CPU s / step':>14}{'peak GiB':>10}")
    for side, row in rows.items():
        print(f"{side:14}{row[0]:10.3f}{row[1]:14.3f}{row[2]:10.2f}")
    print(f"{'ours / plain':14}{ratios[0]:10.2f}{ratios[1]:14.2f}{ratios[2]:10.2f}")
    distance = disagreement(reports, task.settings.learning_rate)
    print(f"the two sides' vectors differ by {distance:.1e} learning rates on average after {task.steps + 1} steps")
    return ratios[0]


def adi_tasks(quick: bool, device: str) -> list[Task]:
    """The toy model and the size of SD1.5, where a CPU gets smaller latents and fewer steps."""
    settings = TrainingSettings()
    if device == "cuda":
        return [
            Task("toy", 8, 10 if quick else 50, device, settings),
            Task("sd1", 64, 3 if quick else 20, device, settings),
        ]
    return [
        Task("toy", 8, 5 if quick else 20, device, settings),
        Task("sd1", 16 if quick else 32, 1 if quick else 3, device, settings),
    ]


def run(quick: bool) -> None:
    """Measure the toy model and the size of SD1.5."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and sys.platform != "linux":
        sys.exit("Only Linux tells how much memory a process held: run it there, or with a CUDA GPU.")
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"ADI, one training step (batch 1, a triple of pictures, one vector a cross-attention layer) on {name}")
    print("plain: three passes, each with all prompts encoded; whole embedding matrix and all weights with gradients")
    print("ours:  one pass over the triple, prompts encoded once, weights frozen")
    ratios = [print_reports(task, measure(task)) for task in adi_tasks(quick, device)]
    print(f"\nours / plain: {', '.join(f'{ratio:.2f}' for ratio in ratios)} (target: at most {TARGET})")
