"""Speed of GCFG with three prompts on one model: python -m concept_atelier.benchmarks.speed gcfg [--quick]

Within one sampling all sides take turns, so that a busy machine slows them alike. They predict from the same noisy
latents and the same prompts; the U-Nets have random weights.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .comfyui import find_comfyui, start_comfyui

TARGET = 1.1
BRANCHES = 3
OURS, BATCH = "GCFG", "1 forward of 4"
SEPARATE, PASSES = "4 forwards of 1", "3 passes of plain CFG"
SD1 = {
    "model_channels": 320,
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_middle": 1,
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "context_dim": 768,
    "num_heads": 8,
    "in_channels": 4,
    "out_channels": 4,
    "image_size": 32,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": False,
    "adm_in_channels": None,
    "legacy": False,
}


class Task(NamedTuple):
    """What is measured. model: "toy" or "sd1". latent: its height and width. rounds: how often each side runs."""

    model: str
    latent: int
    rounds: int

    @property
    def title(self) -> str:
        name = {"toy": "toy model", "sd1": "SD1.5 size, random weights"}[self.model]
        return f"{name}, latents {self.latent} x {self.latent}, fp32"


class Side(NamedTuple):
    """What one side took, at the median: seconds, and CPU seconds, of one step."""

    seconds: float
    cpu_seconds: float


def build_model(task: Task) -> Any:
    """The MODEL of a task."""
    if task.model == "toy":
        from ..nodes.native.toy import toy_checkpoint

        return toy_checkpoint().model
    import comfy.model_base
    import comfy.model_patcher
    import comfy.supported_models

    config = comfy.supported_models.SD15(dict(SD1))
    config.set_inference_dtype(torch.float32, None)
    model = comfy.model_base.BaseModel(config, device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.diffusion_model.parameters():
            weight.normal_(0, 0.02, generator=generator)
    return comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))


def sides(predict: Callable[[], Tensor], model: Any, x: Tensor, sigma: Tensor, contexts: Tensor) -> dict[str, Callable]:
    """What each side does in a step. predict: the guider's. contexts: (K + 1, T, d), the unconditional last."""

    def forward(rows: Tensor) -> Tensor:
        count = len(rows)
        return model.apply_model(
            x.expand(count, -1, -1, -1), sigma.expand(count), c_crossattn=rows, transformer_options={"sigmas": sigma}
        )

    def passes() -> None:
        for number in range(BRANCHES):
            forward(contexts[[number, -1]])

    def separate() -> None:
        for row in contexts:
            forward(row[None])

    return {OURS: predict, BATCH: lambda: forward(contexts), SEPARATE: separate, PASSES: passes}


def measure(task: Task) -> dict[str, Side]:
    """Run all sides of a task in turns."""
    import comfy.samplers

    from ..kernels.guidance import GuidanceWeight
    from ..nodes.native.guiders import Branch, GCFGGuider

    model = build_model(task)
    width, channels = (model.model.model_config.unet_config[key] for key in ("context_dim", "in_channels"))
    contexts = torch.randn(BRANCHES + 1, 77, width, generator=torch.Generator().manual_seed(1))
    conditionings = [[[row[None], {}]] for row in contexts]
    branches = {str(i): Branch(model, c, GuidanceWeight(2.5)) for i, c in enumerate(conditionings[:-1])}
    times: dict[str, list[tuple[float, float]]] = {}

    def sampler(wrapped: Any, x: Tensor, sigmas: Tensor, extra_args: dict, callback: Any, disable: bool) -> Tensor:
        sigma = sigmas[:1]
        turns = sides(lambda: wrapped(x, sigma, **extra_args), model.model, x, sigma, contexts)
        for turn in range(-1, task.rounds):  # the first to warm up
            for name, run in turns.items():
                start = time.perf_counter(), time.process_time()
                run()
                took = time.perf_counter() - start[0], time.process_time() - start[1]
                if turn >= 0:
                    times.setdefault(name, []).append(took)
        return x

    with torch.inference_mode():
        noise = torch.randn(1, channels, task.latent, task.latent, generator=torch.Generator().manual_seed(2))
        guider = GCFGGuider(model, conditionings[-1], branches)
        sigmas = comfy.samplers.calculate_sigmas(model.model.model_sampling, "normal", 2)
        guider.sample(noise, torch.zeros_like(noise), comfy.samplers.KSAMPLER(sampler), sigmas, disable_pbar=True)
    return {name: Side(*map(statistics.median, zip(*took, strict=True))) for name, took in times.items()}


def print_table(task: Task, took: dict[str, Side]) -> float:
    """Print the table of one task; returns the ratio of CPU seconds, GCFG over one forward of the same batch."""
    print(f"\n{task.title}; median of {task.rounds} steps")
    print(f"{'':24}{'s / step':>10}{'CPU s / step':>14}{'GCFG / it':>11}{'of CPU s':>10}")
    ours = took[OURS]
    for name, side in took.items():
        ratios = ours.seconds / side.seconds, ours.cpu_seconds / side.cpu_seconds
        print(f"{name:24}{side.seconds:10.4f}{side.cpu_seconds:14.4f}{ratios[0]:11.2f}{ratios[1]:10.2f}")
    return ours.cpu_seconds / took[BATCH].cpu_seconds


def run(quick: bool) -> None:
    """Measure the toy model and the size of SD1.5, on the CPU."""
    comfyui = find_comfyui()
    if comfyui is None:
        sys.exit("ComfyUI was not found: set COMFYUI_PATH to its folder.")
    start_comfyui(comfyui)
    print(f"GCFG, one step with {BRANCHES} prompts and the unconditional one, CPU, {torch.get_num_threads()} threads")
    tasks = [Task("toy", 8, 10 if quick else 50), Task("sd1", 16 if quick else 32, 1 if quick else 5)]
    ratios = [print_table(task, measure(task)) for task in tasks]
    print(f"\nGCFG / one forward of the same batch: {', '.join(f'{r:.2f}' for r in ratios)} (target: at most {TARGET})")
