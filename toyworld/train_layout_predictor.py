"""Trains the bundled layout predictor on the renderer's own boxes, and overwrites it.

`python -m concept_atelier.toyworld.train_layout_predictor`, a minute on one core.

To be run again whenever the text encoder was trained anew: the predictor keeps its word embeddings.
"""

import argparse
import random

import numpy as np
import torch
from PIL import Image

from ..kernels.diffusers_backbone import DiffusersBackbone
from ..kernels.layout_guidance import Box
from ..kernels.layout_predictor import pairs_of, save_predictor, train_predictor, word_embedding
from .backdrop import SIZE, SUPERSAMPLING, Sheet, draw_background, draw_object
from .dataset import training_scenes
from .figure import Figure
from .model import load_toy
from .vocabulary import NONE, Scene
from .weights import LAYOUT_PREDICTOR, WEIGHTS

SCENES = 6000
STEPS = 3000


def scene_boxes(scene: Scene) -> list[tuple[str, Box]]:
    """Every figure and the object of a scene by its noun, with the box around what was drawn of it."""
    canvas = (SIZE * SUPERSAMPLING,) * 2
    found = []
    for character in scene.characters:
        mask = Image.new("L", canvas)
        Figure(character, Image.new("RGB", canvas), mask).draw()
        found.append((character.subject, _box_around(np.asarray(mask) > 0)))
    if scene.object != NONE:
        # The background draws from the same random numbers first, on which the object's size depends.
        rng = random.Random(scene.seed)
        picture = Image.new("RGB", canvas)
        draw_background(Sheet(picture), scene, rng)
        before = np.asarray(picture).copy()
        draw_object(Sheet(picture), scene, rng)
        found.append((scene.object, _box_around((np.asarray(picture) != before).any(axis=-1))))
    return found


def _box_around(drawn: np.ndarray) -> Box:
    rows, columns = (np.flatnonzero(drawn.any(axis=axis)) for axis in (1, 0))
    side = len(drawn)
    return Box(columns[0] / side, rows[0] / side, (columns[-1] + 1) / side, (rows[-1] + 1) / side)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    backbone = DiffusersBackbone.from_toy(load_toy())
    pairs = [pair for scene in training_scenes(SCENES) for pair in pairs_of(scene_boxes(scene))]
    nouns = {noun for pair in pairs for noun in pair.nouns}
    embeddings = {noun: word_embedding(backbone.token_vectors(noun)) for noun in nouns}
    predictor, distance = train_predictor(pairs, embeddings, backbone.towers, STEPS)
    save_predictor(WEIGHTS / LAYOUT_PREDICTOR, predictor)
    print(f"{len(pairs)} pairs of {len(nouns)} nouns; an edge is {distance:.3f} of the picture off on average")


if __name__ == "__main__":
    main()
