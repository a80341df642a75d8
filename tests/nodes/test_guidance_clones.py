"""GCFG over clones of one base model: each branch predicts with its own LoRAs.

The reference evaluates every prediction in a pass of its own, with the weights of its MODEL merged in for it.
"""

import comfy.hooks
import comfy.model_management
import guiding
import pytest
import torch
from comfy_extras import nodes_custom_sampler as custom
from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete
from comparing import relative
from concept_atelier.nodes.guidance import AtelierGCFG
from guiding import OFF, advanced, branch, counting, gcfg
from patched_models import (
    KEYS_AND_VALUES,
    LORA_LAYERS,
    asking_again,
    in_halves,
    lora_file,
    with_doubled_contexts,
    with_lora,
)
from prompting import STEPS, ksampler, stock_encode

pytestmark = pytest.mark.usefixtures("inference_mode")


@pytest.fixture(scope="module")
def prompts(sd1):
    """An empty prompt and two others."""
    with torch.inference_mode():
        return [stock_encode(sd1.clip, text) for text in ("", "a man", "grass")]


@pytest.fixture(scope="module")
def clones(sd1):
    """The base, and two clones with a LoRA each."""
    return sd1.model, with_lora(sd1.model, 5), with_lora(sd1.model, 6)


def by_hand(unconditional, branches, tiles=1):
    """Each prediction after loading its MODEL, of one tile after the other."""

    def clean(model, conditioning, x, sigma):
        comfy.model_management.load_models_gpu([model])
        options = model.model_options["transformer_options"]
        given = {"c_crossattn": conditioning[0][0], "transformer_options": {**options}}
        return torch.cat([model.model.apply_model(tile, sigma, **given) for tile in x.chunk(tiles, dim=-1)], dim=-1)

    return guiding.by_hand(clean, unconditional, branches)


def test_two_loras_are_those_merged_for_each_branch(clones, prompts):
    base, one, two = clones
    u, a, b = prompts
    guider, cost = gcfg(base, u, branch(one, a, 3.0), branch(two, b, 2.0)).args
    with counting(base) as forwards:
        out = advanced(guider)
    assert sorted(forwards) == [1] * 3 * STEPS
    assert relative(out, by_hand((base, u), [(one, a, 3.0), (two, b, 2.0)])) < 1e-5
    assert cost.splitlines()[0] == "3 forwards of the U-Net a step"
    assert "- branch1, apart: other weights (LoRA), exchanged at each step" in cost


def test_the_stock_guider_of_two_models_is_wrong_there(clones, prompts):
    """Core gives both passes the weights of the clone it loaded last; GCFG gives each its own."""
    base, one, _ = clones
    u, a, _ = prompts
    truth = by_hand((base, u), [(one, a, 5.0)])
    core = advanced(custom.DualModelGuider.execute(one, a, 5.0, base, u)[0])
    lora_on_both = advanced(custom.CFGGuider.execute(one, a, u, 5.0)[0])
    assert relative(core, truth) > 0.05
    assert relative(core, lora_on_both) < 1e-4
    assert relative(advanced(gcfg(base, u, branch(one, a, 5.0))[0]), truth) < 1e-5


def test_equal_clones_share_a_forward(clones, prompts):
    base, one, _ = clones
    u, a, b = prompts
    again = one.clone()
    with counting(base) as forwards:
        out = advanced(gcfg(base, u, branch(one, a, 3.0), branch(again, b, 2.0))[0])
    assert sorted(forwards) == [1] * STEPS + [2] * STEPS
    assert relative(out, by_hand((base, u), [(one, a, 3.0), (one, b, 2.0)])) < 1e-5
    with counting(base) as forwards:
        advanced(gcfg(one, u, branch(one, a, 3.0), branch(again, b, 2.0))[0])
    assert forwards == [3] * STEPS


def test_the_same_lora_at_other_strengths(clones, prompts, sd1):
    u, a, b = prompts
    weak, strong = with_lora(sd1.model, 5, 0.3), with_lora(with_lora(sd1.model, 5, 1.5), 6)
    out = advanced(gcfg(weak, u, branch(strong, a, 3.0), branch(sd1.model, b, 2.0))[0])
    assert relative(out, by_hand((weak, u), [(strong, a, 3.0), (sd1.model, b, 2.0)])) < 1e-5


def test_loras_of_keys_and_values_share_a_forward(sd1, prompts):
    """Custom Diffusion's kind: what it adds to K and V is added to the branch's rows of the batch."""
    u, a, b = prompts
    one, two = (with_lora(sd1.model, seed, layers=KEYS_AND_VALUES) for seed in (5, 6))
    guider, cost = gcfg(sd1.model, u, branch(one, a, 3.0), branch(two, b, 2.0)).args
    with counting(sd1.model) as forwards:
        out = advanced(guider)
    assert forwards == [3] * STEPS
    assert cost.splitlines()[0] == "1 forward of the U-Net a step"
    assert relative(out, by_hand((sd1.model, u), [(one, a, 3.0), (two, b, 2.0)])) < 1e-5
    assert relative(out, by_hand((sd1.model, u), [(sd1.model, a, 3.0), (two, b, 2.0)])) > 1e-2
    assert not any(module._forward_hooks for module in sd1.model.model.diffusion_model.modules())


@pytest.mark.parametrize("together", [False, True])
def test_loras_of_keys_and_values_on_tiles(sd1, prompts, together):
    u, a, b = prompts
    tiled = in_halves(sd1.model, together)
    one, two = (with_lora(tiled, seed, layers=KEYS_AND_VALUES) for seed in (5, 6))
    out = advanced(gcfg(tiled, u, branch(one, a, 3.0), branch(two, b, 2.0))[0])
    assert relative(out, by_hand((tiled, u), [(one, a, 3.0), (two, b, 2.0)], tiles=2)) < 1e-5


def test_keys_and_values_of_the_unconditional_model(sd1, prompts):
    u, a, b = prompts
    one = with_lora(sd1.model, 5, layers=KEYS_AND_VALUES)
    out = advanced(gcfg(one, u, branch(sd1.model, a, 3.0), branch(one, b, 2.0))[0])
    assert relative(out, by_hand((one, u), [(sd1.model, a, 3.0), (one, b, 2.0)])) < 1e-5


def test_tiles_are_told_what_is_negative(sd1, prompts):
    """A node that calls the model twice in a step hands in the same options both times."""
    told = []

    def look(n, context, value, extra):
        told.append(sorted(extra["cond_or_uncond"]))
        return n, context, value

    model = in_halves(sd1.model, together=False)
    model.set_model_attn2_patch(look)
    u, a, b = prompts
    advanced(gcfg(model, u, branch(model, a, 3.0), branch(model, b, 2.0))[0], steps=1)
    assert told and all(roles == [0, 0, 1] for roles in told)


@pytest.mark.parametrize("layers", [LORA_LAYERS, KEYS_AND_VALUES])
def test_nodes_that_predict_again_after_cfg_get_the_lora(sd1, prompts, layers):
    u, a, b = prompts
    model, apart = asking_again(sd1.model)
    lora = with_lora(model, 5, layers=layers)
    advanced(gcfg(model, u, branch(lora, a, 3.0), branch(model, b, 2.0))[0])
    assert len(apart) == STEPS and max(apart) < 1e-5


def test_the_base_is_as_before(clones, prompts):
    base, one, two = clones
    comfy.model_management.load_models_gpu([base])
    weights = {name: weight.clone() for name, weight in base.model.state_dict().items()}
    advanced(gcfg(base, prompts[0], branch(one, prompts[1], 3.0), branch(two, prompts[2], 2.0))[0])
    comfy.model_management.load_models_gpu([base])
    assert all(torch.equal(weight, weights[name]) for name, weight in base.model.state_dict().items())
    assert not base.hook_patches
    assert not one.hook_patches


def test_hooks_on_a_conditioning_come_on_top(sd1, clones, prompts):
    base, one, _ = clones
    u, a, _ = prompts
    hook = comfy.hooks.create_hook_lora(lora_file(sd1.model, 6), 1.0, 0.0)
    hooked = comfy.hooks.set_hooks_for_conditioning(a, hook)
    both = with_lora(one, 6)
    out = advanced(gcfg(base, u, branch(one, hooked, 3.0))[0])
    assert relative(out, by_hand((base, u), [(both, a, 3.0)])) < 1e-5


def test_clones_with_other_patches_run_with_their_own(clones, prompts):
    base, one, _ = clones
    u, a, b = prompts
    patched, both = with_doubled_contexts(base), with_doubled_contexts(one)
    guider, cost = gcfg(base, u, branch(patched, a, 3.0)).args
    with counting(base) as forwards:
        out = advanced(guider)
    assert forwards == [1, 1] * STEPS
    assert relative(out, by_hand((base, u), [(patched, a, 3.0)])) < 1e-5
    assert "- branch0, apart: other patches on the MODEL" in cost
    out = advanced(gcfg(base, u, branch(both, a, 3.0), branch(one, b, 2.0))[0])
    assert relative(out, by_hand((base, u), [(both, a, 3.0), (one, b, 2.0)])) < 1e-5
    assert relative(out, by_hand((base, u), [(one, a, 3.0), (one, b, 2.0)])) > 1e-2


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_ksampler_with_loras_before_and_after(clones, prompts, order):
    """The LoRA of KSampler's MODEL is its own, whichever side of GCFG it is loaded on."""
    base, one, two = clones
    u, a, b = prompts
    added = {"branch0": branch(two, b, 2.0)}
    if order == (0, 1):
        patched = AtelierGCFG.execute(one, added, **OFF)[0]
    else:
        patched = with_lora(AtelierGCFG.execute(base, added, **OFF)[0], 5)
    out = ksampler(patched, a, u, cfg=3.0)
    assert relative(out, by_hand((one, u), [(one, a, 3.0), (two, b, 2.0)])) < 1e-5


def test_other_model_sampling_on_a_clone_is_refused(clones, prompts):
    base, _, _ = clones
    changed = ModelSamplingDiscrete().patch(base, "v_prediction", False)[0]
    with pytest.raises(ValueError, match=r"branch0 and unconditional use the same base model, but .*model sampling"):
        gcfg(base, prompts[0], branch(changed, prompts[1], 2.0))
    same = advanced(gcfg(changed, prompts[0], branch(changed, prompts[1], 2.0))[0])
    stock = advanced(custom.CFGGuider.execute(changed, prompts[1], prompts[0], 2.0)[0])
    assert relative(same, stock) < 1e-5
