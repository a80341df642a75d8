"""The path that DDIM inversion finds from a picture to noise: x_T* .. x_0*, which other methods follow back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ABAR_TOLERANCE = 1e-4  # of sqrt(abar): float32 noise levels from another sampler's arithmetic agree to 1e-6


@dataclass(frozen=True)
class Trajectory:
    """A picture at S + 1 noise levels, from the noisiest to the clean one; level i is where step i starts.

    latents: (S + 1, B, C, h, w) VP latents, float32, on the CPU. abar: (S + 1,) float64, rising to 1.
    model: fingerprint of the model that it was found with.
    """

    latents: Tensor
    abar: Tensor
    model: str

    @property
    def steps(self) -> int:
        """S, the number of sampling steps."""
        return len(self.abar) - 1

    def check_model(self, model: str) -> None:
        """Raise ValueError unless the model with the fingerprint `model` found this trajectory."""
        if model != self.model:
            raise ValueError(
                "The trajectory was found with another MODEL (other weights or other LoRAs): connect the MODEL of "
                "'DDIM Inversion' here as well, or invert the picture with this one."
            )

    def check_sampling(self, abar: Tensor, shape: Sequence[int]) -> None:
        """Raise ValueError unless a sampling along abar (S + 1,) of latents (C, h, w) can follow this trajectory."""
        if len(abar) != len(self.abar):
            raise ValueError(
                f"The trajectory has {self.steps} steps and the sampling {len(abar) - 1}: connect the sigmas of 'DDIM "
                "Inversion' to the sampler, or give both the same steps and scheduler."
            )
        if not torch.allclose(abar.double().sqrt(), self.abar.sqrt(), rtol=0, atol=ABAR_TOLERANCE):
            raise ValueError(
                "The trajectory and the sampling go through other noise levels: connect the sigmas of 'DDIM Inversion' "
                "to the sampler, or give both the same scheduler."
            )
        own = tuple(self.latents.shape[2:])
        if own != tuple(shape):
            raise ValueError(
                f"The trajectory holds latents of size {_size(own)}, the sampling is of size {_size(shape)}: sample at "
                "the size of the inverted picture, with the VAE of the same checkpoint."
            )


def _size(shape: Sequence[int]) -> str:
    channels, height, width = shape
    return f"{height} x {width} with {channels} channels"
