"""What a training node shows while it runs: progress, its loss curve, its newest samples, and a button to stop it.

The picture reaches the node as ComfyUI's own preview, so everything can be seen without our JavaScript; the panel of
web/js/train.js listens to the websocket event and adds figures and the button "Stop and keep".
"""

from __future__ import annotations

import math
import sys
import textwrap
import time
from collections.abc import Sequence
from typing import Any

import comfy.model_management
import comfy.utils
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .pictures import to_pil

EVENT = "concept-atelier.train"
STOP_ROUTE = "/concept-atelier/stop"

EVENT_SECONDS = 0.1  # not faster than the frontend draws
REST = 20  # times as long as an event took: it goes through the whole history, and shall take at most 5 % of the time
PREVIEW_SECONDS = 1.0  # a preview is a JPEG: a hundred times the bytes of an event
PREVIEW_WIDTH = 512
LINE_LENGTH = 72  # characters of a line of text on that width
CURVE_POINTS = 200  # what the panel can show on its width
EMA_BETA = 0.98

INK, PALE, PAPER = (230, 159, 0), (110, 120, 130), (24, 26, 28)  # orange on slate: safe for colour-blind eyes

stop_requests: set[str] = set()
"""Execution ids of the nodes whose "Stop and keep" was pressed and not yet seen."""


def prompt_server() -> Any | None:
    """ComfyUI's running PromptServer, or None in a program that only uses ComfyUI as a library."""
    server = sys.modules.get("server")
    return getattr(server.PromptServer, "instance", None) if server else None


def show_text(text: str, node: Any) -> None:
    """Write `text` on `node`, the class of the node that is running; outside a server nobody sees it."""
    server = prompt_server()
    if server is not None and node.hidden is not None:
        server.send_progress_text(text, node.hidden.unique_id)


def register_routes() -> None:
    """Offer POST /concept-atelier/stop {"node": execution id}, which ends that node's training and keeps its work."""
    server = prompt_server()
    if server is None:
        return
    from aiohttp import web

    @server.routes.post(STOP_ROUTE)
    async def stop(request: web.Request) -> web.Response:
        stop_requests.add(str((await request.json())["node"]))
        return web.json_response({})


def smoothed(losses: Sequence[float], beta: float = EMA_BETA) -> list[float]:
    """The exponential moving average of `losses` after each of them, corrected for its start at zero."""
    averages, total, weight = [], 0.0, 0.0
    for loss in losses:
        total = beta * total + (1 - beta) * loss
        weight = beta * weight + (1 - beta)
        averages.append(total / weight)
    return averages


def curve_points(losses: Sequence[float], count: int = CURVE_POINTS) -> list[tuple[int, float, float]]:
    """At most `count` points (step counted from 1, mean loss since the point before, moving average) of a loss history.

    Losses that are not finite are left out.
    """
    steps = [(step, loss) for step, loss in enumerate(losses, start=1) if math.isfinite(loss)]
    averages = smoothed([loss for _, loss in steps])
    stride = max(1, math.ceil(len(steps) / count))
    points = []
    for start in range(0, len(steps), stride):
        part = steps[start : start + stride]
        points.append((part[-1][0], sum(loss for _, loss in part) / len(part), averages[start + len(part) - 1]))
    return points


def loss_curve(losses: Sequence[float], size: tuple[int, int] = (PREVIEW_WIDTH, 200)) -> Image.Image:
    """Draw a loss history: thin the losses, thick their moving average, the axes' ends in figures.

    losses: one a step, in order; any number of them, those that are not finite left out. size: (width, height) pixels.
    """
    width, height = size
    image = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(13)
    points = curve_points(losses)
    if not points:
        draw.text((width / 2, height / 2), "no loss yet", font=font, fill=PALE, anchor="mm")
        return image
    values = [value for _, loss, average in points for value in (loss, average)]
    low, high = min(values), max(values)
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0  # a constant loss is drawn in the middle
    low, high = low - margin, high + margin
    left, top, right, bottom = 8, 26, width - 9, height - 22
    first, last = points[0][0], points[-1][0]

    def place(step: int, value: float) -> tuple[float, float]:
        across = (step - first) / (last - first) if last > first else 0.5
        return left + across * (right - left), bottom - (value - low) / (high - low) * (bottom - top)

    draw.rectangle((left, top, right, bottom), outline=(60, 64, 68))
    for column, colour, thickness in ((1, PALE, 1), (2, INK, 3)):
        line = [place(point[0], point[column]) for point in points]
        draw.line(line, fill=colour, width=thickness, joint="curve")
        x, y = line[-1]
        draw.ellipse((x - thickness, y - thickness, x + thickness, y + thickness), fill=colour)
    draw.text((left, 5), f"loss {points[-1][1]:.4f}", font=font, fill=(170, 178, 186))
    draw.text((width / 2, 5), f"average {points[-1][2]:.4f}", font=font, fill=INK, anchor="ma")
    draw.text((right, 5), f"{low:.3g} .. {high:.3g}", font=font, fill=PALE, anchor="ra")
    draw.text((left, height - 18), f"step {first}", font=font, fill=PALE)
    draw.text((right, height - 18), f"{last}", font=font, fill=PALE, anchor="ra")
    return image


def finite(value: float) -> float | None:
    """`value`, or None where it is not finite: NaN is no JSON, and a browser drops the whole message."""
    return value if math.isfinite(value) else None


class LiveReport:
    """The one callback of a training node: it shows each step and says when to stop.

    node_id: the node's execution id (`cls.hidden.unique_id`; "3:7" inside a subgraph). total_steps: of the whole run,
    steps of earlier sessions included.
    """

    def __init__(self, node_id: str, total_steps: int) -> None:
        self.node_id, self.total = node_id, total_steps
        self._bar = comfy.utils.ProgressBar(total_steps, node_id=node_id)
        self._grid: Image.Image | None = None
        self._words: Image.Image | None = None
        self._start: tuple[int, float] | None = None
        self._next_event = self._next_preview = 0.0
        stop_requests.discard(node_id)  # a request that came after the last run ended is not for this one

    @property
    def stop_requested(self) -> bool:
        """Whether "Stop and keep" was pressed since this report began."""
        return self.node_id in stop_requests

    def samples(self, image_grid: Tensor) -> None:
        """Show these pictures under the curve from the next step on. image_grid: (H, W, 3) in 0..1."""
        grid = to_pil(image_grid)
        self._grid = grid.resize((PREVIEW_WIDTH, max(1, round(PREVIEW_WIDTH * grid.height / grid.width))))
        self._next_preview = 0.0

    def say(self, lines: Sequence[str]) -> None:
        """Show these lines between curve and samples from the next step on, instead of what was said before."""
        self._words = None
        if lines:
            text = "\n".join(line for long in lines for line in textwrap.wrap(long, LINE_LENGTH))
            self._words = Image.new("RGB", (PREVIEW_WIDTH, 10 + 17 * (1 + text.count("\n"))), PAPER)
            ImageDraw.Draw(self._words).multiline_text((8, 4), text, fill=INK, font=ImageFont.load_default(13))

    def step(self, step: int, loss_history: Sequence[float], stats: dict[str, float]) -> None:
        """Report that `step` steps are done. loss_history: of all steps so far; stats: figures to show, by name.

        Raises ComfyUI's InterruptProcessingException when the artist pressed Cancel.
        """
        comfy.model_management.throw_exception_if_processing_interrupted()
        now = time.monotonic()
        self._start = self._start or (step, now)
        final = step >= self.total
        preview = None
        if final or now >= self._next_preview:
            preview = ("JPEG", self.picture(loss_history), 2 * PREVIEW_WIDTH)
            self._next_preview = now + PREVIEW_SECONDS
        self._bar.update_absolute(step, self.total, preview)
        server = prompt_server()
        if server is not None and (final or now >= self._next_event):
            started = time.monotonic()
            server.send_sync(EVENT, self._event(step, now, loss_history, stats))
            ended = time.monotonic()
            self._next_event = ended + max(EVENT_SECONDS, REST * (ended - started))

    def picture(self, losses: Sequence[float]) -> Image.Image:
        """The loss curve, under it what was said last, under that the newest samples."""
        parts = [part for part in (loss_curve(losses), self._words, self._grid) if part is not None]
        whole = Image.new("RGB", (PREVIEW_WIDTH, sum(part.height for part in parts)))
        top = 0
        for part in parts:
            whole.paste(part, (0, top))
            top += part.height
        return whole

    def _event(self, step: int, now: float, losses: Sequence[float], stats: dict[str, float]) -> dict[str, Any]:
        first_step, start = self._start
        speed = (step - first_step) / (now - start) if step > first_step else None
        points = curve_points(losses)
        return {
            "node": self.node_id,
            "step": step,
            "total": self.total,
            "loss": finite(losses[-1]) if losses else None,
            "ema": points[-1][2] if points else None,
            "curve": points,
            "it_s": speed,
            "eta_s": (self.total - step) / speed if speed else None,
            "stats": {name: finite(value) for name, value in stats.items()},
        }
