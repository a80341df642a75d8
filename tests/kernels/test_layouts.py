"""Layouts: which vector each (layer, K or V, timestep) reads. METHODS.md 3.8 (6), 8 (2)."""

import pytest
from concept_atelier.kernels.backbone import Layer
from concept_atelier.kernels.layouts import Layout

# Two blocks of two layers and one of one: SDXL in miniature.
LAYERS = [
    Layer("input", 4, 0),
    Layer("input", 4, 1),
    Layer("middle", 0, 0),
    Layer("output", 1, 0),
    Layer("output", 1, 1),
]


@pytest.mark.parametrize(
    ("granularity", "expected"),
    [("prompt", (0, 0, 0, 0, 0)), ("block", (0, 0, 1, 2, 2)), ("layer", (0, 1, 2, 3, 4))],
)
def test_granularity_divides_the_layers(granularity, expected):
    bound = Layout(granularity).bind(LAYERS)
    assert bound.table(0) == (expected, expected)
    assert bound.slots == max(expected) + 1


def test_keys_and_values_apart_have_slots_of_their_own():
    bound = Layout("block", stages=2, split_kv=True).bind(LAYERS)
    seen = [slot for stage in range(2) for side in bound.table(stage) for slot in side]
    assert bound.slots == 12 and set(seen) == set(range(12))
    assert bound.table(1)[1] == (9, 9, 10, 11, 11)


def test_stages_divide_the_timesteps_evenly():
    bound = Layout(stages=5).bind(LAYERS)
    stages = [bound.stage(t, 1000) for t in range(1000)]
    assert stages[0] == 0 and stages[999] == 4
    assert [stages.count(s) for s in range(5)] == [200] * 5


def test_a_layout_survives_its_dictionary():
    layout = Layout("layer", tokens=2, stages=5, split_kv=True)
    assert Layout(**layout.to_dict()) == layout


@pytest.mark.parametrize("wrong", [{"granularity": "word"}, {"tokens": 0}, {"stages": 0}])
def test_impossible_layouts_are_refused(wrong):
    with pytest.raises(ValueError, match="layout"):
        Layout(**wrong)
