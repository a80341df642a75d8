"""Cost of layout guidance: python -m concept_atelier.benchmarks.speed layout [--quick]

A fifth of the sampling steps is guided, as in the paper (10 of 50), with all five moves, since none is ever good
enough. All sides are whole samplings through ComfyUI with cfg, by turns, so that a busy machine slows them alike. The
U-Nets have random weights where no others are bundled.
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any, NamedTuple

import torch

from .comfyui import find_comfyui, start_comfyui
from .speed_gcfg import Task, build_model

TARGET = 1.8
PLAIN, UNTRUNCATED, OURS = "plain sampling", "guided, whole forwards", "guided, ours"
WORDS_OF_PROMPT = ("", "a", "cat", "and", "a", "panda", *[""] * 71)
GUIDED_SHARE = 5


class Layouts(NamedTuple):
    """What is measured. task: the model, its latents, and how often each side runs. steps: of the sampler."""

    task: Task
    steps: int


class Side(NamedTuple):
    """What one sampling took, at the median: seconds, and CPU seconds."""

    seconds: float
    cpu_seconds: float


def build_sides(model: Any, steps: int) -> dict[str, Any]:
    """The MODEL of each side."""
    from ..kernels.layout_guidance import TWO_OBJECTS, LayoutGuidance, Placement, guidance_layers
    from ..nodes.native.layout_guidance import LayoutGuide
    from ..nodes.native.model_kind import cross_attention_layers

    objects = [Placement((token,), (box,)) for token, box in zip((2, 5), TWO_OBJECTS)]
    settings = LayoutGuidance(threshold=0.0, steps=steps // GUIDED_SHARE)
    layers = guidance_layers(cross_attention_layers(model))
    sides = {PLAIN: model}
    for name, truncated in ((UNTRUNCATED, False), (OURS, True)):
        sides[name] = LayoutGuide({WORDS_OF_PROMPT: objects}, settings, layers, truncated).patch(model)
    return sides


def measure(layouts: Layouts) -> dict[str, Side]:
    """Sample with all sides in turns."""
    import comfy.samplers

    from ..nodes.native.payload import WORDS

    model = build_model(layouts.task)
    width, channels = (model.model.model_config.unet_config[key] for key in ("context_dim", "in_channels"))
    rows = torch.randn(2, 77, width, generator=torch.Generator().manual_seed(1))
    positive, negative = [[rows[:1], {WORDS: WORDS_OF_PROMPT}]], [[rows[1:], {}]]
    shape = (1, channels, layouts.task.latent, layouts.task.latent)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    sigmas = comfy.samplers.calculate_sigmas(model.model.model_sampling, "normal", layouts.steps)
    times: dict[str, list[tuple[float, float]]] = {}
    with torch.inference_mode():
        for turn in range(-1, layouts.task.rounds):  # the first to warm up
            for name, patched in build_sides(model, layouts.steps).items():
                guider = comfy.samplers.CFGGuider(patched)
                guider.set_conds(positive, negative)
                guider.set_cfg(7.5)
                start = time.perf_counter(), time.process_time()
                guider.sample(
                    noise, torch.zeros_like(noise), comfy.samplers.ksampler("euler"), sigmas, disable_pbar=True
                )
                took = time.perf_counter() - start[0], time.process_time() - start[1]
                if turn >= 0:
                    times.setdefault(name, []).append(took)
    return {name: Side(*map(statistics.median, zip(*took, strict=True))) for name, took in times.items()}


def print_table(layouts: Layouts, took: dict[str, Side]) -> float:
    """Print the table of one task; returns the ratio of CPU seconds, ours over plain."""
    task, guided = layouts.task, layouts.steps // GUIDED_SHARE
    print(f"\n{task.title}; {guided} guided steps of {layouts.steps}; median of {task.rounds} samplings")
    print(f"{'':24}{'s':>10}{'CPU s':>10}{'/ plain':>10}{'of CPU s':>10}")
    plain = took[PLAIN]
    for name, side in took.items():
        ratios = side.seconds / plain.seconds, side.cpu_seconds / plain.cpu_seconds
        print(f"{name:24}{side.seconds:10.2f}{side.cpu_seconds:10.2f}{ratios[0]:10.2f}{ratios[1]:10.2f}")
    return took[OURS].cpu_seconds / plain.cpu_seconds


def run(quick: bool) -> None:
    """Measure the toy model and the size of SD1.5, on the CPU."""
    comfyui = find_comfyui()
    if comfyui is None:
        sys.exit("ComfyUI was not found: set COMFYUI_PATH to its folder.")
    start_comfyui(comfyui)
    print(f"Layout guidance, 5 moves in each guided step, CPU, {torch.get_num_threads()} threads")
    measured = [
        Layouts(Task("toy", 8, 2 if quick else 5), 50),
        Layouts(Task("sd1", 16 if quick else 64, 1), 5),
    ]
    ratios = [print_table(layouts, measure(layouts)) for layouts in measured]
    print(f"\nguided / plain: {', '.join(f'{ratio:.2f}' for ratio in ratios)} (target: at most {TARGET})")
