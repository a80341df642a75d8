"""Core's BOUNDING_BOX and the points of point editors, to and from tensors in pixels."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...kernels.detection import Detection

Box = dict[str, Any]  # x, y, width, height in pixels; detectors add label and score


def to_bounding_box(found: Detection) -> Box:
    """A detection as core's BOUNDING_BOX, in whole pixels, with the keys that core's detectors add."""
    x0, y0, x1, y1 = (round(value) for value in found.box)
    size = {"width": max(1, x1 - x0), "height": max(1, y1 - y0)}
    return {"x": x0, "y": y0, **size, "label": found.phrase, "score": found.score}


def boxes_by_picture(bboxes: Any, count: int) -> list[list[Box]]:
    """For each picture its boxes, out of what travels on BOUNDING_BOX: a box, a list of them, or one list a picture.

    One list is for all pictures. Raises ValueError for another number of lists than pictures.
    """
    if isinstance(bboxes, dict):
        bboxes = [bboxes]
    if not bboxes or isinstance(bboxes[0], dict):
        bboxes = [bboxes or []]
    if len(bboxes) == 1:
        return [*bboxes] * count
    if len(bboxes) != count:
        raise ValueError(
            f"bboxes has boxes for {len(bboxes)} pictures and there are {count}: detect on the same pictures, or "
            "connect the boxes of one picture for all."
        )
    return bboxes


def corners(boxes: Sequence[Box], height: int, width: int) -> Tensor:
    """(K, 4) x0 y0 x1 y1 of boxes, cut off at the picture's border. Raises ValueError for a box outside of it."""
    rows = []
    for box in boxes:
        x0, y0, x1, y1 = box["x"], box["y"], box["x"] + box["width"], box["y"] + box["height"]
        row = (max(0, x0), max(0, y0), min(width, x1), min(height, y1))
        if row[0] >= row[2] or row[1] >= row[3]:
            raise ValueError(
                f"The box from x {x0:g}, y {y0:g} to x {x1:g}, y {y1:g} is outside the picture, which is {width} x "
                f"{height} pixels: draw it on a picture of that size."
            )
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64).reshape(-1, 4)


def read_points(text: str, name: str) -> Tensor:
    """(N, 2) x y of points in a text: JSON [{"x": 1, "y": 2}] as point editors write it, or a line "1, 2" for each.

    Raises ValueError naming the input for anything else.
    """
    text = text.strip()
    try:
        if text.startswith("["):
            points = [(float(point["x"]), float(point["y"])) for point in json.loads(text)]
        else:
            points = [tuple(float(part) for part in line.split(",")) for line in text.splitlines() if line.strip()]
        return torch.tensor(points, dtype=torch.float64).reshape(len(points), 2)
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise ValueError(
            f'"{text[:40]}" on {name} is no list of points: write one point a line as x, y in pixels, for example '
            '"120, 80", or connect a point editor.'
        ) from error


def check_points(points: Tensor, name: str, height: int, width: int) -> None:
    """Raise ValueError naming the input when a point is not in the picture."""
    for x, y in points.tolist():
        if not (0 <= x < width and 0 <= y < height):
            raise ValueError(
                f"The point {x:g}, {y:g} on {name} is outside the picture, which is {width} x {height} pixels."
            )
