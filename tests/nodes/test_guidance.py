"""GCFG through SamplerCustomAdvanced and KSampler, against stock guiders and against separate passes by hand."""

from dataclasses import replace
from functools import partial

import comfy.hooks
import comfy.model_base
import comfy.samplers
import guiding
import pytest
import tiny_models
import torch
from comfy_api.latest._input import CurveInput
from comfy_extras import nodes_custom_sampler as custom
from comfy_extras.nodes_model_advanced import RescaleCFG
from comfy_extras.nodes_pag import PerturbedAttentionGuidance
from comparing import relative
from concept_atelier.benchmarks import speed_gcfg
from concept_atelier.kernels.layouts import Layout
from concept_atelier.nodes.guidance import AtelierGCFG
from concept_atelier.nodes.native.guiders import progress_at
from guiding import OFF, advanced, branch, counting, empty_latent, gcfg
from patched_models import asking_again, lora_file, with_doubled_contexts
from prompting import STEPS, encode, ksampler, make_concept, route, stock_encode

import nodes as comfy_nodes

TOLERANCE = 2e-5

pytestmark = pytest.mark.usefixtures("inference_mode")


@pytest.fixture(scope="module")
def other():
    """Another checkpoint of the same latents."""
    return tiny_models.build_unet("sd1", seed=7)


@pytest.fixture(scope="module")
def velocity():
    """One that predicts velocities."""
    return tiny_models.build_unet("sd2_v", seed=8)


@pytest.fixture(scope="module")
def prompts(sd1):
    """An empty prompt and three others."""
    with torch.inference_mode():
        return [stock_encode(sd1.clip, text) for text in ("", "a man", "grass", "red ball")]


def stock(model, positive, negative, cfg):
    return custom.CFGGuider.execute(model, positive, negative, cfg)[0]


def by_hand(unconditional, branches):
    """Every prediction in a pass of its own."""

    def clean(model, conditioning, x, sigma):
        return model.model.apply_model(x, sigma, c_crossattn=conditioning[0][0], transformer_options={})

    return guiding.by_hand(clean, unconditional, branches)


def test_one_branch_is_plain_cfg_to_the_bit(any_tiny):
    model, clip, _ = any_tiny
    positive, negative = (stock_encode(clip, text) for text in ("a man", "blurry"))
    guider = gcfg(model, negative, branch(model, positive, 5.0))[0]
    assert torch.equal(advanced(guider), advanced(stock(model, positive, negative, 5.0)))


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "heun", "euler_cfg_pp"])
@pytest.mark.parametrize("cfg", [5.0, 1.0])
def test_one_branch_is_plain_cfg_with_any_sampler(sd1, prompts, sampler, cfg):
    guider = gcfg(sd1.model, prompts[0], branch(sd1.model, prompts[1], cfg))[0]
    expected = advanced(stock(sd1.model, prompts[1], prompts[0], cfg), sampler=sampler)
    assert relative(advanced(guider, sampler=sampler), expected) < TOLERANCE


def test_prompts_of_one_model_share_a_forward(sd1, prompts):
    model, (u, a, b, c) = sd1.model, prompts
    guider = gcfg(model, u, branch(model, a, 3.0), branch(model, b, 2.0), branch(model, c, -1.0))[0]
    with counting(model) as forwards:
        out = advanced(guider)
    assert forwards == [4] * STEPS
    assert relative(out, by_hand((model, u), [(model, a, 3.0), (model, b, 2.0), (model, c, -1.0)])) < TOLERANCE


def test_noise_and_velocity_models_meet(sd1, other, velocity, prompts):
    u, a, b, c = prompts
    unconditional, three = (sd1.model, u), [(sd1.model, a, 3.0), (other, b, 2.0), (velocity, c, 1.0)]
    guider = gcfg(*unconditional, *(branch(*one) for one in three))[0]
    with counting(sd1.model) as own, counting(other, velocity) as others:
        out = advanced(guider)
    assert (own, others) == ([2] * STEPS, [1, 1] * STEPS)
    assert relative(out, by_hand(unconditional, three)) < TOLERANCE
    assert relative(out, by_hand(unconditional, [three[0], (sd1.model, b, 2.0), (sd1.model, c, 1.0)])) > 1e-2


def test_another_base_runs_with_its_own_patches(sd1, other, prompts):
    u, a, b, _ = prompts
    patched = with_doubled_contexts(other)
    alone = advanced(stock(patched, b, b, 1.0))
    assert relative(advanced(gcfg(sd1.model, u, branch(patched, b, 1.0))[0]), alone) < TOLERANCE
    plain = advanced(stock(other, b, b, 1.0))
    assert relative(advanced(gcfg(with_doubled_contexts(sd1.model), u, branch(other, b, 1.0))[0]), plain) < TOLERANCE
    assert relative(alone, plain) > 1e-2
    three = gcfg(sd1.model, u, branch(sd1.model, a, 3.0), branch(patched, b, 2.0), branch(other, b, -1.0))[0]
    out = advanced(three, steps=1)
    D_0, D_a, D_patched, D_b = (
        advanced(stock(model, conditioning, conditioning, 1.0), steps=1)
        for model, conditioning in ((sd1.model, u), (sd1.model, a), (patched, b), (other, b))
    )
    assert relative(out, D_0 + 3 * (D_a - D_0) + 2 * (D_patched - D_0) - (D_b - D_0)) < TOLERANCE


def test_another_base_reads_its_concepts(sd1, other, prompts):
    parts = tiny_models.TinyModel(other, sd1.clip, sd1.vae)
    concept, model = make_concept(parts, "it", Layout("layer"), seed=1), route(other)
    conditioning = encode(sd1.clip, "a <it>", concept)
    out = advanced(gcfg(sd1.model, prompts[0], branch(model, conditioning, 1.0))[0])
    assert relative(out, advanced(stock(model, conditioning, conditioning, 1.0))) < TOLERANCE


def test_what_a_sampler_puts_around_predictions_reaches_every_base(sd1, other, prompts):
    """Reference Guidance so remembers what does not change while it varies the unconditional prompt."""
    seen = []

    def wrapper(executor, model, *given):
        seen.append(model)
        return executor(model, *given)

    def sampler(model, noise, sigmas, extra_args, callback, disable):
        wrappers = extra_args["model_options"]["transformer_options"]["wrappers"]
        wrappers.setdefault("calc_cond_batch", {})["sampler"] = [wrapper]
        return model(noise, sigmas[:1], **extra_args)

    guider = gcfg(sd1.model, prompts[0], branch(sd1.model, prompts[1], 3.0), branch(other, prompts[2], 2.0))[0]
    zeros = torch.zeros(1, 4, 8, 8)
    guider.sample(zeros, zeros, comfy.samplers.KSAMPLER(sampler), torch.tensor([3.0, 0.0]), disable_pbar=True)
    assert seen == [sd1.model.model, other.model]


def test_order_does_not_matter(sd1, other, prompts):
    u, a, b, _ = prompts
    one, two = branch(sd1.model, a, 3.0), branch(other, b, 2.0)
    assert relative(advanced(gcfg(other, u, two, one)[0]), advanced(gcfg(other, u, one, two)[0])) < TOLERANCE


def test_a_fine_tune_rectified_by_itself_is_unchanged(sd1, prompts):
    """METHODS.md 5.9, 10: the unconditional of a fine-tune that equals its base."""
    twin = tiny_models.build_unet("sd1", seed=0)
    out = advanced(gcfg(twin, prompts[0], branch(sd1.model, prompts[1], 5.0))[0])
    assert relative(out, advanced(stock(sd1.model, prompts[1], prompts[0], 5.0))) < TOLERANCE


def test_a_negative_prompt_of_any_strength(sd1, prompts):
    u, positive, negative, _ = prompts
    guider = gcfg(sd1.model, u, branch(sd1.model, positive, 5.0), branch(sd1.model, negative, -4.0))[0]
    with counting(sd1.model) as forwards:
        out = advanced(guider)
    assert forwards == [2] * STEPS  # the weights sum to 1: nothing is asked of the unconditional
    assert relative(out, advanced(stock(sd1.model, positive, negative, 5.0))) < TOLERANCE


@pytest.mark.parametrize(("s1", "s2"), [(4.0, 3.0), (2.0, 7.5), (3.0, 1.0)])
def test_dual_cfg_is_gcfg_in_disguise(sd1, prompts, s1, s2):
    """METHODS.md 5.9, 11: core's guider, negative + s2 (middle - negative) + s1 (positive - middle)."""
    negative, positive, middle, _ = prompts
    core = custom.DualCFGGuider.execute(sd1.model, positive, middle, negative, s1, s2, "regular")[0]
    ours = gcfg(sd1.model, negative, branch(sd1.model, positive, s1), branch(sd1.model, middle, s2 - s1))[0]
    assert relative(advanced(ours), advanced(core)) < TOLERANCE


def test_two_models_are_those_of_core(sd1, other, prompts):
    """Core's guider of two models is right where they are two checkpoints."""
    core = custom.DualModelGuider.execute(sd1.model, prompts[1], 4.0, other, prompts[0])[0]
    ours = gcfg(other, prompts[0], branch(sd1.model, prompts[1], 4.0))[0]
    assert relative(advanced(ours), advanced(core)) < TOLERANCE


def test_branches_without_weight_or_out_of_range_cost_nothing(sd1, other, prompts):
    u, a, b, c = prompts
    guider = gcfg(
        sd1.model, u, branch(sd1.model, a, 5.0), branch(other, b, 0.0), branch(other, c, 2.0, end=0.5),
        branch(sd1.model, c, 2.0, start=0.5),
    )[0]  # fmt: skip
    with counting(sd1.model) as own, counting(other) as others:
        advanced(guider)  # at timesteps 999, 499.5 and 0: the second is exactly in the middle
    assert own == [2, 3, 3]
    assert others == [1]


def test_the_unconditional_runs_only_where_its_coefficient_is_not_zero(sd1, prompts):
    u, a, b, _ = prompts
    guider = gcfg(sd1.model, u, branch(sd1.model, a, 1.0), branch(sd1.model, b, 2.0, start=0.5))[0]
    with counting(sd1.model) as forwards:
        advanced(guider, steps=4)
    assert forwards == [1, 1, 3, 3]
    with counting(sd1.model) as forwards:
        advanced(gcfg(sd1.model, u, branch(sd1.model, a, 3.0, start=0.5))[0], steps=4)
    assert forwards == [1, 1, 2, 2]


def test_nothing_active_is_the_unconditional(sd1, prompts):
    out = advanced(gcfg(sd1.model, prompts[0], branch(sd1.model, prompts[1], 3.0, 0.5, 0.5))[0])
    assert relative(out, advanced(stock(sd1.model, prompts[0], prompts[0], 1.0))) < TOLERANCE


def test_a_curve_bends_the_weight(sd1, prompts):
    u, a, _, _ = prompts
    curve = CurveInput.from_raw({"points": [(0, 1), (0.4, 1), (0.6, 0), (1, 0)], "interpolation": "linear"})
    guider = gcfg(sd1.model, u, branch(sd1.model, a, 5.0, curve=curve))[0]
    with counting(sd1.model) as forwards:
        out = advanced(guider, steps=4)
    assert forwards == [2, 2, 1, 1]  # at a progress of 0, 1/3, 2/3 and 1
    half = CurveInput.from_raw([(0, 0.5), (1, 0.5)])
    assert relative(
        advanced(gcfg(sd1.model, u, branch(sd1.model, a, 5.0, curve=half))[0]),
        advanced(stock(sd1.model, a, u, 2.5)),
    ) < TOLERANCE  # fmt: skip
    assert relative(out, advanced(stock(sd1.model, a, u, 5.0), steps=4)) > 1e-3


@pytest.mark.parametrize("percent", [0.0, 0.1, 0.3, 0.5, 0.9, 0.999])
def test_progress_is_percent(sd1, percent):
    sampling = sd1.model.model.model_sampling
    sigma = min(sampling.percent_to_sigma(percent), float(sampling.sigma_max))
    assert progress_at(sampling, sigma) == pytest.approx(percent, abs=2e-6)


def test_a_controlnet_reaches_its_branch_alone(sd1, prompts):
    u, a, b, _ = prompts
    hint = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(4))
    net = tiny_models.build_controlnet(sd1.model)
    controlled = comfy_nodes.ControlNetApply().apply_controlnet(a, net, hint, 0.2)[0]
    guider, cost = gcfg(sd1.model, u, branch(sd1.model, controlled, 3.0), branch(sd1.model, b, 2.0)).args
    with counting(sd1.model) as forwards:
        out = advanced(guider)
    assert sorted(forwards) == [1] * STEPS + [2] * STEPS
    assert "2 forwards" in cost
    assert "branch0, apart: a ControlNet of its own" in cost
    # By hand: only in the first branch is there something to add to the U-Net's features.
    plain = advanced(gcfg(sd1.model, u, branch(sd1.model, a, 3.0), branch(sd1.model, b, 2.0))[0])
    assert relative(out, plain) > 1e-2
    lonely = advanced(gcfg(sd1.model, u, branch(sd1.model, controlled, 1.0))[0])
    assert relative(lonely, advanced(stock(sd1.model, controlled, u, 1.0))) < TOLERANCE


@pytest.fixture(scope="module")
def two_concepts(sd1):
    """CONDITIONING of two prompts, each with a concept of its own per layer."""
    concept = make_concept(sd1, "it", Layout("layer"), seed=1)
    other = replace(concept, name="that", vectors={t: -v for t, v in concept.vectors.items()})
    with torch.inference_mode():
        return [encode(sd1.clip, f"a <{c.name}>", c) for c in (concept, other)]


def test_two_apply_concepts_on_one_base_share_a_forward(sd1, prompts, two_concepts):
    u, (one, two) = prompts[0], two_concepts
    base, first, second = (route(sd1.model) for _ in range(3))
    guider, cost = gcfg(base, u, branch(first, one, 3.0), branch(second, two, 2.0)).args
    with counting(base) as forwards:
        out = advanced(guider)
    assert forwards == [3] * STEPS
    assert cost.splitlines() == ["1 forward of the U-Net a step", "- unconditional, branch0, branch1 together"]
    assert torch.equal(out, advanced(gcfg(base, u, branch(base, one, 3.0), branch(base, two, 2.0))[0]))


def test_concepts_reach_their_branch_alone(sd1, prompts, two_concepts):
    u, (one, two) = prompts[0], two_concepts
    model = route(sd1.model)
    guider = gcfg(model, u, branch(model, one, 3.0), branch(model, two, 2.0))[0]
    with counting(model) as forwards:
        both = advanced(guider, steps=1)
    assert forwards == [3]
    clean = {
        name: advanced(stock(model, conditioning, u, 1.0), steps=1)
        for name, conditioning in (("u", u), ("one", one), ("two", two))
    }
    assert relative(both, clean["u"] + 3 * (clean["one"] - clean["u"]) + 2 * (clean["two"] - clean["u"])) < TOLERANCE
    assert relative(clean["one"], clean["two"]) > 1e-3


def test_a_branch_with_an_area_acts_only_there(sd1, prompts):
    u, a, b, _ = prompts
    left = comfy_nodes.ConditioningSetArea().append(a, 32, 64, 0, 0, 1.0)[0]
    guider, cost = gcfg(sd1.model, u, branch(sd1.model, left, 3.0), branch(sd1.model, b, 2.0)).args
    with counting(sd1.model) as forwards:
        out = advanced(guider, steps=1)
    assert sorted(forwards) == [1, 2]  # the half picture apart; core would evaluate all three on it too
    assert "an area of its own" in cost
    only = advanced(gcfg(sd1.model, u, branch(sd1.model, b, 2.0))[0], steps=1)
    assert torch.allclose(out[..., 4:], only[..., 4:], rtol=0, atol=1e-4 * float(only.abs().max()))
    assert relative(out[..., :4], only[..., :4]) > 1e-2


def test_a_branch_with_a_mask_acts_only_there(sd1, prompts):
    u, a, _, _ = prompts
    mask = torch.zeros(1, 64, 64)
    mask[:, :32] = 1
    top = comfy_nodes.ConditioningSetMask().append(a, mask, "default", 1.0)[0]
    guider = gcfg(sd1.model, u, branch(sd1.model, top, 1.0))[0]  # sums to 1, but elsewhere there is only u
    with counting(sd1.model) as forwards:
        out = advanced(guider, steps=1)
    assert forwards == [2]
    clean = advanced(stock(sd1.model, u, u, 1.0), steps=1), advanced(stock(sd1.model, a, u, 1.0), steps=1)
    assert relative(out[:, :, 4:], clean[0][:, :, 4:]) < TOLERANCE
    assert relative(out[:, :, :3], clean[1][:, :, :3]) < TOLERANCE


def test_a_timestep_range_of_the_conditioning_counts(sd1, prompts):
    u, a, b, _ = prompts
    late = comfy_nodes.ConditioningSetTimestepRange().set_range(a, 0.4, 1.0)[0]
    guider, cost = gcfg(sd1.model, u, branch(sd1.model, late, 3.0), branch(sd1.model, b, 2.0)).args
    with counting(sd1.model) as forwards:
        advanced(guider, steps=4)
    assert forwards == [2, 2, 3, 3]
    assert cost.startswith("0% to 40%: 1 forward of the U-Net a step")
    early = comfy_nodes.ConditioningSetTimestepRange().set_range(u, 0.0, 0.4)[0]
    with pytest.raises(ValueError, match="says nothing at a step that needs it"):
        advanced(gcfg(sd1.model, early, branch(sd1.model, a, 3.0))[0])


def test_patches_are_told_positive_and_negative(sd1, prompts):
    told = []

    def look(n, context, value, extra):
        told.append(tuple(extra["cond_or_uncond"]))
        return n, context, value

    model = sd1.model.clone()
    model.set_model_attn2_patch(look)
    u, a, b, c = prompts
    advanced(gcfg(model, u, branch(model, a, 3.0), branch(model, b, 2.0), branch(model, c, 1.5))[0], steps=1)
    assert {tuple(sorted(roles)) for roles in told} == {(0, 0, 0, 1)}


def test_rescale_is_the_stock_nodes(sd1, velocity, prompts):
    for model in (sd1.model, velocity):
        rescaled = RescaleCFG().patch(model, 0.7)[0]
        ours = gcfg(model, prompts[0], branch(model, prompts[1], 6.0), rescale=0.7)[0]
        expected = advanced(stock(rescaled, prompts[1], prompts[0], 6.0))
        assert relative(advanced(ours), expected) < TOLERANCE
        assert relative(advanced(gcfg(model, prompts[0], branch(model, prompts[1], 6.0))[0]), expected) > 1e-2


def test_apg_changes_the_picture_and_forgets_between_runs(sd1, prompts):
    def make(**options):
        return gcfg(sd1.model, prompts[0], branch(sd1.model, prompts[1], 6.0), **options)[0]

    plain, guider = advanced(make()), make(apg_momentum=-0.5, apg_eta=0.0, apg_norm_threshold=5.0)
    first = advanced(guider)
    assert torch.equal(advanced(guider), first)
    for options in ({"apg_momentum": -0.5}, {"apg_eta": 0.0}, {"apg_norm_threshold": 5.0}):
        assert relative(advanced(make(**options)), plain) > 1e-3


def test_apg_leaves_a_negative_prompt_of_any_strength_alone(sd1, prompts):
    """8.3 and -7.3 sum to a little more than 1: nothing is guided beyond their mean."""
    u, a, b, _ = prompts
    both = branch(sd1.model, a, 8.3), branch(sd1.model, b, -7.3)
    out = advanced(gcfg(sd1.model, u, *both, apg_eta=0.0)[0])
    assert torch.equal(out, advanced(gcfg(sd1.model, u, *both)[0]))


def test_inpainting_keeps_what_is_outside_the_mask(sd1, other, prompts):
    latent = {"samples": torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))}
    latent["noise_mask"] = torch.zeros(1, 1, 64, 64)
    latent["noise_mask"][..., :32] = 1
    guider = gcfg(sd1.model, prompts[0], branch(sd1.model, prompts[1], 3.0), branch(other, prompts[2], 2.0))[0]
    out = advanced(guider, latent=latent)
    assert relative(out[..., 5:], latent["samples"][..., 5:]) < 1e-4
    assert relative(out[..., :4], latent["samples"][..., :4]) > 1e-2


class TestKSampler:
    """The MODEL patch: KSampler's negative is the unconditional, its positive a branch with weight cfg."""

    @staticmethod
    def patch(model, *branches, **options):
        named = {f"branch{i}": b for i, b in enumerate(branches)}
        return AtelierGCFG.execute(model, named, **OFF | options)

    @pytest.mark.parametrize("cfg", [6.0, 1.0])
    def test_equals_the_guider(self, sd1, other, prompts, cfg):
        u, a, b, c = prompts
        added = branch(sd1.model, b, 2.0), branch(other, c, -1.0, end=0.5)
        patched, cost = self.patch(sd1.model, *added, rescale=0.3).args
        guider = gcfg(sd1.model, u, branch(sd1.model, a, cfg), *added, rescale=0.3)[0]
        with counting(sd1.model) as own, counting(other) as others:
            out = ksampler(patched, a, u, cfg=cfg, steps=4)
        assert (own, others) == ([3] * 4, [1, 1])
        assert torch.equal(out, advanced(guider, steps=4))
        assert cost.splitlines()[0] == "0% to 50%: 2 forwards of the U-Net a step"

    def test_every_picture_of_a_batch_keeps_its_mask(self, sd1, prompts):
        u, a, b, _ = prompts
        mask = torch.zeros(2, 1, 64, 64)
        mask[0, ..., :32] = mask[1, ..., 32:] = 1
        samples = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
        latent = {"samples": samples, "noise_mask": mask}
        added = branch(sd1.model, b, 2.0)
        out = ksampler(self.patch(sd1.model, added)[0], a, u, latent, cfg=3.0)
        assert relative(out[0, ..., 5:], samples[0, ..., 5:]) < 1e-4
        assert relative(out[1, ..., :3], samples[1, ..., :3]) < 1e-4
        guider = gcfg(sd1.model, u, branch(sd1.model, a, 3.0), added)[0]
        assert relative(out, advanced(guider, latent=latent)) < TOLERANCE

    def test_hooks_on_the_positive(self, sd1, prompts):
        u, a, b, _ = prompts
        hook = comfy.hooks.create_hook_lora(lora_file(sd1.model, 6), 1.0, 0.0)
        hooked, added = comfy.hooks.set_hooks_for_conditioning(a, hook), branch(sd1.model, b, 2.0)
        patched, before = self.patch(sd1.model, added)[0], ksampler(sd1.model, a, u)
        expected = advanced(gcfg(sd1.model, u, branch(sd1.model, hooked, 3.0), added)[0])
        for _ in range(2):
            assert relative(ksampler(patched, hooked, u, cfg=3.0), expected) < TOLERANCE
        assert relative(ksampler(patched, a, u, cfg=3.0), expected) > 1e-2
        assert relative(ksampler(sd1.model, hooked, u), before) > 1e-2  # hooks still do their work elsewhere
        assert torch.equal(ksampler(sd1.model, a, u), before)

    def test_leaves_the_model_as_it_was(self, sd1, prompts):
        before = ksampler(sd1.model, prompts[1], prompts[0], cfg=4.0)
        ksampler(self.patch(sd1.model, branch(sd1.model, prompts[2], 2.0))[0], prompts[1], prompts[0], cfg=4.0)
        assert torch.equal(ksampler(sd1.model, prompts[1], prompts[0], cfg=4.0), before)

    def test_wrappers_of_other_nodes_run_once(self, sd1, prompts):
        calls = []

        def wrapper(executor, *args, **kwargs):
            calls.append("outer")
            return executor(*args, **kwargs)

        first = sd1.model.clone()
        first.add_wrapper_with_key("outer_sample", "other pack", wrapper)
        last = self.patch(first, branch(first, prompts[2], 2.0))[0]
        last.add_wrapper_with_key("outer_sample", "third pack", wrapper)
        ksampler(last, prompts[1], prompts[0], cfg=4.0)
        assert calls == ["outer"] * 2

    def test_works_only_where_it_means_something(self, sd1, prompts):
        patched = self.patch(sd1.model, branch(sd1.model, prompts[1], 2.0))[0]
        with pytest.raises(ValueError, match=r"works with KSampler.*not with Guider_Basic: use 'GCFG Guider'"):
            advanced(custom.BasicGuider.execute(patched, prompts[1])[0])
        with pytest.raises(ValueError, match="brings its own branches"):
            self.patch(patched, branch(sd1.model, prompts[1], 2.0))
        with pytest.raises(ValueError, match="The MODEL of branch0 comes from 'GCFG"):
            gcfg(sd1.model, prompts[0], branch(patched, prompts[1], 2.0))
        with pytest.raises(ValueError, match="No guidance branch is connected"):
            self.patch(sd1.model)
        with pytest.raises(ValueError, match="All guidance weights are 0"):
            self.patch(sd1.model, branch(sd1.model, prompts[1], 0.0))


class TestRefusals:
    def test_nothing_to_guide_with(self, sd1, prompts):
        with pytest.raises(ValueError, match="No guidance branch is connected"):
            gcfg(sd1.model, prompts[0])
        with pytest.raises(ValueError, match="All guidance weights are 0"):
            gcfg(sd1.model, prompts[0], branch(sd1.model, prompts[1], 0.0))

    @pytest.mark.parametrize("weight", [float("nan"), float("inf")])
    def test_impossible_weights(self, sd1, prompts, weight):
        with pytest.raises(ValueError, match="give it a finite number"):
            branch(sd1.model, prompts[1], weight)

    def test_start_after_end(self, sd1, prompts):
        with pytest.raises(ValueError, match="exchange start and end"):
            branch(sd1.model, prompts[1], 1.0, 0.6, 0.4)

    def test_other_latents(self, sd1, tiny, prompts):
        with pytest.raises(ValueError, match=r"branch0 \(SDXL\) works in latents of SDXL, .* in SD15: combine models"):
            gcfg(sd1.model, prompts[0], branch(tiny("sdxl").model, prompts[1], 1.0))

    def test_flow_models(self, sd1, prompts):
        flow = tiny_models.build_unet("sd1", seed=9)
        flow.model.model_sampling = comfy.model_base.model_sampling(
            flow.model.model_config, comfy.model_base.ModelType.FLOW
        )
        with pytest.raises(ValueError, match=r"branch0 .* predicts neither noise nor velocities .*flow model"):
            gcfg(sd1.model, prompts[0], branch(flow, prompts[1], 1.0))
        with pytest.raises(ValueError, match=r"The MODEL of unconditional .* flow model"):
            gcfg(flow, prompts[0], branch(sd1.model, prompts[1], 2.0))

    def test_nodes_that_combine_prompts_themselves(self, sd1, prompts):
        rescaled = RescaleCFG().patch(sd1.model, 0.7)[0]
        with pytest.raises(ValueError, match="combines prompts in its own way"):
            gcfg(rescaled, prompts[0], branch(sd1.model, prompts[1], 2.0))
        changed = sd1.model.clone()
        changed.set_model_sampler_post_cfg_function(lambda args: args["denoised"])
        with pytest.raises(ValueError, match="put one such node before both, or none"):
            gcfg(sd1.model, prompts[0], branch(changed, prompts[1], 2.0))


def test_functions_after_cfg_get_what_stock_gives_them(sd1, prompts):
    seen = []

    def look(args):
        seen.append({key: args[key] for key in ("denoised", "cond_denoised", "uncond_denoised", "cond_scale", "input")})
        return args["denoised"] * 0.9

    model = sd1.model.clone()
    model.set_model_sampler_post_cfg_function(look)
    ours = advanced(gcfg(model, prompts[0], branch(model, prompts[1], 4.0))[0])
    theirs = advanced(stock(model, prompts[1], prompts[0], 4.0))
    assert relative(ours, theirs) < TOLERANCE
    for one, other in zip(seen[:STEPS], seen[STEPS:], strict=True):
        assert one["cond_scale"] == other["cond_scale"]
        assert all(relative(one[key], other[key]) < TOLERANCE for key in one if key != "cond_scale")


class TestAfterCFG:
    """Nodes that act after CFG are told of one condition, and may ask what it predicts in other circumstances."""

    @pytest.mark.parametrize("weights", [(3.0, 2.0), (3.0, -1.0), (4.0, -3.0), (2.0, -2.0)])
    def test_the_condition_predicts_what_they_are_told(self, sd1, prompts, weights):
        model, apart = asking_again(sd1.model)
        advanced(gcfg(model, prompts[0], *map(partial(branch, model), prompts[1:3], weights))[0])
        assert len(apart) == STEPS and max(apart) < TOLERANCE

    def test_prompts_of_several_parts_count_once(self, sd1, prompts):
        u, a, b, c = prompts
        model, apart = asking_again(sd1.model)
        strong = comfy_nodes.ConditioningSetAreaStrength().append(b, 3.0)[0]
        advanced(gcfg(model, u, branch(model, [*a, *strong], 3.0), branch(model, c, 2.0))[0])
        assert len(apart) == STEPS and max(apart) < TOLERANCE

    def test_branches_that_cannot_be_asked_are_left_out(self, sd1, prompts):
        """One with an area, one with patches of its own: nothing is left but the unconditional."""
        u, a, b, c = prompts
        model, apart = asking_again(sd1.model)
        left = comfy_nodes.ConditioningSetArea().append(a, 32, 64, 0, 0, 1.0)[0]
        patched = branch(with_doubled_contexts(model), b, 2.0)
        for others in ([patched], [branch(model, left, 3.0)], [branch(model, c, 3.0), branch(model, left, 3.0)]):
            advanced(gcfg(model, u, *others, patched)[0])
        assert len(apart) == 3 * STEPS and max(apart) < TOLERANCE
        advanced(gcfg(model, u, branch(with_doubled_contexts(model), b, 1.0))[0])
        assert len(apart) == 4 * STEPS and max(apart) < TOLERANCE

    @staticmethod
    def with_pag(base, prompts, weights, scale=3.0):
        """A picture large enough for several tokens in the middle of the U-Net, where PAG acts."""
        model = PerturbedAttentionGuidance.execute(base.model, scale)[0]
        branches = map(partial(branch, model), prompts[1:], weights)
        return advanced(gcfg(model, prompts[0], *branches)[0], latent=empty_latent(16))

    def test_order_does_not_matter_to_pag(self, sd1, prompts):
        u, a, b, _ = prompts
        out = self.with_pag(sd1, [u, a, b], (4.0, -2.0))
        assert relative(out, self.with_pag(sd1, [u, b, a], (-2.0, 4.0))) < TOLERANCE
        assert relative(out, self.with_pag(sd1, [u, a, b], (4.0, -2.0), scale=0.0)) > 1e-2

    def test_weights_that_almost_cancel_leave_the_picture_finite(self, sd1, prompts):
        """0.3 - 0.1 - 0.2 is not 0 in floating point."""
        exact = self.with_pag(sd1, prompts, (0.375, -0.125, -0.25))
        assert relative(self.with_pag(sd1, prompts, (0.3, -0.1, -0.2)), exact) < 0.1


def test_the_speed_benchmark_measures_all_sides(capsys):
    task = speed_gcfg.Task("toy", 8, 2)
    took = speed_gcfg.measure(task)
    assert list(took) == [speed_gcfg.OURS, speed_gcfg.BATCH, speed_gcfg.SEPARATE, speed_gcfg.PASSES]
    assert min(min(side) for side in took.values()) > 0
    ratio = speed_gcfg.print_table(task, took)
    assert ratio == took[speed_gcfg.OURS].cpu_seconds / took[speed_gcfg.BATCH].cpu_seconds
    assert len(capsys.readouterr().out.splitlines()) == 3 + len(took)


def test_the_cost_where_nothing_is_at_work(sd1, prompts):
    early = comfy_nodes.ConditioningSetTimestepRange().set_range(prompts[0], 0.0, 0.4)[0]
    cost = gcfg(sd1.model, early, branch(sd1.model, prompts[1], 3.0, end=0.3))[1]
    expected = "40% to 100%: 0 forwards of the U-Net: nothing is at work here, not even the unconditional"
    assert cost.splitlines()[-1] == expected


def test_the_cost_is_told(sd1, other, prompts):
    u, a, b, c = prompts
    one = gcfg(sd1.model, u, branch(sd1.model, a, 2.0), branch(sd1.model, b, 2.0))[1]
    assert one.splitlines() == ["1 forward of the U-Net a step", "- unconditional, branch0, branch1 together"]
    many = gcfg(
        sd1.model, u, branch(sd1.model, a, 1.0, end=0.3), branch(other, b, 2.0, start=0.3), branch(other, c, 0)
    )[1]
    assert many.splitlines() == [
        "0% to 30%: 1 forward of the U-Net a step",
        "- branch0",
        "- unconditional left out: the weights sum to 1, which leaves nothing for it",
        "30% to 100%: 2 forwards of the U-Net a step",
        "- unconditional",
        "- branch1, apart: another base model",
        "- branch2 left out: its weight is 0",
    ]
