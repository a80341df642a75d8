"""Prompts through CLIP text encoders of transformers, learned vectors at their places."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from .prompts import Placeholder, Prompt

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer


END_OF_WORD = "</w>"  # how CLIP's vocabulary marks the last piece of a word
LETTERS = re.compile("[a-z]+")
# Its pieces are bytes of UTF-8, each written as one letter (GPT-2): as itself where that is visible, else from 256 on.
VISIBLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
BYTES = {chr(b): b for b in VISIBLE} | {chr(0x100 + i): b for i, b in enumerate(sorted({*range(256)} - {*VISIBLE}))}


class Tower(NamedTuple):
    """One text encoder: its name in a concept file ("l", "h", "g"), its tokenizer, its model."""

    name: str
    tokenizer: CLIPTokenizer
    encoder: CLIPTextModel | CLIPTextModelWithProjection


def pieces(tokenizer: CLIPTokenizer, text: str) -> list[int]:
    """Token ids of a text without BOS and EOS."""
    return tokenizer(text, add_special_tokens=False).input_ids


def spell(pieces: str) -> str:
    """The word that these pieces of a CLIP vocabulary are, after one another."""
    return bytes(BYTES[letter] for letter in pieces.removesuffix(END_OF_WORD)).decode(errors="replace")


def whole_words(vocabulary: Mapping[str, int]) -> dict[str, int]:
    """The pieces of a CLIP vocabulary {piece: id} that are words of letters a to z: {word: id}, by id."""
    words = {p.removesuffix(END_OF_WORD): i for p, i in vocabulary.items() if p.endswith(END_OF_WORD)}
    return {word: i for word, i in sorted(words.items(), key=lambda entry: entry[1]) if LETTERS.fullmatch(word)}


def tokenise(
    tower: Tower, prompt: Prompt, lengths: Mapping[str, int]
) -> tuple[list[int], dict[str, tuple[int, ...]], tuple[int, ...]]:
    """Padded token ids (T) of a prompt, the positions of each placeholder's vectors, and those of all its words.

    lengths: vectors a placeholder. Raises ValueError when the prompt is longer than the tower's context.
    """
    tokenizer = tower.tokenizer
    ids = [tokenizer.bos_token_id]
    positions: dict[str, tuple[int, ...]] = dict.fromkeys(prompt.names, ())
    for part in prompt.parts:
        if isinstance(part, Placeholder):
            length = lengths[part.name]
            positions[part.name] += tuple(range(len(ids), len(ids) + length))
            # An id that exists and is not EOS: the pooled output is read at the largest id, or at the first EOS.
            ids += [tokenizer.bos_token_id] * length
        else:
            ids += pieces(tokenizer, part)
    ids.append(tokenizer.eos_token_id)
    room = tower.encoder.config.max_position_embeddings
    if len(ids) > room:
        raise ValueError(
            f'The prompt "{prompt.text}" has {len(ids) - 2} tokens, the text encoder reads {room - 2}: shorten it.'
        )
    return ids + [tokenizer.pad_token_id] * (room - len(ids)), positions, tuple(range(1, len(ids) - 1))


@contextmanager
def learned_rows(
    embedding: nn.Module, rows: Mapping[str, Tensor], positions: Mapping[str, Sequence[int]]
) -> Iterator[None]:
    """While open, `embedding` gives each placeholder's rows (N, n, width) at its positions, at every occurrence.

    A hook works with every version of transformers; CLIPTextModel takes no `inputs_embeds` in some.
    """

    def put(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        for name, vectors in rows.items():
            index = torch.tensor(positions[name], device=output.device)
            output = output.index_copy(1, index, vectors.to(output).repeat(1, len(index) // vectors.shape[1], 1))
        return output

    handle = embedding.register_forward_hook(put)
    try:
        yield
    finally:
        handle.remove()
