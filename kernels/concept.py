"""A learned concept: its vectors, where they go, what they were learned on. Safetensors in and out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from torch import Tensor

from .backbone import Layer
from .files import NEWER, check_version, read_safetensors, write_safetensors
from .layouts import GRANULARITIES, PLACES, BoundLayout, Layout

FORMAT_VERSION = 1
# The names under which ComfyUI and A1111 look for the vectors of a stock embedding, one a text tower.
STOCK_KEYS = {"l": "clip_l", "g": "clip_g", "h": "clip_h"}
# How ComfyUI names weights of the U-Net in the LoRA files that it writes and reads.
WEIGHTS_PREFIX = "diffusion_model."

REQUIRED_HEADER = {"format_version", "name", "layout", "family", "layers"}
# What ComfyUI writes about the run that saved a file: not about the concept, and perhaps not to be saved again.
WORKFLOW_HEADER = {"prompt", "workflow"}


@dataclass(frozen=True)
class Concept:
    """What was learned.

    name: its placeholder in prompts, <name>. vectors: {tower: (S, n, width)}, S slots of n word embeddings, at the
    input of the text encoder, or of n changes to rows of its output (see Layout.place). layout: which slot each reader
    gets. family: "sd1", "sd2", "sdxl" or "toy". layers: the cross-attention layers of the model it was learned on, in
    execution order. metadata: strings (method, init_word, steps, seed, ...). weights: changes to the U-Net that were
    learned with it, by the names of core's LoRA loader; mostly none.
    """

    name: str
    vectors: Mapping[str, Tensor]
    layout: Layout
    family: str
    layers: tuple[Layer, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)
    weights: Mapping[str, Tensor] = field(default_factory=dict)

    def bound_layout(self) -> BoundLayout:
        """Its layout on the layers it was learned on."""
        return self.layout.bind(self.layers, self.metadata.get("init_word", ""))

    def check_fits(self, family: str, towers: Mapping[str, int], layers: Sequence[Layer] | None = None) -> None:
        """Raise ValueError with a sentence when this concept cannot be used with a model of that kind.

        layers: None where no U-Net is at hand (a CLIP alone).
        """
        widths = {tower: v.shape[-1] for tower, v in self.vectors.items()}
        if self.family != family or widths != dict(towers):
            raise ValueError(
                f"Concept <{self.name}> was learned on {self.family} (text widths {widths}) and cannot be used with "
                f"this {family} model (text widths {dict(towers)}): load the kind of checkpoint it was learned on."
            )
        if layers is not None and tuple(layers) != self.layers:
            raise ValueError(
                f"Concept <{self.name}> was learned on a U-Net with {len(self.layers)} cross-attention layers; this "
                f"one has {len(layers)}, or has them elsewhere: load the kind of checkpoint it was learned on."
            )

    @property
    def is_stock_embedding(self) -> bool:
        """Whether every reader gets the same vectors, so that any prompt node can use the file as embedding:name."""
        return self.layout.place == "word" and all(v.shape[0] == 1 for v in self.vectors.values())


def save_concept(path: Path, concept: Concept, extra_metadata: Mapping[str, str] | None = None) -> None:
    """Write `concept` to a safetensors file, at once or not at all.

    extra_metadata: strings that travel in the header, such as ComfyUI's "prompt" and "workflow" JSON.
    Raises ValueError naming the folder when it cannot be written (full, read-only).
    """
    tensors = {f"vectors.{tower}": v.detach().float().cpu().contiguous() for tower, v in concept.vectors.items()}
    tensors |= {name: weight.detach().cpu().contiguous() for name, weight in concept.weights.items()}
    if concept.is_stock_embedding:
        tensors |= {STOCK_KEYS[tower]: v.detach().float().cpu()[0].clone() for tower, v in concept.vectors.items()}
    header = {
        **concept.metadata,
        **(extra_metadata or {}),
        "format_version": str(FORMAT_VERSION),
        "name": concept.name,
        "layout": json.dumps(concept.layout.to_dict()),
        "family": concept.family,
        "layers": json.dumps(concept.layers),
    }
    write_safetensors(path, tensors, header)


def load_concept(path: Path) -> Concept:
    """Read a concept saved by `save_concept`.

    Raises ValueError naming the file when it is damaged, no concept of ours, or of a newer format.
    """
    tensors, header = read_safetensors(path)
    missing = REQUIRED_HEADER - header.keys()
    vectors = {key.removeprefix("vectors."): v for key, v in tensors.items() if key.startswith("vectors.")}
    if missing or not vectors:
        lacking = ", ".join(sorted(missing)) or "vectors"
        raise ValueError(
            f"The file {path} holds no concept of Concept Atelier (it lacks {lacking}): "
            "a stock embedding is used as embedding:name in the prompt instead."
        )
    layout, layers = _read_layout(path, header)
    shape = (layout.bind(layers, header.get("init_word", "")).slots, layout.tokens)
    for tower, v in vectors.items():
        if v.ndim != 3 or v.shape[:2] != shape:
            raise ValueError(
                f"The file {path} is damaged (its layout has {shape[0]} slots of {shape[1]} tokens, its vectors of "
                f"text encoder {tower} have the shape {tuple(v.shape)}): save it again."
            )
    return Concept(
        name=header["name"],
        vectors=vectors,
        layout=layout,
        family=header["family"],
        layers=layers,
        metadata={key: value for key, value in header.items() if key not in REQUIRED_HEADER | WORKFLOW_HEADER},
        weights={key: value for key, value in tensors.items() if key.startswith(WEIGHTS_PREFIX)},
    )


def _read_layout(path: Path, header: Mapping[str, str]) -> tuple[Layout, tuple[Layer, ...]]:
    """The layout in a concept's header, and the layers that it is bound to. Raises ValueError like `load_concept`."""
    check_version(path, header["format_version"], FORMAT_VERSION)
    try:
        values = dict(json.loads(header["layout"]))
        layers = tuple(Layer(*layer) for layer in json.loads(header["layers"]))
    except (TypeError, ValueError) as error:
        raise ValueError(f"The header of the file {path} is damaged ({error}): save it again.") from error
    defaults = {entry.name: entry.default for entry in fields(Layout)}
    full = defaults | values
    if full.keys() != defaults.keys() or full["granularity"] not in GRANULARITIES or full["place"] not in PLACES:
        raise ValueError(NEWER.format(path=path))
    if (
        any(type(full[name]) is not type(default) for name, default in defaults.items())
        or any([type(part) for part in layer] != [str, int, int] for layer in layers)
        or not layers
    ):
        raise ValueError(f"The header of the file {path} is damaged (impossible layout or layers): save it again.")
    return Layout(**full), layers


def new_vectors(words: Mapping[str, Tensor], slots: int, tokens: int) -> dict[str, Tensor]:
    """Initial vectors of words: the same word embedding in every slot.

    words: {tower: (1, width)}, the embedding of a one-piece word. Returns {tower: (slots, tokens, width)}.
    """
    return {tower: w.detach().expand(slots, tokens, -1).clone().to(torch.float32) for tower, w in words.items()}
