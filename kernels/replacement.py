"""Personalised subject replacement: another subject in a picture whose every other word keeps its place.

HiFi Tuner (arXiv 2312.00079), section 3.4 and Algorithm 3. From the inverted noise the picture is painted again with
the target prompt c^g, its cross-attention fixed to that of the source prompt c^r on the picture's own trajectory, in
all token columns but those of the new subject [c_s^t, w_g].
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

import torch
from torch import Tensor

MAPS_DTYPE = torch.float16  # half the memory, and rounding that no 8-bit picture shows
LEAST_SUM = 1e-3  # of a row to be renormalised: below, the rounding of the maps would be blown up to a picture


@dataclass(frozen=True)
class Columns:
    """Token columns of c^g whose attention is fixed, and the column of c^r that each is fixed to.

    fixed, source: as many, fixed ascending. subject: the words of the columns left free, each once, as they stand.
    """

    fixed: tuple[int, ...]
    source: tuple[int, ...]
    subject: tuple[str, ...]


def match_columns(source: Sequence[str], target: Sequence[str], subject: Collection[str] = ()) -> Columns:
    """Which columns of the target prompt are fixed to which of the source prompt.

    source, target: for each of a prompt's T tokens the word it is a piece of, a concept's name for its rows, "" for
    start, end and padding. subject: words of the new subject, of which the source prompt knows nothing. Empty: all
    that differ from the source prompt. Words are aligned as in a text comparison; where subject is given, words that
    differ one by one are fixed to one another too. The start, the end and the padding of one prompt are fixed to those
    of the other. A column without a counterpart is free. Raises ValueError for prompts of different T and for a subject
    that the target prompt does not have.
    """
    if len(source) != len(target):
        raise ValueError(
            f"The source prompt takes {len(source)} tokens and the target prompt {len(target)}, so they cannot be "
            "matched: shorten the longer one until CLIP reads both in one piece."
        )
    words = {word for word in target if word}
    if missing := sorted(set(subject) - words):
        raise ValueError(
            f"The target prompt does not have {', '.join(missing)}: choose the subject among its words "
            f"{', '.join(sorted(words))}."
        )
    of_source, of_target = (tuple(at for at, word in enumerate(prompt) if word) for prompt in (source, target))
    matcher = SequenceMatcher(None, [source[at] for at in of_source], [target[at] for at in of_target], autojunk=False)
    pairs: dict[int, int] = {}
    for kind, s0, s1, t0, t1 in matcher.get_opcodes():
        if kind == "equal" or (subject and kind == "replace" and s1 - s0 == t1 - t0):
            pairs.update(zip(of_target[t0:t1], of_source[s0:s1]))
    used = set(pairs.values())
    for t, s in ((_end(target), _end(source)), *((at, at) for at in range(len(target)))):
        if not (target[t] or source[s] or t in pairs or s in used):
            pairs[t] = s
            used.add(s)
    fixed = tuple(t for t in sorted(pairs) if target[t] not in subject)
    free = dict.fromkeys(word for t, word in enumerate(target) if word and t not in fixed)
    return Columns(fixed, tuple(pairs[t] for t in fixed), tuple(free))


def _end(prompt: Sequence[str]) -> int:
    """Where the last run of wordless tokens starts: with the end of the text."""
    at = len(prompt) - 1
    while prompt[at]:
        at -= 1
    while at and not prompt[at - 1]:
        at -= 1
    return at


def attention(q: Tensor, k: Tensor, length: int) -> Tensor:
    """softmax(Q K^T / sqrt(d)) (B, heads, h * w, length), as it is kept and compared.

    q: (B, heads, h * w, d). k: (B, heads, copies * length, d), a prompt of `length` tokens once or more; the attention
    to its copies is added up.
    """
    scores = q.float() @ k.float().transpose(-1, -2) * q.shape[-1] ** -0.5
    return scores.softmax(dim=-1).unflatten(-1, (-1, length)).sum(dim=-2).to(MAPS_DTYPE)


def fix_columns(
    out: Tensor, a: Tensor, a_source: Tensor, v: Tensor, columns: Columns, renormalise: bool = False
) -> Tensor:
    """out = A V (B, heads, h * w, d) as it would be with the fixed columns of A replaced (Algorithm 3).

    a: A, the new run's (B, heads, h * w, T). a_source: a_t^r*, likewise. v: V (B, heads, T, d). Only the change is
    added, so that whatever computed `out` stays in effect, and equal maps change nothing. Rows of A no longer sum to
    one, as in Prompt-to-Prompt; renormalise: divide each by its sum.
    """
    change = a_source[..., columns.source].float() - a[..., columns.fixed].float()
    out = out + (change.to(v) @ v[..., columns.fixed, :]).to(out)
    if renormalise:
        out = out / (1 + change.sum(dim=-1, keepdim=True)).clamp_min(LEAST_SUM).to(out)
    return out
