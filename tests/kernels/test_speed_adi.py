"""The speed benchmark on the toy model: both sides learn the same, and the table comes out."""

from __future__ import annotations

import re

import tiny_diffusers
import torch
from concept_atelier.benchmarks import speed_adi
from concept_atelier.kernels.training import TrainingSettings
from concept_atelier.toyworld.autoencoder import LATENT_CHANNELS
from concept_atelier.toyworld.model import ToyModel, load_toy
from pytest import CaptureFixture

SETTINGS = TrainingSettings(learning_rate=5e-3)


def toy_parts() -> ToyModel:
    """The toy model with weights of order one, so that every layer and channel has a gradient to speak of."""
    parts = load_toy(random_weights=True)
    for seed, part in enumerate((parts.unet, parts.text_encoder)):
        tiny_diffusers.fill(part, seed)
    return parts


def test_the_plain_implementation_makes_the_same_updates() -> None:
    data = speed_adi.make_exemplars(LATENT_CHANNELS, 8, "cpu")
    steps, vectors = zip(*(side(toy_parts(), data, SETTINGS) for side in speed_adi.SIDES.values()), strict=True)
    start = vectors[0]().clone()
    assert torch.equal(start, vectors[1]())
    for number in range(3):
        for step in steps:
            step(number)
        assert torch.allclose(vectors[0](), vectors[1](), rtol=0, atol=1e-5)
    moved = (vectors[0]() - start).abs()
    assert moved.max() > 2 * SETTINGS.learning_rate
    # Each of three steps moves about a seventh of the channels; the others only decay.
    assert 0.05 < (moved > SETTINGS.learning_rate / 2).float().mean() < 0.6


def test_plain_leaves_other_words_alone() -> None:
    parts = toy_parts()
    before = parts.text_encoder.get_input_embeddings().weight.detach().clone()
    step, _ = speed_adi.plain_side(parts, speed_adi.make_exemplars(LATENT_CHANNELS, 8, "cpu"), SETTINGS)
    step(0)
    assert torch.equal(parts.text_encoder.get_input_embeddings().weight.detach()[: len(before)], before)


def test_the_benchmark_measures_both_sides_in_their_own_processes(capsys: CaptureFixture[str]) -> None:
    task = speed_adi.Task("toy", 8, 2, "cpu", SETTINGS)
    reports = speed_adi.measure(task)
    ratio = speed_adi.print_reports(task, reports)
    assert list(reports) == ["plain", "ours"]
    for report in reports.values():
        assert len(report.seconds) == 2
        assert min(report.seconds) > 0
        assert 2**20 < report.peak < 2**33
    assert speed_adi.disagreement(reports, SETTINGS.learning_rate) < 0.02
    table = capsys.readouterr().out
    assert re.search(rf"ours / plain +{ratio:.2f}", table)
