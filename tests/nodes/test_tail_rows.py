"""Tail rows and stages (HiFi Tuner) through the real nodes: encoded, sampled."""

from dataclasses import replace

import pytest
import torch
from concept_atelier.kernels.concept import Concept
from concept_atelier.kernels.layouts import Layout
from concept_atelier.nodes.native.payload import WORDS
from prompting import encode, ksampler, make_concept, route, stock_encode

RESIDUAL = Layout(tokens=5, place="tail residual")

pytestmark = pytest.mark.usefixtures("inference_mode")


def tail_concept(tiny, layout: Layout, scale: float, seed: int = 0) -> Concept:
    made = make_concept(tiny, "rex", layout, seed, init_word="brown dog")
    return replace(made, vectors={tower: scale * v for tower, v in made.vectors.items()})


@pytest.mark.parametrize("topology", ["sd1", "sd2", "sdxl"])
def test_an_unlearned_concept_is_the_plain_prompt_bit_for_bit(tiny, topology):
    parts = tiny(topology)
    ours = encode(parts.clip, "a <rex> on grass", tail_concept(parts, RESIDUAL, 0.0))
    stock = stock_encode(parts.clip, "a brown dog on grass")
    assert torch.equal(ours[0][0], stock[0][0])
    assert torch.equal(ours[0][1]["pooled_output"], stock[0][1]["pooled_output"])
    negative = stock_encode(parts.clip, "blurry")
    assert torch.equal(ksampler(route(parts.model), ours, negative), ksampler(parts.model, stock, negative))


def test_equal_steps_are_one_step_and_different_ones_are_not(tiny):
    parts, negative = tiny("sd1"), stock_encode(tiny("sd1").clip, "blurry")
    one = tail_concept(parts, RESIDUAL, 1.0)
    same = {tower: v.expand(50, -1, -1) for tower, v in one.vectors.items()}
    staged = Layout(tokens=5, stages=50, place="tail residual")
    pictures = [
        ksampler(route(parts.model), encode(parts.clip, "a <rex>", concept), negative)
        for concept in (
            one,
            Concept("rex", same, staged, one.family, one.layers, one.metadata),
            tail_concept(parts, staged, 1.0),
        )
    ]
    assert torch.allclose(pictures[0], pictures[1], atol=1e-5)
    assert (pictures[1] - pictures[2]).abs().max() > 1e-2


def test_the_rows_carry_the_name_so_that_attention_maps_find_them(tiny):
    words = encode(tiny("sd1").clip, "a <rex> on grass", tail_concept(tiny("sd1"), RESIDUAL, 1.0))[0][1][WORDS]
    assert words[1:6] == ("a", "brown", "dog", "on", "grass")
    assert words[-5:] == ("<rex>",) * 5 and words[-6] == ""


def test_a_prompt_without_room_is_refused(tiny):
    with pytest.raises(ValueError, match="shorten the prompt"):
        encode(tiny("sd1").clip, "a <rex>" + " x" * 70, tail_concept(tiny("sd1"), RESIDUAL, 1.0))
