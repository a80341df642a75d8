"""Runs that are ended in their middle: by Cancel or otherwise, at a step of a training or at a call of the U-Net."""

from collections.abc import Callable

import comfy.model_management
import comfy.samplers
import pytest
from concept_atelier.nodes.native.live import LiveReport


def after_each_step(monkeypatch: pytest.MonkeyPatch, action: Callable[[int], None]) -> None:
    """Let either training node call action(number of steps done) once it has reported a step."""
    stock = LiveReport.step

    def step_then_act(self, done, losses, stats):
        stock(self, done, losses, stats)
        action(done)

    monkeypatch.setattr(LiveReport, "step", step_then_act)


def cancel_at_step(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Press Cancel once `step` steps are reported, as the interface does."""

    def cancel(done):
        if done == step:
            comfy.model_management.interrupt_current_processing()

    after_each_step(monkeypatch, cancel)


def cancel_at_prediction(monkeypatch: pytest.MonkeyPatch, number: int) -> list[int]:
    """Press Cancel when ComfyUI is asked for prediction `number`, counted from 1; returns a list that counts them."""
    asked = []
    stock = comfy.samplers.calc_cond_batch

    def cancel(*args, **kwargs):
        asked.append(len(asked) + 1)
        if len(asked) == number:
            comfy.model_management.interrupt_current_processing()
        return stock(*args, **kwargs)

    monkeypatch.setattr(comfy.samplers, "calc_cond_batch", cancel)
    return asked
