"""Tail rows, the prior and the stage-by-stage course of HiFi Tuner: METHODS.md 4.11, properties 1-6."""

from dataclasses import replace

import pytest
import torch
from concept_atelier.kernels.backbone import TextContext
from concept_atelier.kernels.conditioning import encode_prompt
from concept_atelier.kernels.diffusers_backbone import DiffusersBackbone
from concept_atelier.kernels.exemplars import Exemplar, encode_exemplars
from concept_atelier.kernels.gradient_rules import PlainGradient
from concept_atelier.kernels.layouts import Layout
from concept_atelier.kernels.losses import Learning, NullTextPrior, Prediction, denoising_loss
from concept_atelier.kernels.objective import DENOISING, Objective
from concept_atelier.kernels.prompts import Prompt, fill_blank, parse_prompt
from concept_atelier.kernels.run_state import RunState
from concept_atelier.kernels.training import TrainingSettings, train
from concept_atelier.toyworld.model import load_toy

NAME, WORDS, ROWS = "it", "red dog", 3
RESIDUAL = Layout(tokens=ROWS, place="tail residual")
REPLACE = replace(RESIDUAL, place="tail replace")
STAGED = replace(RESIDUAL, stages=4)


@pytest.fixture(scope="module")
def backbone() -> DiffusersBackbone:
    return DiffusersBackbone.from_toy(load_toy(random_weights=True))


@pytest.fixture(scope="module")
def data(backbone):
    images = torch.rand(3, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    masks = torch.zeros(3, 64, 64)
    masks[:, 16:48, 16:48] = 1
    exemplars = [Exemplar(image, "a {} on grass", mask) for image, mask in zip(images, masks)]
    return encode_exemplars(backbone, exemplars, NAME)


def encode(backbone, layout: Layout, rows: torch.Tensor, text: str = "a <it> on grass"):
    bound = layout.bind(backbone.layers, WORDS)
    return encode_prompt(
        backbone.encode_text, backbone.layers, parse_prompt(text, [NAME]), {NAME: {"l": rows}}, {NAME: bound}, 1000
    )


def plain(backbone, text: str) -> torch.Tensor:
    return backbone.encode_text(Prompt((text,)), {}).hidden


def zeros(backbone, layout: Layout) -> torch.Tensor:
    return torch.zeros(layout.bind(backbone.layers, WORDS).slots, ROWS, backbone.context_width)


def test_an_unlearned_residual_is_the_plain_prompt_bit_for_bit(backbone):
    staged = encode(backbone, RESIDUAL, zeros(backbone, RESIDUAL))
    assert torch.equal(staged.at(500).rows[0], plain(backbone, "a red dog on grass"))
    assert staged.positions[NAME] == (21, 22, 23)


def test_an_unlearned_replacement_has_the_last_rows_of_the_empty_prompt(backbone):
    rows = encode(backbone, REPLACE, zeros(backbone, REPLACE)).at(500).rows[0]
    expected = plain(backbone, "a red dog on grass").clone()
    expected[:, -ROWS:] = backbone.encode_text(Prompt(()), {}).hidden[:, -ROWS:]
    assert torch.equal(rows, expected)
    assert not torch.equal(expected, plain(backbone, "a red dog on grass"))


def test_equal_stages_are_one_stage(backbone):
    rows = torch.randn(1, ROWS, backbone.context_width)
    one, four = encode(backbone, RESIDUAL, rows), encode(backbone, STAGED, rows.expand(4, -1, -1))
    for t in (0, 400, 999):
        assert torch.equal(one.at(t).rows, four.at(t).rows)


def test_a_stage_is_read_at_its_own_timesteps(backbone):
    rows = torch.arange(4.0)[:, None, None].expand(4, ROWS, backbone.context_width)
    staged, base = encode(backbone, STAGED, rows), plain(backbone, "a red dog on grass")
    for t, stage in ((0, 0), (249, 0), (250, 1), (999, 3)):
        assert torch.allclose(staged.at(t).rows[0][:, -ROWS:], base[:, -ROWS:] + stage)


def test_two_concepts_of_tail_rows_stand_side_by_side(backbone):
    bound = RESIDUAL.bind(backbone.layers, WORDS)
    vectors = {n: {"l": torch.full((1, ROWS, backbone.context_width), v)} for n, v in (("it", 1.0), ("that", 2.0))}
    prompt = parse_prompt("a <it> and a <that>", ["it", "that"])
    layouts = {"it": bound, "that": bound}
    staged = encode_prompt(backbone.encode_text, backbone.layers, prompt, vectors, layouts, 1000)
    added = staged.at(0).rows[0] - plain(backbone, "a red dog and a red dog")
    assert staged.positions == {"it": (21, 22, 23), "that": (18, 19, 20)}
    assert added[0, :, 0].tolist() == pytest.approx([0.0] * 18 + [2.0] * 3 + [1.0] * 3, abs=1e-5)


def test_tail_rows_do_not_overwrite_words(backbone):
    with pytest.raises(ValueError, match=r"tail rows of <it> need the last 3 of 24 free: shorten the prompt"):
        encode(backbone, RESIDUAL, zeros(backbone, RESIDUAL), "a <it>" + " on grass" * 9)


def test_tail_rows_need_words_to_read_as(backbone):
    with pytest.raises(ValueError, match="Tail rows need words"):
        RESIDUAL.bind(backbone.layers)


def test_the_order_of_context_rows_does_not_matter(backbone):
    x_t, t = torch.randn(1, backbone.latent_channels, 8, 8), torch.tensor([500])
    hidden = plain(backbone, "a red dog on grass")
    shuffled = hidden[:, torch.randperm(24, generator=torch.Generator().manual_seed(0))]
    eps = [backbone.predict_noise(x_t, t, TextContext.plain(h, backbone.layers)) for h in (hidden, shuffled)]
    assert torch.allclose(*eps, atol=1e-5)


def test_a_full_mask_is_no_mask_and_outside_it_nothing_counts():
    eps, t = torch.randn(2, 4, 8, 8), torch.zeros(2)
    eps_hat = torch.randn(2, 4, 8, 8, requires_grad=True)
    full, half = torch.ones(2, 1, 8, 8), torch.zeros(2, 1, 8, 8)
    half[..., :4] = 1
    unmasked = denoising_loss(Prediction(eps, eps_hat, t))
    assert torch.allclose(denoising_loss(Prediction(eps, eps_hat, t, full)), unmasked)
    denoising_loss(Prediction(eps, eps_hat, t, half)).sum().backward()
    assert (eps_hat.grad[..., 4:] == 0).all() and (eps_hat.grad[..., :4] != 0).all()


def learn(backbone, data, layout=STAGED, objective=DENOISING, state=None, stop_at=None, **settings) -> RunState:
    bound = layout.bind(backbone.layers, WORDS)
    state = state or RunState.start({"l": zeros(backbone, layout)})
    settings = TrainingSettings(**{"steps": 3, "learning_rate": 1e-2, "weight_decay": 0.0, **settings})
    train(backbone, data, NAME, bound, PlainGradient(), settings, state, lambda s: s.step == stop_at, objective)
    return state


def prior(backbone, data, weight: float) -> Objective:
    bound = STAGED.bind(backbone.layers, WORDS)
    return Objective.of([NullTextPrior(weight)], Learning(backbone, NAME, bound, WORDS, data.prompts))


def test_shared_steps_keep_all_stages_equal(backbone, data):
    v = learn(backbone, data, steps_each_stage=1, stop_at=3).vectors["l"]
    assert v.abs().max() > 0 and all(torch.equal(v[0], v[stage]) for stage in range(4))


def test_no_steps_of_its_own_leave_every_stage_as_it_was_shared(backbone, data):
    shared = learn(backbone, data, steps_each_stage=1, stop_at=3).vectors["l"]
    one = learn(backbone, data, layout=RESIDUAL).vectors["l"]
    assert torch.allclose(shared[0], one[0], atol=1e-6)  # I = 0: c_s^t = c_s for all t


def test_stages_learn_one_after_the_other_from_the_noisiest_down(backbone, data):
    state = learn(backbone, data, steps_each_stage=2, stop_at=3)
    before = state.vectors["l"].detach().clone()
    for stage in (3, 2, 1, 0):
        start = before[stage] if stage == 3 else state.vectors["l"][stage + 1].detach().clone()
        learn(backbone, data, state=state, steps_each_stage=2, stop_at=state.step + 1)
        first = (state.vectors["l"][stage] - start).abs().max().item()
        assert 0 < first <= 1.01e-2  # one fresh Adam step away from where the chain begins
        learn(backbone, data, state=state, steps_each_stage=2, stop_at=state.step + 1)
        assert torch.equal(state.vectors["l"][:stage], before[:stage])
    assert state.step == 3 + 4 * 2
    assert len({v.sum().item() for v in state.vectors["l"]}) == 4


def test_a_stage_starts_without_moments_and_weights_keep_theirs(backbone):
    bound = STAGED.bind(backbone.layers, WORDS)
    state = RunState.start({"l": zeros(backbone, STAGED)}, {"weight": torch.zeros(3)})
    optimizer = state.make_optimizer(1e-2, 0.0, 1e-2)
    for leaf in (state.vectors["l"], state.weights["weight"]):
        leaf.grad = torch.ones_like(leaf)
    optimizer.step()
    course = TrainingSettings(steps=1, steps_each_stage=2).course(bound, 1000)
    course.begin(2, state.vectors, optimizer)  # in the middle of a stage
    assert len(optimizer.state) == 2
    course.begin(3, state.vectors, optimizer)
    assert list(optimizer.state) == [state.weights["weight"]]


def test_stages_learn_at_the_timesteps_of_ddim(backbone):
    bound = Layout(tokens=1, stages=50, place="tail residual").bind(backbone.layers, WORDS)
    course = TrainingSettings(steps=0, steps_each_stage=1).course(bound, 1000)
    visited = [int(course.timesteps(step, (1, 1), torch.Generator())) for step in range(50)]
    assert visited == list(range(981, 0, -20))  # METHODS 0.5


def test_a_staged_run_resumes_bit_for_bit(backbone, data, tmp_path):
    objective = prior(backbone, data, 1e-3)
    whole = learn(backbone, data, objective=objective, steps_each_stage=3)
    for stop_at in (2, 3, 4, 8):
        part = learn(backbone, data, objective=objective, steps_each_stage=3, stop_at=stop_at)
        part.save(tmp_path / "state.safetensors")
        again = RunState.load(tmp_path / "state.safetensors", torch.device("cpu"))
        resumed = learn(backbone, data, objective=objective, state=again, steps_each_stage=3)
        assert torch.equal(whole.vectors["l"], resumed.vectors["l"])
        assert whole.losses == resumed.losses and whole.stats == resumed.stats


def test_a_large_prior_keeps_the_rows_at_those_of_the_empty_prompt(backbone, data):
    free = learn(backbone, data, layout=RESIDUAL, steps=8)
    held = learn(backbone, data, layout=RESIDUAL, steps=8, objective=prior(backbone, data, 1e6))
    assert held.vectors["l"].norm() < 0.3 * free.vectors["l"].norm()
    assert len(held.stats["prior : denoising"]) == 8


def test_a_prior_of_weight_zero_changes_no_bit(backbone, data):
    off = prior(backbone, data, 0.0)
    assert off == DENOISING
    assert torch.equal(learn(backbone, data, objective=off).vectors["l"], learn(backbone, data).vectors["l"])


def test_the_prior_is_for_tail_rows(backbone):
    learning = Learning(backbone, NAME, Layout().bind(backbone.layers), "dog", (fill_blank("a {}", NAME),))
    with pytest.raises(ValueError, match="choose tail rows in Token Layout"):
        NullTextPrior().bind(learning)
