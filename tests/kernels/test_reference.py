"""Reference-guided generation (HiFi Tuner Algorithm 2): METHODS.md 4.11, items 7, 8, 9 and 11, on the toy model."""

from dataclasses import replace

import pytest
import torch
from concept_atelier.kernels.backbone import TextContext
from concept_atelier.kernels.conditioning import StagedContext
from concept_atelier.kernels.diffusers_backbone import DiffusersBackbone
from concept_atelier.kernels.inversion import PivotalSettings, invert, optimise_null_text, predict_along, reconstruct
from concept_atelier.kernels.prompts import Prompt
from concept_atelier.kernels.reference import (
    ReferenceSettings,
    classifier_free,
    ending,
    follow_reference,
    generate_with_reference,
    latent_mask,
    masked_distance,
)
from concept_atelier.kernels.schedule import NoiseSchedule
from concept_atelier.kernels.trajectory import Trajectory
from concept_atelier.toyworld.exemplars import exemplar_scenes
from concept_atelier.toyworld.model import load_toy
from concept_atelier.toyworld.render import render_with_mask
from concept_atelier.toyworld.vocabulary import ACTIONS, caption

STEPS, W = 6, 4.0
SCHEDULE = NoiseSchedule.scaled_linear()
TIMESTEPS = SCHEDULE.sampling_timesteps(STEPS)
SETTINGS = ReferenceSettings(inner_steps=2, learning_rate=0.02, early_stop=0)
GUIDED = SETTINGS.levels(STEPS)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def toy():
    """The predictions of the toy model with a prompt, without, its empty context, and an inverted picture's mask."""
    backbone = DiffusersBackbone.from_toy(load_toy())

    def plain(text):
        return TextContext.plain(backbone.encode_text(Prompt((text,)), {}).hidden, backbone.layers)

    scene = exemplar_scenes(next(iter(ACTIONS)), 1, 0)[0]
    picture, mask = (torch.from_numpy(part.copy()).float() / 255 for part in render_with_mask(scene))
    abar = backbone.schedule.abar_along(TIMESTEPS)
    with torch.no_grad():
        words, phi, x_0 = plain(caption(scene)), plain("").rows[0], backbone.encode_image(picture[None])

        def conditional(x, i):
            return predict_along(backbone, StagedContext((0,), (words.repeat(len(x)),), {}), TIMESTEPS)(x, i)

        path = invert(conditional, abar, x_0, 3)

    def unconditional(x, i, phi):
        context = TextContext.plain(phi.expand(len(x), -1, -1), backbone.layers)
        return predict_along(backbone, StagedContext((0,), (context,), {}), TIMESTEPS)(x, i)

    return conditional, unconditional, Trajectory(path, abar, ""), phi, latent_mask(mask, x_0.shape[-2:])


@pytest.fixture(scope="module")
def predict(toy):
    return classifier_free(toy[0], toy[1], W)


@pytest.fixture(scope="module")
def noise(toy):
    return randn(1, *toy[2].latents.shape[2:], seed=3)


def first_pass(toy, predict, x, start=0, stop=STEPS):
    return reconstruct(lambda x, i: predict(x, start + i)(toy[3]), toy[2].abar[start : stop + 1], x)


def second_pass(toy, predict, x, settings=SETTINGS, mask=None, **more):
    return generate_with_reference(predict, toy[2], toy[4] if mask is None else mask, toy[3], x, settings, **more)


def literal(toy, x, settings):
    """Algorithm 2 as it is written: two predictions for every F, nothing kept."""
    conditional, unconditional, trajectory, phi, mask = toy
    abar, levels = trajectory.abar, settings.levels(trajectory.steps)

    def F(x, i, phi):
        eps_0, eps = unconditional(x, i, phi), conditional(x, i)
        a, a_next = abar[i], abar[i + 1]
        x_0 = (x - (1 - a) ** 0.5 * (eps_0 + W * (eps - eps_0))) / a**0.5
        return a_next**0.5 * x_0 + (1 - a_next) ** 0.5 * (eps_0 + W * (eps - eps_0))

    inside = mask.expand_as(x)
    for i in range(trajectory.steps):
        if i == levels.start:
            phi_h, x = phi.clone(), torch.where(inside, trajectory.latents[i], x)
        with torch.no_grad():
            x_next = F(x, i, phi)
        if i in levels:
            phi_h = phi_h.detach().requires_grad_()
            decay = 1 - i / (2 * trajectory.steps) if settings.decay else 1
            adam = torch.optim.Adam([phi_h], lr=settings.learning_rate * decay)
            for _ in range(settings.inner_steps):
                loss = (trajectory.latents[i + 1] - F(x, i, phi_h))[inside].square().mean()
                adam.zero_grad()
                loss.backward()
                adam.step()
            with torch.no_grad():
                x_next = torch.where(inside, F(x, i, phi_h), x_next)
        x = x_next
    return x.float()


# What equals what


@pytest.mark.parametrize("decay", [True, False])
def test_it_is_algorithm_2(toy, predict, noise, decay):
    settings = replace(SETTINGS, decay=decay)
    expected = literal(toy, noise, settings)
    torch.testing.assert_close(second_pass(toy, predict, noise, settings), expected, rtol=0, atol=1e-4)


def test_without_inner_steps_it_is_plain_sampling_with_one_paste(toy, predict, noise):
    """4.11, 7."""
    x = first_pass(toy, predict, noise, 0, GUIDED.start)
    x = torch.where(toy[4], toy[2].latents[GUIDED.start], x)
    expected = first_pass(toy, predict, x, GUIDED.start)
    found = second_pass(toy, predict, noise, replace(SETTINGS, inner_steps=0))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_without_a_mask_or_a_step_at_t_s_it_is_the_first_pass(toy, predict, noise):
    """4.11, 7: bit for bit."""
    expected = first_pass(toy, predict, noise)
    assert torch.equal(second_pass(toy, predict, noise, mask=torch.zeros_like(toy[4])), expected)
    late = first_pass(toy, predict, noise, 0, GUIDED.start + 1)
    assert torch.equal(second_pass(toy, predict, late, start=GUIDED.start + 1), expected)


def test_down_to_t_s_it_is_the_first_pass_which_may_be_reused(toy, predict, noise):
    """4.11, 7: bit for bit, and the predictions before t_s are not made again."""
    seen = {}

    def watched(x, i):
        seen[i] = x
        return predict(x, i)

    found = second_pass(toy, watched, noise)
    x = noise
    for i in range(GUIDED.start):
        assert torch.equal(seen[i], x)
        x = first_pass(toy, predict, x, i, i + 1)
    assert torch.equal(torch.where(toy[4], toy[2].latents[GUIDED.start], x), seen[GUIDED.start])
    seen.clear()
    assert torch.equal(second_pass(toy, watched, x, start=GUIDED.start), found)
    assert min(seen) == GUIDED.start


def test_with_a_full_mask_on_its_own_trajectory_it_is_null_text_optimisation(toy, predict):
    """4.11, 8: Eq. 10 is Eq. 4; both keep the context of their only step of Adam where it is the better one."""
    conditional, unconditional, trajectory, phi, mask = toy
    whole = ReferenceSettings(t_s=50, t_e=1, inner_steps=1, learning_rate=0.02, early_stop=0)
    start = trajectory.latents[0]
    found = follow_reference(predict, trajectory, torch.ones_like(mask), phi, start, whole)
    expected = optimise_null_text(conditional, unconditional, trajectory, phi, PivotalSettings(W, 1, 0.02, 0))
    assert found.before == pytest.approx(expected.before, rel=1e-3)
    assert found.after == pytest.approx(expected.after, rel=1e-3)
    torch.testing.assert_close(found.x, expected.x_0, rtol=0, atol=1e-4)


def test_at_scale_1_there_is_no_gradient_and_it_is_refused(toy, noise):
    """4.11, 9."""
    conditional, unconditional, _, phi, mask = toy
    gradients = []
    for w in (1.0, 1.5):
        leaf = phi.clone().requires_grad_()
        eps_0 = unconditional(noise, 0, leaf)
        eps = eps_0 + w * (conditional(noise, 0) - eps_0)
        gradients.append(torch.autograd.grad(masked_distance(eps, noise, mask).sum(), leaf)[0])
    assert not gradients[0].any() and gradients[1].any()
    with pytest.raises(ValueError, match=r"cfg\) 1: the unconditional prompt"):
        classifier_free(conditional, unconditional, 1.0)
    with pytest.raises(ValueError, match=r"cfg\) 1: the unconditional prompt"):
        second_pass(toy, lambda x, i: lambda phi: conditional(x, i), noise)


# What it does


def test_the_distance_falls_with_inner_steps_and_the_subject_comes_near(toy, predict, noise):
    """4.11, 11."""
    mask, reference = toy[4], toy[2].latents
    x = first_pass(toy, predict, noise, 0, GUIDED.start)
    last = []
    for inner in range(4):
        settings = ReferenceSettings(t_s=40, t_e=40, inner_steps=inner, learning_rate=2e-3, early_stop=0)
        last.append(follow_reference(predict, toy[2], mask, toy[3], x, settings).after[0])
    assert last == sorted(last, reverse=True) and last[-1] < last[0]
    near = masked_distance(second_pass(toy, predict, noise), reference[-1], mask)
    assert near < 0.8 * masked_distance(first_pass(toy, predict, noise), reference[-1], mask)


def test_outside_of_the_mask_the_plain_prediction_is_kept(toy, predict, noise):
    """A single guided step differs from a plain one inside the mask alone."""
    once = replace(SETTINGS, t_s=25, t_e=25)
    (level,) = once.levels(STEPS)
    x = first_pass(toy, predict, noise, 0, level)
    pasted = torch.where(toy[4], toy[2].latents[level], x)
    plain = first_pass(toy, predict, pasted, level, level + 1)
    found = follow_reference(predict, toy[2], toy[4], toy[3], x, once).x
    outside = ~toy[4].expand_as(x)
    torch.testing.assert_close(found[outside], plain[outside], rtol=0, atol=1e-5)
    assert (found - plain)[~outside].abs().max() > 1e-3


def test_gradients_outside_of_the_mask_are_zero(toy):
    x = randn(2, 4, 8, 8).requires_grad_()
    masked_distance(x, torch.zeros(1, 4, 8, 8), toy[4]).sum().backward()
    assert not x.grad[~toy[4].expand_as(x)].any() and x.grad[toy[4].expand_as(x)].all()


def test_pictures_of_a_batch_do_not_know_of_each_other(toy, predict, noise):
    """Early stop too: a picture that has come near enough waits for the others."""
    two = torch.cat([noise, randn(*noise.shape, seed=9)])
    x = first_pass(toy, predict, two, 0, GUIDED.start)
    x[0] = toy[2].latents[GUIDED.start]  # on the trajectory already
    settings = ReferenceSettings(inner_steps=3, learning_rate=0.02, early_stop=2e-4)
    counts = []
    for i in range(2):
        alone = follow_reference(predict, toy[2], toy[4], toy[3], x[i : i + 1], settings)
        counts.append(alone)
    both = follow_reference(predict, toy[2], toy[4], toy[3], x, settings)
    torch.testing.assert_close(both.x, torch.cat([alone.x for alone in counts]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("early_stop", [0.0, 1e9])
def test_what_repeats_is_predicted_once(toy, noise, early_stop):
    conditional, unconditional, trajectory, phi, mask = toy
    counts = {"conditional": [0] * STEPS, "unconditional": [0] * STEPS}

    def counted(name, predict):
        def call(x, i, *rest):
            counts[name][i] += 1
            return predict(x, i, *rest)

        return call

    predict = classifier_free(counted("conditional", conditional), counted("unconditional", unconditional), W)
    generate_with_reference(predict, trajectory, mask, phi, noise, replace(SETTINGS, early_stop=early_stop))
    assert counts["conditional"] == [1] * STEPS
    # J = 2 steps of Adam and the last prediction; one more for the plain phi once phi_h has left it.
    guided = [3 + (i > GUIDED.start) if i in GUIDED else 1 for i in range(STEPS)]
    assert counts["unconditional"] == ([1] * STEPS if early_stop else guided)


def test_gradients_are_scaled_back(toy, predict, noise):
    plain, scaled = (second_pass(toy, predict, noise, gradient_scale=scale) for scale in (1.0, 1024.0))
    torch.testing.assert_close(plain, scaled, rtol=0, atol=1e-4)


def test_steps_are_told_and_can_be_cancelled(toy, predict, noise):
    told = []

    def stop(i, x_0):
        told.append((i, x_0.shape))
        if i == GUIDED.start + 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        second_pass(toy, predict, noise, callback=stop)
    assert told == [(GUIDED.start, noise.shape), (GUIDED.start + 1, noise.shape)]


# Steps, masks and levels


def test_the_papers_steps():
    assert list(ReferenceSettings().levels(50)) == list(range(10, 41))  # t = 40 .. 10 of 50 .. 1: 31 steps
    assert ReferenceSettings().levels(20) == range(4, 17)
    assert ReferenceSettings(50, 1).levels(3) == range(3)
    assert len(ReferenceSettings(20, 20).levels(4)) == 1


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (ReferenceSettings(t_s=5), "t_s = 5, after its end at t_e = 10"),
        (ReferenceSettings(t_s=60), "within 50"),
        (ReferenceSettings(t_e=0), "within 50"),
    ],
)
def test_steps_that_make_no_sense_are_refused(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        settings.check()


def test_a_latent_belongs_to_the_mask_when_half_of_it_does():
    mask = torch.zeros(32, 64)
    mask[:12, :8] = 1  # one and a half latents of 8 x 8 pixels
    mask[20, 40] = 1
    found = latent_mask(mask, (4, 8))
    assert found.shape == (1, 1, 4, 8) and found.nonzero().tolist() == [[0, 0, 0, 0], [0, 0, 1, 0]]
    grown = latent_mask(mask, (4, 8), 1)[0, 0]
    assert grown[:3, :2].all() and grown.sum() == 6
    assert not latent_mask(torch.zeros(32, 64).index_fill(0, torch.tensor([3]), 0.2), (4, 8), 2).any()


def test_the_end_of_a_trajectory_is_found_by_its_levels(toy):
    trajectory = toy[2]
    tail = ending(trajectory, trajectory.abar[4:].float())
    assert tail.steps == STEPS - 4 and torch.equal(tail.latents, trajectory.latents[4:])
    for other in (trajectory.abar, trajectory.abar[:4], SCHEDULE.abar_along([t - 15 for t in TIMESTEPS[4:]])):
        assert ending(trajectory, other) is trajectory


def test_a_distance_that_is_not_finite_is_named(toy, predict, noise):
    with pytest.raises(ValueError, match="not finite at step"):
        second_pass(toy, predict, noise, replace(SETTINGS, learning_rate=1e30))
