"""How many forwards a step of a GCFG costs, and why, told before it runs."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

from ...kernels.guidance import unconditional_coefficient
from .guiders import UNCONDITIONAL, GCFGGuider

# What keeps two conds from one batch, in the order of `_batch`.
REASONS = (
    "another base model",
    "other patches on the MODEL (connect the same MODEL where they need not differ)",
    "other weights (LoRA), exchanged at each step",
    "a ControlNet of its own",
    "GLIGEN boxes of its own",
    "an area of its own",
)


def cost_report(guider: GCFGGuider) -> str:
    """Lines that say how many forwards of the U-Net a step costs, and which predictions share one.

    Where the cost changes over the sampling, each stretch is told. A batch that memory does not hold is split further.
    """
    stretches: list[tuple[float, float, list[str]]] = []
    for start, end in pairwise(sorted({0.0, 1.0, *_edges(guider)})):
        lines = _stretch(guider, (start + end) / 2)
        if stretches and stretches[-1][2] == lines:
            start = stretches.pop()[0]
        stretches.append((start, end, lines))
    text = []
    for start, end, (count, *reasons) in stretches:
        text.append(count if len(stretches) == 1 else f"{start:.0%} to {end:.0%}: {count}")
        text += reasons
    return "\n".join([*text, *(f"- {name} left out: its weight is 0" for name in guider.idle)])


def _edges(guider: GCFGGuider) -> list[float]:
    weights = [edge for weight in guider.weights.values() for edge in (weight.start, weight.end)]
    conds = [cond for group in guider.groups for conds in group.original_conds.values() for cond in conds]
    own = [cond[edge] for cond in conds for edge in ("start_percent", "end_percent") if edge in cond]
    return weights + [min(max(edge, 0.0), 1.0) for edge in own]


def _stretch(guider: GCFGGuider, progress: float) -> list[str]:
    """The count of forwards at `progress`, and a line on each."""
    conds = {
        name: (group, [cond for cond in group.original_conds[name] if _in_range(cond, progress)])
        for group in guider.groups
        for name in group.original_conds
    }
    at_work = {
        name: weight
        for name, weight in guider.weights.items()
        if replace(weight, curve=None).at(progress) and conds[name][1]
    }
    coefficient = unconditional_coefficient([weight.w for weight in at_work.values()])
    curved = any(weight.curve for weight in at_work.values())
    partial = any(all({"area", "mask"} & cond.keys() for cond in conds[name][1]) for name in at_work)
    names = [UNCONDITIONAL, *at_work] if coefficient or curved or partial else list(at_work)
    forwards: dict[tuple, list[str]] = {}
    for name in names:
        group, active = conds[name]
        for cond in active:
            together = forwards.setdefault(_batch(guider.groups.index(group), group, name, cond), [])
            if name not in together:
                together.append(name)
    if not forwards:
        return ["0 forwards of the U-Net: nothing is at work here, not even the unconditional"]
    (first, shared), *others = forwards.items()
    lines = [f"{len(forwards)} forward{'s' * (len(forwards) > 1)} of the U-Net a step"]
    lines.append(f"- {', '.join(shared)}" + " together" * (len(shared) > 1))
    for batch, apart in others:
        reason = next(text for text, one, other in zip(REASONS, first, batch, strict=True) if one != other)
        lines.append(f"- {', '.join(apart)}{' together' * (len(apart) > 1)}, apart: {reason}")
    if UNCONDITIONAL not in names:
        lines.append(f"- {UNCONDITIONAL} left out: the weights sum to 1, which leaves nothing for it")
    return lines


def _in_range(cond: dict, progress: float) -> bool:
    return cond.get("start_percent", 0.0) <= progress <= cond.get("end_percent", 1.0)


def _batch(base: int, group: Any, name: str, cond: dict) -> tuple:
    """What ComfyUI batches by: conds with equal ones share a forward."""
    call = next(number for number, (_, names) in enumerate(group.calls) if name in names)
    area = cond.get("area", ())
    size = tuple(area[: -(-len(area) // 2)])
    return (base, call, *(id(cond.get(key)) for key in ("hooks", "control", "gligen")), size)
