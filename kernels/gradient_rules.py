"""Which pictures a training step compares, and which part of their gradients the vectors may follow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from .exemplars import EncodedExemplars, Exemplar
from .gradient_mask import GradientMask, action_mask, context_mask, independent_overlap, overlap


@dataclass(frozen=True)
class RolePictures:
    """The pictures that share one anchor's prompt. latents: (R, C, h, w). masks: (R, 1, h, w) or None."""

    latents: Tensor
    masks: Tensor | None


@dataclass(frozen=True)
class Update:
    """What the optimiser gets. gradient: (S, n, width). movable: bool of that shape, or None when all may move.

    stats: numbers worth showing beside the loss.
    """

    gradient: Tensor
    movable: Tensor | None = None
    stats: dict[str, float] = field(default_factory=dict)


class GradientRule(Protocol):
    """A rule draws the pictures of each role and combines their gradients.

    moves_all: whether every number of the vectors may move in every step.
    """

    share_noise: bool
    share_timestep: bool
    moves_all: bool

    def check(self, exemplars: Sequence[Exemplar]) -> None:
        """Raise ValueError with a sentence when the rule cannot work with these exemplars."""
        ...

    def pictures(self, data: EncodedExemplars, anchor: int, generator: torch.Generator) -> RolePictures:
        """The pictures compared under exemplar `anchor`'s prompt; role 0 is the anchor itself."""
        ...

    def combine(self, gradients: Tensor, generator: torch.Generator) -> Update:
        """From gradients (R, B, S, n, width) of every role and anchor to the one the optimiser gets."""
        ...


@dataclass(frozen=True)
class PlainGradient:
    """No rule: the exemplars' own gradient, averaged over the batch (Textual Inversion, P+)."""

    share_noise: bool = True
    share_timestep: bool = True
    moves_all = True

    def check(self, exemplars: Sequence[Exemplar]) -> None:
        """Any exemplars will do."""

    def pictures(self, data: EncodedExemplars, anchor: int, generator: torch.Generator) -> RolePictures:
        """The anchor alone."""
        one = slice(anchor, anchor + 1)
        return RolePictures(data.latents[one], None if data.masks is None else data.masks[one])

    def combine(self, gradients: Tensor, generator: torch.Generator) -> Update:
        """The mean over anchors."""
        return Update(gradients[0].mean(dim=0))


@dataclass(frozen=True)
class MaskedTriples:
    """ADI's rule on triples: context-different, anchor, action-different (section 4.2)."""

    mask: GradientMask

    @property
    def share_noise(self) -> bool:
        """Whether the three pictures get the same noise."""
        return self.mask.share_noise

    @property
    def share_timestep(self) -> bool:
        """Whether the three pictures get the same timestep."""
        return self.mask.share_timestep

    @property
    def moves_all(self) -> bool:
        """Not where the update itself is masked."""
        return self.mask.target != "update"

    def check(self, exemplars: Sequence[Exemplar]) -> None:
        """Triples need a second exemplar and, for each, pictures of other actions."""
        if len(exemplars) < 2:
            raise ValueError(
                "ADI compares pictures of the same action in different contexts and needs at least two exemplars; "
                "there is one: add pictures of other people doing it."
            )
        lacking = [str(i + 1) for i, e in enumerate(exemplars) if not e.other_actions]
        if lacking:
            raise ValueError(
                f"Exemplar {', '.join(lacking)} has no pictures of other actions, which the gradient mask needs: "
                "route the exemplars through the Triples node."
            )

    def pictures(self, data: EncodedExemplars, anchor: int, generator: torch.Generator) -> RolePictures:
        """(anchor, another exemplar, the anchor's context with another action)."""
        count = len(data.prompts)
        other = (anchor + 1 + int(torch.randint(count - 1, (), generator=generator))) % count
        alternatives = data.other_actions[anchor]
        action = int(torch.randint(len(alternatives), (), generator=generator))
        latents = torch.stack([data.latents[anchor], data.latents[other], alternatives[action]])
        if data.masks is None:
            return RolePictures(latents, None)
        # A made picture has the anchor's context and its mask: averaged over more, its loss would differ by that, too.
        return RolePictures(latents, data.masks[[anchor, other, anchor]])

    def combine(self, gradients: Tensor, generator: torch.Generator) -> Update:
        """The anchor's gradient, masked triple by triple (Eq. 14), averaged over anchors."""
        g_anchor, g_context, g_action = gradients
        m = self.mask.mask(g_anchor, g_context, g_action, generator)
        beta = self.mask.beta
        # Slots that the step does not read have gradients of zero: their masks are ties and tell nothing.
        read = g_anchor.any(dim=-1)
        anchor, context, action = gradients[:, read]
        stats = {
            "overlap": overlap(context_mask(anchor, context, beta), action_mask(anchor, action, beta), beta),
            "overlap_if_independent": independent_overlap(anchor, context, action, beta, generator),
            "kept": m[read].double().mean().item(),
        }
        movable = m.any(dim=0) if self.mask.target == "update" else None
        return Update((m * g_anchor).mean(dim=0), movable, stats)
