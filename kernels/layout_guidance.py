"""Compositional Inversion's spatial part (arXiv 2312.08048, section "Spatial inversion"): words kept to their boxes.

In the first steps of sampling the noisy latents x_t are moved so that the cross-attention of each object's tokens
gathers inside the object's box. The constants are those of the released code, which took them from layout-guidance
(arXiv 2304.03373). Two readings differ from that code on purpose (METHODS 2.5): all heads count, and the loss is
computed anew at each step, where the code carries the last one over and may stop for good.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .backbone import Backbone, Layer
from .conditioning import StagedContext
from .heatmaps import map_level, map_shape
from .prompts import Placeholder, Prompt


class Box(NamedTuple):
    """A box in fractions of the picture: 0 is its left or upper border, 1 its right or lower one."""

    x0: float
    y0: float
    x1: float
    y1: float

    def check(self, name: str) -> None:
        """Raise ValueError for a box without area and for one that leaves the picture. name: what the box is for."""
        text = f"from x {self.x0:.3g}, y {self.y0:.3g} to x {self.x1:.3g}, y {self.y1:.3g} of the picture (0 to 1)"
        if not (self.x0 < self.x1 and self.y0 < self.y1):
            raise ValueError(f'The box of "{name}" goes {text} and has no area: draw it larger.')
        if min(self) < 0 or max(self) > 1:
            raise ValueError(
                f'The box of "{name}" goes {text}, beyond its borders: draw it inside, and tell the width and height '
                "of the picture it was drawn on."
            )


# The boxes of the released code: the first object on the left, the second on the right.
TWO_OBJECTS = (Box(0.1, 0.2, 0.5, 0.8), Box(0.6, 0.2, 0.95, 0.8))

NOT_FINITE = (
    "The gradient of the layout loss is not finite: limit the moves with largest_move, for example to 0.2, or load the "
    "checkpoint in bf16 or fp32 if it runs in fp16."
)


@dataclass(frozen=True)
class Placement:
    """Where one object goes. tokens: its positions in the prompt (0..T-1). boxes: its place is all of them together."""

    tokens: tuple[int, ...]
    boxes: tuple[Box, ...]


@dataclass(frozen=True)
class LayoutGuidance:
    """How strongly, how often and how long the latents are moved.

    strength: factor of the loss. threshold: no move while the loss is at or below it (0..1). iterations: moves a step,
    at most. steps: how many of the first sampling steps. power: of each object's loss, 1 as in Eq. 9 or 2 as in the
    released code. largest_move: root mean square of one move in VP latents, which themselves have about 1; longer ones
    are shortened; 0 for no limit.
    """

    strength: float = 30.0
    threshold: float = 0.2
    iterations: int = 5
    steps: int = 10
    power: int = 1
    largest_move: float = 0.0

    @property
    def idle(self) -> bool:
        """Whether nothing would ever be moved."""
        return self.strength == 0 or self.iterations == 0 or self.steps == 0

    def check(self) -> None:
        """Raise ValueError for numbers that mean nothing."""
        for name in ("strength", "threshold", "iterations", "steps", "largest_move"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} of the layout guidance must be 0 or more, got {value}.")
        if self.power not in (1, 2):
            raise ValueError(f"power of the layout loss must be 1 (paper) or 2 (released code), got {self.power}.")


def guidance_layers(layers: Sequence[Layer]) -> tuple[Layer, ...]:
    """The layers whose maps enter the loss: the middle block and the first cross-attention up block.

    layers: all of a U-Net, in execution order. Of each block only its last transformer layer, which is all of it in
    SD1.x, SD2.x and the toy model (1 + 3, 1 + 3 and 1 + 2 maps); SDXL has 10 (1 + 3 of 10 + 30 maps), too many to hold
    with their graphs (METHODS 2.7).
    """
    last = {layer[:2]: layer for layer in layers}  # layers come in the order of depth
    middle = [layer for layer in last.values() if layer.block == "middle"]
    down = sorted(layer.number for layer in last.values() if layer.block == "input")
    up = sorted((layer for layer in last.values() if layer.block == "output"), key=lambda layer: layer.number)
    # An up block has one layer more than a down block, whose layers have consecutive numbers.
    size = 1 + next((i for i in range(1, len(down)) if down[i] != down[i - 1] + 1), len(down))
    return (*middle, *up[:size])


def box_mask(boxes: Sequence[Box], h: int, w: int) -> Tensor:
    """M of Eq. 9: (h, w), 1 in the cells of the boxes and 0 elsewhere, at least one cell a box.

    Edges go to the nearest border between cells. (The released code cuts them off to the left and upwards, and narrow
    boxes become empty.)
    """
    mask = torch.zeros(h, w)
    for box in boxes:
        rows, columns = _cells(box.y0, box.y1, h), _cells(box.x0, box.x1, w)
        mask[rows, columns] = 1
    return mask


def _cells(start: float, end: float, count: int) -> slice:
    first, last = round(start * count), round(end * count)
    if first < last:
        return slice(first, last)
    middle = min(int((start + end) / 2 * count), count - 1)
    return slice(middle, middle + 1)


def layout_loss(
    maps: Sequence[Tensor],
    tokens: Sequence[int],
    placements: Sequence[Placement],
    size: tuple[int, int],
    power: int = 1,
) -> Tensor:
    """L_loc (Eq. 9) of each sample: the share of its attention that an object pays outside of its boxes.

    maps: A of each layer, (B, heads, h * w, n), attention to the positions `tokens` (n). size: of the latents. The mean
    over heads, over the tokens of an object, over objects and over layers of (1 - sum(M A) / sum(A)) ** power. Returns
    (B,) float32 in 0..1; attention that is zero everywhere is nowhere wrong, 0.
    """
    losses = []
    for attention in maps:
        attention = attention.float()
        h, w = map_shape(map_level(attention.shape[2], *size), *size)
        for placement in placements:
            mask = box_mask(placement.boxes, h, w).to(attention.device).flatten().bool()
            a = attention[..., [tokens.index(token) for token in placement.tokens]]
            inside, outside = a[:, :, mask].sum(dim=2), a[:, :, ~mask].sum(dim=2)
            share = outside / (inside + outside).clamp_min(torch.finfo(torch.float32).tiny)
            losses.append(share.pow(power).mean(dim=(1, 2)))
    return torch.stack(losses).mean(dim=0)


def move_latents(
    x_t: Tensor,
    abar: float,
    loss_of: Callable[[Tensor], Tensor],
    settings: LayoutGuidance,
    gradient_scale: float = 1.0,
) -> Tensor:
    """x_t <- x_t - (1 - abar_t) strength dL/dx_t, at most `iterations` times.

    x_t: VP latents (B, C, h, w), no inference tensor; inference mode must be off. loss_of: maps x_t to the losses (B,),
    each of its own sample alone. A sample rests once its loss is at or below the threshold, whatever the others do.
    In k-diffusion's x = x_t sqrt(1 + sigma^2) the same move is x - sigma^2 strength dL/dx (METHODS 0.5).
    gradient_scale: as Backbone.gradient_scale. Returns the moved x_t, detached. Raises ValueError when the gradient is
    not finite.
    """
    x_t = x_t.detach()
    for _ in range(settings.iterations):
        with torch.enable_grad():
            x = x_t.clone().requires_grad_(True)
            loss = loss_of(x)
            moving = loss.detach() > settings.threshold
            if not moving.any():
                break
            (gradient,) = torch.autograd.grad(loss.sum() * gradient_scale, x)
            if not gradient.isfinite().all():
                raise ValueError(NOT_FINITE)
        move = (1 - abar) * settings.strength / gradient_scale * gradient
        if settings.largest_move:
            length = move.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
            move = move * (settings.largest_move / length.clamp_min(settings.largest_move))
        x_t = torch.where(moving.view(-1, 1, 1, 1), x_t - move, x_t)
    return x_t


def guide_layout(
    backbone: Backbone, placements: Sequence[Sequence[Placement]], settings: LayoutGuidance
) -> Callable[[StagedContext], Callable[[Tensor, int, int], Tensor]]:
    """Layout guidance on any Backbone: the `before_step` of `sampling.paint`.

    placements: of each prompt of the batch. From the batch's contexts it makes the hook of `sampling.ddim_sample`:
    (x_t (B, C, h, w), t, step) -> x_t, moved in the first steps. The forward pass is a full one; the one inside
    ComfyUI stops after the last map (nodes/native/layout_guidance.py).
    """
    settings.check()
    layers = guidance_layers(backbone.layers)
    tokens = sorted({token for objects in placements for placement in objects for token in placement.tokens})

    def with_context(context: StagedContext) -> Callable[[Tensor, int, int], Tensor]:
        def before_step(x_t: Tensor, t: int, step: int) -> Tensor:
            if settings.idle or step >= settings.steps:
                return x_t
            t_batch = torch.full((len(x_t),), t, device=x_t.device)

            def loss_of(x: Tensor) -> Tensor:
                with backbone.attention(layers, tokens) as recorded:
                    backbone.predict_noise(x, t_batch, context.at(t))
                maps = [a for by_layer in recorded.maps.values() for a in by_layer]
                size = (x.shape[2], x.shape[3])
                losses = [
                    layout_loss([a[i : i + 1] for a in maps], tokens, objects, size, settings.power)
                    for i, objects in enumerate(placements)
                ]
                return torch.cat(losses)

            abar = float(backbone.schedule.alphas_cumprod[t])
            return move_latents(x_t, abar, loss_of, settings, backbone.gradient_scale)

        return before_step

    return with_context


def phrase_positions(backbone: Backbone, prompt: Prompt, phrase: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The token positions of every place where `phrase` (words, or <name>) stands in `prompt`, all pieces of it.

    sizes: number of vectors of each placeholder. Raises ValueError when it stands nowhere.
    """

    def pieces(text: str) -> int:
        return len(next(iter(backbone.token_vectors(text).values())))

    # A phrase is found as whole words; byte pairs never reach over the border of a word.
    pattern = re.compile(rf"(?<!\w){re.escape(phrase)}(?!\w)", re.IGNORECASE)
    positions: list[int] = []
    start = 1  # after the start of text
    for part in prompt.parts:
        if isinstance(part, Placeholder):
            length = sizes[part.name]
            positions += range(start, start + length) if phrase == f"<{part.name}>" else ()
        else:
            length = pieces(part)
            for match in pattern.finditer(part):
                positions += range(start + pieces(part[: match.start()]), start + pieces(part[: match.end()]))
        start += length
    if not positions:
        raise ValueError(f'The prompt "{prompt.text}" does not say "{phrase}": name words of the prompt.')
    return tuple(positions)
