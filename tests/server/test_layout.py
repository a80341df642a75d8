"""Subjects kept apart, through /prompt: loss terms of the training, layout guidance and predictor, the grid."""

import math

import numpy as np
import prompts
import pytest
from bad_input import assert_one_sentence
from PIL import Image
from prompts import TOY

LEFT, RIGHT = ({"x": 6, "y": 13, "width": 26, "height": 38}, {"x": 38, "y": 13, "width": 22, "height": 38})
ANCHORS = {
    "weight": 0.5,
    "anchors": "my words",
    "words": "cat, panda, nobody said this",
    "class_word": "",
    "most_anchors": 2,
    "neighbours": 80,
    "refresh_every": 2,
    "scale": "class word's length",
}
ATTENTION = {
    "weight": 0.003,
    "class_phrase": "",
    "largest_map": 32,
    "with_padding": False,
    "detach_query": True,
    "detach_reference": True,
}
GUIDANCE = {
    "words": "cat, panda",
    "width": 64,
    "height": 64,
    "strength": 30.0,
    "steps": 1,
    "iterations": 2,
    "threshold": 0.0,
    "power": "1 (paper)",
    "largest_move": 0.0,
}
PREDICTOR = {"predictor": "toy world (bundled)", "train_steps": 10, "seed": 0, "file_name": "layout"}


def composed(anchors=None, attention=None, **changes):
    """Training as SeFi-IDE does it, with an anchor loss as well. anchors, attention: changes of the terms."""
    prompt = prompts.training(**({"name": "composed", "init_word": "man"} | changes))
    prompt["layout"]["inputs"] |= {"stages": 5, "split_kv": True}
    prompt["anchors"] = prompts.node("AtelierAnchorLoss", **ANCHORS | (anchors or {}))
    prompt["attention"] = prompts.node("AtelierSubjectAttentionLoss", **ATTENTION | (attention or {}))
    terms = {"loss_terms.loss_term0": ["anchors", 0], "loss_terms.loss_term1": ["attention", 0]}
    prompt["train"]["inputs"] |= terms
    return prompt


def laid_out(text="a cat and a panda stands on grass", boxes=None, **changes):
    """KSampler under Layout Guidance. boxes: drawn in core's editor; None for left and right."""
    prompt = {
        "toy": prompts.node("AtelierToyCheckpoint"),
        **prompts.painting(*TOY, text, None, apply=False),
        "guidance": prompts.node(
            "AtelierLayoutGuidance", model=["toy", 0], positive=["positive", 0], **GUIDANCE | changes
        ),
    }
    del prompt["apply"]
    prompt["sampler"]["inputs"]["model"] = ["guidance", 0]
    if boxes is not None:
        prompt["boxes"] = prompts.node("CreateBoundingBoxes", width=64, height=64, editor_state={"__value__": boxes})
        prompt["guidance"]["inputs"]["bboxes"] = ["boxes", 1]
    return prompt


def pictures(server, outcome, of="picture"):
    """What a preview node shows, as arrays."""
    assert outcome.status == "success", outcome.error
    return [np.asarray(Image.open(file)) for file in server.pictures(outcome, of)]


def test_terms_are_learned_with_and_shown_relative_to_the_denoising_loss(server):
    prompt = {**composed(), **prompts.painting(*TOY, "a <composed>", ["train", 0])}
    outcome = server.run(prompt)
    (picture,) = pictures(server, outcome)
    assert picture.shape == (64, 64, 3)
    shown = outcome.training[-1]["stats"]
    assert shown["anchor : denoising"] > 0
    assert math.isfinite(shown["attention : denoising"])
    assert outcome.training[-1]["step"] == 5


def test_the_terms_decide_the_run(server):
    assert server.run(composed(name="decided")).training[-1]["step"] == 5
    assert server.run(composed(name="decided", anchors={"weight": 0.25})).training[-1]["step"] == 5
    assert server.run(composed(name="decided", attention={"weight": 0.05})).training[-1]["step"] == 5
    assert server.run(composed(name="decided")).training == []


def test_guidance_moves_the_picture_and_strength_0_does_not(server):
    plain = laid_out()
    plain["sampler"]["inputs"]["model"] = ["toy", 0]
    (unguided,) = pictures(server, server.run(plain))
    (guided,) = pictures(server, server.run(laid_out()))
    (off,) = pictures(server, server.run(laid_out(strength=0.0)))
    assert not np.array_equal(guided, unguided)
    assert np.array_equal(off, unguided)


def test_drawn_boxes_place_words(server):
    (one,) = pictures(server, server.run(laid_out(boxes=[LEFT], words="cat")))
    (other,) = pictures(server, server.run(laid_out(boxes=[RIGHT], words="cat")))
    assert not np.array_equal(one, other)


def test_predicted_boxes_guide(server):
    prompt = laid_out(words="panda")  # of two labelled boxes the one of this label
    prompt["predictor"] = prompts.node(
        "AtelierLayoutPredictor", clip=["toy", 1], words="cat, panda", width=64, height=64, **PREDICTOR
    )
    prompt["guidance"]["inputs"]["bboxes"] = ["predictor", 0]
    (guided,) = pictures(server, server.run(prompt))
    (unguided,) = pictures(server, server.run(laid_out(strength=0.0)))
    assert not np.array_equal(guided, unguided)


def test_the_grid_has_a_row_for_each_batch(server):
    prompt = laid_out(strength=0.0)
    prompt["latent"]["inputs"]["batch_size"] = 3
    rows = {f"pictures.picture{number}": ["decode", 0] for number in range(2)}
    prompt["grid"] = prompts.node(
        "AtelierCompareGrid", row_titles="one\ntwo", column_titles="", caption="both", picture_size=64, **rows
    )
    (grid,) = pictures(server, server.run(prompt), of="grid")
    height, width = grid.shape[:2]
    assert height > 2 * 64
    assert width > 3 * 64


CASES = {
    "word not in the prompt": (lambda: laid_out(words="cat, robot"), ["robot", "choose among"]),
    "box of zero area": (lambda: laid_out(words="cat", boxes=[LEFT | {"width": 0}]), ["cat", "no area"]),
    "box outside": (lambda: laid_out(words="cat", boxes=[LEFT], width=16), ["cat", "beyond its borders"]),
    "more boxes than words": (lambda: laid_out(boxes=[LEFT, RIGHT, LEFT]), ["3 boxes", "names 2 things"]),
    "more words than boxes": (lambda: laid_out(boxes=[LEFT]), ["1 boxes", "names 2 things"]),
    "no single-token word": (
        lambda: composed(anchors={"words": "red ball\nstands on grass"}),
        ["red ball", "one piece", "cat, dog, chair"],
    ),
    "unequal token counts": (
        lambda: composed(attention={"class_phrase": "man in red"}),
        ["man in red", "3 tokens", "<composed> has 1", "choose"],
    ),
}


@pytest.mark.parametrize(("make", "words"), CASES.values(), ids=CASES)
def test_bad_input_gets_one_sentence(server, make, words):
    outcome = server.run(make())
    assert outcome.status == "error"
    assert_one_sentence(outcome.error, words)
    assert outcome.training == []
