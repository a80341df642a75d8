"""Reference-guided generation of HiFi Tuner (arXiv 2312.00079, section 3.3, Algorithm 2).

The second pass of a sampling: from t_s on, the subject's region starts out of the inverted reference x* and is drawn
along it by an unconditional context phi_h, optimised at each step as in null-text optimisation; around it the picture
goes on with the plain phi, and the next prediction harmonises the two.

What the algorithm repeats is computed once: the prompt's prediction of a step, which phi_h does not touch, and the
plain prediction as long as phi_h is still phi. Down to t_s both passes are the same, so the second may start from where
the first one was.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from .inversion import NOT_FINITE, REFERENCE_STEPS, PredictNoise, distance_to_stop_at, reconstruct
from .schedule import ddim_coefficients
from .trajectory import ABAR_TOLERANCE, Trajectory

GuidedNoise = Callable[[Tensor], Tensor]
"""eps of one x at one noise level with guidance, as a function of the unconditional context phi (B, T, d)."""

PredictGuided = Callable[[Tensor, int], GuidedNoise]
"""That function for VP latents x (B, C, h, w) at level i; what does not depend on phi is predicted at most once."""

NO_GRADIENT = (
    "Reference guidance has nothing to work with at guidance scale (cfg) 1: the unconditional prompt, through which it "
    "acts, then has no part in the picture. Use a CFG Guider with a cfg above 1 (the usual 7.5, for example)."
)


@dataclass(frozen=True)
class ReferenceSettings:
    """Of Algorithm 2; the defaults of the first four are the paper's.

    t_s, t_e: the first and the last guided step, counted down to 1 as in a sampling of 50 steps; of another number of
    steps the nearest are taken. inner_steps: J, of Adam, at most, for each guided step. learning_rate: its own.
    early_stop: as in `PivotalSettings`; 0: never. decay: let the learning rate fall to half over the sampling, as
    null-text optimisation does, since Adam carries phi_h far in J (t_s - t_e + 1) steps; the paper has no decay.
    """

    t_s: int = 40
    t_e: int = 10
    inner_steps: int = 10
    learning_rate: float = 1e-2
    early_stop: float = 1e-5
    decay: bool = True

    def check(self) -> None:
        """Raise ValueError unless 1 <= t_e <= t_s <= 50."""
        if self.t_s < self.t_e:
            raise ValueError(
                f"The guidance is to start at t_s = {self.t_s}, after its end at t_e = {self.t_e}: steps are counted "
                "down, so t_s must be the larger one (paper: 40 and 10)."
            )
        if not (self.t_e >= 1 and self.t_s <= REFERENCE_STEPS):
            raise ValueError(
                f"t_s = {self.t_s} and t_e = {self.t_e} must be within {REFERENCE_STEPS} (the first step) and 1 (the "
                "last)."
            )

    def levels(self, steps: int) -> range:
        """The noise levels, 0 the noisiest, at which the guided steps of a sampling start."""
        first, last = (max(1, int(t * steps / REFERENCE_STEPS + 0.5)) for t in (self.t_s, self.t_e))
        return range(steps - first, steps - last + 1)


@dataclass(frozen=True)
class Followed:
    """Guided steps. x: (B, C, h, w) VP latents after the last one. before, after: mean square distance to the reference
    inside the mask, averaged over the pictures, of each step with the context it started from and ended at.
    """

    x: Tensor
    before: tuple[float, ...]
    after: tuple[float, ...]


def classifier_free(
    conditional: PredictNoise, unconditional: Callable[[Tensor, int, Tensor], Tensor], w: float
) -> PredictGuided:
    """eps_0 + w (eps - eps_0), with the conditional eps predicted once for each x, without gradient.

    conditional, unconditional: as in `optimise_null_text`. Raises ValueError for w = 1, where phi has no part.
    """
    if w == 1:
        raise ValueError(NO_GRADIENT)

    def predict(x: Tensor, i: int) -> GuidedNoise:
        with torch.no_grad():
            eps = conditional(x, i)

        def guided(phi: Tensor) -> Tensor:
            eps_0 = unconditional(x, i, phi)
            return eps_0 + w * (eps - eps_0)

        return guided

    return predict


def ending(trajectory: Trajectory, abar: Tensor) -> Trajectory:
    """The last levels of a trajectory where these are abar (S + 1,), else all of it.

    A second pass that goes on from the first one samples along the end of the trajectory's noise levels.
    """
    count = len(abar)
    if count < len(trajectory.abar) and torch.allclose(
        abar.double().sqrt(), trajectory.abar[-count:].sqrt(), rtol=0, atol=ABAR_TOLERANCE
    ):
        return replace(trajectory, latents=trajectory.latents[-count:], abar=trajectory.abar[-count:])
    return trajectory


def latent_mask(mask: Tensor, size: tuple[int, int], grow: int = 0) -> Tensor:
    """M: a mask (H, W) in 0..1 as booleans (1, 1, h, w) over latents of `size`, inside where a latent is half covered.

    grow: latents that it is widened by on all sides; an empty one stays empty.
    """
    inside = F.adaptive_avg_pool2d(mask[None, None].float(), size) >= 0.5
    return F.max_pool2d(inside.float(), 2 * grow + 1, stride=1, padding=grow) > 0


def masked_distance(x: Tensor, goal: Tensor, mask: Tensor) -> Tensor:
    """Eq. 10: the mean square distance of latents (B, C, h, w) inside mask (B or 1, 1, h, w), for each picture (B,)."""
    weight = mask.expand_as(x).to(x.dtype)
    return ((x - goal).square() * weight).sum(dim=(1, 2, 3)) / weight.sum(dim=(1, 2, 3))


def follow_reference(
    predict: PredictGuided,
    trajectory: Trajectory,
    mask: Tensor,
    phi: Tensor,
    x: Tensor,
    settings: ReferenceSettings,
    gradient_scale: float = 1.0,
    callback: Callable[[int, Tensor], None] = lambda i, x_0: None,
) -> Followed:
    """The steps t_s .. t_e of Algorithm 2.

    trajectory: x*, of one picture. mask: M_r* (1, 1, h, w) of booleans, not empty. phi: (1, T, d). x: (B, C, h, w) VP
    latents of the first pass at t_s. gradient_scale: see `Backbone`. callback: called after each step with its level
    and the clean latents that it sees; may raise to cancel.

    Each step has an Adam of its own, as null-text optimisation does; phi_h goes on from step to step. Each picture of a
    batch is guided as if it were alone. Raises ValueError where phi has no part in the prediction, and where the
    distance is not finite.
    """
    steps, abar = trajectory.steps, trajectory.abar.tolist()
    levels = settings.levels(steps)
    reference, mask = trajectory.latents[levels.start : levels.stop + 1].to(x.device), mask.to(x.device)
    x = torch.where(mask, reference[0], x)
    phi_h, moved = phi.expand(len(x), -1, -1), False
    before, after = [], []
    for i, goal in zip(levels, reference[1:], strict=True):
        scale, shift = ddim_coefficients(abar[i], abar[i + 1])
        good_enough = distance_to_stop_at(settings.early_stop, i, steps)
        phi_h = phi_h.detach().clone().requires_grad_()
        optimizer = torch.optim.Adam([phi_h], lr=settings.learning_rate * (1 - settings.decay * i / (2 * steps)))
        guided = predict(x, i)
        with torch.no_grad():
            eps = guided(phi) if moved else None
        for inner in range(settings.inner_steps + 1):  # one more prediction than steps of Adam: the one that is kept
            with torch.set_grad_enabled(inner < settings.inner_steps):
                eps_h = guided(phi_h)
                distance = masked_distance(scale * x + shift * eps_h, goal, mask)
            if not distance.isfinite().all():
                raise ValueError(NOT_FINITE.format(step=i + 1))
            eps = eps_h.detach() if eps is None else eps
            if inner == 0:
                before.append(distance.mean().item())
            far = distance >= good_enough
            if inner == settings.inner_steps or not far.any():
                break
            _step(optimizer, phi_h, distance, far, gradient_scale)
            moved = True
        after.append(distance.mean().item())
        eps = torch.where(mask, eps_h.detach(), eps)
        callback(i, (x - (1 - abar[i]) ** 0.5 * eps) / abar[i] ** 0.5)
        x = scale * x + shift * eps
    return Followed(x, tuple(before), tuple(after))


def _step(
    optimizer: torch.optim.Optimizer, phi_h: Tensor, distance: Tensor, far: Tensor, gradient_scale: float
) -> None:
    """One step of Adam on the contexts phi_h (B, T, d) of the pictures that are still far (B,)."""
    if not distance.requires_grad:
        raise ValueError(NO_GRADIENT)
    reached = phi_h.detach().clone()
    optimizer.zero_grad()
    (distance.sum() * gradient_scale).backward()
    phi_h.grad /= gradient_scale
    optimizer.step()
    with torch.no_grad():
        phi_h.copy_(torch.where(far[:, None, None], phi_h, reached))


def generate_with_reference(
    predict: PredictGuided,
    trajectory: Trajectory,
    mask: Tensor,
    phi: Tensor,
    x: Tensor,
    settings: ReferenceSettings,
    start: int = 0,
    gradient_scale: float = 1.0,
    callback: Callable[[int, Tensor], None] = lambda i, x_0: None,
) -> Tensor:
    """The second pass of Algorithm 2, from x at level `start` to clean latents (B, C, h, w).

    x: the noise, or what the first pass had at a later level down to t_s, which saves predicting it again. The rest as
    in `follow_reference`. With an empty mask, or from a level after t_s, it is the first pass.
    """
    settings.check()
    guided = settings.levels(trajectory.steps)
    if not mask.any() or start > guided.start:
        return _plain(predict, trajectory.abar, x, phi, start, trajectory.steps)
    x = _plain(predict, trajectory.abar, x, phi, start, guided.start)
    x = follow_reference(predict, trajectory, mask, phi, x, settings, gradient_scale, callback).x
    return _plain(predict, trajectory.abar, x, phi, guided.stop, trajectory.steps)


def _plain(predict: PredictGuided, abar: Tensor, x: Tensor, phi: Tensor, start: int, stop: int) -> Tensor:
    """DDIM from level `start` to level `stop` with phi itself."""
    return reconstruct(lambda x, i: predict(x, start + i)(phi), abar[start : stop + 1], x)
