"""The similarity transform that lays a reference's subject over the subject of a generated picture (HiFi Tuner, arXiv
2312.00079, section 3.3, Eq. 8, 9, Algorithm 4).

Algorithm 4 as published draws the points of one mask towards the other, which shrinking to a point inside it does best.
Here the borders of both masks are drawn to each other, from a start in closed form: scale from the areas, place from
the centroids, angle from the principal axes or none. Points are (x, y) in pixels, y downwards, from the upper left
corner.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

CELLS = 96  # of a region's longer side: a tenth of a percent of the subject is far below one latent
MARGIN = 24  # cells around a region, in which distances are exact
POINTS = 500  # of each mask in Algorithm 4, spread evenly
LONGEST = 256  # pixels of a mask in Eq. 9: edges that are averaged tell a place to a fraction of a pixel
STEPS, STEP = 120, 0.03  # of Adam, in radians, logarithms of the scale and radii of the subject

Cost = Callable[["Similarity"], Tensor]


@dataclass(frozen=True)
class Similarity:
    """T_theta = S(theta_1) R(theta_2) Trans(theta_3, theta_4) (Eq. 8): shift first, then turn and scale about (0, 0).

    scale: theta_1. angle: theta_2 in radians, clockwise on the screen. shift: (theta_3, theta_4) in pixels, (2,).
    """

    scale: Tensor
    angle: Tensor
    shift: Tensor

    @classmethod
    def between(cls, source: Tensor, target: Tensor, scale: Tensor, angle: Tensor) -> Similarity:
        """The one that takes point `source` (2,) to point `target` (2,) with this scale and angle."""
        unmoved = cls(scale, angle, torch.zeros_like(target))
        return cls(scale, angle, unmoved.inverse(target) - source)

    def _rotation(self) -> Tensor:
        cos, sin = self.angle.cos(), self.angle.sin()
        return torch.stack([torch.stack([cos, -sin]), torch.stack([sin, cos])])

    def __call__(self, points: Tensor) -> Tensor:
        """T of points (..., 2)."""
        return self.scale * (points + self.shift) @ self._rotation().T

    def inverse(self, points: Tensor) -> Tensor:
        """T^-1 of points (..., 2)."""
        return points @ self._rotation() / self.scale - self.shift

    @property
    def degrees(self) -> float:
        """The angle within -180..180."""
        return math.degrees(math.remainder(self.angle.item(), 2 * math.pi))


class Moments(NamedTuple):
    """Of a mask: area in pixels, centroid (2,), direction of its long axis in radians within -pi/2..pi/2."""

    area: Tensor
    centroid: Tensor
    axis: Tensor


def moments(mask: Tensor) -> Moments:
    """Moments of a mask (H, W) in 0..1 that is not empty."""
    mask = mask.double()
    area = mask.sum()
    x, y = (torch.arange(n, dtype=torch.float64, device=mask.device) + 0.5 for n in (mask.shape[1], mask.shape[0]))
    columns, rows = mask.sum(dim=0), mask.sum(dim=1)
    centroid = torch.stack([columns @ x, rows @ y]) / area
    x, y = x - centroid[0], y - centroid[1]
    axis = 0.5 * torch.atan2(2 * (y @ mask @ x), columns @ x**2 - rows @ y**2)
    return Moments(area, centroid, axis)


def closed_form(reference: Moments, target: Moments, angle: Tensor) -> Similarity:
    """The start: sqrt(|M_g| / |M_r|) about the centroids, turned by `angle`."""
    return Similarity.between(reference.centroid, target.centroid, (target.area / reference.area).sqrt(), angle)


class Region:
    """The border of a mask and how far points are from it, between the pixels, so that the grid takes no part in a fit.

    border: (N, 2) points. The distance is positive outside of the mask and negative inside.
    """

    def __init__(self, mask: Tensor) -> None:
        """mask: (H, W) in 0..1, not empty."""
        rows, columns = (mask.amax(dim=dim).nonzero().flatten() for dim in (1, 0))
        top, left = rows[0].item(), columns[0].item()
        crop = mask[top : rows[-1] + 1, left : columns[-1] + 1].double()
        longest = max(1.0, max(crop.shape) / CELLS)
        size = [max(1, round(side / longest)) for side in crop.shape]
        inside = F.interpolate(crop[None, None], size=size, mode="area")[0, 0]
        inside = F.pad(inside >= min(0.5, inside.max().item()), (MARGIN,) * 4)
        self.cell = torch.tensor([crop.shape[1] / size[1], crop.shape[0] / size[0]], dtype=torch.float64)
        self.corner = torch.tensor([left, top], dtype=torch.float64) - MARGIN * self.cell
        self.size = torch.tensor(inside.shape[::-1]) * self.cell
        self.field = (distance_field(inside) - distance_field(~inside)) * self.cell.mean()
        across = (inside[:, 1:] != inside[:, :-1]).nonzero().flip(1) + torch.tensor([1.0, 0.5])
        down = (inside[1:] != inside[:-1]).nonzero().flip(1) + torch.tensor([0.5, 1.0])
        self.border = self.corner + torch.cat([across, down]).double() * self.cell

    def distance(self, points: Tensor) -> Tensor:
        """Signed distance in pixels of points (N, 2) from the border: (N,). Differentiable."""
        place = (points - self.corner) / self.size * 2 - 1
        near = place.clamp(-1, 1)
        field = F.grid_sample(self.field[None, None], near[None, None], padding_mode="border", align_corners=False)
        return field[0, 0, 0] + ((place - near) * self.size / 2).square().sum(dim=-1).clamp_min(1e-12).sqrt()


def distance_field(inside: Tensor) -> Tensor:
    """Distance, in cells, of each cell (H, W) from the border of those that are inside; 0 for these themselves."""
    height, width = inside.shape
    far = float(height + width)
    y, x = (torch.arange(n, dtype=torch.float64) for n in (height, width))
    # Exactly, one dimension after the other: first the nearest cell inside of each column.
    gaps = (y[:, None] - y[None]).abs()[:, :, None] + torch.where(inside, 0.0, far)[None]
    squared = gaps.amin(dim=1).square()
    squared = (squared[:, None, :] + (x[:, None] - x[None]).square()[None]).amin(dim=2)
    return (squared.sqrt() - 0.5).clamp_min(0)


def symmetric_chamfer(reference: Tensor, target: Tensor) -> Cost:
    """Mean square distance of each mask's border from the other's, both in pixels of the target."""
    own, goal = Region(reference), Region(target)

    def cost(transform: Similarity) -> Tensor:
        there = goal.distance(transform(own.border)).square().mean()
        back = own.distance(transform.inverse(goal.border)).square().mean() * transform.scale**2
        return there + back

    return cost


def one_sided(reference: Tensor, target: Tensor) -> Cost:
    """Algorithm 4 as published: the sum of square distances of the transformed reference points to the nearest target
    point. A reference shrunk to a point inside the target costs less than the right answer.
    """
    own, goal = (_points(mask) for mask in (reference, target))
    return lambda transform: torch.cdist(transform(own), goal).square().amin(dim=1).sum()


def _points(mask: Tensor) -> Tensor:
    points = (mask >= min(0.5, mask.max().item())).nonzero().flip(1).double() + 0.5
    return points[:: math.ceil(len(points) / POINTS)]


def mask_l1(reference: Tensor, target: Tensor) -> Cost:
    """Eq. 9: ||T(M_r) - M_g||_1, in pixels of the target; masks are compared at `LONGEST` pixels a side at most."""
    (own, k), (goal, n) = (_averaged(mask.double()) for mask in (reference, target))

    def cost(transform: Similarity) -> Tensor:
        small = Similarity(transform.scale * k / n, transform.angle, transform.shift / k)
        return (warp_mask(own, small, goal.shape) - goal).abs().sum() * n**2

    return cost


def _averaged(mask: Tensor) -> tuple[Tensor, int]:
    """The mask averaged over k x k pixels, from its upper left corner on so that points only scale by 1 / k; and k."""
    height, width = mask.shape
    k = math.ceil(max(height, width) / LONGEST)
    return F.avg_pool2d(F.pad(mask, (0, -width % k, 0, -height % k))[None], k)[0], k


OBJECTIVES: dict[str, Callable[[Tensor, Tensor], Cost]] = {
    "symmetric chamfer": symmetric_chamfer,
    "mask L1 (Eq. 9)": mask_l1,
    "one-sided (Alg. 4)": one_sided,
}


def fit_masks(
    reference: Tensor, target: Tensor, objective: str = "symmetric chamfer", turn: float = 180.0
) -> Similarity:
    """The similarity transform with T(M_r) ~ M_g, float64.

    reference, target: masks M_r, M_g (H, W) in 0..1 of any sizes, not empty, on the CPU. objective: one of
    `OBJECTIVES`. turn: degrees that the subject may be turned by either way, 0 to keep it upright.

    Started from no rotation and from the two that lay one long axis over the other, each is refined by Adam; the best
    of all is returned, so that none is worse than its start.
    """
    own, goal = moments(reference), moments(target)
    limit = math.radians(turn)
    cost = OBJECTIVES[objective](reference, target)
    radius = (goal.area / math.pi).sqrt()  # makes a shift as large as a turn or a change of scale
    best: tuple[float, Similarity] | None = None
    for angle in _starts(own, goal, limit):
        start = closed_form(own, goal, torch.tensor(angle, dtype=torch.float64))
        theta = torch.zeros(4, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.Adam([theta], lr=STEP)
        for step in range(STEPS + 1):
            optimizer.param_groups[0]["lr"] = STEP * (1 - step / STEPS)
            turned = (start.angle + theta[1]).clamp(-limit, limit)
            place = goal.centroid + radius * theta[2:]
            transform = Similarity.between(own.centroid, place, start.scale * theta[0].exp(), turned)
            value = cost(transform)
            if best is None or value.item() < best[0]:
                found = Similarity(transform.scale.detach(), transform.angle.detach(), transform.shift.detach())
                best = (value.item(), found)
            if step < STEPS:
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
    return best[1]


def _starts(own: Moments, goal: Moments, limit: float) -> list[float]:
    """No rotation, and the two that lay long axis over long axis, as far as they are within the limit."""
    between = (goal.axis - own.axis).item()
    turned = (math.remainder(between + flip, 2 * math.pi) for flip in (0.0, math.pi))
    return [0.0, *(angle for angle in turned if 1e-6 < abs(angle) <= limit)]


def warp_picture(picture: Tensor, transform: Similarity, size: tuple[int, int]) -> Tensor:
    """T(I_r): a picture (H, W, 3) as it lies in a picture of `size` (H', W'), beyond its borders its reflection."""
    channels = _warp(picture.movedim(-1, 0), transform, size, "reflection")
    return channels.movedim(0, -1).clamp(0, 1)


def warp_mask(mask: Tensor, transform: Similarity, size: tuple[int, int]) -> Tensor:
    """T(M_r): a mask (H, W) as it lies in a picture of `size`, with soft edges; nothing outside. Differentiable."""
    return _warp(mask[None], transform, size, "zeros")[0].clamp(0, 1)


def _warp(channels: Tensor, transform: Similarity, size: tuple[int, int], outside: str) -> Tensor:
    height, width = channels.shape[-2:]
    own_size = torch.tensor([width, height], dtype=torch.float64)
    y, x = (torch.arange(n, dtype=torch.float64) + 0.5 for n in size)
    places = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)
    grid = transform.inverse(places) / own_size * 2 - 1
    scale = transform.scale.item()
    if scale < 1:  # else every other pixel would be skipped; the grid counts in pictures, not in pixels
        smaller = [max(1, round(side * scale)) for side in (height, width)]
        channels = F.interpolate(channels[None], size=smaller, mode="bilinear", antialias=True)[0]
    return F.grid_sample(
        channels[None], grid[None].to(channels), mode="bilinear", padding_mode=outside, align_corners=False
    )[0]
