"""Which known words a learned one is made of: anchors and their sparse code.

The semantic part of Compositional Inversion (arXiv 2312.08048, Eq. 6). A word learned from few pictures drifts to where
no known word is, and there it takes over the prompt. Anchors are the embeddings of known words; the code says which few
of them the learned word is made of.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .backbone import Backbone


def split_words(text: str) -> tuple[str, ...]:
    """Words or phrases of a list, separated by commas or lines, each once, in lower case."""
    words = (" ".join(word.lower().split()) for line in text.splitlines() for word in line.split(","))
    return tuple(dict.fromkeys(word for word in words if word))


COCO_NAMES = split_words(
    "person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign, "
    "parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, "
    "handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, "
    "surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, "
    "broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, "
    "laptop, mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, "
    "scissors, teddy bear, hair drier, toothbrush"
)
"""The 80 classes of COCO, the paper's example of anchors."""

# Correlations below this share of the vector's length are rounding: the code is as good as it gets.
ROUNDING = 1e-9


class Dictionary(NamedTuple):
    """Anchors of one text tower. words: n names, the class word first. vectors: (n, d), their embeddings D."""

    words: tuple[str, ...]
    vectors: Tensor


def single_pieces(backbone: Backbone, words: Sequence[str]) -> tuple[str, ...]:
    """Those of `words` that are one piece for every text tower."""
    return tuple(word for word in words if all(len(v) == 1 for v in backbone.token_vectors(word).values()))


def check_class_word(backbone: Backbone, class_word: str) -> None:
    """Raise ValueError when the class word is not one piece."""
    if not single_pieces(backbone, [class_word]):
        raise ValueError(
            f'The class word "{class_word}" is not one piece for the text encoder, so it has no embedding of its own: '
            'choose a common single word such as "cat" or "person".'
        )


def word_dictionary(backbone: Backbone, class_word: str, words: Sequence[str]) -> dict[str, Dictionary]:
    """Anchors {tower: Dictionary} of the class word and those of `words` that are one piece; the others are left out.

    Raises ValueError when the class word is not one piece, or none of `words` is; without words, no other is needed.
    """
    check_class_word(backbone, class_word)
    usable = single_pieces(backbone, words)
    if words and not usable:
        raise ValueError(
            f"None of the anchor words ({', '.join(words)}) is one piece for the text encoder, so none has an "
            "embedding of its own: list common single words, such as cat, dog, chair."
        )
    names = tuple(dict.fromkeys([class_word, *usable]))
    embeddings = [backbone.token_vectors(name) for name in names]
    return {tower: Dictionary(names, torch.cat([e[tower] for e in embeddings])) for tower in backbone.towers}


def nearest_dictionary(backbone: Backbone, class_word: str, neighbours: int) -> dict[str, Dictionary]:
    """Anchors {tower: Dictionary} of the class word and its `neighbours` nearest words in each tower's vocabulary.

    Nearest by angle: by distance it would be the rarest words, whose embeddings stayed short. Raises ValueError when
    the class word is not one piece.
    """
    check_class_word(backbone, class_word)
    dictionaries = {}
    for tower, e_class in backbone.token_vectors(class_word).items():
        words, table = backbone.word_table(tower)
        cosine = torch.cosine_similarity(table, e_class, dim=1)
        order = cosine.topk(min(neighbours + 1, len(words))).indices.tolist()  # the class word is one of them
        others = [i for i in order if words[i] != class_word][:neighbours]
        names = (class_word, *(words[i] for i in others))
        dictionaries[tower] = Dictionary(names, torch.cat([e_class, table[others]]))
    return dictionaries


def sparse_code(e: Tensor, dictionary: Tensor, atoms: int) -> Tensor:
    """delta = argmin ||e - D^T delta||^2 with delta >= 0 and at most `atoms` anchors (Eq. 6: fewer than c).

    e: (d,). dictionary: D (n, d). Returns (n,), float64 on the CPU. Non-negative orthogonal matching pursuit: the
    anchor that best explains what is left joins, then all coefficients are fitted anew, and those that would turn
    negative leave. That is Lawson and Hanson's non-negative least squares, ended at `atoms` anchors, and exact where
    it ends before.
    """
    e, dictionary = e.detach().cpu().double(), dictionary.detach().cpu().double()
    tiny = torch.finfo(torch.float64).tiny
    lengths = dictionary.norm(dim=1).clamp_min(tiny)
    delta = torch.zeros(len(dictionary), dtype=torch.float64)
    chosen: list[int] = []
    for _ in range(3 * len(dictionary)):  # anchors may come and go; Lawson and Hanson's bound
        explains = dictionary @ (e - delta @ dictionary) / lengths
        explains[chosen] = 0
        best = int(explains.argmax())
        if len(chosen) == min(atoms, len(dictionary)) or explains[best] <= ROUNDING * e.norm():
            break
        chosen.append(best)
        while True:
            fitted = torch.linalg.lstsq(dictionary[chosen].T, e[:, None]).solution[:, 0]
            if bool((fitted > 0).all()):
                break
            # Towards the fit, as far as the first coefficient reaches zero: that anchor leaves.
            now = delta[chosen]
            reach = torch.where(fitted > 0, torch.inf, now / (now - fitted).clamp_min(tiny))
            delta[chosen] = now + reach.min() * (fitted - now)
            delta[chosen.pop(int(reach.argmin()))] = 0
        delta[chosen] = fitted
    return delta


def anchor_weights(e: Tensor, dictionary: Tensor, atoms: int) -> Tensor:
    """The sparse code of each vector, scaled to sum 1. e: (..., d); returns (..., n) like `e`, without graph.

    A vector that points away from every anchor belongs to the class word, the first.
    """
    rows = []
    for vector in e.detach().reshape(-1, e.shape[-1]):
        delta = sparse_code(vector, dictionary, atoms)
        if not delta.any():
            delta[0] = 1
        rows.append(delta / delta.sum())
    return torch.stack(rows).view(*e.shape[:-1], len(dictionary)).to(e)


def squared_distance(e: Tensor, weights: Tensor, dictionary: Tensor) -> Tensor:
    """||e - ebar||^2 to the weighted centroid ebar = D^T delta: (...), of e (..., d) and weights (..., n) of sum 1.

    It has the gradient of the sum over i of delta_i ||e - e_i||^2 (Eq. 6) and differs from it by the anchors' own
    spread, which e does not change: as a value it is 0 where nothing pulls.
    """
    return (e - weights @ dictionary).square().sum(dim=-1)
