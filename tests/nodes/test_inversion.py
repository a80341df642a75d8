"""Inversion nodes with core's samplers: the picture comes back, on an exact denoiser and the toy model."""

import re

import comfy.model_management
import comfy.samplers
import comfy.utils
import pytest
import tiny_models
import torch
from cancelling import cancel_at_prediction
from comfy_extras import nodes_custom_sampler as custom
from comfy_extras.nodes_model_advanced import RescaleCFG
from comparing import relative
from concept_atelier.kernels.inversion import psnr
from concept_atelier.kernels.layout_guidance import Box, LayoutGuidance
from concept_atelier.kernels.layouts import Layout
from concept_atelier.nodes.apply import AtelierApplyConcepts
from concept_atelier.nodes.guidance import AtelierGCFG
from concept_atelier.nodes.inversion import AtelierDDIMInversion, AtelierNullTextOptimize
from concept_atelier.nodes.native.inversion import model_fingerprint
from concept_atelier.nodes.native.layout_guidance import LayoutGuide, place_words
from concept_atelier.nodes.toy import AtelierToyCheckpoint, AtelierToyPictures
from concept_atelier.toyworld.vocabulary import ACTIONS
from guiding import OFF, branch
from patched_models import with_ones_added
from prompting import encode, make_concept, stock_encode

import nodes as comfy_nodes

STEPS = 8
ACTION = next(iter(ACTIONS))
SCHEDULERS = ["ddim_uniform", "simple", "normal", "karras"]

pytestmark = pytest.mark.usefixtures("inference_mode", "cancellable")


@pytest.fixture(scope="module")
def toy():
    """MODEL, CLIP, VAE of the bundled model, a picture's latent, its prompt and the empty one."""
    with torch.inference_mode():
        model, clip, vae = AtelierToyCheckpoint.execute().args
        images, captions = AtelierToyPictures.execute(ACTION, 2, 0, 1).args[:2]
        text = captions.splitlines()[0].replace("{}", ACTIONS[ACTION] if isinstance(ACTIONS, dict) else ACTION)
        return model, clip, vae, {"samples": vae.encode(images)}, stock_encode(clip, text), stock_encode(clip, "")


@pytest.fixture(scope="module")
def one(toy):
    """The latent of one picture."""
    return {"samples": toy[3]["samples"][:1]}


@pytest.fixture(scope="module")
def inverted(toy, one):
    with torch.inference_mode():
        return invert(toy[0], toy[4], one)


def invert(model, conditioning, latent, steps=STEPS, scheduler="ddim_uniform", iterations=8, vae=None):
    return AtelierDDIMInversion.execute(model, conditioning, latent, steps, scheduler, iterations, vae).args


def optimise(model, trajectory, conditioning, unconditional, cfg=7.5, inner_steps=4, learning_rate=0.01, early_stop=0):
    return AtelierNullTextOptimize.execute(
        model, trajectory, conditioning, unconditional, cfg, inner_steps, learning_rate, early_stop
    ).args


def exact(model, variance=1.0):
    """A clone of MODEL that is the exact denoiser of latents ~ N(0, variance)."""
    clone = model.clone()
    clone.set_model_unet_function_wrapper(
        lambda _, given: given["input"] * variance / (variance + given["timestep"].view(-1, 1, 1, 1) ** 2)
    )
    return clone


def ksampler(model, noise, scheduler, sampler="euler", cfg=1.0, positive=None, negative=None, steps=STEPS):
    """KSampler (Advanced) on noise that is complete as it is."""
    return comfy_nodes.KSamplerAdvanced().sample(
        model, "disable", 0, steps, cfg, sampler, scheduler, positive, negative, noise, 0, 10000, "disable"
    )[0]["samples"]  # fmt: skip


def in_half(conditioning):
    """Limited to the upper half of pictures of 128 x 128."""
    return comfy_nodes.ConditioningSetArea().append(conditioning, 128, 64, 0, 0, 1.0)[0]


# The round trip


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("sampler", ["euler", "ddim"])
def test_core_samples_the_picture_back_from_the_noise(tiny, scheduler, sampler):
    model, clip, _ = tiny("sd1")
    model, prompt = exact(model), stock_encode(clip, "a cat")
    latent = {"samples": torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)) / 0.18215}
    noise, _, sigmas, report = invert(model, prompt, latent, 20, scheduler, 30)
    expected = latent["samples"]
    out = ksampler(model, noise, scheduler, sampler, 1.0, prompt, prompt, 20)
    assert relative(out, expected) < 1e-3
    guider = custom.BasicGuider.execute(model, prompt)[0]
    select, nothing = custom.KSamplerSelect.execute(sampler)[0], custom.DisableNoise.execute()[0]
    out = custom.SamplerCustomAdvanced.execute(nothing, guider, select, sigmas, noise)[0]["samples"]
    assert relative(out, expected) < 1e-3
    assert min(decibels(report)) > 60
    # As large as ComfyUI's own leftover noise at this level.
    assert float(noise["samples"].std() * 0.18215 / sigmas[0]) == pytest.approx(1.0, abs=0.15)


def decibels(report):
    return [float(value) for value in re.search(r"([\d., ]+) dB", report)[1].split(",")]


def test_every_topology(any_tiny):
    model, clip, _ = any_tiny
    latent = {"samples": torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * 5}
    prompt = stock_encode(clip, "a cat")
    noise = invert(exact(model), prompt, latent, 20, "ddim_uniform", 30)[0]
    assert (
        relative(ksampler(exact(model), noise, "ddim_uniform", "euler", 1.0, prompt, prompt, 20), latent["samples"])
        < 1e-3
    )


def test_a_picture_of_the_toy_world_comes_back(toy):
    model, _, vae, latent, prompt, empty = toy
    noise, trajectory, _, report = invert(model, prompt, latent, iterations=10, vae=vae)
    plain = invert(model, prompt, latent, iterations=0, vae=vae)[3]
    picture = vae.decode(latent["samples"])
    out = vae.decode(ksampler(model, noise, "ddim_uniform", "euler", 1.0, prompt, empty))
    measured = psnr(out, picture, 1.0)
    assert min(measured) > 45
    assert decibels(report) == pytest.approx(measured, abs=0.1)
    assert min(measured) > max(decibels(plain)) + 10
    assert trajectory.latents.shape == (STEPS + 1, *latent["samples"].shape)
    assert torch.equal(trajectory.latents[-1], model.model.process_latent_in(latent["samples"]))


def test_the_reconstruction_is_shown_with_a_vae(toy, one):
    shown = AtelierDDIMInversion.execute(toy[0], toy[4], one, 2, "simple", 0, toy[2])
    assert shown.ui.as_dict()["images"] and "of the picture" in shown.args[3]
    assert AtelierDDIMInversion.execute(toy[0], toy[4], one, 2, "simple", 0).ui is None


def test_a_batch_is_inverted_picture_by_picture(toy, inverted):
    """And measured by its own range, beside one that has ten times as much."""
    first, second = toy[3]["samples"]
    _, both, _, report = invert(toy[0], toy[4], {"samples": torch.stack([first, 10 * second])})
    torch.testing.assert_close(both.latents[:, :1], inverted[1].latents, rtol=0, atol=2e-3)
    assert decibels(report)[0] == pytest.approx(decibels(inverted[3])[0], abs=3)


def test_noise_is_complete_without_a_mask(toy, one):
    masked = {**one, "noise_mask": torch.ones(1, 64, 64)}
    assert invert(toy[0], toy[4], masked, 2, iterations=0)[0].keys() == {"samples"}


def test_the_whole_conditioning_counts(tiny):
    """An area that covers half the picture, as any sampler understands it."""
    model, clip, _ = tiny("sd1")
    latent = {"samples": torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))}
    prompt = stock_encode(clip, "a cat")
    half = in_half(stock_encode(clip, "grass"))
    alone, both = (invert(model, c, latent, 2, iterations=0)[1].latents[0] for c in (prompt, prompt + half))
    assert relative(both, alone) > 1e-4


# Null-text optimisation


@pytest.fixture(scope="module")
def optimised(toy, inverted):
    with torch.inference_mode():
        return optimise(toy[0], inverted[1], toy[4], toy[5], learning_rate=0.03)


def test_guided_sampling_retraces_the_picture(toy, one, inverted, optimised):
    model, _, _, _, prompt, empty = toy
    noise, _, sigmas, _ = inverted
    negative, report = optimised
    routed = AtelierApplyConcepts.execute(model)[0]
    found = ksampler(routed, noise, "ddim_uniform", "euler", 7.5, prompt, negative)
    plain = ksampler(model, noise, "ddim_uniform", "euler", 7.5, prompt, empty)
    original = one["samples"]
    assert (found - original).square().mean() < 0.4 * (plain - original).square().mean()
    near = psnr(found, original, float(original.max() - original.min()))
    assert decibels(report) == pytest.approx(near, abs=0.1)
    guider = custom.CFGGuider.execute(routed, prompt, negative, 7.5)[0]
    select, nothing = custom.KSamplerSelect.execute("euler")[0], custom.DisableNoise.execute()[0]
    out = custom.SamplerCustomAdvanced.execute(nothing, guider, select, sigmas, noise)[0]["samples"]
    torch.testing.assert_close(out, found)


def test_the_context_of_a_step_is_its_own(toy, inverted, optimised):
    [[context, values]] = optimised[0]
    payload = values["model_conds"]["concept_atelier"].cond
    assert context.shape == toy[5][0][0].shape
    assert len(payload.staged.contexts) == STEPS
    timesteps = toy[0].model.model_sampling.timestep(inverted[2][:-1])
    chosen = [payload.staged.at(int(t)) for t in timesteps]
    assert len({id(c) for c in chosen}) == STEPS


def test_without_apply_concepts_the_sampler_says_so(toy, inverted, optimised):
    with pytest.raises(ValueError, match="Apply Concepts"):
        ksampler(toy[0], inverted[0], "ddim_uniform", "euler", 7.5, toy[4], optimised[0])


def test_areas_of_the_prompt_share_the_unconditional_prompt(tiny):
    """ComfyUI samples a copy of it in each."""
    model, clip, _ = tiny("sd1")
    empty = stock_encode(clip, "")
    prompt = in_half(stock_encode(clip, "a cat")) + stock_encode(clip, "grass")
    latent = {"samples": torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))}
    noise, trajectory = invert(model, prompt, latent, 2, iterations=0)[:2]
    negative, report = optimise(model, trajectory, prompt, empty, 3.0, 3)
    routed = AtelierApplyConcepts.execute(model)[0]
    out, plain = (ksampler(routed, noise, "ddim_uniform", "euler", 3.0, prompt, n, 2) for n in (negative, empty))
    original = latent["samples"]
    assert (out - original).square().mean() < (plain - original).square().mean()
    near = psnr(out, original, float(original.max() - original.min()))
    assert decibels(report) == pytest.approx(near, abs=0.1)


def test_nothing_of_the_model_changes(tiny):
    model, clip, _ = tiny_models.build("sd1")
    prompt, empty = stock_encode(clip, "a cat"), stock_encode(clip, "")
    latent = {"samples": torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))}
    before = {k: v.clone() for k, v in model.model.state_dict().items()}
    asked = {k for k, v in model.model.named_parameters() if v.requires_grad}
    trajectory = invert(model, prompt, latent, 2, iterations=1)[1]
    optimise(model, trajectory, prompt, empty, inner_steps=1)
    assert torch.is_inference_mode_enabled()
    assert all(torch.equal(v, before[k]) for k, v in model.model.state_dict().items())
    assert {k for k, v in model.model.named_parameters() if v.requires_grad} == asked


def test_sdxl_keeps_its_vector_and_sizes(tiny):
    model, clip, _ = tiny("sdxl")
    prompt, empty = stock_encode(clip, "a cat"), stock_encode(clip, "")
    empty = [[empty[0][0], {**empty[0][1], "width": 64, "height": 96}]]
    latent = {"samples": torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))}
    trajectory = invert(model, prompt, latent, 2, iterations=0)[1]
    [[_, values]] = optimise(model, trajectory, prompt, empty, inner_steps=1, early_stop=0)[0]
    assert torch.equal(values["pooled_output"], empty[0][1]["pooled_output"])
    assert (values["width"], values["height"]) == (64, 96)


def test_a_concept_in_the_prompt_is_read_when_inverting(tiny):
    model, clip, _ = tiny("sd1")
    prompt = encode(clip, "a cat <act>", make_concept(tiny("sd1"), "act", Layout("block"), seed=1))
    latent = {"samples": torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))}
    with pytest.raises(ValueError, match="Apply Concepts"):
        invert(model, prompt, latent, 2, iterations=0)
    routed = AtelierApplyConcepts.execute(model)[0]
    mean = [[prompt[0][0], {k: v for k, v in prompt[0][1].items() if k != "model_conds"}]]
    own, plain = (invert(routed, c, latent, 2, iterations=0)[1].latents[0] for c in (prompt, mean))
    assert relative(own, plain) > 1e-4


# Cancel


@pytest.mark.parametrize("work", ["invert", "optimise"])
def test_cancel_takes_effect_within_a_step(toy, one, inverted, monkeypatch, work):
    asked = cancel_at_prediction(monkeypatch, 3)  # of the first step
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        if work == "invert":
            invert(toy[0], toy[4], one)
        else:
            optimise(toy[0], inverted[1], toy[4], toy[5])
    assert len(asked) == 3 and torch.is_inference_mode_enabled()
    monkeypatch.undo()
    comfy.model_management.interrupt_current_processing(False)
    assert not any(p.requires_grad and p.is_inference() for p in toy[0].model.parameters())
    invert(toy[0], toy[4], one, 2, iterations=0)  # and the model is as before


def test_progress_counts_both_ways(toy, one, inverted, monkeypatch):
    seen = []
    monkeypatch.setattr(comfy.utils.ProgressBar, "update_absolute", lambda bar, n, *_: seen.append((n, bar.total)))
    invert(toy[0], toy[4], one, 3, "simple", 0)
    assert seen == [(n, 6) for n in range(1, 7)]
    seen.clear()
    optimise(toy[0], inverted[1], toy[4], toy[5], inner_steps=1, early_stop=1.0)
    assert seen == [(n, STEPS) for n in range(1, STEPS + 1)]


# Whose trajectory


def with_lora(model, strength=1.0):
    key = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    return with_ones_added(model, key, strength)


def test_a_fingerprint_tells_weights_and_loras_apart_and_nothing_else(tiny):
    model = tiny_models.build_unet("sd1", seed=0)
    own = model_fingerprint(model)
    others = [tiny_models.build_unet("sd1", seed=7), with_lora(model), with_lora(model, 0.5)]
    assert len({own, *map(model_fingerprint, others)}) == 4
    assert model_fingerprint(AtelierApplyConcepts.execute(model)[0]) == own
    assert model_fingerprint(with_lora(model)) == model_fingerprint(others[1])
    comfy.model_management.load_models_gpu([others[1]], force_full_load=True)  # merges the LoRA into the weights
    assert model_fingerprint(others[1]) == model_fingerprint(with_lora(model))
    assert model_fingerprint(model) == own


def test_a_trajectory_of_another_model_is_refused(tiny, toy, inverted):
    with pytest.raises(ValueError, match="found with another MODEL"):
        optimise(with_ones_added(toy[0]), inverted[1], toy[4], toy[5])


# Bad input


@pytest.mark.parametrize(
    ("latent", "sentence"),
    [
        (torch.zeros(1, 4, 8, 8), "latent is empty"),
        (torch.ones(1, 16, 8, 8), "needs pictures of 4 channels"),
        (torch.ones(1, 4, 2, 8, 8), r"\(1, 4, 2, 8, 8\)"),
        (torch.tensor([1.0, float("nan")]).repeat(1, 4, 8, 4), "values that are not finite"),
    ],
)
def test_latents_that_are_no_picture_are_named(tiny, latent, sentence):
    model, clip, _ = tiny("sd1")
    with pytest.raises(ValueError, match=sentence):
        invert(model, stock_encode(clip, "a cat"), {"samples": latent})


def test_models_and_prompts_that_cannot_be_inverted_are_named(toy, tiny, one):
    words = encode(toy[1], "a man prays on grass")
    laid_out = LayoutGuide(place_words(words, {"man": (Box(0, 0, 0.5, 1),)}), LayoutGuidance(), ()).patch(toy[0])
    for_ksampler = AtelierGCFG.execute(toy[0], {"branch0": branch(toy[0], toy[4], 3.0)}, **OFF)[0]
    for other in (RescaleCFG().patch(toy[0], 0.7)[0], laid_out, for_ksampler):
        with pytest.raises(ValueError, match="changes guidance"):
            invert(other, toy[4], one)
    with pytest.raises(ValueError, match="conditioning is 64 wide and the MODEL reads contexts 128 wide"):
        invert(toy[0], stock_encode(tiny("sd1").clip, "a cat"), one)


def test_null_text_names_what_it_cannot_do(toy, tiny, one, inverted):
    model, _, _, latent, prompt, empty = toy
    trajectory = inverted[1]
    with pytest.raises(ValueError, match=r"\(cfg\) 1: the unconditional prompt"):
        optimise(model, trajectory, prompt, empty, cfg=1.0)
    with pytest.raises(ValueError, match="holds 2 pictures"):
        optimise(model, invert(model, prompt, latent, 2, iterations=0)[1], prompt, empty)
    with pytest.raises(ValueError, match="2 prompts"):
        optimise(model, trajectory, prompt, empty + prompt)
    area = comfy_nodes.ConditioningSetArea().append(empty, 32, 32, 0, 0, 1.0)[0]
    with pytest.raises(ValueError, match=r"more than one plain prompt \(area"):
        optimise(model, trajectory, prompt, area)
    with pytest.raises(ValueError, match="unconditional is 64 wide"):
        optimise(model, trajectory, prompt, stock_encode(tiny("sd1").clip, ""))
    with pytest.raises(ValueError, match="share a timestep"):
        optimise(model, invert(model, prompt, one, 60, "karras", 0)[1], prompt, empty)
    with pytest.raises(ValueError, match="not finite at step 1"):
        optimise(model, trajectory, prompt, empty, learning_rate=1e30)


def test_null_text_refuses_a_controlnet_on_both_prompts(tiny):
    model, clip, _ = tiny("sd1")
    prompt, empty = stock_encode(clip, "a cat"), stock_encode(clip, "")
    latent = {"samples": torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))}
    trajectory = invert(model, prompt, latent, 2, iterations=0)[1]
    net, hint = tiny_models.build_controlnet(model), torch.rand(1, 128, 128, 3)
    both = comfy_nodes.ControlNetApply().apply_controlnet(prompt, net, hint, 0.5)[0]
    positive = comfy_nodes.ControlNetApplyAdvanced().apply_controlnet(prompt, empty, net, hint, 0.5, 0.0, 1.0)[0]
    for conditioning in (both, in_half(positive)):
        with pytest.raises(ValueError, match="ControlNet of the conditioning acts on the unconditional prompt too"):
            optimise(model, trajectory, conditioning, empty, inner_steps=1)
    assert optimise(model, trajectory, positive, empty, inner_steps=1)
