"""Finding by text what a picture shows (GroundingDINO, arXiv 2303.05499), whichever engine runs the network.

An engine is a module with a tokenizer. It maps pixels (1, 3, h, w) and a caption to logits (Q, 256) of Q boxes against
the caption's tokens, minus infinity where there is no token, and boxes (Q, 4): centre x y, width, height, in 0..1 of
the picture. kernels/grounding_dino.py builds two of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

SHORT_SIDE, LONG_SIDE = 800, 1333  # pixels; what the published models were trained and measured on
PIXEL_MEAN, PIXEL_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MAX_TOKENS = 256
# [CLS], [SEP], "." and "?" of bert-base-uncased, which part a caption into phrases that do not see each other.
SEPARATORS = (101, 102, 1012, 1029)


class Engine(Protocol):
    """What runs the network: see this file's head."""

    tokenizer: Any

    def __call__(self, pixels: Tensor, caption: str) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class Detection:
    """One thing found: x0 y0 x1 y1 in pixels inside the picture, how sure (0..1), and the phrase it answers."""

    box: tuple[float, float, float, float]
    score: float
    phrase: str


def tidy_caption(text: str) -> str:
    """A caption as the network was taught to read it: lower case, its end marked with a full stop."""
    text = text.lower().strip()
    return text if text.endswith(".") else text + "."


def input_size(height: int, width: int, short_side: int) -> tuple[int, int]:
    """(height, width) for the network: `short_side` pixels, fewer where the other side would be over 5/3 of it."""
    low, high = min(height, width), max(height, width)
    longest = short_side * LONG_SIDE // SHORT_SIDE
    if high / low * short_side > longest:
        short_side = round(longest * low / high)
    long_side = int(short_side * high / low)
    return (short_side, long_side) if height <= width else (long_side, short_side)


def prepare(picture: Tensor, short_side: int = SHORT_SIDE) -> Tensor:
    """Pixels (1, 3, h, w) for the network of a picture (H, W, 3) in 0..1, resized like by the package groundingdino."""
    from torchvision.transforms.functional import resize, to_pil_image

    pixels = (picture * 255).round().clamp(0, 255).to("cpu", torch.uint8).numpy()
    resized = resize(to_pil_image(pixels), list(input_size(*picture.shape[:2], short_side)))
    values = torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.uint8).view(resized.height, resized.width, 3)
    normal = (values.float() / 255 - torch.tensor(PIXEL_MEAN)) / torch.tensor(PIXEL_STD)
    return normal.permute(2, 0, 1)[None].contiguous()


def phrases(tokenizer: Any, caption: str) -> list[str]:
    """For each token of the caption the phrase that it is part of; "" for the separators between phrases.

    Raises ValueError for captions without a word or with more tokens than the network reads.
    """
    tokens = tokenizer(caption, return_offsets_mapping=True)
    ids, offsets = tokens["input_ids"], tokens["offset_mapping"]
    if len(ids) > MAX_TOKENS:
        raise ValueError(
            f'The text "{caption[:40]}..." has {len(ids)} tokens and GroundingDINO reads {MAX_TOKENS}: name fewer '
            "things."
        )
    found = [""] * len(ids)
    start = None
    for place, token in enumerate(ids):
        if token not in SEPARATORS:
            start = place if start is None else start
        elif start is not None:
            phrase = caption[offsets[start][0] : offsets[place - 1][1]]
            found[start:place] = [phrase] * (place - start)
            start = None
    if not any(found):
        raise ValueError('The text names nothing to look for: write for example "a dog" or "a dog. a red ball".')
    return found


def read_out(
    logits: Tensor, boxes: Tensor, words: list[str], height: int, width: int, threshold: float
) -> list[Detection]:
    """What an engine found in a picture of that size, the surest first; boxes of less than a pixel are left out.

    words: from `phrases`. threshold: of a box's score, the largest probability of any token. The phrase is that of the
    likeliest word.
    """
    probabilities = logits.float().sigmoid().cpu()
    scores = probabilities.amax(dim=1)
    is_word = torch.tensor([bool(word) for word in words])
    likeliest = probabilities[:, : len(words)].masked_fill(~is_word, -1).argmax(dim=1)
    center, extent = boxes.float().cpu().split(2, dim=1)
    corners = torch.cat([center - extent / 2, center + extent / 2], dim=1).clamp(0, 1)
    corners = corners * torch.tensor([width, height, width, height])
    kept = (scores > threshold) & (corners[:, 2:] - corners[:, :2] >= 1).all(dim=1)
    order = [int(query) for query in scores.argsort(descending=True) if kept[query]]
    return [Detection(tuple(corners[q].tolist()), float(scores[q]), words[likeliest[q]]) for q in order]


def detect(
    engine: Engine, picture: Tensor, text: str, threshold: float, short_side: int = SHORT_SIDE
) -> list[Detection]:
    """What `text` names in a picture (H, W, 3) in 0..1, the surest first.

    One picture at a time, because groundingdino-py mixes up captions of unequal length in a batch.
    """
    caption = tidy_caption(text)
    words = phrases(engine.tokenizer, caption)
    logits, boxes = engine(prepare(picture, short_side), caption)
    return read_out(logits, boxes, words, *picture.shape[:2], threshold)
