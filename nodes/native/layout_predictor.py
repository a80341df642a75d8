"""Layout predictors inside ComfyUI: words of a CLIP, detections on its pictures, files among its models."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import comfy.sd
import folder_paths
import torch
from torch import Tensor

from ...kernels.concept import Concept
from ...kernels.layout_guidance import Box
from ...kernels.layout_predictor import (
    LayoutPredictor,
    load_predictor,
    pairs_of,
    save_predictor,
    train_predictor,
    word_embedding,
)
from ...toyworld.weights import LAYOUT_PREDICTOR, WEIGHTS
from .attention_maps import fold
from .boxes import Box as PixelBox
from .boxes import corners
from .output_files import check_file_name, free_name, output_file, register_folder
from .text import describe_clip, token_vectors

FOLDER = "concept_atelier_layouts"  # the key of the predictors in ComfyUI's model folders
TOY = "toy world (bundled)"
ARTICLE = re.compile(r"^(?:an?|the)\s+", re.IGNORECASE)


def plain_noun(label: str) -> str:
    """A label as it is compared with words: without its article, and without capitals unless it is a <Name>."""
    return ARTICLE.sub("", fold(label.strip()))


def predictor_names() -> list[str]:
    """The predictors there are: the toy world's, then files."""
    return [TOY, *folder_paths.get_filename_list(FOLDER)]


def predictor_path(name: str) -> Path:
    """The file of one of `predictor_names`."""
    return WEIGHTS / LAYOUT_PREDICTOR if name == TOY else Path(folder_paths.get_full_path_or_raise(FOLDER, name))


def open_predictor(name: str, clip: comfy.sd.CLIP) -> LayoutPredictor:
    """One of `predictor_names`. Raises ValueError when it was trained on the words of another kind of CLIP."""
    predictor, kind = load_predictor(predictor_path(name)), describe_clip(clip)
    if dict(predictor.towers) != kind.towers:
        raise ValueError(
            f'The layout predictor "{name}" reads words of widths {dict(predictor.towers)}, and this {kind.family} '
            f"CLIP has {kind.towers}: choose a predictor for this kind of checkpoint, or connect images and bboxes to "
            "train one."
        )
    return predictor


def phrase_embedding(clip: comfy.sd.CLIP, phrase: str, concepts: Mapping[str, Concept]) -> Tensor:
    """(d,) of words, or of a <name>: the mean of its vectors. Raises ValueError when `concepts` lacks the name."""
    if not phrase.startswith("<"):
        return word_embedding({tower: v.cpu() for tower, v in token_vectors(clip, phrase).items()})
    name = phrase.strip("<>")
    if name not in concepts:
        raise ValueError(f"words says {phrase}, but no concept of that name is connected: connect it to concepts.")
    return word_embedding({tower: v.mean(dim=0) for tower, v in concepts[name].vectors.items()})


def labelled_boxes(frame: Sequence[PixelBox], height: int, width: int) -> list[tuple[str, Box]]:
    """The nouns of a picture's boxes, without their articles, and the boxes in fractions.

    Raises ValueError for a box without a label.
    """
    labels = [plain_noun(box.get("label", "")) for box in frame]
    if "" in labels:
        raise ValueError(
            "A box on bboxes has no label, so nobody knows what stands there: connect boxes from a detector, such as "
            "Detect by Text."
        )
    size = torch.tensor([width, height, width, height])
    return [(label, Box(*row)) for label, row in zip(labels, (corners(frame, height, width) / size).tolist())]


def learn_predictor(
    clip: comfy.sd.CLIP, frames: Sequence[Sequence[PixelBox]], height: int, width: int, steps: int, seed: int
) -> tuple[LayoutPredictor, float, int]:
    """Train on the boxes of pictures of one size: the predictor, its mean distance of an edge, and the pairs seen."""
    pairs = [pair for frame in frames for pair in pairs_of(labelled_boxes(frame, height, width))]
    nouns = {noun for pair in pairs for noun in pair.nouns}
    embeddings = {noun: phrase_embedding(clip, noun, {}) for noun in nouns}
    # Nothing but this network of a few thousand weights has gradients here.
    with torch.inference_mode(False), torch.enable_grad():
        embeddings = {noun: embedding.clone() for noun, embedding in embeddings.items()}
        predictor, distance = train_predictor(pairs, embeddings, describe_clip(clip).towers, steps, seed=seed)
    return predictor, distance, len(pairs)


def keep_predictor(predictor: LayoutPredictor, file_name: str) -> Path:
    """Save a predictor where `predictor_names` finds it, never over another one. Raises ValueError for a bad name."""
    check_file_name(file_name)
    path = output_file(FOLDER, free_name(file_name, [FOLDER]))
    save_predictor(path, predictor)
    return path


register_folder(FOLDER)
