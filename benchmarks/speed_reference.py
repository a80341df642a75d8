"""Cost of reference guidance: python -m concept_atelier.benchmarks.speed reference [--quick]

A picture of the toy world is followed by Algorithm 2 of HiFi Tuner as it is written, and by ours, with the paper's t_s,
t_e, J and learning rate. Both make the first pass and the second; the inversion, the same for both, is done before. All
sides take turns, so that a busy machine slows them alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..kernels.backbone import TextContext
from ..kernels.conditioning import StagedContext
from ..kernels.diffusers_backbone import DiffusersBackbone
from ..kernels.inversion import PredictNoise, invert, predict_along, reconstruct
from ..kernels.prompts import Prompt
from ..kernels.reference import ReferenceSettings, classifier_free, generate_with_reference, latent_mask
from ..kernels.schedule import ddim_coefficients
from ..kernels.trajectory import Trajectory
from ..toyworld.exemplars import subject_scenes
from ..toyworld.model import load_toy
from ..toyworld.render import render_with_mask
from ..toyworld.vocabulary import caption

TARGET, AGREEMENT = 0.6, 1e-4
W = 7.5
# Every optimisation step is made, none stops early: the work is then the same for all.
SETTINGS = ReferenceSettings(early_stop=0.0)
PLAIN, NAIVE, FROZEN, OURS = "plain picture", "naive Algorithm 2", "naive, weights frozen", "ours"


@dataclass(frozen=True)
class Work:
    """What is measured. conditional, unconditional: predictions with the prompt, and with phi; both: with the two in
    one batch, phi first. decode: latents to pictures in 0..1. x: the noise. mask: over the latents.
    """

    unet: nn.Module
    conditional: PredictNoise
    unconditional: Callable[[Tensor, int, Tensor], Tensor]
    both: Callable[[Tensor, int, Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]
    trajectory: Trajectory
    mask: Tensor
    phi: Tensor
    x: Tensor


class Side(NamedTuple):
    """What a picture took, at the median: seconds, and CPU seconds. picture: it, (1, H, W, 3) in 0..1."""

    seconds: float
    cpu_seconds: float
    picture: Tensor


def make_work(steps: int) -> Work:
    """A robot of the toy world, inverted along `steps` noise levels."""
    backbone = DiffusersBackbone.from_toy(load_toy())
    reference, generated = subject_scenes("robot", 2)
    picture, covered = (torch.from_numpy(part.copy()).float() / 255 for part in render_with_mask(reference))
    timesteps = backbone.schedule.sampling_timesteps(steps)
    abar = backbone.schedule.abar_along(timesteps)

    def predict(rows: Tensor, x: Tensor, i: int) -> Tensor:
        context = StagedContext((0,), (TextContext.plain(rows, backbone.layers),), {})
        return predict_along(backbone, context, timesteps)(x, i)

    with torch.no_grad():
        words, phi = (backbone.encode_text(Prompt((text,)), {}).hidden for text in (caption(generated), ""))
        x_0 = backbone.encode_image(picture[None])
        path = invert(lambda x, i: predict(words, x, i), abar, x_0)
    return Work(
        backbone.unet,
        lambda x, i: predict(words, x, i),
        lambda x, i, phi: predict(phi, x, i),
        lambda x, i, phi: predict(torch.cat([phi, words]), x.repeat(2, 1, 1, 1), i),
        backbone.decode_latent,
        Trajectory(path, abar, ""),
        latent_mask(covered, x_0.shape[-2:]),
        phi,
        torch.randn(x_0.shape, generator=torch.Generator().manual_seed(0)),
    )


def guided_noise(work: Work) -> Callable[[Tensor, int, Tensor], Tensor]:
    """Guidance as samplers compute it: both prompts in one batch."""

    def eps(x: Tensor, i: int, phi: Tensor) -> Tensor:
        eps_0, eps_c = work.both(x, i, phi).chunk(2)
        return eps_0 + W * (eps_c - eps_0)

    return eps


def plain(work: Work) -> Tensor:
    """The first pass."""
    eps = guided_noise(work)
    return reconstruct(lambda x, i: eps(x, i, work.phi), work.trajectory.abar, work.x)


def naive(work: Work, frozen: bool) -> Tensor:
    """Algorithm 2 line by line, after its first pass. frozen: whether the weights ask for no gradients."""
    plain(work)
    work.unet.requires_grad_(not frozen)
    eps = guided_noise(work)
    abar, x = work.trajectory.abar.tolist(), work.x
    levels = SETTINGS.levels(work.trajectory.steps)

    def F(x: Tensor, i: int, phi: Tensor) -> Tensor:
        scale, shift = ddim_coefficients(abar[i], abar[i + 1])
        return scale * x + shift * eps(x, i, phi)

    inside = work.mask.expand_as(x)
    for i in range(work.trajectory.steps):
        if i == levels.start:
            phi_h, x = work.phi.clone(), torch.where(inside, work.trajectory.latents[i], x)
        with torch.no_grad():
            x_next = F(x, i, work.phi)
        if i in levels:
            phi_h = phi_h.detach().requires_grad_()
            adam = torch.optim.Adam([phi_h], lr=SETTINGS.learning_rate * (1 - i / (2 * work.trajectory.steps)))
            for _ in range(SETTINGS.inner_steps):
                adam.zero_grad()
                (work.trajectory.latents[i + 1] - F(x, i, phi_h))[inside].square().mean().backward()
                adam.step()
            with torch.no_grad():
                x_next = torch.where(inside, F(x, i, phi_h), x_next)
        x = x_next
    work.unet.requires_grad_(False)
    work.unet.zero_grad()
    return x


def ours(work: Work) -> Tensor:
    """The kernel, which goes on from the first pass at t_s."""
    start = SETTINGS.levels(work.trajectory.steps).start
    abar, eps = work.trajectory.abar, guided_noise(work)
    x = reconstruct(lambda x, i: eps(x, i, work.phi), abar[: start + 1], work.x)
    reconstruct(lambda x, i: eps(x, start + i, work.phi), abar[start:], x)  # the rest of the first pass
    predict = classifier_free(work.conditional, work.unconditional, W)
    return generate_with_reference(predict, work.trajectory, work.mask, work.phi, x, SETTINGS, start)


SIDES: dict[str, Callable[[Work], Tensor]] = {
    PLAIN: plain,
    NAIVE: partial(naive, frozen=False),
    FROZEN: partial(naive, frozen=True),
    OURS: ours,
}


def measure(steps: int, rounds: int) -> dict[str, Side]:
    """All sides in turns."""
    work = make_work(steps)
    plain(work)  # to warm up
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in SIDES}
    found = {}
    for _ in range(rounds):
        for name, side in SIDES.items():
            start = time.perf_counter(), time.process_time()
            found[name] = side(work)
            times[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))
    return {name: Side(*map(statistics.median, zip(*taken)), work.decode(found[name])) for name, taken in times.items()}


def print_table(sides: dict[str, Side]) -> float:
    """Print what all sides took; returns the ratio of CPU seconds, ours over naive."""
    print(f"{'':24}{'s / picture':>12}{'CPU s':>9}{'of plain':>10}{'of naive':>10}{'difference':>12}")
    for name, side in sides.items():
        ratios = [side.cpu_seconds / sides[other].cpu_seconds for other in (PLAIN, NAIVE)]
        apart = "" if name == PLAIN else f"{(side.picture - sides[NAIVE].picture).abs().max():12.1e}"
        print(f"{name:24}{side.seconds:12.2f}{side.cpu_seconds:9.2f}{ratios[0]:10.1f}{ratios[1]:10.2f}{apart}")
    return sides[OURS].cpu_seconds / sides[NAIVE].cpu_seconds


def run(quick: bool) -> None:
    """Measure the toy model on the CPU."""
    steps, rounds = (10, 3) if quick else (50, 3)
    guided = len(SETTINGS.levels(steps))
    print(f"Reference guidance, toy model, {steps} DDIM steps, {guided} guided with J = {SETTINGS.inner_steps}, CPU,")
    print(f"{torch.get_num_threads()} threads, median of {rounds} rounds; difference: of pictures in 0..1 from naive's")
    print(
        "naive: every F predicts both prompts in one batch, through a model as it is loaded; ours keeps what repeats\n"
    )
    sides = measure(steps, rounds)
    ratio = print_table(sides)
    difference = (sides[OURS].picture - sides[NAIVE].picture).abs().max()
    print(f"\nours / naive: {ratio:.2f} (target: at most {TARGET}); difference {difference:.1e} (at most {AGREEMENT})")
