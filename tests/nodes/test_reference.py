"""Reference nodes: core's SamplerCustomAdvanced on the toy model, DINO from the artist's folder, and every refusal."""

import re

import comfy.hooks
import comfy.model_management
import comfy.samplers
import folder_paths
import pytest
import tiny_models
import torch
from cancelling import cancel_at_prediction
from comfy_extras import nodes_custom_sampler as custom
from comfy_extras.nodes_apg import APG
from comfy_extras.nodes_model_advanced import RescaleCFG
from concept_atelier.kernels.alignment import OBJECTIVES, closed_form, fit_masks, moments, warp_mask
from concept_atelier.kernels.features import Dino
from concept_atelier.kernels.guidance import GuidanceWeight
from concept_atelier.kernels.reference import (
    ReferenceSettings,
    classifier_free,
    generate_with_reference,
    latent_mask,
    masked_distance,
)
from concept_atelier.kernels.trajectory import Trajectory
from concept_atelier.nodes import reference
from concept_atelier.nodes.apply import AtelierApplyConcepts
from concept_atelier.nodes.inversion import AtelierDDIMInversion
from concept_atelier.nodes.layout_guidance import AtelierLayoutGuidance
from concept_atelier.nodes.native import features
from concept_atelier.nodes.native.guiders import Branch, GCFGGuider
from concept_atelier.nodes.native.inversion import abar_of, model_fingerprint
from concept_atelier.nodes.native.payload import concept_conditioning
from concept_atelier.nodes.pick_reference import AtelierPickReference
from concept_atelier.nodes.reference import AtelierAlignReference, AtelierReferenceGuidance
from concept_atelier.nodes.toy import AtelierToyCheckpoint, to_batch
from concept_atelier.toyworld.exemplars import subject_scenes
from concept_atelier.toyworld.render import render_with_mask
from concept_atelier.toyworld.vocabulary import caption
from guiding import branch, gcfg
from patched_models import KEYS_AND_VALUES, LORA_LAYERS, lora_file, make_dynamic, with_lora, with_ones_added
from prompting import encode, stock_encode

import nodes as comfy_nodes

STEPS, CFG = 8, 4.0
FIT = "symmetric chamfer"

pytestmark = pytest.mark.usefixtures("inference_mode", "cancellable")


@pytest.fixture(scope="module")
def world():
    """Two pictures of a robot with their exact masks, and what both show."""
    scenes = subject_scenes("robot", 2)
    pictures, masks = zip(*(render_with_mask(scene) for scene in scenes))
    return to_batch(pictures), to_batch(masks), [caption(scene) for scene in scenes]


class Toy:
    """The toy model with a reference inverted for the second scene's prompt, and its sampling."""

    def __init__(self, world):
        images, self.masks, texts = world
        self.model, self.clip, vae = AtelierToyCheckpoint.execute().args
        self.prompt, self.empty = stock_encode(self.clip, texts[1]), stock_encode(self.clip, "")
        self.latent = {"samples": vae.encode(images[:1])}
        self.trajectory, self.sigmas = self.invert(self.model)
        self.noise = custom.RandomNoise.execute(5)[0]

    def invert(self, model, steps=STEPS, scheduler="ddim_uniform", latent=None):
        _, trajectory, sigmas, _ = AtelierDDIMInversion.execute(
            model, self.prompt, latent or self.latent, steps, scheduler, 1
        ).args
        return trajectory, sigmas

    def guider(self, model=None, prompt=None, empty=None, cfg=CFG):
        return custom.CFGGuider.execute(model or self.model, prompt or self.prompt, empty or self.empty, cfg)[0]

    def sample(self, sampler, guider=None, noise=None, sigmas=None, start=None, batch=1, **latent):
        start = torch.zeros(batch, *self.trajectory.latents.shape[2:]) if start is None else start
        return custom.SamplerCustomAdvanced.execute(
            noise or self.noise, guider or self.guider(), sampler, self.sigmas if sigmas is None else sigmas,
            {"samples": start, **latent},
        )[0]["samples"]  # fmt: skip

    @property
    def inside(self):
        """The mask over the latents."""
        return latent_mask(self.masks[0], (8, 8))


@pytest.fixture(scope="module")
def toy(world):
    with torch.inference_mode():
        return Toy(world)


EULER = comfy.samplers.ksampler("euler")


def guidance(toy, mask=None, **changes):
    """The node's sampler."""
    return run_guidance(toy, mask, **changes)[0]


def run_guidance(toy, mask=None, trajectory=None, grow=0, **changes):
    inputs = {"t_s": 40, "t_e": 10, "inner_steps": 2, "learning_rate": 0.02, "early_stop": 0.0, "decay": True} | changes
    mask = toy.masks[:1] if mask is None else mask
    return AtelierReferenceGuidance.execute(trajectory or toy.trajectory, mask, **inputs, grow=grow)


@pytest.fixture(scope="module")
def guided(toy):
    with torch.inference_mode():
        return toy.sample(guidance(toy))


@pytest.fixture(scope="module")
def first(toy):
    """The first pass."""
    with torch.inference_mode():
        return toy.sample(EULER)


@pytest.fixture
def told(monkeypatch):
    """What the nodes show as text, in order."""
    texts = []
    monkeypatch.setattr(reference, "show_text", lambda text, node: texts.append(text))
    return texts


# Sampling


def test_it_is_the_kernel_on_the_same_predictions(toy, guided):
    """Against the plain formula, from predictions that ComfyUI's calc_cond_batch gives for each prompt alone."""
    model = toy.model.model
    with torch.inference_mode(False):
        sigmas, context, phi = (one.clone() for one in (toy.sigmas, toy.prompt[0][0], toy.empty[0][0]))

    def eps(x, i, rows):
        scale = (1 + sigmas[i] ** 2).sqrt()
        clean = model.apply_model(x * scale, sigmas[i].expand(len(x)), c_crossattn=rows, transformer_options={})
        return (x * scale - clean) / sigmas[i]

    with torch.inference_mode(False):
        trajectory = toy.trajectory
        predict = classifier_free(lambda x, i: eps(x, i, context), eps, CFG)
        # As ComfyUI starts below its largest noise level.
        x = toy.noise.generate_noise({"samples": torch.zeros(1, *trajectory.latents.shape[2:])}).clone()
        x = x * sigmas[0] / (1 + sigmas[0] ** 2).sqrt()
        x = generate_with_reference(
            predict, Trajectory(trajectory.latents.clone(), trajectory.abar.clone(), ""), toy.inside.clone(), phi, x,
            ReferenceSettings(40, 10, 2, 0.02, 0.0),
        )  # fmt: skip
    torch.testing.assert_close(guided, model.process_latent_out(x), rtol=0, atol=2e-3)


def test_the_subject_comes_near_to_the_reference(toy, guided, first):
    reference = toy.trajectory.latents[-1]
    near, far = (masked_distance(toy.model.model.process_latent_in(x), reference, toy.inside) for x in (guided, first))
    assert near < 0.8 * far


def test_an_empty_mask_samples_the_first_picture_bit_for_bit_and_says_so(toy, first):
    output = run_guidance(toy, torch.zeros(1, 64, 64), grow=2)
    assert torch.equal(toy.sample(output[0]), first)
    assert "mask is empty at the size of the latents (8 x 8): plain sampling" in output.ui.value


def test_without_inner_steps_core_samples_the_same_from_one_paste(toy):
    levels = ReferenceSettings().levels(STEPS)
    early, late = toy.sigmas[: levels.start + 1], toy.sigmas[levels.start :]
    x = toy.model.model.process_latent_in(toy.sample(EULER, sigmas=early))
    reference = toy.trajectory.latents[levels.start] * (1 + late[0] ** 2).sqrt()
    pasted = toy.model.model.process_latent_out(torch.where(toy.inside, reference, x))
    expected = toy.sample(EULER, noise=custom.DisableNoise.execute()[0], sigmas=late, start=pasted)
    torch.testing.assert_close(toy.sample(guidance(toy, inner_steps=0)), expected, rtol=0, atol=2e-3)


def test_the_first_pass_can_be_reused_down_to_t_s(toy, guided):
    start = ReferenceSettings().levels(STEPS).start
    x = toy.sample(EULER, sigmas=toy.sigmas[: start + 1])
    out = toy.sample(guidance(toy), noise=custom.DisableNoise.execute()[0], sigmas=toy.sigmas[start:], start=x)
    torch.testing.assert_close(out, guided, rtol=0, atol=2e-3)


def test_down_to_t_s_it_is_core_sampling_bit_for_bit(toy, monkeypatch):
    """Seen through the preview of each step."""
    previews = {}

    def watch(name):
        monkeypatch.setattr(
            custom.latent_preview, "prepare_callback",
            lambda model, steps, output: lambda i, x_0, x, total: previews.setdefault(name, {}).update({i: x_0}),
        )  # fmt: skip

    watch("first")
    toy.sample(EULER)
    watch("second")
    toy.sample(guidance(toy))
    assert list(previews["first"]) == list(previews["second"]) == list(range(STEPS))
    start = ReferenceSettings().levels(STEPS).start
    assert all(torch.equal(previews["first"][i], previews["second"][i]) for i in range(start))
    assert not torch.equal(previews["first"][start], previews["second"][start])


def test_pictures_of_a_batch_are_guided_each(toy, guided):
    both = toy.sample(guidance(toy), batch=2)
    torch.testing.assert_close(both[:1], guided, rtol=0, atol=2e-3)
    assert (both[1] - both[0]).abs().max() > 0.1


def test_outside_of_an_inpainting_mask_nothing_changes(toy):
    keep = toy.latent["samples"]
    hole = torch.zeros(1, 64, 64)
    hole[:, :32] = 1
    out = toy.sample(guidance(toy), start=keep, noise_mask=hole)
    torch.testing.assert_close(out[..., 4:, :], keep[..., 4:, :], rtol=0, atol=1e-4)
    assert (out - keep)[..., :4, :].abs().max() > 0.1


def tiny_outputs(model, clip, prompts=None, inner_steps=(0, 1), guider=None, inverted=None):
    """Pictures guided along random latents, one for each number of inner steps. inverted: with another MODEL."""
    prompt, empty = prompts or (stock_encode(clip, "a cat"), stock_encode(clip, ""))
    guider = guider or custom.CFGGuider.execute(model, prompt, empty, 3.0)[0]
    latent = {"samples": torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))}
    inversion = AtelierDDIMInversion.execute(inverted or model, prompt, latent, 3, "ddim_uniform", 0)
    _, trajectory, sigmas, _ = inversion.args
    mask = torch.zeros(1, 128, 128)
    mask[:, 32:96, 32:96] = 1
    outputs = []
    for number in inner_steps:
        sampler = AtelierReferenceGuidance.execute(trajectory, mask, 40, 10, number, 0.05, 0.0, True, 0)[0]
        latent, noise = {"samples": torch.zeros(1, 4, 16, 16)}, custom.RandomNoise.execute(1)[0]
        outputs.append(custom.SamplerCustomAdvanced.execute(noise, guider, sampler, sigmas, latent)[0]["samples"])
    return outputs


def test_every_topology(any_tiny):
    """Gradients run, the picture is finite and another one than without; nothing of the model changes."""
    model, clip, _ = any_tiny
    comfy.model_management.unload_all_models()  # a clone of another test may have left its patches in the weights
    before = {key: value.clone() for key, value in model.model.state_dict().items()}
    asked = {key for key, value in model.model.named_parameters() if value.requires_grad}
    outputs = tiny_outputs(model, clip)
    assert all(out.isfinite().all() for out in outputs) and not torch.equal(*outputs)
    assert torch.is_inference_mode_enabled()
    assert all(torch.equal(value, before[key]) for key, value in model.model.state_dict().items())
    assert {key for key, value in model.model.named_parameters() if value.requires_grad} == asked


def test_a_dynamic_model_takes_its_gradients_from_a_whole_copy():
    """Dynamic VRAM needs a GPU; a patcher that says so and reloads itself stands for it."""
    model, clip, _ = tiny_models.build("sd1")
    [expected] = tiny_outputs(model, clip, inner_steps=[1])
    dynamic, reloaded = tiny_models.build_unet("sd1"), []

    def reload():
        reloaded.append(tiny_models.build_unet("sd1"))
        return reloaded[-1]

    make_dynamic(dynamic, reload)
    with torch.inference_mode():
        weights = list(dynamic.model.parameters())
    [found] = tiny_outputs(dynamic, clip, inner_steps=[1])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert reloaded and all(one is other for one, other in zip(weights, dynamic.model.parameters()))
    assert dynamic.model.current_patcher is None


def test_a_controlnet_on_the_prompt_counts_and_one_on_both_is_refused(tiny):
    model, clip, _ = tiny("sd1")
    prompt, empty = stock_encode(clip, "a cat"), stock_encode(clip, "")
    hint = torch.rand(1, 128, 128, 3, generator=torch.Generator().manual_seed(0))
    net = tiny_models.build_controlnet(model)
    both = comfy_nodes.ControlNetApplyAdvanced().apply_controlnet(prompt, empty, net, hint, 0.2, 0.0, 1.0)
    [plain] = tiny_outputs(model, clip, inner_steps=[1])
    [controlled] = tiny_outputs(model, clip, (both[0], empty), [1])
    assert controlled.isfinite().all() and not torch.allclose(controlled, plain, atol=1e-3)
    with pytest.raises(ValueError, match=r"more than one plain prompt \(control"):
        tiny_outputs(model, clip, both, [1])


# Guiders, and what rides on MODEL and CONDITIONING


def test_gcfg_with_one_branch_is_cfg(toy, guided):
    guider = GCFGGuider(toy.model, toy.empty, {"one": Branch(toy.model, toy.prompt, GuidanceWeight(CFG))})
    torch.testing.assert_close(toy.sample(guidance(toy), guider), guided, rtol=0, atol=2e-3)


@pytest.mark.parametrize("layers", [LORA_LAYERS, KEYS_AND_VALUES])
@pytest.mark.parametrize("patched", [False, True])
def test_gcfg_of_a_lora_that_not_all_branches_have(tiny, layers, patched):
    """Of one checkpoint as of two, where no weights are exchanged; with a patch the branches run one by one."""
    model, clip, _ = tiny("sd1")
    lora, empty = with_lora(model, 1, layers=layers), stock_encode(clip, "")
    cat, dog = stock_encode(clip, "a cat"), stock_encode(clip, "a dog")

    def guided(base):
        bare = base.clone()
        if patched:
            bare.set_model_attn2_patch(lambda q, k, v, extra_options: (q, k, v))
        guider = gcfg(lora, empty, branch(lora, cat, 2.0), branch(bare, dog, 1.0))[0]
        return tiny_outputs(lora, clip, inner_steps=[0, 2], guider=guider)

    comfy.model_management.unload_all_models()  # a clone of another test may have left its patches in the weights
    before = {key: value.clone() for key, value in model.model.state_dict().items()}
    pasted, found = guided(model)
    comfy.model_management.unload_all_models()
    assert all(torch.equal(value, before[key]) for key, value in model.model.state_dict().items())
    torch.testing.assert_close(found, guided(tiny_models.build_unet("sd1"))[1], rtol=0, atol=2e-3)
    assert not torch.allclose(found, pasted, atol=1e-2)


def test_a_lora_hook_on_both_prompts_is_that_lora_on_the_model(tiny):
    model, clip, _ = tiny("sd1")
    hook = comfy.hooks.create_hook_lora(lora_file(model, 1), 1.0, 0.0)
    prompts = [
        [[context, {**values, "hooks": hook}] for context, values in stock_encode(clip, text)] for text in ("a cat", "")
    ]
    [found] = tiny_outputs(model, clip, prompts, [2])
    [expected] = tiny_outputs(with_lora(model, 1), clip, inner_steps=[2])
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)


def test_gcfg_takes_the_trajectory_of_its_own_model(tiny):
    model, clip, _ = tiny("sd1")
    lora, prompt = with_lora(model, 1), stock_encode(clip, "a cat")
    guider = gcfg(lora, stock_encode(clip, ""), branch(lora, prompt, 2.0), branch(model, prompt, 1.0))[0]
    with pytest.raises(ValueError, match="found with another MODEL"):
        tiny_outputs(model, clip, inner_steps=[1], guider=guider)


def test_dual_cfg_of_equal_prompts_is_cfg(toy, guided):
    """Its formula: cfg 1 between the two prompts, 4 against the negative one."""
    guider = custom.DualCFGGuider.execute(toy.model, toy.prompt, toy.prompt, toy.empty, 1.0, CFG, "regular")[0]
    torch.testing.assert_close(toy.sample(guidance(toy), guider), guided, rtol=0, atol=2e-3)


def test_nodes_that_change_guidance_are_followed(toy, guided):
    rescaled = toy.sample(guidance(toy), toy.guider(RescaleCFG().patch(toy.model, 0.7)[0]))
    reference = toy.trajectory.latents[-1]
    first = toy.sample(EULER, toy.guider(RescaleCFG().patch(toy.model, 0.7)[0]))
    near, far = (
        masked_distance(toy.model.model.process_latent_in(x), reference, toy.inside) for x in (rescaled, first)
    )
    assert near < far and not torch.allclose(rescaled, guided)


def test_the_unconditional_alone_is_predicted_again_and_the_prompt_once(toy, monkeypatch):
    counts = []
    stock = toy.model.model.apply_model

    def counted(x, *args, **kwargs):
        counts.append((len(x), torch.is_grad_enabled()))
        return stock(x, *args, **kwargs)

    monkeypatch.setattr(toy.model.model, "apply_model", counted)
    toy.sample(guidance(toy, t_s=25, t_e=25, inner_steps=3))
    learned = [n for n, grad in counts if grad]
    # Plain steps batch both prompts; the guided one predicts the prompt once, phi_h = phi, two more and the last.
    assert len(learned) == 3 and set(learned) == {1}
    assert sum(n for n, _ in counts) == 2 * (STEPS - 1) + 1 + 3 + 1


def staged(toy):
    """The prompt as a concept with two stages would make it: other rows in the later half of the sampling."""
    from concept_atelier.kernels.backbone import TextContext
    from concept_atelier.kernels.conditioning import StagedContext
    from concept_atelier.nodes.native.model_kind import cross_attention_layers

    layers, rows = cross_attention_layers(toy.model), toy.prompt[0][0]
    other = stock_encode(toy.clip, "a cat sits on sand")[0][0]
    contexts = tuple(TextContext.plain(one.clone(), layers) for one in (other, rows))
    return concept_conditioning(StagedContext((0, 500), contexts, {}), layers, ())


def test_concepts_that_change_over_the_steps_arrive_with_the_prompt(toy, guided):
    prompt = staged(toy)
    routed = AtelierApplyConcepts.execute(toy.model)[0]
    assert not torch.allclose(toy.sample(guidance(toy), toy.guider(routed, prompt)), guided, atol=1e-2)
    with pytest.raises(ValueError, match="Apply Concepts"):
        toy.sample(guidance(toy), toy.guider(prompt=prompt))
    # A payload that says at every step what the plain prompt says changes nothing.
    carried = prompt[0][1]["model_conds"]["concept_atelier"].cond
    twice = type(carried.staged)((0, 500), (carried.staged.contexts[1],) * 2, {})
    same = concept_conditioning(twice, carried.layers, ())
    torch.testing.assert_close(toy.sample(guidance(toy), toy.guider(routed, same)), guided, rtol=0, atol=2e-3)


def test_areas_of_the_prompt_count(toy, guided):
    """ComfyUI gives the negative prompt a copy for each area, which is varied with it."""
    half = comfy_nodes.ConditioningSetArea().append(stock_encode(toy.clip, "a cat"), 32, 64, 0, 0, 1.0)[0]
    out = toy.sample(guidance(toy), toy.guider(prompt=toy.prompt + half))
    assert out.isfinite().all() and not torch.allclose(out, guided, atol=1e-2)


def test_cancel_takes_effect_within_a_step(toy, monkeypatch):
    asked = cancel_at_prediction(monkeypatch, 4)  # inside of the guided steps
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        toy.sample(guidance(toy))
    assert len(asked) == 4 and torch.is_inference_mode_enabled()


def test_the_node_is_told_how_near_it_came(toy, told):
    toy.sample(guidance(toy))
    assert re.match(r"5 of 8 steps guided, \d+\.\d% of the latents inside", told[0])
    before, after = map(float, re.search(r"reference (\S+) before, (\S+) after", told[1]).groups())
    assert after < before


# Refusals of the guidance


def test_trajectories_of_another_sampling_are_refused(toy):
    with pytest.raises(ValueError, match="found with another MODEL"):
        toy.sample(guidance(toy), toy.guider(with_ones_added(toy.model)))
    with pytest.raises(ValueError, match="has 8 steps and the sampling 4"):
        toy.sample(guidance(toy), sigmas=toy.invert(toy.model, 4)[1])
    with pytest.raises(ValueError, match="other noise levels"):
        toy.sample(guidance(toy), sigmas=toy.invert(toy.model, STEPS, "karras")[1])
    with pytest.raises(ValueError, match=r"of size 8 x 8 with .* the sampling is of size 16 x 8"):
        toy.sample(guidance(toy), start=torch.zeros(1, toy.trajectory.latents.shape[2], 16, 8))
    with pytest.raises(ValueError, match=r"starts 2 steps before its end, and the guidance 6 \(t_s\)"):
        toy.sample(guidance(toy), sigmas=toy.sigmas[-3:])


def test_without_a_part_for_the_unconditional_prompt_it_is_refused(toy):
    for guider in (toy.guider(cfg=1.0), custom.BasicGuider.execute(toy.model, toy.prompt)[0]):
        with pytest.raises(ValueError, match=r"scale \(cfg\) 1: the unconditional prompt"):
            toy.sample(guidance(toy), guider)
    branch = {"one": Branch(toy.model, toy.prompt, GuidanceWeight(1.0))}
    with pytest.raises(ValueError, match=r"scale \(cfg\) 1: the unconditional prompt"):
        toy.sample(guidance(toy), GCFGGuider(toy.model, toy.empty, branch))


def test_layout_guidance_at_the_guided_steps_is_refused(tiny):
    model, clip, _ = tiny("sd1")
    prompts = encode(clip, "a cat and a dog"), stock_encode(clip, "")

    def outputs(steps):
        settings = {"strength": 30.0, "steps": steps, "iterations": 1, "threshold": 0.0, "power": "1 (paper)"}
        guided = AtelierLayoutGuidance.execute(
            model, prompts[0], "cat, dog", 128, 128, bboxes=None, largest_move=0.0, **settings
        )[0]
        guider = custom.CFGGuider.execute(guided, *prompts, 3.0)[0]
        return tiny_outputs(guided, clip, prompts, [1], guider, inverted=model)

    assert outputs(1)[0].isfinite().all()
    with pytest.raises(ValueError, match=r"still moves the latents at step 2, where .* set its steps to 1 or fewer"):
        outputs(2)


def test_apg_with_momentum_is_refused_and_without_it_is_followed(tiny):
    model, clip, _ = tiny("sd1")
    prompt, empty = stock_encode(clip, "a cat"), stock_encode(clip, "")

    def core(momentum):
        return custom.CFGGuider.execute(APG.execute(model, 0.5, 5.0, momentum)[0], prompt, empty, 3.0)[0]

    def ours(momentum):
        options = {"apg_eta": 0.5, "apg_norm_threshold": 5.0, "apg_momentum": momentum}
        return gcfg(model, empty, branch(model, prompt, 3.0), **options)[0]

    for guider in (core, ours):
        assert tiny_outputs(model, clip, inner_steps=[1], guider=guider(0.0))[0].isfinite().all()
        with pytest.raises(ValueError, match=r"APG with momentum counts each: set apg_momentum"):
            tiny_outputs(model, clip, inner_steps=[1], guider=guider(-0.5))


def test_an_unconditional_that_is_no_plain_prompt_is_refused(toy):
    routed = AtelierApplyConcepts.execute(toy.model)[0]
    area = comfy_nodes.ConditioningSetArea().append(toy.empty, 32, 32, 0, 0, 1.0)[0]
    for negative, what in ((toy.empty + toy.prompt, "2 prompts"), (area, "area"), (staged(toy), "concepts")):
        with pytest.raises(ValueError, match=rf"more than one plain prompt \(.*{what}"):
            toy.sample(guidance(toy), toy.guider(routed, empty=negative))
    # ComfyUI gives the negative prompt a copy for the area, with its hooks.
    area = [
        [toy.prompt[0][0], {**area[0][1], "hooks": comfy.hooks.create_hook_lora(lora_file(toy.model, 1), 1.0, 0.0)}]
    ]
    with pytest.raises(ValueError, match=r"more than one plain prompt \(the hooks of an area"):
        toy.sample(guidance(toy), toy.guider(prompt=toy.prompt + area))


def test_inputs_of_the_guidance_that_make_no_sense_are_named(toy):
    with pytest.raises(ValueError, match="t_s = 5, after its end at t_e = 10"):
        guidance(toy, t_s=5)
    with pytest.raises(ValueError, match='2 pictures on "mask"'):
        guidance(toy, toy.masks)
    two = {"samples": toy.latent["samples"].repeat(2, 1, 1, 1)}
    with pytest.raises(ValueError, match="holds 2 pictures"):
        guidance(toy, trajectory=toy.invert(toy.model, 2, latent=two)[0])
    with pytest.raises(ValueError, match="not finite at step"):
        toy.sample(guidance(toy, learning_rate=1e30))
    assert "(64 x 32) has other proportions" in run_guidance(toy, toy.masks[:1, :32]).ui.value


def test_quantised_models_are_refused(toy):
    model = tiny_models.build_unet("sd1", dtype=torch.float8_e4m3fn)
    sigmas = toy.sigmas[-4:]
    trajectory = Trajectory(torch.zeros(4, 1, 4, 8, 8), abar_of(sigmas), model_fingerprint(model))
    text = [[torch.zeros(1, 77, 64), {}]]
    guider = custom.CFGGuider.execute(model, text, text, CFG)[0]
    with pytest.raises(ValueError, match="MODEL is quantised"):
        toy.sample(guidance(toy, trajectory=trajectory), guider, sigmas=sigmas, start=torch.zeros(1, 4, 8, 8))


# Align Reference


def align(images, masks, target, fit=FIT, max_rotation=180.0):
    output = AtelierAlignReference.execute(images, masks, target, fit, max_rotation)
    return output.args, output.ui.as_dict()


def test_a_picture_of_the_toy_world_is_laid_over_another(world):
    images, masks, _ = world
    (aligned, moved), shown = align(images[:1], masks[:1], masks[1:], max_rotation=0.0)
    target = masks[1]
    assert aligned.shape == (1, 64, 64, 3) and moved.shape == (1, 64, 64) and shown["images"]
    assert aligned.min() >= 0 and aligned.max() <= 1

    def overlap(mask):
        return torch.minimum(mask, target).sum() / torch.maximum(mask, target).sum()

    assert overlap(moved[0]) > 1.3 * overlap(masks[0])


def test_a_picture_on_its_own_mask_stays(world):
    images, masks, _ = world
    (aligned, moved), _ = align(images[:1], masks[:1], masks[:1])
    torch.testing.assert_close(aligned, images[:1], rtol=0, atol=1e-3)
    torch.testing.assert_close(moved, masks[:1], rtol=0, atol=1e-3)


@pytest.mark.parametrize("fit", OBJECTIVES)
def test_the_fit_is_refined_inside_of_comfyui_too(fit):
    """The executor runs nodes in inference mode, in which nothing has a gradient."""
    reference, target = blob(0.0), blob(0.6)
    assert torch.is_inference_mode_enabled() and reference.is_inference()
    (_, moved), _ = align(torch.rand(1, 64, 64, 3), reference[None], target[None], fit, 20.0)
    with torch.inference_mode(False):
        reference, target = reference.clone(), target.clone()
        transform = fit_masks(reference, target, fit, 20.0)
        torch.testing.assert_close(moved[0].clone(), warp_mask(reference, transform, target.shape))
        start = closed_form(moments(reference), moments(target), torch.zeros((), dtype=torch.float64))
        assert (moved[0] - warp_mask(reference, start, target.shape)).abs().max() > 0.3


def blob(turn):
    """A lobed shape (64, 64), turned by radians."""
    y, x = torch.meshgrid(torch.arange(64.0) - 31.5, torch.arange(64.0) - 31.5, indexing="ij")
    angle = torch.atan2(y, x) - turn
    return (torch.hypot(x, y) < 18 + 4 * torch.cos(2 * angle) + 3 * torch.cos(3 * angle + 1)).float()


def test_it_takes_the_size_of_the_target_and_masks_of_other_sizes(world, told):
    images, masks, _ = world
    small = torch.nn.functional.interpolate(masks[:1, None], size=(32, 32), mode="area")[:, 0]
    wide = torch.nn.functional.pad(masks[1:], (32, 32))
    (aligned, _), _ = align(images[:1], small, wide)
    assert aligned.shape == (1, 64, 128, 3)
    assert "reference_mask is 32 x 32 and was scaled to 64 x 64." in told[0]
    assert re.search(r"Scaled by \d\.\d\d, turned by -?\d+ degrees; \d+% of both", told[0])


def test_no_place_to_put_the_subject_is_said_and_guides_nothing(world, toy, first, told):
    images, masks, _ = world
    (aligned, moved), _ = align(images[:1], masks[:1], torch.zeros(1, 64, 64))
    assert torch.equal(aligned, images[:1]) and not moved.any()
    assert "target_mask is empty" in told[0]
    assert torch.equal(toy.sample(guidance(toy, moved)), first)


def test_masks_that_say_nothing_are_named(world, told):
    images, masks, _ = world
    with pytest.raises(ValueError, match="reference_mask is empty"):
        align(images[:1], torch.zeros(1, 64, 64), masks[1:])
    with pytest.raises(ValueError, match='2 pictures on "reference"'):
        align(images, masks[:1], masks[1:])
    align(images[:1], torch.ones(1, 64, 64), masks[1:])
    assert "reference_mask covers everything" in told[0]


# Pick Reference


@pytest.fixture
def dino(tmp_path, monkeypatch):
    """A models folder with a small DINO of random weights."""
    folders = {key: ([*paths], set(endings)) for key, (paths, endings) in folder_paths.folder_names_and_paths.items()}
    folders.pop("dino", None)
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", folders)
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    features.DINO_FILES.register()
    (tmp_path / "dino").mkdir()
    torch.manual_seed(0)
    network = Dino(128, 32, 1)
    for weight in network.parameters():
        weight.detach().normal_(0, 0.2)
    torch.save(network.state_dict(), tmp_path / "dino" / "tiny.pth")
    return network


def pick(pictures, by="DINO", dino="tiny.pth", index=0, **more):
    """As the executor calls the node: each input is a list."""
    inputs = {"pictures": pictures, "by": by, "dino": dino, "index": index, **more}
    output = AtelierPickReference.execute(
        **{name: given if isinstance(given, list) else [given] for name, given in inputs.items()}
    )
    return *output.args[:3], output.ui.value


def test_the_picture_nearest_by_dino_is_chosen_with_its_mask(dino, world):
    pictures = torch.rand(3, 40, 60, 3, generator=torch.Generator().manual_seed(0))
    masks = torch.rand(3, 40, 60, generator=torch.Generator().manual_seed(1))
    generated = (pictures[1:2] + 0.02).clamp(0, 1)
    picture, mask, index, text = pick(pictures, generated=generated, masks=masks)
    assert index == 1 and torch.equal(picture, pictures[1:2]) and torch.equal(mask, masks[1:2])
    with torch.no_grad():
        expected = [float(dino(generated) @ dino(one[None]).T) for one in pictures]
    shown = [float(value) for value in re.findall(r"-?\d\.\d{3}", text)]
    assert shown == pytest.approx(expected, abs=2e-3)


def test_a_list_of_pictures_of_any_sizes_is_chosen_from_as_a_whole(dino):
    generator = torch.Generator().manual_seed(0)
    batches = [torch.rand(n, *size, 3, generator=generator) for n, *size in ((1, 40, 60), (2, 48, 32))]
    masks = [torch.rand(*batch.shape[:3], generator=generator) for batch in batches]
    generated = [batches[1][1:] * 0.98, batches[1][1:] * 0.96]
    picture, mask, index, text = pick(batches, generated=generated, masks=masks)
    assert index == 2 and torch.equal(picture, batches[1][1:]) and torch.equal(mask, masks[1][1:])
    assert len(re.findall(r"-?\d\.\d{3}", text)) == 3
    colors = [torch.eye(3)[i].expand(1, 8 + i, 8, 3) for i in range(3)]
    assert pick(colors, "CLIP Vision", generated=colors[1:2], clip_vision=FakeClipVision())[2] == 1
    assert AtelierPickReference.define_schema().is_input_list


def test_a_replaced_dino_file_counts_as_a_change(dino, tmp_path):
    def fingerprint(by):
        # As the executor asks: what is linked is not known yet.
        return AtelierPickReference.fingerprint_inputs(
            pictures=(None,), by=[by], dino=["tiny.pth"], index=[0], caption_model=["none"]
        )

    before = fingerprint("DINO"), fingerprint("index")
    assert before == (fingerprint("DINO"), fingerprint("index"))
    with open(tmp_path / "dino" / "tiny.pth", "ab") as file:
        file.write(b"more")
    assert fingerprint("DINO") != before[0] and fingerprint("index") == before[1]


class FakeClipVision:
    """Stands for a loaded CLIP_VISION: its embedding is the mean colour."""

    def encode_image(self, images):
        return {"image_embeds": images.mean(dim=(1, 2))}


def test_the_picture_nearest_by_clip_vision_is_chosen():
    colors = torch.eye(3)[:, None, None].expand(3, 8, 8, 3)
    picture, mask, index, text = pick(colors, "CLIP Vision", generated=colors[2:], clip_vision=FakeClipVision())
    assert index == 2 and torch.equal(picture, colors[2:]) and mask.shape == (1, 8, 8) and mask.all()
    assert text == "Picture 2 by CLIP Vision; similarity of all: 0.000, 0.000, 1.000"


def test_a_picture_is_taken_by_hand():
    pictures = torch.rand(3, 8, 8, 3)
    picture, _, index, _ = pick(pictures, "index", index=1)
    assert index == 1 and torch.equal(picture, pictures[1:2])
    with pytest.raises(ValueError, match="index is 3, and there are 3 pictures"):
        pick(pictures, "index", index=3)


def test_what_is_missing_to_choose_is_named(dino):
    pictures = torch.rand(2, 8, 8, 3)
    with pytest.raises(ValueError, match='connect the generated picture to "generated"'):
        pick(pictures)
    with pytest.raises(ValueError, match='connect Load CLIP Vision to "clip_vision"'):
        pick(pictures, "CLIP Vision", generated=pictures[:1])
    with pytest.raises(ValueError, match="2 pictures but 1 masks"):
        pick(pictures, "index", masks=torch.ones(1, 8, 8))
    with pytest.raises(ValueError, match='no picture on "pictures"'):
        pick([])
    missing = AtelierPickReference.validate_inputs(["DINO"], ["dino_deitsmall16_pretrain.pth"])
    assert (
        "no file dino_deitsmall16_pretrain.pth in models/dino" in missing and "github.com/facebookresearch" in missing
    )
    assert AtelierPickReference.validate_inputs(["index"], ["dino_deitsmall16_pretrain.pth"]) is True
    assert AtelierPickReference.validate_inputs(["DINO"], ["tiny.pth"]) is True
