"""DDIM inversion and null-text optimisation: METHODS.md 0.5, 4.4, 4.11 (9, 10), on closed forms and the toy model."""

from dataclasses import replace

import pytest
import torch
from concept_atelier.kernels.backbone import TextContext
from concept_atelier.kernels.conditioning import StagedContext
from concept_atelier.kernels.diffusers_backbone import DiffusersBackbone
from concept_atelier.kernels.inversion import (
    PivotalSettings,
    invert,
    optimise_null_text,
    predict_along,
    psnr,
    reconstruct,
    stage_starts,
)
from concept_atelier.kernels.prompts import Prompt
from concept_atelier.kernels.schedule import NoiseSchedule
from concept_atelier.kernels.trajectory import Trajectory
from concept_atelier.toyworld.exemplars import exemplar_scenes
from concept_atelier.toyworld.model import load_toy
from concept_atelier.toyworld.render import render
from concept_atelier.toyworld.vocabulary import ACTIONS, caption

SCHEDULE = NoiseSchedule.scaled_linear()
STEPS = 6
SCENE = exemplar_scenes(next(iter(ACTIONS)), 1, 0)[0]
CAPTION = caption(SCENE)
TIMESTEPS = SCHEDULE.sampling_timesteps(STEPS)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def levels(steps):
    return SCHEDULE.abar_along(SCHEDULE.sampling_timesteps(steps))


def gaussian(abar, variance=0.5):
    """eps of the exact denoiser of data ~ N(0, variance)."""
    return lambda x, i: (1 - abar[i]).sqrt().float() * x / (abar[i] * variance + 1 - abar[i]).float()


def error(a, b):
    return float((a - b).square().mean().sqrt())


@pytest.fixture
def x_0():
    return randn(2, 4, 8, 8) * 0.5**0.5


@pytest.fixture(scope="module")
def backbone():
    return DiffusersBackbone.from_toy(load_toy())


@pytest.fixture(scope="module")
def picture(backbone):
    """The latents of a drawn picture."""
    drawn = torch.tensor(render(SCENE))[None].float() / 255
    return backbone.encode_image(drawn)


@pytest.fixture(scope="module")
def plain(backbone):
    """plain(text): the context of a prompt in all layers."""

    def encode(text):
        encoding = backbone.encode_text(Prompt((text,)), {})
        return TextContext.plain(encoding.hidden, backbone.layers)

    return encode


def steady(context):
    return StagedContext((0,), (context,), {})


# Inversion


def test_the_inverse_of_the_steps_is_exact_for_a_fixed_prediction(x_0):
    """METHODS 4.11, 10."""
    eps = randn(*x_0.shape, seed=1)
    path = invert(lambda x, i: eps, levels(STEPS), x_0)
    assert path.shape == (STEPS + 1, *x_0.shape) and torch.equal(path[-1], x_0)
    torch.testing.assert_close(reconstruct(lambda x, i: eps, levels(STEPS), path[0]), x_0, rtol=0, atol=1e-5)


def test_without_iterations_it_is_the_published_inversion(x_0):
    """METHODS 0.5: eps at the label of the noisier level, of the latents of the less noisy one."""
    abar = levels(STEPS)
    predict = gaussian(abar)
    path = invert(predict, abar, x_0, iterations=0)
    for i in range(STEPS):
        bbar = (abar[i] / abar[i + 1]).sqrt()
        gbar = (1 - abar[i]).sqrt() - (abar[i] * (1 - abar[i + 1]) / abar[i + 1]).sqrt()
        expected = bbar * path[i + 1] + gbar * predict(path[i + 1], i)
        torch.testing.assert_close(path[i], expected.float(), rtol=0, atol=1e-5)


def test_iterations_close_the_round_trip_of_an_exact_denoiser(x_0):
    abar = levels(50)
    errors = []
    for iterations in (0, 1, 5):
        path = invert(gaussian(abar), abar, x_0, iterations)
        errors.append(error(reconstruct(gaussian(abar), abar, path[0]), x_0))
    assert errors[0] > 1e-2 and errors[1] < errors[0] / 5 and errors[2] < 5e-4
    assert path[0].std() == pytest.approx(1.0, abs=0.1)  # of the size that samplers start from


def test_every_level_of_the_path_leads_on_to_the_next(x_0):
    abar = levels(20)
    path = invert(gaussian(abar), abar, x_0, iterations=30)
    for i in range(20):
        assert error(reconstruct(gaussian(abar[i:]), abar[i:], path[i]), x_0) < 2e-3


def test_iterations_end_where_they_no_longer_change_anything(x_0):
    counts = dict.fromkeys(range(STEPS), 0)

    def predict(x, i):
        counts[i] += 1
        return gaussian(levels(STEPS))(x, i) if i == 0 else torch.ones_like(x)

    invert(predict, levels(STEPS), x_0, iterations=20)
    assert all(counts[i] == 2 for i in range(1, STEPS))  # the second prediction shows that the first was right
    assert 2 < counts[0] < 21


def test_iterations_that_lead_away_are_dropped(x_0):
    """A prediction so steep that the iteration diverges: no worse than without."""
    abar = torch.tensor([0.5, 1.0], dtype=torch.float64)

    def steep(x, i):
        return -3.0 * x

    assert torch.equal(invert(steep, abar, x_0, iterations=8), invert(steep, abar, x_0, iterations=0))


def test_each_picture_of_a_batch_ends_by_itself(x_0):
    """A prediction so steep for the second picture that its iteration diverges, and tame for the first."""
    abar = torch.tensor([0.3, 0.5, 1.0], dtype=torch.float64)
    steepness = torch.tensor([-0.3, -3.0]).view(2, 1, 1, 1)
    tame, steep = (invert(lambda x, i, s=s: s * x, abar, x[None], iterations=20) for s, x in zip(steepness, x_0))
    assert torch.equal(invert(lambda x, i: steepness * x, abar, x_0, iterations=20), torch.cat([tame, steep], dim=1))
    assert error(reconstruct(lambda x, i: steepness[0] * x, abar, tame[0]), x_0[:1]) < 1e-3


def test_the_round_trip_of_a_picture_through_a_backbone(backbone, plain, picture):
    timesteps = [981 - 98 * i for i in range(11)]
    predict = predict_along(backbone, steady(plain(CAPTION)), timesteps)
    abar = backbone.schedule.abar_along(timesteps)
    loose, tight = (error(reconstruct(predict, abar, invert(predict, abar, picture, n)[0]), picture) for n in (0, 5))
    assert tight < 1e-2 and tight < loose / 10


def test_a_staged_context_is_read_at_each_timestep(backbone, plain):
    staged = StagedContext((0, 500), (plain("a man"), plain("grass")), {})
    x = randn(1, backbone.latent_channels, 8, 8)
    with torch.no_grad():
        for i, text in enumerate(("grass", "a man")):
            t = torch.tensor([[700, 300][i]])
            expected = backbone.predict_noise(x, t, plain(text))
            assert torch.equal(predict_along(backbone, staged, [700, 300])(x, i), expected)


def test_cancel_within_inversion(x_0):
    def stop(step):
        raise KeyboardInterrupt(step)

    with pytest.raises(KeyboardInterrupt, match="1"):
        invert(gaussian(levels(STEPS)), levels(STEPS), x_0, callback=stop)


def test_psnr_of_a_known_error():
    a = torch.zeros(2, 1, 4, 4)
    b = torch.stack([torch.full((1, 4, 4), 0.1), torch.full((1, 4, 4), 0.01)])
    assert psnr(a, b, 1.0) == pytest.approx([20, 40])
    assert psnr(a, b, 10.0) == pytest.approx([40, 60])
    assert psnr(a, b, torch.tensor([1.0, 10.0])) == pytest.approx([20, 60])


# Trajectories


def test_a_trajectory_knows_its_sampling(x_0):
    abar = levels(STEPS)
    trajectory = Trajectory(torch.zeros(STEPS + 1, *x_0.shape), abar, "ours")
    trajectory.check_model("ours")
    sigmas = (1 / abar - 1).sqrt().float()  # as samplers hold them
    trajectory.check_sampling(1 / (1 + sigmas**2), x_0.shape[1:])
    with pytest.raises(ValueError, match="another MODEL"):
        trajectory.check_model("theirs")
    with pytest.raises(ValueError, match=r"has 6 steps and the sampling 7"):
        trajectory.check_sampling(levels(7), x_0.shape[1:])
    with pytest.raises(ValueError, match="other noise levels"):
        trajectory.check_sampling(SCHEDULE.abar_along([t - 15 for t in TIMESTEPS]), x_0.shape[1:])
    with pytest.raises(ValueError, match=r"8 x 8 with 4 channels, the sampling is of size 16 x 8 with 4 channels"):
        trajectory.check_sampling(abar, (4, 16, 8))


def test_each_timestep_belongs_to_the_nearest_step():
    timesteps = [981, 502, 499, 498, 1]
    starts = stage_starts(timesteps)
    staged = StagedContext(starts, tuple(reversed(timesteps)), {})  # numbers stand for the contexts
    for t in range(1000):
        assert abs(staged.at(t) - t) == min(abs(step - t) for step in timesteps)
    assert all(staged.at(t) == t for t in timesteps)
    assert stage_starts([981]) == (0,)
    with pytest.raises(ValueError, match="fewer steps"):
        stage_starts([981, 4, 4])


# Null-text optimisation


@pytest.fixture(scope="module")
def pivot(backbone, plain, picture):
    """A trajectory of the toy model, and the predictions that null-text optimisation asks for."""
    abar = backbone.schedule.abar_along(TIMESTEPS)
    conditional = predict_along(backbone, steady(plain(CAPTION)), TIMESTEPS)
    path = invert(conditional, abar, picture, 3)

    def unconditional(x, i, phi):
        return predict_along(backbone, steady(TextContext.plain(phi, backbone.layers)), TIMESTEPS)(x, i)

    return conditional, unconditional, Trajectory(path, abar, ""), plain("").rows[0]


def guided(conditional, unconditional, trajectory, contexts, w):
    x, abar = trajectory.latents[0], trajectory.abar
    for i in range(trajectory.steps):
        with torch.no_grad():
            eps, eps_0 = conditional(x, i), unconditional(x, i, contexts[i])
        x = backward(x, eps_0 + w * (eps - eps_0), float(abar[i]), float(abar[i + 1]))
    return x


def backward(x, eps, abar, abar_next):
    x_0 = (x - (1 - abar) ** 0.5 * eps) / abar**0.5
    return abar_next**0.5 * x_0 + (1 - abar_next) ** 0.5 * eps


def test_it_comes_nearer_to_the_pivot_in_every_step_and_at_the_end(pivot):
    conditional, unconditional, trajectory, phi = pivot
    found = optimise_null_text(*pivot, PivotalSettings(w=7.5, inner_steps=5, learning_rate=0.03))
    assert len(found.contexts) == STEPS and all(c.shape == phi.shape for c in found.contexts)
    assert all(after < before for before, after in zip(found.before, found.after))
    x_0 = trajectory.latents[-1]
    plain_error = error(guided(conditional, unconditional, trajectory, [phi] * STEPS, 7.5), x_0)
    assert error(found.x_0, x_0) < 0.5 * plain_error
    retraced = guided(conditional, unconditional, trajectory, found.contexts, 7.5)
    torch.testing.assert_close(retraced, found.x_0, rtol=0, atol=1e-3)


def test_a_step_starts_where_the_one_before_ended(pivot):
    found = optimise_null_text(*pivot, PivotalSettings(inner_steps=1, early_stop=0.0))
    seen = []

    def unconditional(x, i, phi):
        seen.append((i, phi.detach().clone()))
        return pivot[1](x, i, phi)

    again = optimise_null_text(pivot[0], unconditional, *pivot[2:], PivotalSettings(inner_steps=1, early_stop=0.0))
    first = {}
    for i, phi in seen:
        first.setdefault(i, phi)
    assert torch.equal(first[0], pivot[3])
    assert all(torch.equal(first[i + 1], again.contexts[i]) for i in range(STEPS - 1))
    assert all(torch.equal(a, b) for a, b in zip(found.contexts, again.contexts))


@pytest.mark.parametrize(("early_stop", "predictions"), [(1e9, 1), (0.0, 4)])
def test_the_prompt_is_predicted_once_a_step_and_early_stop_saves_the_rest(pivot, early_stop, predictions):
    conditional, unconditional, trajectory, phi = pivot
    counts = {"conditional": [0] * STEPS, "unconditional": [0] * STEPS}

    def counted(name, predict):
        def call(x, i, *rest):
            counts[name][i] += 1
            assert torch.is_grad_enabled() == (name == "unconditional" and counts[name][i] < 4)
            return predict(x, i, *rest)

        return call

    found = optimise_null_text(
        counted("conditional", conditional), counted("unconditional", unconditional), trajectory, phi,
        PivotalSettings(inner_steps=3, early_stop=early_stop),
    )  # fmt: skip
    assert counts == {"conditional": [1] * STEPS, "unconditional": [predictions] * STEPS}
    if predictions == 1:
        assert all(torch.equal(context, phi) for context in found.contexts)


def test_early_stop_grows_as_in_the_reference(pivot):
    """1e-5 + i 2e-5 at 50 steps: a loss between the thresholds of two steps stops in the later one alone."""
    abar, phi = torch.linspace(0.5, 1, 51, dtype=torch.float64), torch.ones(1, 2, 3)
    latents = torch.zeros(51, 1, 1, 2, 2)
    trajectory = Trajectory(latents, abar, "")
    counts = [0] * 50

    def unconditional(x, i, phi):
        counts[i] += 1
        scale = (abar[i + 1] / abar[i]).sqrt()
        shift = ((1 - abar[i + 1]).sqrt() - scale * (1 - abar[i]).sqrt()).float()
        target = 3e-4**0.5 - scale.float() * x  # whatever phi is, the step misses the pivot by a square of 3e-4
        return (target / shift) / -6.5 + 0 * phi.sum()

    optimise_null_text(lambda x, i: torch.zeros_like(x), unconditional, trajectory, phi, PivotalSettings(inner_steps=2))
    assert counts == [3] * 15 + [1] * 35  # 1e-5 + 14 * 2e-5 = 2.9e-4


def test_gradients_are_scaled_back(pivot):
    settings = PivotalSettings(inner_steps=2, learning_rate=0.01)
    one, scaled = (optimise_null_text(*pivot, settings, gradient_scale=scale) for scale in (1.0, 1024.0))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(one.contexts, scaled.contexts))


def test_at_scale_1_there_is_no_gradient_and_it_is_refused(pivot):
    """METHODS 4.11, 9."""
    conditional, unconditional, trajectory, phi = pivot
    gradients = []
    for w in (1.0, 1.5):
        leaf = phi.clone().requires_grad_()
        eps_0 = unconditional(trajectory.latents[0], 0, leaf)
        guided_eps = (1 - w) * eps_0 + w * conditional(trajectory.latents[0], 0)
        gradients.append(torch.autograd.grad(guided_eps.square().mean(), leaf)[0])
    assert not gradients[0].any() and gradients[1].any()
    with pytest.raises(ValueError, match=r"cfg\) 1: the unconditional prompt then has no part"):
        optimise_null_text(*pivot, PivotalSettings(w=1.0))


def test_bad_input_is_named(pivot):
    conditional, unconditional, trajectory, phi = pivot
    two = replace(trajectory, latents=trajectory.latents.repeat(1, 2, 1, 1, 1))
    with pytest.raises(ValueError, match="holds 2 pictures"):
        optimise_null_text(conditional, unconditional, two, phi, PivotalSettings())
    with pytest.raises(ValueError, match="not finite at step 1"):
        optimise_null_text(*pivot, PivotalSettings(learning_rate=1e30))
