"""From a picture back to the noise it is sampled from, and the unconditional prompts that lead there with guidance.

DDIM inversion as in Null-text Inversion (Mokady et al. 2023) and HiFi Tuner (arXiv 2312.00079, sections 3.3, 3.4). A
step from noise level i to i + 1 uses eps(x_i, i), so its inverse is the x_i with step(x_i, eps(x_i, i)) = x_{i+1}. The
published inversion takes eps at level i of x_{i+1} instead; here that is the first of a few fixed-point iterations
(Pan et al. 2023, "Effective Real Image Editing with Accelerated Iterative Diffusion Inversion").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .backbone import Backbone
from .conditioning import StagedContext
from .schedule import ddim_coefficients
from .trajectory import Trajectory

PredictNoise = Callable[[Tensor, int], Tensor]
"""eps_theta(x, i) of VP latents x (B, C, h, w) at noise level i of a sampling, 0 the noisiest."""

CONVERGED = 1e-4  # RMS of a fixed-point iteration's change, in latents of unit variance: a fiftieth of an 8-bit step
REFERENCE_STEPS = 50  # of the sampling that the reference's early stop was written for

NOT_FINITE = (
    "The distance to the picture is not finite at step {step}: lower the learning rate, or load the checkpoint in bf16 "
    "or fp32 if it runs in fp16."
)


def predict_along(backbone: Backbone, context: StagedContext, timesteps: Sequence[int]) -> PredictNoise:
    """The noise predictions of a backbone at `timesteps`, one a noise level; context: of the latents' batch."""

    def predict(x: Tensor, i: int) -> Tensor:
        t = torch.full((len(x),), timesteps[i], device=x.device)
        return backbone.predict_noise(x, t, context.at(timesteps[i]))

    return predict


@torch.no_grad()
def invert(
    predict: PredictNoise,
    abar: Tensor,
    x_0: Tensor,
    iterations: int = 5,
    callback: Callable[[int], None] = lambda step: None,
) -> Tensor:
    """The latents (S + 1, B, C, h, w) through which DDIM with guidance scale w = 1 leads to x_0 (B, C, h, w), the last.

    abar: (S + 1,) of the noise levels, rising to 1. iterations: at most so many more predictions a step, fewer where
    they no longer change anything; 0 is the published inversion. callback: called with the number of finished steps,
    may raise to cancel.
    """
    levels, path = abar.tolist(), [x_0]
    for i in reversed(range(len(levels) - 1)):
        path.append(_noisier(predict, i, path[-1], *ddim_coefficients(levels[i], levels[i + 1]), iterations))
        callback(len(path) - 1)
    return torch.stack(path[::-1])


def _noisier(predict: PredictNoise, i: int, x_next: Tensor, scale: float, shift: float, iterations: int) -> Tensor:
    """The x at level i with scale x + shift eps(x, i) = x_next, as near as `iterations` beyond the first bring it.

    Each picture of the batch ends by itself.
    """
    x = (x_next - shift * predict(x_next, i)) / scale
    x_before, change_before = x, _rms(x - x_next)
    going = change_before >= CONVERGED
    for _ in range(iterations):
        if not going.any():
            break
        x_after = (x_next - shift * predict(x, i)) / scale
        change = _rms(x_after - x)
        worse = change > change_before  # x misses x_next by more than x_before did: rounding, or a step too large
        best = torch.where(worse, x_before, x_after)
        x_before, x = x, torch.where(going, best, x)
        going = going & ~worse & (change >= CONVERGED)
        change_before = change
    return x


def _rms(x: Tensor) -> Tensor:
    """(B, 1, 1, 1): of each picture."""
    return x.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()


@torch.no_grad()
def reconstruct(
    predict: PredictNoise, abar: Tensor, x: Tensor, callback: Callable[[int], None] = lambda step: None
) -> Tensor:
    """DDIM with w = 1 along abar (S + 1,) from x (B, C, h, w) at the noisiest level. Returns clean latents."""
    levels = abar.tolist()
    for i in range(len(levels) - 1):
        scale, shift = ddim_coefficients(levels[i], levels[i + 1])
        x = scale * x + shift * predict(x, i)
        callback(i + 1)
    return x


def psnr(a: Tensor, b: Tensor, peak: float | Tensor) -> list[float]:
    """Peak signal-to-noise ratio in dB of each element of two batches. peak: the range of their values, or (B,)."""
    return (10 * torch.log10(peak**2 / (a - b).square().flatten(1).mean(dim=1))).tolist()


@dataclass(frozen=True)
class PivotalSettings:
    """Of null-text optimisation; the defaults are those of its reference code (METHODS 4.5).

    w: guidance scale that the result will be used with. inner_steps: of Adam, at most, for each sampling step.
    learning_rate: of the first sampling step, it falls to half by the last. early_stop: mean square distance to the
    pivot at which the first sampling step is good enough; it grows to 100 times that by the last. 0: never.
    """

    w: float = 7.5
    inner_steps: int = 10
    learning_rate: float = 1e-2
    early_stop: float = 1e-5

    def check(self) -> None:
        """Raise ValueError for w = 1, where there is no gradient."""
        if self.w == 1:
            raise ValueError(
                "Null-text optimisation has nothing to work with at guidance scale (cfg) 1: the unconditional prompt "
                "then has no part in the picture. Set cfg to the value that the sampler will use, above 1, or sample "
                "from the inverted noise at cfg 1, which needs no optimisation."
            )


@dataclass(frozen=True)
class NullText:
    """Unconditional contexts phi_t that make guided sampling retrace a trajectory.

    contexts: (1, T, d) on the CPU for each of S steps, from noise to clean. before, after: mean square distance to the
    pivot of each step, with the context it started from and with the one it ended at. x_0: (1, C, h, w) VP latents that
    the sampling ends at.
    """

    contexts: tuple[Tensor, ...]
    before: tuple[float, ...]
    after: tuple[float, ...]
    x_0: Tensor


def optimise_null_text(
    conditional: PredictNoise,
    unconditional: Callable[[Tensor, int, Tensor], Tensor],
    trajectory: Trajectory,
    phi: Tensor,
    settings: PivotalSettings,
    gradient_scale: float = 1.0,
    callback: Callable[[int], None] = lambda step: None,
) -> NullText:
    """Null-text optimisation along a pivotal trajectory (Mokady et al. 2023, Algorithm 1; HiFi Tuner Eq. 4).

    conditional: predictions with the prompt, one a step without gradient. unconditional: eps_theta(x, i, phi),
    differentiable in phi (1, T, d), where phi starts; each step goes on from the one before. gradient_scale: see
    `Backbone`. callback: called with the number of finished steps, may raise to cancel.

    Of all contexts tried in a step the best is kept, so no step ends farther from its pivot than it started. Raises
    ValueError for a trajectory of several pictures, for w = 1 and where the loss is not finite.
    """
    settings.check()
    if trajectory.latents.shape[1] != 1:
        raise ValueError(
            f"The trajectory holds {trajectory.latents.shape[1]} pictures, and null-text optimisation works on one: "
            "pick it with 'Latent From Batch' before 'DDIM Inversion'."
        )
    levels, steps = trajectory.abar.tolist(), trajectory.steps
    x = trajectory.latents[0].to(phi.device)
    contexts, before, after = [], [], []
    for i in range(steps):
        pivot = trajectory.latents[i + 1].to(phi.device)
        scale, shift = ddim_coefficients(levels[i], levels[i + 1])
        good_enough = distance_to_stop_at(settings.early_stop, i, steps)
        phi = phi.detach().clone().requires_grad_()
        optimizer = torch.optim.Adam([phi], lr=settings.learning_rate * (1 - i / (2 * steps)))
        with torch.no_grad():
            eps = conditional(x, i)
        tried: list[tuple[float, Tensor, Tensor]] = []
        for inner in range(settings.inner_steps + 1):  # one more prediction, to see where the last step of Adam led
            with torch.set_grad_enabled(inner < settings.inner_steps):
                eps_0 = unconditional(x, i, phi)
                x_next = scale * x + shift * (eps_0 + settings.w * (eps - eps_0))
                loss = (x_next - pivot).square().mean()
            if not loss.isfinite():
                raise ValueError(NOT_FINITE.format(step=i + 1))
            tried.append((loss.item(), phi.detach().clone(), x_next.detach()))
            if inner == settings.inner_steps or loss < good_enough:
                break
            optimizer.zero_grad()
            (loss * gradient_scale).backward()
            phi.grad /= gradient_scale
            optimizer.step()
        distance, phi, x = min(tried, key=lambda one: one[0])
        contexts.append(phi.cpu())
        before.append(tried[0][0])
        after.append(distance)
        callback(i + 1)
    return NullText(tuple(contexts), tuple(before), tuple(after), x.cpu())


def distance_to_stop_at(early_stop: float, i: int, steps: int) -> float:
    """Mean square distance at which step i of `steps` is good enough: 1e-5 + i * 2e-5 in the reference, at 50 steps."""
    return early_stop * (1 + 2 * i * REFERENCE_STEPS / steps)


def stage_starts(timesteps: Sequence[int]) -> tuple[int, ...]:
    """The starts of a `StagedContext` in which every timestep belongs to the nearest of S falling `timesteps`.

    Ascending, so the first stage is that of the last, cleanest timestep. Raises ValueError where two are the same.
    """
    if len(set(timesteps)) < len(timesteps):
        raise ValueError(
            "Two steps of the trajectory are so close that they share a timestep, and cannot have prompts of their "
            "own: invert with fewer steps, or with the scheduler ddim_uniform."
        )
    return tuple(sorted([0, *((noisier + cleaner + 1) // 2 for noisier, cleaner in pairwise(timesteps))]))
