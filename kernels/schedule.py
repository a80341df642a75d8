"""The variance-preserving noise schedule: x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps (Ho et al. 2020, Eq. 4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class NoiseSchedule:
    """abar_t, the cumulative product of the alphas, for t = 0 .. T-1 (float64 inside, float32 outside)."""

    def __init__(self, alphas_cumprod: Tensor) -> None:
        self.alphas_cumprod = alphas_cumprod.detach().to("cpu", torch.float64)

    @classmethod
    def scaled_linear(cls, steps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012) -> NoiseSchedule:
        """Stable Diffusion's schedule: sqrt(beta) is linear in t."""
        beta = torch.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=torch.float64) ** 2
        return cls(torch.cumprod(1 - beta, dim=0))

    def __len__(self) -> int:
        return len(self.alphas_cumprod)

    def abar(self, t: Tensor) -> Tensor:
        """abar at integer timesteps t (B,), shaped (B, 1, 1, 1) on the device of t."""
        return self.alphas_cumprod[t.cpu()].to(t.device, torch.float32).view(-1, 1, 1, 1)

    def add_noise(self, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """x_t of clean latents x_0 (B, C, h, w) at timesteps t (B,) with noise eps."""
        abar = self.abar(t)
        return abar.sqrt() * x_0 + (1 - abar).sqrt() * eps

    def eps_from_v(self, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
        """eps of a velocity prediction v = sqrt(abar) eps - sqrt(1 - abar) x_0 (Salimans & Ho 2022)."""
        abar = self.abar(t)
        return abar.sqrt() * v + (1 - abar).sqrt() * x_t

    def ddim_step(
        self, x_t: Tensor, eps: Tensor, t: int, t_next: int, eta: float = 0.0, fresh: Tensor | None = None
    ) -> Tensor:
        """DDIM step from timestep t to t_next (Song et al. 2021, Eq. 12).

        t_next > t is the inverse step. t_next = -1 stands for the clean picture, abar = 1. eta: 0 for the
        deterministic step, 1 for DDPM's (Eq. 16); then `fresh` is new noise of x_t's shape.
        """
        abar, abar_next = self.abar_along([t, t_next])[:2].tolist()
        sigma = eta * ((1 - abar_next) / (1 - abar) * (1 - abar / abar_next)) ** 0.5 if eta else 0.0
        scale, shift = ddim_coefficients(abar, abar_next, sigma)
        x_next = scale * x_t + shift * eps
        return x_next + sigma * fresh if eta else x_next

    def abar_along(self, timesteps: Sequence[int]) -> Tensor:
        """abar of a sampling that visits S timesteps and ends at the clean picture: (S + 1,) float64, the last one 1.

        A timestep of -1 stands for the clean picture as well.
        """
        clean = torch.ones(1, dtype=torch.float64)
        return torch.cat([torch.cat([self.alphas_cumprod, clean])[list(timesteps)], clean])

    def sampling_timesteps(self, steps: int) -> list[int]:
        """`steps` timesteps from noisy to clean, evenly spaced, the first one T-1.

        Raises ValueError when steps is not within 1..T.
        """
        if not 1 <= steps <= len(self):
            raise ValueError(f"steps must be within 1..{len(self)}, got {steps}.")
        return [len(self) - 1 - i * len(self) // steps for i in range(steps)]


def ddim_coefficients(abar: float, abar_next: float, sigma: float = 0.0) -> tuple[float, float]:
    """(scale, shift) of the DDIM step x_next = scale x + shift eps (Song et al. 2021, Eq. 12), sigma its fresh noise.

    Deterministic (sigma = 0), they are beta_t and -gamma_t of METHODS 0.5; x = (x_next - shift eps) / scale undoes the
    step.
    """
    scale = (abar_next / abar) ** 0.5
    return scale, (1 - abar_next - sigma**2) ** 0.5 - scale * (1 - abar) ** 0.5
