"""ADI's gradient masks: keep the channels that carry the action (arXiv 2311.15841, section 4.2).

Three pictures share the anchor's prompt: the anchor itself, one of the same action in another context, one of the
same context with another action. Where anchor and context-different picture disagree, a channel speaks of context;
where anchor and action-different picture agree, it does not speak of the action. Both kinds are masked.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MERGES = ("intersection", "union", "context only", "action only")
STRATEGIES = ("adi", "uniform", "random", "min", "max", "reversed")
TARGETS = ("gradient", "update")


def masked_channels(d: int, beta: float) -> int:
    """How many of d channels one pair's mask zeroes: round(beta d)."""
    return round(beta * d)


def lowest_channels(values: Tensor, count: int) -> Tensor:
    """Boolean mask of the `count` lowest of the last axis; ties go to the lower channel. Same shape as `values`."""
    order = values.argsort(dim=-1, stable=True)
    mask = torch.zeros_like(values, dtype=torch.bool)
    return mask.scatter_(-1, order[..., :count], True)


def context_mask(g_anchor: Tensor, g_context: Tensor, beta: float) -> Tensor:
    """m_c (Eqs. 4-7): keep the (1 - beta) d channels where Dc = |g_anchor - g_context| is smallest.

    g_anchor, g_context: (..., d) gradients of the anchor and the context-different picture. Returns (..., d) bool.
    """
    d = g_anchor.shape[-1]
    return lowest_channels((g_anchor - g_context).abs(), d - masked_channels(d, beta))


def action_mask(g_anchor: Tensor, g_action: Tensor, beta: float) -> Tensor:
    """m_a (Eqs. 9-12): keep the (1 - beta) d channels where Da = |g_anchor - g_action| is largest.

    g_anchor, g_action: (..., d) gradients of the anchor and the action-different picture. Returns (..., d) bool.
    """
    d = g_anchor.shape[-1]
    return ~lowest_channels((g_anchor - g_action).abs(), masked_channels(d, beta))


def merge_masks(m_context: Tensor, m_action: Tensor, merge: str) -> Tensor:
    """m (Eq. 13 is "intersection"; the others are the paper's ablations, Fig. 7)."""
    return {
        "intersection": m_context & m_action,
        "union": m_context | m_action,
        "context only": m_context,
        "action only": m_action,
    }[merge]


def control_mask(strategy: str, g_anchor: Tensor, kept: Tensor, generator: torch.Generator) -> Tensor:
    """A mask of a control strategy (section 5.5) that keeps exactly as many channels as another mask.

    strategy: "uniform" - evenly spaced channels; "random"; "min" / "max" - the smallest / largest |g_anchor|.
    g_anchor: (..., d). kept: (..., 1) integers, how many channels to keep. Returns (..., d) bool.
    """
    d = g_anchor.shape[-1]
    if strategy == "uniform":
        channel = torch.arange(d, device=g_anchor.device)
        # Channel c is kept where the staircase floor((c + 1) kept / d) rises: exactly `kept` rises, evenly spaced.
        return (channel + 1) * kept // d > channel * kept // d
    scores = {
        "random": lambda: torch.rand(g_anchor.shape, generator=generator).to(g_anchor.device),
        "min": lambda: g_anchor.abs(),
        "max": lambda: -g_anchor.abs(),
    }[strategy]()
    rank = scores.argsort(dim=-1, stable=True).argsort(dim=-1, stable=True)
    return rank < kept


def overlap(m_context: Tensor, m_action: Tensor, beta: float) -> float:
    """|m_c and m_a| / ((1 - beta) d), averaged; the paper reports 30.26 % (section 4.2). NaN for beta = 1."""
    d = m_context.shape[-1]
    kept = d - masked_channels(d, beta)
    return (m_context & m_action).sum(-1).double().mean().item() / kept if kept else float("nan")


def independent_overlap(
    g_anchor: Tensor, g_context: Tensor, g_action: Tensor, beta: float, generator: torch.Generator
) -> float:
    """The overlap these gradients would have if they had nothing in common: channels of each shuffled on their own.

    About 0.31-0.34 at beta 0.6 (METHODS 1.7): an overlap near it is no evidence of signal.
    """

    def shuffled(g: Tensor) -> Tensor:
        return g.gather(-1, torch.rand(g.shape, generator=generator).argsort(dim=-1).to(g.device))

    anchor, context, action = shuffled(g_anchor), shuffled(g_context), shuffled(g_action)
    return overlap(context_mask(anchor, context, beta), action_mask(anchor, action, beta), beta)


@dataclass(frozen=True)
class GradientMask:
    """ADI's gradient rule.

    beta: share of channels each pair's mask zeroes, 0..1 (paper: 0.6). merge, strategy, target: see MERGES,
    STRATEGIES, TARGETS; "gradient" masks what AdamW sees (Eq. 14), "update" also freezes the masked channels, which
    AdamW's momentum would otherwise move. share_noise, share_timestep: the three pictures of a triple get the same.
    Raises ValueError for values outside these.
    """

    beta: float = 0.6
    merge: str = "intersection"
    strategy: str = "adi"
    target: str = "gradient"
    share_noise: bool = True
    share_timestep: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.beta <= 1:
            raise ValueError(f"beta is a share of channels within 0..1, not {self.beta}.")
        for value, allowed in ((self.merge, MERGES), (self.strategy, STRATEGIES), (self.target, TARGETS)):
            if value not in allowed:
                raise ValueError(f"{value!r} is none of {', '.join(allowed)}.")

    def mask(self, g_anchor: Tensor, g_context: Tensor, g_action: Tensor, generator: torch.Generator) -> Tensor:
        """The channels that may learn from this triple: (..., d) bool, from three (..., d) gradients."""
        m = merge_masks(
            context_mask(g_anchor, g_context, self.beta), action_mask(g_anchor, g_action, self.beta), self.merge
        )
        if self.strategy == "adi":
            return m
        if self.strategy == "reversed":
            return ~m
        return control_mask(self.strategy, g_anchor, m.sum(-1, keepdim=True), generator)
