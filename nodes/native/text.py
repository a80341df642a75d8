"""Prompts with placeholders through ComfyUI's CLIP: its own tokenizer and text towers, our vectors.

A placeholder goes through the tokenizer as `embedding:<name>` does, so that weights, long prompts and files named
`embedding:` work, and a concept behaves in a prompt as the stock embedding that it may be saved as.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import NamedTuple

import comfy.clip_model
import comfy.model_management
import comfy.sd
import torch
from comfy.sd1_clip import SD1ClipModel, SDClipModel, SDTokenizer, gen_empty_tokens
from comfy.sdxl_clip import SDXLClipModel
from torch import Tensor

from ...kernels.backbone import TOWER_ORDER, TextEncoding
from ...kernels.clip_text import END_OF_WORD, spell, whole_words
from ...kernels.prompts import Placeholder, Prompt

FAMILIES = {("l",): "sd1", ("h",): "sd2", ("l", "g"): "sdxl"}

Tokens = list[list[tuple[int | Tensor, float]]]  # chunks of (token, weight); a token is an id or a vector


class ClipKind(NamedTuple):
    """What a concept must match to be used with a CLIP. towers: width of the word embeddings of each text tower."""

    family: str
    towers: dict[str, int]


def describe_clip(clip: comfy.sd.CLIP) -> ClipKind:
    """Family ("sd1", "sd2", "sdxl", "toy") and tower widths of a CLIP.

    A text model class may name its family in `atelier_family`. Raises ValueError for text encoders of other models.
    """
    towers = text_towers(clip)
    family = getattr(type(clip.cond_stage_model), "atelier_family", FAMILIES.get(tuple(towers)))
    if family is None:
        raise ValueError(
            f"This CLIP ({type(clip.cond_stage_model).__name__}) belongs to none of SD1.x, SD2.x, SDXL: "
            "connect the CLIP of such a checkpoint."
        )
    return ClipKind(family, {name: _embedding(tower).weight.shape[1] for name, tower in towers.items()})


def text_towers(clip: comfy.sd.CLIP) -> dict[str, SDClipModel]:
    """The text towers by name ("l", "h", "g"), in the order of their channels in the context; none if not CLIP's."""
    if not isinstance(clip.cond_stage_model, (SD1ClipModel, SDXLClipModel)):
        return {}
    parts = {name.removeprefix("clip_"): part for name, part in clip.cond_stage_model.named_children()}
    if not all(isinstance(getattr(p, "transformer", None), comfy.clip_model.CLIPTextModel) for p in parts.values()):
        return {}
    return {name: parts[name] for name in TOWER_ORDER if name in parts}


def encode_text(clip: comfy.sd.CLIP, prompt: Prompt, vectors: Mapping[str, Mapping[str, Tensor]]) -> TextEncoding:
    """`Backbone.encode_text` with a CLIP alone, without gradients: loads it, returns tensors where ComfyUI keeps them.

    Raises ValueError for vectors that do not fit this CLIP.
    """
    clip.load_model()
    with torch.no_grad():
        encoding = encode_text_loaded(clip, prompt, vectors)
    device = comfy.model_management.intermediate_device()
    pooled = None if encoding.pooled is None else encoding.pooled.to(device)
    return TextEncoding(encoding.hidden.to(device), pooled, encoding.positions, encoding.words)


def encode_text_loaded(
    clip: comfy.sd.CLIP, prompt: Prompt, vectors: Mapping[str, Mapping[str, Tensor]]
) -> TextEncoding:
    """`Backbone.encode_text` with a CLIP that is loaded already; differentiable inside `gradients.differentiable`."""
    kind = describe_clip(clip)
    _check_vectors(kind, prompt, vectors)
    variants = max((len(v) for by_tower in vectors.values() for v in by_tower.values()), default=1)
    sizes = {name: next(iter(by_tower.values())).shape[1] for name, by_tower in vectors.items()}

    clip.cond_stage_model.reset_clip_options()
    if clip.layer_idx is not None:
        clip.cond_stage_model.set_clip_options({"layer": clip.layer_idx})
    clip.cond_stage_model.set_clip_options({"execution_device": clip.patcher.load_device})

    slots = _Slots(prompt, sizes)
    hidden, pooled = [], None
    with comfy.model_management.cuda_device_context(clip.patcher.load_device):
        for name, tower in text_towers(clip).items():
            chunks = slots.tokenize(clip, name)
            rows = {p: by_tower[name].unbind() for p, by_tower in vectors.items()}
            filled = [slots.fill(chunks, {p: row[n] for p, row in rows.items()}) for n in range(variants)]
            h, pooled = _encode_chunks(tower, filled)  # SDXL pools its last tower, g
            hidden.append(h)
    shortest = min(h.shape[1] for h in hidden)
    hidden = torch.cat([h[:, :shortest] for h in hidden], dim=-1)
    return TextEncoding(hidden, pooled, slots.positions(chunks), _own_tokens(chunks, _tokenizer(clip, name)))


def prompt_words(clip: comfy.sd.CLIP, prompt: Prompt, sizes: Mapping[str, int]) -> tuple[str, ...]:
    """For each of the T tokens of `prompt`, the word that it is a piece of.

    sizes: number of vectors of each placeholder. A placeholder reads "<name>"; start, end, padding and the vectors of
    embedding files read "".
    """
    tower = next(iter(text_towers(clip)))
    tokenizer, slots = _tokenizer(clip, tower), _Slots(prompt, sizes)
    chunks = slots.tokenize(clip, tower)
    tokens = [token for chunk in chunks for token, _ in chunk]
    words, pieces = [""] * len(tokens), {}  # pieces: of the word being read, by position; a chunk may end inside it
    for at in _own_tokens(chunks, tokenizer):
        if _is_slot(tokens[at]):
            words[at] = f"<{slots.owner[int(tokens[at])][0]}>"
        elif not torch.is_tensor(tokens[at]):
            pieces[at] = tokenizer.inv_vocab[tokens[at]]
            if pieces[at].endswith(END_OF_WORD):
                word = spell("".join(pieces.values()))
                words = [word if i in pieces else other for i, other in enumerate(words)]
                pieces = {}
    return tuple(words)


def token_vectors(clip: comfy.sd.CLIP, text: str) -> dict[str, Tensor]:
    """`Backbone.token_vectors` with a CLIP alone: loads it and returns tensors where ComfyUI keeps them."""
    clip.load_model()
    device = comfy.model_management.intermediate_device()
    return {tower: v.to(device) for tower, v in token_vectors_loaded(clip, text).items()}


def token_vectors_loaded(clip: comfy.sd.CLIP, text: str) -> dict[str, Tensor]:
    """`Backbone.token_vectors` with a CLIP that is loaded already."""
    vectors = {}
    for name, tower in text_towers(clip).items():
        tokenizer = _tokenizer(clip, name)
        end = -1 if tokenizer.tokenizer_adds_end_token else None
        ids = tokenizer.tokenizer(text)["input_ids"][tokenizer.tokens_start : end]
        with torch.no_grad():
            vectors[name] = _embedding(tower)(
                torch.tensor(ids, dtype=torch.long, device=clip.patcher.load_device), out_dtype=torch.float32
            )
    return vectors


def word_table_loaded(clip: comfy.sd.CLIP, tower: str) -> tuple[tuple[str, ...], Tensor]:
    """`Backbone.word_table` with a CLIP that is loaded already."""
    words = whole_words({piece: i for i, piece in _tokenizer(clip, tower).inv_vocab.items()})
    ids = torch.tensor(list(words.values()), device=clip.patcher.load_device)
    with torch.no_grad():
        return tuple(words), _embedding(text_towers(clip)[tower])(ids, out_dtype=torch.float32)


def _embedding(tower: SDClipModel) -> torch.nn.Embedding:
    return tower.transformer.get_input_embeddings()


def _tokenizer(clip: comfy.sd.CLIP, tower: str) -> SDTokenizer:
    return getattr(clip.tokenizer, f"clip_{tower}")


def _check_vectors(kind: ClipKind, prompt: Prompt, vectors: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Raise ValueError unless `vectors` holds (N, n, width) tensors of this CLIP for every placeholder of `prompt`."""
    for name in prompt.names:
        if name not in vectors:
            raise ValueError(f"The prompt asks for <{name}>, but no vectors were given for it.")
        widths = {tower: v.shape[-1] for tower, v in vectors[name].items()}
        if widths != kind.towers:
            raise ValueError(
                f"The vectors of <{name}> have widths {widths}, but this {kind.family} CLIP has {kind.towers}: "
                "load the kind of checkpoint that the concept was learned on."
            )
    shapes = {name: {tuple(v.shape[:2]) for v in vectors[name].values()} for name in vectors}
    if len({variants for pairs in shapes.values() for variants, _ in pairs}) > 1 or any(
        len(pairs) > 1 for pairs in shapes.values()
    ):
        raise ValueError(f"All placeholders need the same number of variants, and all towers of tokens: got {shapes}.")


class _Slots:
    """Stands for the vectors of placeholders while a prompt is tokenised: slot number s is a tensor [s] of width 1."""

    def __init__(self, prompt: Prompt, sizes: Mapping[str, int]) -> None:
        """sizes: number of vectors of each placeholder."""
        self.prompt = prompt
        self.owner = [(name, i) for name in prompt.names for i in range(sizes[name])]

    def tokenize(self, clip: comfy.sd.CLIP, tower: str) -> Tokens:
        """The chunks of one tower, with slots where placeholders are."""
        tokenizer = copy.copy(_tokenizer(clip, tower))
        stock_lookup = tokenizer._try_get_embedding
        # The tokenizer looks for `embedding:` only when it knows of a folder.
        tokenizer.embedding_directory = tokenizer.embedding_directory or []
        tables = {f"<{name}>": self._table(name) for name in self.prompt.names}

        def lookup(text: str) -> tuple[Tensor | None, str, str]:
            word, _, rest = text.partition(" ")
            return (tables[word], word, rest) if word in tables else stock_lookup(text)

        tokenizer._try_get_embedding = lookup
        text = "".join(
            f" {tokenizer.embedding_identifier}<{part.name}> " if isinstance(part, Placeholder) else part
            for part in self.prompt.parts
        )
        return tokenizer.tokenize_with_weights(text, tokenizer_options=clip.tokenizer_options)

    def _table(self, name: str) -> Tensor:
        return torch.tensor([[s] for s, (owner, _) in enumerate(self.owner) if owner == name])

    def fill(self, chunks: Tokens, vectors: Mapping[str, Tensor]) -> Tokens:
        """Put vectors (n, width) of each placeholder into its slots."""
        return [[(self._fill(token, vectors), weight) for token, weight in chunk] for chunk in chunks]

    def _fill(self, token: int | Tensor, vectors: Mapping[str, Tensor]) -> int | Tensor:
        if not _is_slot(token):
            return token
        name, i = self.owner[int(token)]
        return vectors[name][i]

    def positions(self, chunks: Tokens) -> dict[str, tuple[int, ...]]:
        """Where the slots of each placeholder are among all tokens, chunk after chunk."""
        flat = [token for chunk in chunks for token, _ in chunk]
        owners = {at: self.owner[int(token)][0] for at, token in enumerate(flat) if _is_slot(token)}
        return {name: tuple(at for at, owner in owners.items() if owner == name) for name in self.prompt.names}


def _own_tokens(chunks: Tokens, tokenizer: SDTokenizer) -> tuple[int, ...]:
    """Where the prompt's own tokens are among all: without start, end and padding of each chunk."""
    positions, start = [], 0
    for chunk in chunks:
        # Padding may be the end token again, so the first of them ends the text.
        ids = [None if torch.is_tensor(token) else token for token, _ in chunk]
        positions += range(start + 1, start + ids.index(tokenizer.end_token))
        start += len(chunk)
    return tuple(positions)


def _is_slot(token: int | Tensor) -> bool:
    """Whether a token is a slot; vectors from embedding files are wider."""
    return torch.is_tensor(token) and token.shape == (1,)


def _encode_chunks(tower: SDClipModel, variants: list[Tokens]) -> tuple[Tensor, Tensor | None]:
    """All chunks of all variants in one batch -> hidden (N, T, d) and the pooled embedding (N, p) of first chunks.

    Weighted tokens are moved away from the encoding of the empty prompt, as ComfyUI does.
    """
    sections = [chunk for chunks in variants for chunk in chunks]
    tokens = [[token for token, _ in chunk] for chunk in sections]
    weights = torch.tensor([[weight for _, weight in chunk] for chunk in sections])
    weighted = bool((weights != 1).any())
    if weighted:
        tokens.append(gen_empty_tokens(tower.special_tokens, weights.shape[1]))
    hidden, pooled = tower.encode(tokens)[:2]
    if weighted:
        hidden, empty = hidden[:-1], hidden[-1:]
        w = weights.to(hidden)[:, :, None]
        hidden = torch.where(w == 1, hidden, (hidden - empty) * w + empty)
    chunks = len(variants[0])
    hidden = hidden.reshape(len(variants), -1, hidden.shape[-1])
    return hidden, None if pooled is None else pooled[: len(sections) : chunks]
