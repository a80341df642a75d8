"""Generalised classifier-free guidance (GCFG, arXiv 2312.08195): any number of conditions, each with its own model.

eps^(z, C) = eps_0(z) + sum_i w_i (eps_i(z, c_i) - eps_0(z))   (Eq. 3)

w_i is what Stable Diffusion calls the guidance scale: one condition with w = 7.5 is plain CFG at 7.5. The coefficients
1 - sum w_i of eps_0 and w_i of eps_i sum to 1, so at one (z_t, t) the same formula combines noise, velocities and
clean latents alike. Rescaling and adaptive projection come after it, against the oversaturation of large sums.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

PIXELS = (-3, -2, -1)  # the dimensions of one sample: channels, height, width


@dataclass(frozen=True)
class GuidanceWeight:
    """w_i over the sampling, whose progress runs from 0 (pure noise) to 1 (clean).

    w: the guidance scale, any finite number; below 0 it guides away. start, end: within 0..1; outside start <= progress
    < end (end = 1 included) the weight is 0. curve: what w is multiplied by, given 0 at start to 1 at end.
    Raises ValueError when a number makes no sense.
    """

    w: float
    start: float = 0.0
    end: float = 1.0
    curve: Callable[[float], float] | None = None

    def __post_init__(self) -> None:
        if not math.isfinite(self.w):
            raise ValueError(f"The guidance weight is {self.w}: give it a finite number, such as 2.5.")
        if not (0 <= self.start <= 1 and 0 <= self.end <= 1):
            raise ValueError(
                f"The guidance is to act from {self.start} to {self.end}: start and end must be within 0 (the first "
                "step) and 1 (the last)."
            )
        if self.start > self.end:
            raise ValueError(
                f"The guidance is to start at {self.start}, after its end at {self.end}: exchange start and end."
            )

    @property
    def constant(self) -> bool:
        """Whether the weight is w at every progress."""
        return self.curve is None and self.start == 0 and self.end == 1

    def at(self, progress: float) -> float:
        """The weight at a progress within 0..1. Raises ValueError when the curve gives no finite number."""
        if not (self.start <= progress < self.end or (progress == self.end == 1)):
            return 0.0
        if self.curve is None:
            return self.w
        factor = float(self.curve((progress - self.start) / (self.end - self.start or 1)))
        if not math.isfinite(factor):
            raise ValueError(f"The weight curve is {factor} at {progress:.0%}: draw it with finite values.")
        return self.w * factor


def check_weights(weights: Sequence[GuidanceWeight]) -> None:
    """Raise ValueError unless there is a branch to guide, with a weight that is not 0."""
    if not weights:
        raise ValueError("No guidance branch is connected: connect at least one from 'Guidance Branch'.")
    if not any(weight.w for weight in weights):
        raise ValueError("All guidance weights are 0, which would ignore every prompt: raise one of them.")


def unconditional_coefficient(w: Sequence[float]) -> float:
    """1 - sum w_i, which multiplies eps_0; exactly 0 where only rounding keeps it from 0."""
    total = math.fsum(w)
    return 0.0 if math.isclose(total, 1.0) else 1 - total


def combine(eps: Sequence[Tensor], w: Sequence[float], eps_0: Tensor | None) -> Tensor:
    """Eq. 3 in fp32: eps_0 + sum_i w_i (eps_i - eps_0).

    eps: K predictions (B, C, h, w) of noise, velocity or clean latents, eps_0 the unconditional one. Without eps_0,
    sum_i w_i eps_i, which is the same when the weights sum to 1.
    """
    if eps_0 is None:
        return sum(w_i * eps_i.float() for w_i, eps_i in zip(w, eps, strict=True))
    eps_0 = eps_0.float()
    combined = eps_0
    for w_i, eps_i in zip(w, eps, strict=True):
        combined = combined + (eps_i.float() - eps_0) * w_i
    return combined


def rescale(
    combined: Tensor, x_0: Sequence[Tensor], w: Sequence[float], x: Tensor, sigma: Tensor, phi: float
) -> Tensor:
    """Guidance rescale (Lin et al. 2023, arXiv 2305.08891, Eq. 15-16): back to the contrast of the conditions.

    combined, x_0: clean latents (B, C, h, w), guided and of each condition. x = x_0 + sigma eps, sigma (B,), the noisy
    latents they were predicted from. phi: 0 leaves `combined`, 1 gives it the standard deviation of the conditions, the
    mean of theirs by |w_i|. As in the paper that of velocities is meant, over each sample.
    """
    sigma = sigma.float().view(-1, 1, 1, 1)
    variance = 1 + sigma.square()

    def velocity(clean: Tensor) -> Tensor:
        return (x - variance * clean.float()) / (sigma * variance.sqrt())

    sizes = [abs(w_i) for w_i in w]
    spread = sum(s * velocity(c).std(dim=PIXELS, keepdim=True) for s, c in zip(sizes, x_0, strict=True)) / sum(sizes)
    v = velocity(combined)
    v = v * (phi * spread / v.std(dim=PIXELS, keepdim=True) + 1 - phi)
    return (x - sigma * variance.sqrt() * v) / variance


@dataclass
class AdaptiveProjection:
    """Adaptive projected guidance (APG; Sadat et al. 2024, arXiv 2410.02416, Algorithm 1) on the combined guidance.

    GCFG is plain CFG at the scale W = sum w_i with the condition D = sum_i w_i D_i / W; APG changes D - D_0, in clean
    latents. eta: how much of its part along D stays, which saturates; the paper takes 0. norm_threshold: r, its
    largest L2 norm, 0 for any. momentum: beta, the share of the earlier steps' sum added to it, negative in the paper.
    With eta = 1 and the others 0 it changes nothing. Keeps the running sum: take a new one for each sampling.
    """

    eta: float = 1.0
    norm_threshold: float = 0.0
    momentum: float = 0.0
    running: Tensor | None = field(default=None, repr=False)

    @property
    def off(self) -> bool:
        """Whether it changes nothing."""
        return self.eta == 1 and self.norm_threshold == 0 and self.momentum == 0

    def guide(self, combined: Tensor, D_0: Tensor | None, w: Sequence[float]) -> Tensor:
        """D + (W - 1) APG(D - D_0), in place of combined = D + (W - 1) (D - D_0); all (B, C, h, w).

        A W of 1 or less guides no further than the conditions themselves: then `combined` stays, and D_0 may be None.
        """
        excess = -unconditional_coefficient(w)  # W - 1
        if self.off or excess <= 0:
            return combined
        delta = (combined - D_0.float()) / (1 + excess)
        D = D_0.float() + delta
        if self.momentum:
            delta = delta if self.running is None else delta + self.momentum * self.running
            self.running = delta
        if self.norm_threshold:
            norm = torch.linalg.vector_norm(delta, dim=PIXELS, keepdim=True)
            delta = delta * (self.norm_threshold / norm).clamp(max=1)
        along = torch.nn.functional.normalize(D.flatten(1), dim=1).view_as(D)
        parallel = (delta * along).sum(dim=PIXELS, keepdim=True) * along
        return D + excess * (delta - (1 - self.eta) * parallel)
