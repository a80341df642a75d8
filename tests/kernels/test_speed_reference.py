"""The speed benchmark of reference guidance: all sides paint the same picture, and the table comes out."""

from __future__ import annotations

import re

import pytest
from concept_atelier.benchmarks import speed_reference
from pytest import CaptureFixture


def test_all_sides_paint_the_same_picture_and_are_listed(capsys: CaptureFixture[str]) -> None:
    sides = speed_reference.measure(steps=5, rounds=1)
    ratio = speed_reference.print_table(sides)
    guided, plain = (sides[name].picture for name in (speed_reference.OURS, speed_reference.PLAIN))
    for name in (speed_reference.NAIVE, speed_reference.FROZEN):
        assert (sides[name].picture - guided).abs().max() < speed_reference.AGREEMENT
    assert (guided - plain).abs().max() > 0.05
    assert ratio == pytest.approx(sides["ours"].cpu_seconds / sides["naive Algorithm 2"].cpu_seconds)
    table = capsys.readouterr().out
    assert all(re.search(rf"^{name} +\d", table, re.MULTILINE) for name in speed_reference.SIDES)
    assert f"{ratio:.2f}" in table
