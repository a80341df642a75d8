"""The speed benchmark of the attention loss: one side trains with it, and the table comes out."""

from __future__ import annotations

import re

from concept_atelier.benchmarks import speed_adi, speed_attention_loss
from concept_atelier.kernels.training import TrainingSettings
from pytest import CaptureFixture


def test_one_side_has_the_loss_and_both_are_listed(capsys: CaptureFixture[str]) -> None:
    task = speed_adi.Task("toy", 8, 2, "cpu", TrainingSettings())
    sides = speed_attention_loss.measure(task)
    without, with_loss = sides.values()
    assert without.stats == {}
    assert min(with_loss.stats["attention : denoising"]) > 0
    ratio = speed_attention_loss.print_table(task, sides)
    assert ratio == with_loss.cpu_seconds / without.cpu_seconds
    table = capsys.readouterr().out
    assert re.search(rf"with attention loss .* {ratio:.2f}\n", table)
