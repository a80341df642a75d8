"""The denoising loss and the terms beside it, as one thing for the training loop to ask."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .losses import Learning, LossTerm, PictureTerm, Prediction, VectorTerm, denoising_loss


class SampleLosses(NamedTuple):
    """Of each of B samples: what is minimised (B,), the denoising loss in it (B,), and the terms' values (B,)."""

    total: Tensor
    denoising: Tensor
    terms: dict[str, Tensor]

    def detached(self, shape: tuple[int, ...]) -> SampleLosses:
        """Without the graph, each in another shape."""
        terms = {label: value.detach().view(shape) for label, value in self.terms.items()}
        return SampleLosses(self.total.detach().view(shape), self.denoising.detach().view(shape), terms)


@dataclass(frozen=True)
class Objective:
    """What training minimises: denoising_weight * denoising loss + the weighted terms."""

    denoising_weight: float = 1.0
    picture_terms: tuple[PictureTerm, ...] = ()
    vector_terms: tuple[VectorTerm, ...] = ()

    @classmethod
    def of(cls, terms: Sequence[LossTerm], learning: Learning) -> Objective:
        """Bind the terms of a run. One of weight 0 is left out, so that it costs nothing and changes no bit.

        Raises ValueError for two of a kind, which would share what they show and keep.
        """
        bound = [term for term in (term.bind(learning) for term in terms) if term.weight]
        labels = [term.label for term in bound]
        if twice := next((label for label in labels if labels.count(label) > 1), None):
            raise ValueError(f'Two loss terms are of one kind, "{twice}": connect a single one of each kind.')
        return cls(
            math.prod(term.denoising_weight for term in terms),
            tuple(term for term in bound if isinstance(term, PictureTerm)),
            tuple(term for term in bound if isinstance(term, VectorTerm)),
        )

    @contextmanager
    def watch(self, anchors: Sequence[int], roles: int) -> Iterator[Callable[[Prediction], SampleLosses]]:
        """To be open around a forward pass on R roles of B anchors; what it yields gives the losses after it."""
        with ExitStack() as stack:
            values = [stack.enter_context(term.watch(anchors, roles)) for term in self.picture_terms]

            def losses(prediction: Prediction) -> SampleLosses:
                denoising = denoising_loss(prediction)
                total, by_label = self.denoising_weight * denoising, {}
                for term, value in zip(self.picture_terms, values, strict=True):
                    by_label[term.label] = value(prediction)
                    total = total + term.weight * by_label[term.label]
                return SampleLosses(total, denoising, by_label)

            yield losses

    def pull(
        self, vectors: Mapping[str, Tensor], slots: Sequence[int], step: int, memory: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """What the terms of the vectors alone ask: their weighted gradient {tower: (S, n, width)} and their values.

        vectors: {tower: (S, n, width)}. slots: those that this step's pictures read; the others are not pulled.
        """
        leaves = {tower: v.detach().clone().requires_grad_() for tower, v in vectors.items()}
        read = {tower: leaf[list(slots)] for tower, leaf in leaves.items()}
        values = {term.label: term.value(read, step, memory) for term in self.vector_terms}
        if values:
            total = torch.stack([t.weight * values[t.label] for t in self.vector_terms]).sum()
            total.backward()
        gradients = {t: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for t, leaf in leaves.items()}
        return gradients, {label: value.item() for label, value in values.items()}

    def describe(self, vectors: Mapping[str, Tensor], memory: Mapping[str, Tensor]) -> list[str]:
        """Lines for the artist about where the terms stand."""
        lines = [term.describe(vectors, memory) for term in self.vector_terms]
        return [line for line in lines if line]


DENOISING = Objective()  # nothing but the denoising loss
