"""From a prompt with concepts to the contexts every reader gets."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .backbone import POOLED_TOWER, TOWER_ORDER, Layer, TextContext, TextEncoding
from .layouts import BoundLayout
from .prompts import Placeholder, Prompt

EncodeText = Callable[[Prompt, Mapping[str, Mapping[str, Tensor]]], TextEncoding]


@dataclass(frozen=True)
class StagedContext:
    """Contexts over the timestep range: contexts[i] holds for t >= starts[i], up to the next start.

    positions: token positions of each placeholder.
    """

    starts: tuple[int, ...]
    contexts: tuple[TextContext, ...]
    positions: Mapping[str, tuple[int, ...]]

    def at(self, t: int) -> TextContext:
        """The context of timestep t."""
        return self.contexts[max(i for i, start in enumerate(self.starts) if start <= t)]

    @staticmethod
    def cat(staged: Sequence[StagedContext]) -> StagedContext:
        """One batch out of several prompts' contexts, without their token positions.

        Raises ValueError where the prompts' concepts differ, so that their stages or layer tables do.
        """
        first = staged[0]
        if any(s.starts != first.starts for s in staged):
            raise ValueError("Prompts whose concepts have different stages cannot share a batch.")
        return StagedContext(first.starts, tuple(TextContext.cat(c) for c in zip(*(s.contexts for s in staged))), {})


def encode_prompt(
    encode_text: EncodeText,
    layers: Sequence[Layer],
    prompt: Prompt,
    vectors: Mapping[str, Mapping[str, Tensor]],
    layouts: Mapping[str, BoundLayout],
    timesteps: int,
    read_at: Collection[int] | None = None,
) -> StagedContext:
    """Encode `prompt` once for every distinct combination of its words' slots, all in one batch.

    encode_text: `Backbone.encode_text`. vectors: {placeholder: {tower: (S, n, width)}}; layouts: of each placeholder.
    timesteps: T of the schedule. read_at: the timesteps that the result will be asked for, None for all; stages
    without any are then left out, except in SDXL, whose pooled embedding takes part of all stages. Differentiable in
    the vectors. With one-token concepts alone this is one encoding that all layers share. Raises ValueError when tail
    rows would overwrite words of the prompt.
    """
    names = prompt.names
    starts = sorted(
        {-(-stage * timesteps // layouts[n].layout.stages) for n in names for stage in range(layouts[n].layout.stages)}
    )
    starts = starts or [0]
    if read_at is not None and not any(POOLED_TOWER in vectors[n] for n in names):
        starts = sorted({max(start for start in starts if start <= t) for t in read_at})

    combinations: dict[tuple[int, ...], int] = {}

    def row(slots: tuple[int, ...]) -> int:
        return combinations.setdefault(slots, len(combinations))

    tables = []
    for start in starts:
        bound = [layouts[n].table(layouts[n].stage(start, timesteps)) for n in names]
        tables.append(
            tuple(
                tuple(row(tuple(table[side][layer] for table in bound)) for layer in range(len(layers)))
                for side in (0, 1)
            )
        )
    chosen = {name: [slots[i] for slots in combinations] for i, name in enumerate(names)}  # a slot a combination

    # Words: as many encodings as there are distinct combinations of words' slots.
    words = [name for name in names if layouts[name].layout.place == "word"]
    of_words = list(zip(*(chosen[name] for name in words))) if words else [()] * len(combinations)
    variants = {slots: number for number, slots in enumerate(dict.fromkeys(of_words))}
    word_vectors = {
        name: {tower: v[[slots[i] for slots in variants]] for tower, v in vectors[name].items()}
        for i, name in enumerate(words)
    }
    encoding = encode_text(spell_out(prompt, layouts), word_vectors)
    # A pooled embedding cannot differ from layer to layer: the mean over the variants stands for all (METHODS 1.8).
    pooled = None if encoding.pooled is None else encoding.pooled.mean(dim=0, keepdim=True)
    hidden, positions = encoding.hidden, dict(encoding.positions)

    # Tail rows: each concept's before those of the one before it.
    if tails := [name for name in names if name not in words]:
        hidden = hidden[[variants[slots] for slots in of_words]]
        end = hidden.shape[1]
        for name in tails:
            rows = torch.cat([vectors[name][tower] for tower in TOWER_ORDER if tower in vectors[name]], dim=-1)
            start = end - rows.shape[1]
            if start < encoding.length:
                raise ValueError(
                    f'The prompt "{prompt.text}" has {encoding.length} tokens with its start and end, and the tail '
                    f"rows of <{name}> need the last {rows.shape[1]} of {hidden.shape[1]} free: shorten the prompt."
                )
            base = hidden[:, start:end]
            if layouts[name].layout.place == "tail replace":
                base = encode_text(Prompt(()), {}).hidden[:, -rows.shape[1] :]
            learned = base + rows[chosen[name]].to(hidden)
            hidden = torch.cat([hidden[:, :start], learned, hidden[:, end:]], dim=1)
            positions[name] = tuple(range(start, end))
            end = start
    contexts = tuple(_select(hidden, key, value, pooled) for key, value in tables)
    return StagedContext(tuple(starts), contexts, positions)


def spell_out(prompt: Prompt, layouts: Mapping[str, BoundLayout]) -> Prompt:
    """The prompt with the placeholders of tail rows read as their words."""

    def read(part: str | Placeholder) -> str | Placeholder:
        is_tail = isinstance(part, Placeholder) and layouts[part.name].layout.place != "word"
        return layouts[part.name].words if is_tail else part

    return Prompt(tuple(read(part) for part in prompt.parts))


def _select(hidden: Tensor, key: tuple[int, ...], value: tuple[int, ...], pooled: Tensor | None) -> TextContext:
    """The context of one stage out of all variants (N, T, d): only the rows that the stage reads."""
    used = {row: i for i, row in enumerate(dict.fromkeys((*key, *value)))}
    rows = hidden[torch.tensor(list(used), device=hidden.device)][:, None]
    return TextContext(rows, tuple(used[k] for k in key), tuple(used[v] for v in value), pooled)
