"""Layout loss, its move of the latents, on any backbone; and the predictor of layouts."""

import random

import pytest
import tiny_diffusers
import torch
from concept_atelier.kernels import layout_predictor
from concept_atelier.kernels.backbone import Layer, TextContext
from concept_atelier.kernels.conditioning import StagedContext
from concept_atelier.kernels.diffusers_backbone import DiffusersBackbone
from concept_atelier.kernels.layout_guidance import (
    TWO_OBJECTS,
    Box,
    LayoutGuidance,
    Placement,
    box_mask,
    guidance_layers,
    guide_layout,
    layout_loss,
    move_latents,
    phrase_positions,
)
from concept_atelier.kernels.layout_predictor import Pair, load_predictor, pairs_of, train_predictor, word_embedding
from concept_atelier.kernels.prompts import Placeholder, Prompt
from concept_atelier.kernels.sampling import paint
from concept_atelier.toyworld.model import load_toy
from concept_atelier.toyworld.train_layout_predictor import scene_boxes
from concept_atelier.toyworld.vocabulary import draw_pair_scene, draw_scene
from concept_atelier.toyworld.weights import LAYOUT_PREDICTOR, WEIGHTS
from safetensors.torch import save_file

LEFT, RIGHT = Box(0, 0, 0.5, 1), Box(0.5, 0, 1, 1)
ALL = Box(0, 0, 1, 1)
SIZE = (8, 8)


def attention(*places, h=8, w=8, heads=3, seed=0):
    """(1, heads, h * w, n) with attention at the given cells of each token alone, or everywhere for None."""
    generator = torch.Generator().manual_seed(seed)
    maps = torch.rand(1, heads, h, w, len(places), generator=generator)
    for number, cells in enumerate(places):
        if cells is not None:
            keep = torch.zeros(h, w)
            keep[cells] = 1
            maps[..., number] *= keep
    return maps.flatten(2, 3)


def loss(maps, *placements, power=1, tokens=(1, 2)):
    return layout_loss([maps], tokens, placements, SIZE, power)


# The loss: METHODS 2.10, item 5


def test_the_loss_is_within_0_and_1():
    value = loss(attention(None, None), Placement((1,), (LEFT,)), Placement((2,), (RIGHT,)))
    assert 0.2 < float(value) < 0.8


def test_a_box_around_everything_costs_nothing():
    assert float(loss(attention(None, None), Placement((1, 2), (ALL,)))) == 0


def test_attention_inside_costs_nothing_and_outside_one():
    maps = attention((slice(None), slice(0, 4)), (slice(None), slice(0, 4)))
    assert float(loss(maps, Placement((1,), (LEFT,)))) == 0
    assert float(loss(maps, Placement((1,), (RIGHT,)))) == 1
    assert float(loss(maps, Placement((1,), (LEFT,)), Placement((2,), (RIGHT,)))) == 0.5


def test_only_proportions_of_the_attention_count():
    maps, place = attention(None, None), Placement((1,), (Box(0.1, 0.2, 0.6, 0.9),))
    torch.testing.assert_close(loss(7 * maps, place), loss(maps, place))


def test_boxes_of_one_object_add_up():
    maps = attention(None, None)
    one, other = Box(0, 0, 0.25, 1), Box(0.5, 0.5, 1, 1)
    inside = [1 - loss(maps, Placement((1,), boxes)) for boxes in ((one,), (other,), (one, other))]
    torch.testing.assert_close(inside[0] + inside[1], inside[2])


def test_power_two_is_of_each_head_and_token():
    maps, place = attention(None, None, heads=4), Placement((1, 2), (LEFT,))
    a = maps.view(1, 4, 8, 8, 2)
    outside = a[:, :, :, 4:].sum((2, 3)) / a.sum((2, 3))
    torch.testing.assert_close(loss(maps, place), outside.mean((1, 2)))
    torch.testing.assert_close(loss(maps, place, power=2), outside.square().mean((1, 2)))


def test_objects_and_maps_of_any_size_weigh_the_same():
    small, large = attention(None, h=4, w=4), attention(None, seed=1)
    placements = [Placement((1,), (LEFT,)), Placement((1,), (RIGHT,))]
    each = [layout_loss([maps], (1,), [p], SIZE) for maps in (small, large) for p in placements]
    torch.testing.assert_close(layout_loss([small, large], (1,), placements, SIZE), torch.stack(each).mean(0))


def test_attention_that_underflows_has_a_finite_gradient():
    """Backbones take the softmax in float32; half-precision scores may still drive a token's attention to zero."""
    scores = torch.zeros(1, 2, 64, 3, dtype=torch.float16)
    scores[..., 1] = -200
    scores.requires_grad_(True)
    value = loss(scores.float().softmax(-1)[..., [1, 2]], Placement((1,), (LEFT,)))
    (gradient,) = torch.autograd.grad(value.sum(), scores)
    assert value.item() == 0
    assert gradient.isfinite().all()
    assert 0 <= loss(attention(None, None) * 1e-38, Placement((1,), (LEFT,))).item() <= 1


def test_masks_have_at_least_one_cell_and_round_to_the_nearest_border():
    assert box_mask([Box(0.45, 0.45, 0.5, 0.5)], 8, 8).nonzero().tolist() == [[3, 3]]
    assert box_mask([Box(0.99, 0.99, 1, 1)], 8, 8).nonzero().tolist() == [[7, 7]]
    assert box_mask([Box(0.1, 0.2, 0.5, 0.8)], 4, 4).tolist() == [[0] * 4, [1, 1, 0, 0], [1, 1, 0, 0], [0] * 4]
    assert [box_mask([box], 16, 16).sum(0).count_nonzero() for box in TWO_OBJECTS] == [6, 5]


@pytest.mark.parametrize(
    ("box", "what"),
    [(Box(0.5, 0, 0.5, 1), "no area"), (Box(0, 0.6, 1, 0.5), "no area"), (Box(0.5, 0, 1.1, 1), "beyond")],
)
def test_boxes_that_cannot_be_used_are_refused(box, what):
    with pytest.raises(ValueError, match=f'box of "a cat" goes from x .* {what}'):
        box.check("a cat")


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("sd1", [("middle", 0, 0), ("output", 3, 0), ("output", 4, 0), ("output", 5, 0)]),
        ("sdxl", [("middle", 0, 9), ("output", 0, 9), ("output", 1, 9), ("output", 2, 9)]),
    ],
)
def test_layers_are_the_middle_and_the_first_up_block(family, expected):
    backbone = DiffusersBackbone.from_pipeline(tiny_diffusers.build(family))
    assert guidance_layers(backbone.layers) == tuple(Layer(*layer) for layer in expected)


# The move


@pytest.mark.parametrize("t", [999, 600, 20])
def test_the_move_is_the_one_in_k_space(t):
    abar = float(DiffusersBackbone.from_toy(load_toy(random_weights=True)).schedule.alphas_cumprod[t])
    sigma = ((1 - abar) / abar) ** 0.5
    target = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x_t = torch.zeros(2, 3, 4, 4, dtype=torch.float64) + 0.3
    settings = LayoutGuidance(strength=0.05, threshold=0, iterations=1)

    def loss_of(x):
        return (x - target).square().mean((1, 2, 3))

    moved = move_latents(x_t, abar, loss_of, settings)
    x_k = (x_t * (1 + sigma**2) ** 0.5).requires_grad_(True)
    (gradient,) = torch.autograd.grad(loss_of(x_k / (1 + sigma**2) ** 0.5).sum(), x_k)
    k_moved = x_k - sigma**2 * settings.strength * gradient
    torch.testing.assert_close(moved * (1 + sigma**2) ** 0.5, k_moved)
    assert (moved - x_t).abs().max() > 1e-6


def test_samples_rest_one_by_one():
    start = torch.tensor([1.0, 3.0]).view(2, 1, 1, 1)
    seen = []

    def loss_of(x):
        seen.append(x.detach().flatten().tolist())
        return x.flatten() / 4

    settings = LayoutGuidance(strength=4.0, threshold=0.3, iterations=5)
    moved = move_latents(start, 0.5, loss_of, settings)
    assert moved.flatten().tolist() == [1.0, 1.0]  # each move is 4 * 0.5 / 4
    assert seen[-1] == [1.0, 1.0]
    assert len(seen) == 5
    assert torch.equal(move_latents(start[:1], 0.5, loss_of, settings), start[:1])


def test_long_moves_are_shortened():
    start = torch.zeros(2, 1, 2, 2)
    factor = torch.tensor([100.0, 0.01])
    settings = LayoutGuidance(strength=1.0, threshold=0, iterations=1, largest_move=0.25)
    moved = move_latents(start, 0.0, lambda x: (x.mean((1, 2, 3)) + 1) * factor, settings)
    assert moved.square().mean((1, 2, 3)).sqrt().tolist() == pytest.approx([0.25, 0.0025])


@pytest.mark.parametrize("wrong", [{"strength": -1.0}, {"threshold": float("nan")}, {"power": 3}])
def test_settings_that_mean_nothing_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        LayoutGuidance(**wrong).check()


# On a backbone


@pytest.fixture(scope="module")
def toy():
    return DiffusersBackbone.from_toy(load_toy())


PROMPT = Prompt(("a cat and a panda stands on grass",))


def objects(toy, prompt=PROMPT, boxes=TWO_OBJECTS, phrases=("cat", "panda")):
    return [Placement(phrase_positions(toy, prompt, p, {}), (box,)) for p, box in zip(phrases, boxes)]


def painted(toy, settings=None, prompts=(PROMPT,), placements=None, seeds=(0,), steps=4):
    guide = None
    if settings is not None:
        guide = guide_layout(toy, placements or [objects(toy)] * len(prompts), settings)
    return paint(toy, prompts, {}, {}, seeds, (64, 64), steps, 3.0, guide=guide)


@pytest.mark.parametrize("off", [{"strength": 0.0}, {"iterations": 0}, {"steps": 0}, {"threshold": 1.0}])
def test_no_guidance_is_no_guidance(toy, off):
    assert torch.equal(painted(toy, LayoutGuidance(**off)), painted(toy))


def test_guidance_lowers_the_loss_in_its_steps_alone(toy):
    """With the loss computed anew at each step: after a step below the threshold it may move again."""
    first = LayoutGuidance(steps=1, iterations=2, threshold=0)
    assert not torch.equal(painted(toy, first), painted(toy))
    calls = []
    predict = toy.predict_noise

    def counted(x_t, t, context):
        calls.append(int(t[0]))
        return predict(x_t, t, context)

    toy.predict_noise = counted
    try:
        painted(toy, LayoutGuidance(steps=2, iterations=3, threshold=0))
    finally:
        del toy.predict_noise
    timesteps = toy.schedule.sampling_timesteps(4)
    assert [calls.count(t) for t in timesteps] == [3 + 2, 3 + 2, 2, 2]


def test_a_picture_does_not_depend_on_its_batch(toy):
    settings = LayoutGuidance(steps=2, iterations=2)
    other = Prompt(("a man salutes on white with a ball on the left",))
    places = [objects(toy), objects(toy, other, phrases=("ball", "man"))]
    both = painted(toy, settings, (PROMPT, other), places, (0, 1))
    alone = painted(toy, settings, (other,), places[1:], (1,))
    torch.testing.assert_close(both[1:], alone, rtol=0, atol=2e-3)


def test_gradient_equals_finite_differences():
    backbone = DiffusersBackbone.from_pipeline(tiny_diffusers.build("sd1"))
    context = backbone.encode_text(PROMPT, {})
    staged = StagedContext((0,), (TextContext.plain(context.hidden, backbone.layers),), {})
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(1, 4, 16, 16, generator=generator)
    direction = torch.randn(1, 4, 16, 16, generator=generator)
    placements = objects(backbone)
    t = 400
    settings = LayoutGuidance(strength=1.0, threshold=0, iterations=1)
    moved = guide_layout(backbone, [placements], settings)(staged)(x_t, t, 0)
    slope = float(((x_t - moved) * direction).sum()) / (1 - float(backbone.schedule.alphas_cumprod[t]))

    def value(x):
        layers = guidance_layers(backbone.layers)
        tokens = sorted({token for p in placements for token in p.tokens})
        with torch.no_grad(), backbone.attention(layers, tokens) as recorded:
            backbone.predict_noise(x, torch.tensor([t]), staged.contexts[0])
        return float(layout_loss([m for by in recorded.maps.values() for m in by], tokens, placements, (16, 16)))

    h = 1e-3
    assert (value(x_t + h * direction) - value(x_t - h * direction)) / (2 * h) == pytest.approx(slope, rel=0.02)


def test_words_of_several_pieces_and_placeholders_are_found(toy):
    prompt = Prompt(("a xylophone, a Red cat and ", Placeholder("dog"), " with a red cat"))
    pieces = len(toy.token_vectors("xylophone")["l"])
    assert pieces > 1
    comma = len(toy.token_vectors(",")["l"])
    cat = 1 + 1 + pieces + comma + 1 + 1
    assert phrase_positions(toy, prompt, "xylophone", {"dog": 2}) == tuple(range(2, 2 + pieces))
    dog = cat + 2
    assert phrase_positions(toy, prompt, "<dog>", {"dog": 2}) == (dog, dog + 1)
    assert phrase_positions(toy, prompt, "red cat", {"dog": 2}) == (cat - 1, cat, dog + 4, dog + 5)
    with pytest.raises(ValueError, match='does not say "cats"'):
        phrase_positions(toy, prompt, "cats", {"dog": 2})


# The predictor


def test_pairs_are_ordered_from_left_to_right():
    one, other = Box(0.6, 0, 0.9, 1), Box(0, 0, 0.4, 1)
    found = pairs_of([("cat", one), ("dog", other), ("ball", Box(0.3, 0.8, 0.6, 1))])
    assert [pair.nouns for pair in found] == [("dog", "cat"), ("ball", "cat"), ("dog", "ball")]
    assert found[0].boxes == (other, one)
    assert pairs_of([("cat", one), ("cat", other)]) == []


@pytest.fixture(scope="module")
def learned():
    """A predictor of three nouns, of which 'ball' is small and low."""
    generator = torch.Generator().manual_seed(0)
    embeddings = {noun: 0.1 * torch.randn(8, generator=generator) for noun in ("ball", "cat", "dog")}
    tall, low = (0.2, 0.9), (0.7, 0.9)
    rise = {"ball": low, "cat": tall, "dog": tall}

    def box(noun, x):
        return Box(x, rise[noun][0], x + 0.3, rise[noun][1])

    pairs = [Pair((a, b), (box(a, 0.1), box(b, 0.6))) for a in rise for b in rise if a != b]
    return train_predictor(pairs, embeddings, {"l": 8}, steps=300), embeddings, pairs


def test_the_predictor_learns_its_pairs(learned):
    (predictor, distance), embeddings, pairs = learned
    assert distance < 0.03
    for (a, b), boxes in pairs:
        assert torch.tensor(predictor.predict(embeddings[a], embeddings[b])).sub(torch.tensor(boxes)).abs().max() < 0.1


def test_unseen_words_take_the_nearest_noun(learned):
    (predictor, _), embeddings, _ = learned
    near = embeddings["ball"] + 0.01
    assert predictor.nearest(near) == "ball"
    assert predictor.predict(near, embeddings["cat"]) == predictor.predict(embeddings["ball"], embeddings["cat"])


def test_a_saved_predictor_predicts_the_same(learned, tmp_path):
    (predictor, _), embeddings, _ = learned
    layout_predictor.save_predictor(tmp_path / "p.safetensors", predictor)
    loaded = load_predictor(tmp_path / "p.safetensors")
    assert (loaded.nouns, loaded.towers) == (predictor.nouns, predictor.towers)
    boxes = [torch.tensor(p.predict(embeddings["dog"], embeddings["ball"])) for p in (predictor, loaded)]
    torch.testing.assert_close(*boxes, rtol=0, atol=2e-3)


def test_other_files_are_refused(tmp_path):
    save_file({"x": torch.zeros(1)}, str(tmp_path / "x.safetensors"))
    with pytest.raises(ValueError, match=r"x\.safetensors holds no layout predictor"):
        load_predictor(tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="two different things"):
        train_predictor([], {}, {})


@pytest.mark.parametrize(
    ("tensors", "header", "what"),
    [
        ({"mlp.1.weight": None}, {}, "damaged .*missing"),
        ({"mlp.3.bias": None}, {}, "damaged .*missing"),
        ({"mlp.1.weight": torch.zeros(64, 15)}, {}, "damaged .*shapes"),
        ({"mlp.1.bias": torch.tensor(0.0)}, {}, "damaged .*shapes"),
        ({"mlp.4.weight": torch.zeros(3)}, {}, "damaged .*shapes"),
        ({"embeddings": torch.zeros(3, 9)}, {}, "damaged .*shapes"),
        ({"embeddings": torch.zeros(8)}, {}, "damaged .*shapes"),
        ({}, {"nouns": '["cat"]'}, "damaged .*shapes"),
        ({}, {"nouns": "[cat"}, "header .*damaged"),
        ({}, {"towers": "{"}, "header .*damaged"),
        ({}, {"towers": '{"l": "8"}'}, "header .*damaged"),
        ({}, {"format_version": "2", "nouns": "{"}, "newer Concept Atelier"),
    ],
)
def test_damaged_predictors_are_named(learned, tmp_path, tensors, header, what):
    path = tmp_path / "p.safetensors"
    layout_predictor.save_predictor(path, learned[0][0])
    good, plain = layout_predictor.read_safetensors(path)
    save_file({k: v for k, v in (good | tensors).items() if v is not None}, str(path), metadata=plain | header)
    with pytest.raises(ValueError, match=what) as raised:
        load_predictor(path)
    assert str(path) in str(raised.value)


def test_the_renderers_boxes_are_around_what_is_drawn():
    rng = random.Random(0)
    scene = draw_pair_scene(rng, ("cat", "panda"), "stands")
    for (noun, box), character in zip(scene_boxes(scene), scene.characters, strict=True):
        assert noun == character.subject
        box.check(noun)
        assert box.x0 < character.x / 64 < box.x1
        assert box.y1 == pytest.approx(character.ground / 64, abs=0.04)
    scene = draw_scene(rng, "man", "stands", object="ball", side="right")
    (_, figure), (noun, ball) = scene_boxes(scene)
    assert noun == "ball"
    assert ball.x0 + ball.x1 > figure.x0 + figure.x1
    assert ball.y1 - ball.y0 < 0.3 < figure.y1 - figure.y0


def test_the_bundled_predictor_knows_the_toy_world_of_today(toy):
    """Fails after the text encoder was trained anew: run toyworld/train_layout_predictor.py again."""
    predictor = load_predictor(WEIGHTS / LAYOUT_PREDICTOR)
    for noun, known in zip(predictor.nouns, predictor.embeddings, strict=True):
        torch.testing.assert_close(word_embedding(toy.token_vectors(noun)), known, rtol=2e-3, atol=2e-3)
    cat, ball = (word_embedding(toy.token_vectors(word)) for word in ("cat", "ball"))
    for pair in ((cat, ball), (ball, cat)):
        left, right = predictor.predict(*pair)
        assert left.x0 + left.x1 < right.x0 + right.x1
    assert predictor.predict(cat, ball)[1].y0 > 0.6
    assert predictor.nearest(word_embedding(toy.token_vectors("lamp"))) in predictor.nouns
