"""What a concept is asked to explain: the denoising loss, and the contract of the terms that can be added to it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from .backbone import Backbone
from .layouts import BoundLayout
from .prompts import Prompt


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

    The mean over elements; with a mask the mean over masked elements (HiFi Tuner Eq. 6, METHODS 4.7), so that a small
    subject weighs as much as a large one.
    """
    error = (prediction.eps - prediction.eps_hat).square()
    if prediction.mask is None:
        return error.mean(dim=(1, 2, 3))
    weight = prediction.mask.expand_as(error)
    return (error * weight).sum(dim=(1, 2, 3)) / weight.sum(dim=(1, 2, 3))


@dataclass(frozen=True)
class Learning:
    """What is being learned, as a loss term sees it when a run begins.

    name: the placeholder. prompts: of the exemplars, in their order.
    """

    backbone: Backbone
    name: str
    layout: BoundLayout
    init_word: str
    prompts: tuple[Prompt, ...]


class VectorTerm(ABC):
    """A loss of the vectors alone. The objective gets weight * value; value / denoising loss is shown as `label`."""

    label: str
    weight: float

    @abstractmethod
    def value(self, vectors: Mapping[str, Tensor], step: int, memory: dict[str, Tensor]) -> Tensor:
        """The loss, a scalar, of the A slots that a step reads: vectors {tower: (A, n, width)}, with their graph.

        memory: what the term keeps from step to step; it is saved with the run, so that a resumed one goes on alike.
        """

    def describe(self, vectors: Mapping[str, Tensor], memory: Mapping[str, Tensor]) -> str:
        """A line for the artist about where the term stands, or nothing. vectors: of all slots."""
        return ""


class PictureTerm(ABC):
    """A loss of each sample's forward pass. The objective gets weight * value; value / denoising loss is shown."""

    label: str
    weight: float

    @abstractmethod
    def watch(self, anchors: Sequence[int], roles: int) -> AbstractContextManager[Callable[[Prediction], Tensor]]:
        """To be open around the U-Net's forward pass on R roles of B anchors (role after role).

        anchors: B numbers of training prompts. Yields a function that gives, after the pass, (R * B,) values.
        """


class LossTerm(Protocol):
    """A term before a run begins: a frozen dataclass of plain values, whose str() takes part in the run's name.

    denoising_weight: what the denoising loss is multiplied with while the term is there.
    """

    denoising_weight: float

    def bind(self, learning: Learning) -> VectorTerm | PictureTerm:
        """The term for this run. Raises ValueError with a sentence where it cannot work."""
        ...


@dataclass(frozen=True)
class NullTextPrior:
    """HiFi Tuner's w_s ||c_s - phi_s||^2 (arXiv 2312.00079, Eq. 6), for the tail-rows layout.

    weight: w_s, with the sum over the n x d numbers of c_s, averaged over slots. The paper does not give it.
    """

    weight: float = 1e-5
    denoising_weight = 1.0

    def bind(self, learning: Learning) -> VectorTerm:
        """Raises ValueError for a layout whose vectors are words, which have no null text beside them."""
        if learning.layout.layout.place == "word":
            raise ValueError(
                "The null-text prior holds rows of the text encoder's output near those of the empty prompt: choose "
                "tail rows in Token Layout, or use Anchor Loss for words."
            )
        return _BoundPrior(self.weight)


class _BoundPrior(VectorTerm):
    label = "prior : denoising"

    def __init__(self, w_s: float) -> None:
        self.w_s, self.weight = w_s, float(w_s != 0)  # w_s in the value: what is shown is what it is set by

    def value(self, vectors: Mapping[str, Tensor], step: int, memory: dict[str, Tensor]) -> Tensor:
        # The vectors of tail rows are kept as c_s - phi_s.
        return self.w_s * sum(v.square().sum(dim=(1, 2)).mean() for v in vectors.values())
