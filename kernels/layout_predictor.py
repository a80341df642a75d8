"""Compositional Inversion's location predictor (arXiv 2312.08048, Eq. 8): where two things stand, from their words.

(l_i, l_j) = MLP(e_i, e_j), trained on boxes that a detector finds in pictures of two things. The paper does not say how
a pair is ordered. In pictures where either may stand on either side, the mean of both orders would be two boxes in the
middle; here the first of a pair is the one on the left, so that who asks decides who stands where.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .files import check_version, read_safetensors, write_safetensors
from .layout_guidance import Box

FORMAT_VERSION = 1
HIDDEN = 64
SMALLEST_SIDE = 0.05  # of a predicted box, in fractions of the picture


class Pair(NamedTuple):
    """Two things seen in one picture, the left one first: their nouns and boxes."""

    nouns: tuple[str, str]
    boxes: tuple[Box, Box]


@dataclass(frozen=True)
class LayoutPredictor:
    """The trained MLP and the nouns it knows.

    nouns: N words. embeddings: (N, d), their word embeddings, all text towers side by side. mlp: (K, 2 d) -> (K, 8).
    towers: the widths of the text towers, whose sum is d.
    """

    nouns: tuple[str, ...]
    embeddings: Tensor
    mlp: nn.Sequential
    towers: Mapping[str, int]

    def nearest(self, embedding: Tensor) -> str:
        """The known noun whose embedding is the nearest to `embedding` (d,); of a known noun, itself."""
        return self.nouns[int(torch.cdist(embedding[None].float(), self.embeddings).argmin())]

    @torch.no_grad()
    def predict(self, e_i: Tensor, e_j: Tensor) -> tuple[Box, Box]:
        """The boxes of two things with word embeddings e_i, e_j (d,), the first one on the left.

        A token that no training picture showed takes the embedding of the nearest noun.
        """
        known = [self.nouns.index(self.nearest(e)) for e in (e_i, e_j)]
        centres = self.mlp(self.embeddings[known].reshape(1, -1)).sigmoid().view(2, 4)
        return tuple(_to_box(*row) for row in centres.tolist())


def pairs_of(labelled: Sequence[tuple[str, Box]]) -> list[Pair]:
    """All pairs of differently labelled boxes of one picture, each ordered from left to right by the boxes' middles."""
    pairs = []
    for number, one in enumerate(labelled):
        for other in labelled[number + 1 :]:
            if one[0] != other[0]:
                left, right = sorted((one, other), key=lambda thing: thing[1].x0 + thing[1].x1)
                pairs.append(Pair((left[0], right[0]), (left[1], right[1])))
    return pairs


def word_embedding(vectors: Mapping[str, Tensor]) -> Tensor:
    """(d,): the mean over a word's pieces in every tower, towers side by side. vectors: {tower: (n, width)}."""
    return torch.cat([vectors[tower].float().mean(dim=0) for tower in sorted(vectors)])


def build_mlp(d: int, hidden: int = HIDDEN) -> nn.Sequential:
    """The MLP of Eq. 8 with fresh weights; embeddings of CLIP are small, which the norm undoes."""
    return nn.Sequential(nn.LayerNorm(2 * d), nn.Linear(2 * d, hidden), nn.GELU(), nn.Linear(hidden, 8))


def train_predictor(
    pairs: Sequence[Pair],
    embeddings: Mapping[str, Tensor],
    towers: Mapping[str, int],
    steps: int = 1000,
    learning_rate: float = 3e-3,
    seed: int = 0,
) -> tuple[LayoutPredictor, float]:
    """Learn where pairs stand: the predictor, and the mean distance of a predicted edge on `pairs` (0..1).

    embeddings: (d,) of each noun, by `word_embedding`. Raises ValueError without pairs.
    """
    if not pairs:
        raise ValueError(
            "No picture has boxes of two different things, so there is nothing to learn a layout from: detect with a "
            "text such as 'a cat. a dog' on pictures that show both."
        )
    nouns = tuple(sorted({noun for pair in pairs for noun in pair.nouns}))
    table = torch.stack([embeddings[noun].cpu() for noun in nouns]).float()
    rows = torch.tensor([[nouns.index(noun) for noun in pair.nouns] for pair in pairs])
    edges = torch.tensor([pair.boxes for pair in pairs])
    centres = torch.cat([(edges[..., :2] + edges[..., 2:]) / 2, edges[..., 2:] - edges[..., :2]], dim=-1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mlp = build_mlp(table.shape[1])
        optimizer = torch.optim.AdamW(mlp.parameters(), learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            chosen = torch.randint(len(pairs), (64,))
            wanted = centres[chosen].flatten(1)
            loss = F.smooth_l1_loss(mlp(table[rows[chosen]].flatten(1)).sigmoid(), wanted, beta=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    predictor = LayoutPredictor(nouns, table, mlp.requires_grad_(False).eval(), dict(towers))
    known = {names: predictor.predict(*(embeddings[n].cpu() for n in names)) for names in {p.nouns for p in pairs}}
    distance = (torch.tensor([known[pair.nouns] for pair in pairs]) - edges).abs().mean()
    return predictor, float(distance)


def _to_box(x: float, y: float, width: float, height: float) -> Box:
    """A box inside the picture from its middle and its sides."""
    sides = (max(width, SMALLEST_SIDE), max(height, SMALLEST_SIDE))
    (x0, x1), (y0, y1) = (
        (max(0.0, middle - side / 2), min(1.0, middle + side / 2)) for middle, side in zip((x, y), sides)
    )
    return Box(x0, y0, x1, y1)


def save_predictor(path: Path, predictor: LayoutPredictor) -> None:
    """Write a predictor in half precision. Raises ValueError naming the folder when it cannot be written."""
    tensors = {"embeddings": predictor.embeddings} | {f"mlp.{k}": v for k, v in predictor.mlp.state_dict().items()}
    header = {
        "format_version": str(FORMAT_VERSION),
        "nouns": json.dumps(predictor.nouns),
        "towers": json.dumps(dict(predictor.towers)),
    }
    write_safetensors(path, {k: v.half().contiguous() for k, v in tensors.items()}, header)


def load_predictor(path: Path) -> LayoutPredictor:
    """Read what `save_predictor` wrote. Raises ValueError naming the file when it is damaged, newer, or something else.

    The nouns' embeddings are as saved: half precision moves none of them nearer to another noun.
    """
    tensors, header = read_safetensors(path)
    weights = {key.removeprefix("mlp."): v.float() for key, v in tensors.items() if key.startswith("mlp.")}
    if not ({"format_version", "nouns", "towers"} <= header.keys() and "embeddings" in tensors and weights):
        raise ValueError(f"The file {path} holds no layout predictor: choose one that Layout Predictor has saved.")
    check_version(path, header["format_version"], FORMAT_VERSION)
    try:
        nouns, towers = tuple(json.loads(header["nouns"])), dict(json.loads(header["towers"]))
        d = sum(towers.values())
    except (TypeError, ValueError) as error:
        raise ValueError(f"The header of the file {path} is damaged ({error}): train the predictor again.") from error
    embeddings = tensors["embeddings"].float()
    hidden = weights["1.bias"].numel() if "1.bias" in weights else HIDDEN
    mlp = build_mlp(embeddings.shape[1], hidden) if embeddings.shape == (len(nouns), d) else nn.Sequential()
    if {key: v.shape for key, v in mlp.state_dict().items()} != {key: v.shape for key, v in weights.items()}:
        raise ValueError(
            f"The file {path} is damaged (some of its tensors are missing or have other shapes): train the predictor "
            "again."
        )
    mlp.load_state_dict(weights)
    return LayoutPredictor(nouns, embeddings, mlp.requires_grad_(False).eval(), towers)
