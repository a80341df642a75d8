"""What a training node shows: the loss curve as a picture, events for the panel, and stopping on request."""

import math
import sys
from types import SimpleNamespace

import comfy.model_management
import comfy.utils
import numpy as np
import pytest
import torch
from concept_atelier.nodes.native import live

INK = np.array(live.INK)


def columns_with_ink(picture):
    """The pixel columns in which the thick line is seen."""
    near = (np.abs(np.asarray(picture, int) - INK).sum(-1) < 60)[26:178]  # below the figures
    return np.flatnonzero(near.any(axis=0))


@pytest.mark.parametrize("losses", [[0.5], [0.3] * 50, [0.0] * 3, [1.0, math.nan, 0.5, math.inf], [-2.0, 3e6]])
def test_any_history_is_drawn(losses):
    drawn = columns_with_ink(live.loss_curve(losses))
    assert len(drawn)
    assert drawn.max() < live.PREVIEW_WIDTH


def test_no_history_is_drawn_without_a_line():
    assert not len(columns_with_ink(live.loss_curve([])))


def test_the_line_falls_from_left_to_right():
    picture = np.asarray(live.loss_curve([1 / (1 + step) for step in range(300)]), int)
    near = np.abs(picture - INK).sum(-1) < 60
    near[:26] = False
    heights = [np.flatnonzero(near[:, column]).mean() for column in (20, 250, 490)]
    assert heights[0] < heights[1] < heights[2]  # pixel rows count downwards


def test_smoothing_keeps_a_constant_and_follows_a_step():
    assert live.smoothed([2.0] * 5) == pytest.approx([2.0] * 5)
    after = live.smoothed([0.0] * 200 + [1.0] * 200)
    assert after[199] == 0
    assert after[200] == pytest.approx(1 - live.EMA_BETA, rel=0.05)
    assert after[-1] > 0.95


def test_curve_points_cover_the_history():
    points = live.curve_points([float(step) for step in range(1, 1001)])
    assert len(points) <= live.CURVE_POINTS
    assert points[-1][0] == 1000
    assert points[0][1] == pytest.approx(3.0)  # the mean of 1..5
    assert live.curve_points([1.0, math.nan, 3.0])[1][:2] == (3, 3.0)


class Hook:
    """Stands for ComfyUI's progress hook and its PromptServer."""

    def __init__(self):
        self.progress, self.sent = [], []

    def __call__(self, value, total, preview, node_id=None):
        self.progress.append((value, total, preview, node_id))

    def send_sync(self, event, data):
        self.sent.append((event, data))


@pytest.fixture
def hook(monkeypatch):
    heard = Hook()
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", heard)
    server = SimpleNamespace(PromptServer=SimpleNamespace(instance=heard))
    monkeypatch.setitem(sys.modules, "server", server)
    return heard


def test_steps_are_reported_with_a_picture_and_an_event(hook):
    report = live.LiveReport("3:7", 100)
    report.samples(torch.ones(32, 64, 3))
    report.step(41, [0.5, math.nan], {"overlap": 0.3, "broken": math.nan})
    value, total, (kind, picture, _), node = hook.progress[0]
    assert (value, total, kind, node) == (41, 100, "JPEG", "3:7")
    assert np.asarray(picture)[-1].min() == 255  # the samples, below the curve
    event, data = hook.sent[0]
    assert event == "concept-atelier.train"
    assert (data["node"], data["step"], data["total"], data["loss"]) == ("3:7", 41, 100, None)
    assert data["stats"] == {"overlap": 0.3, "broken": None}


def test_events_and_previews_are_spared_but_never_the_last(hook):
    report = live.LiveReport("7", 500)
    for step in range(1, 501):
        report.step(step, [1.0] * step, {})
    assert [data["step"] for _, data in hook.sent][-1] == 500
    assert len(hook.sent) < 100
    assert sum(preview is not None for _, _, preview, _ in hook.progress) < 10
    assert hook.progress[-1][2] is not None


def test_events_of_a_long_history_take_a_twentieth_of_the_time(hook, monkeypatch):
    now, points = 100.0, live.curve_points

    def slow(losses):
        nonlocal now
        now += 0.25
        return points(losses)

    monkeypatch.setattr(live.time, "monotonic", lambda: now)
    monkeypatch.setattr(live, "curve_points", slow)
    monkeypatch.setattr(live, "PREVIEW_SECONDS", math.inf)  # the first alone
    report = live.LiveReport("7", 1000)
    for step in range(1, 41):
        report.step(step, [1.0] * step, {})
        now += 0.5
    assert [data["step"] for _, data in hook.sent] == [1, 11, 21, 31]


def test_speed_counts_from_where_a_run_was_resumed(hook, monkeypatch):
    now = 100.0
    monkeypatch.setattr(live.time, "monotonic", lambda: now)
    report = live.LiveReport("7", 100)
    report.step(51, [1.0] * 51, {})
    now = 110.0
    report.step(71, [1.0] * 71, {})
    first, second = (data for _, data in hook.sent)
    assert (first["it_s"], first["eta_s"]) == (None, None)
    assert (second["it_s"], second["eta_s"]) == (2.0, 14.5)


def test_without_a_server_it_only_trains(monkeypatch):
    monkeypatch.delitem(sys.modules, "server", raising=False)
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", None)
    report = live.LiveReport("7", 2)
    report.step(1, [1.0], {})
    assert not report.stop_requested


def test_cancel_raises_comfyuis_exception():
    report = live.LiveReport("7", 2)
    comfy.model_management.interrupt_current_processing()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        report.step(1, [1.0], {})


def test_a_stop_is_for_one_run_of_one_node():
    live.stop_requests.update({"7", "8"})
    report, other = live.LiveReport("7", 2), "8"
    assert not report.stop_requested
    live.stop_requests.add("7")
    assert report.stop_requested
    assert other in live.stop_requests
    live.stop_requests.clear()
