"""What a concept is asked to explain."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Prediction:
    """One forward pass of the U-Net in training, as loss terms see it.

    eps, eps_hat: (B, C, h, w) true and predicted noise. t: (B,). mask: (B, 1, h, w) in 0..1 at latent size, or None.
    """

    eps: Tensor
    eps_hat: Tensor
    t: Tensor
    mask: Tensor | None = None


def denoising_loss(prediction: Prediction) -> Tensor:
    """||eps - eps_theta||^2 of each sample (Ho et al. 2020, Eq. 14; ADI Eq. 1): (B,).

    The mean over elements; with a mask the mean over masked elements (HiFi Tuner, METHODS 4), so that a small
    subject weighs as much as a large one.
    """
    error = (prediction.eps - prediction.eps_hat).square()
    if prediction.mask is None:
        return error.mean(dim=(1, 2, 3))
    weight = prediction.mask.expand_as(error)
    return (error * weight).sum(dim=(1, 2, 3)) / weight.sum(dim=(1, 2, 3))
