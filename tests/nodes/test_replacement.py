"""Replace Subject with ComfyUI's own calls: what is fixed, what stays in effect, what it costs and what it refuses."""

import gc
import types

import comfy.conds
import comfy.model_management
import comfy.samplers
import comfy.utils
import pytest
import torch
from concept_atelier.benchmarks.methods.pictures import to_image
from concept_atelier.benchmarks.replacement import outside, swaps
from concept_atelier.kernels.backbone import TextContext
from concept_atelier.kernels.conditioning import StagedContext
from concept_atelier.kernels.inversion import psnr
from concept_atelier.kernels.layouts import Layout
from concept_atelier.kernels.replacement import match_columns
from concept_atelier.nodes.apply import AtelierApplyConcepts
from concept_atelier.nodes.inversion import AtelierDDIMInversion, AtelierNullTextOptimize
from concept_atelier.nodes.native import replacement
from concept_atelier.nodes.native.fixed_attention import seen_in, with_fixed_columns
from concept_atelier.nodes.native.model_kind import cross_attention_layers
from concept_atelier.nodes.native.payload import WORDS, concept_conditioning
from concept_atelier.nodes.replacement import AtelierReplaceSubject
from concept_atelier.nodes.toy import AtelierToyCheckpoint
from concept_atelier.toyworld.render import render
from concept_atelier.toyworld.vocabulary import caption
from patched_models import in_halves, with_ones_added
from prompting import encode, make_concept, stock_encode

import nodes as comfy_nodes

STEPS, CFG = 8, 3.0
LATENTS = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3))

pytestmark = pytest.mark.usefixtures("inference_mode", "cancellable")


@pytest.fixture(autouse=True)
def empty_store():
    yield
    replacement.STORE.clear()


def replace(model, trajectory, source, target, negative, cfg=CFG, subject="", maps="recompute", renormalise=False):
    out = AtelierReplaceSubject.execute(model, trajectory, source, target, negative, cfg, subject, maps, renormalise)
    return out.args[0]["samples"], out.args[1]


def invert(model, prompt, latent, steps=STEPS):
    return AtelierDDIMInversion.execute(model, prompt, latent, steps, "ddim_uniform", 8).args


@pytest.fixture(scope="module")
def toy():
    """MODEL, CLIP, noise, trajectory, source, target and null-text prompt of a picture of the toy world."""
    with torch.inference_mode():
        model, clip, vae = AtelierToyCheckpoint.execute().args
        old, new = swaps(6)[5]
        picture = to_image(render(old))[None]
        source, target = encode(clip, caption(old)), encode(clip, caption(new))
        latent = {"samples": vae.encode(picture)}
        noise, trajectory = invert(model, source, latent)[:2]
        empty = encode(clip, "")
        negative = AtelierNullTextOptimize.execute(model, trajectory, source, empty, CFG, 4, 0.03, 0.0).args[0]
        return types.SimpleNamespace(**locals())


@pytest.fixture(scope="module")
def small(tiny):
    """The same of a model of SD1.x's topology with random weights, inverted in two steps."""
    with torch.inference_mode():
        model, clip, _ = tiny("sd1")
        source, target, empty = (encode(clip, text) for text in ("a cat on grass", "a dog on grass", ""))
        latent = {"samples": torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))}
        trajectory = invert(model, source, latent, 2)[1]
        negative = AtelierNullTextOptimize.execute(model, trajectory, source, empty, CFG, 1, 0.01, 0.0).args[0]
        return types.SimpleNamespace(**locals())


def inputs(of):
    return of.model, of.trajectory, of.source, of.target, of.negative


def calls_of_unet(model):
    """A clone of MODEL, and a list that grows by the prompts (0: positive) of each call of its U-Net."""
    clone, calls = model.clone(), []

    def count(apply, given):
        calls.append(given["cond_or_uncond"])
        return apply(given["input"], given["timestep"], **given["c"])

    clone.set_model_unet_function_wrapper(count)
    return clone, calls


# Algorithm 3


def test_the_same_prompt_paints_the_picture_as_null_text_does(toy):
    """METHODS 4.11, 13."""
    same, report = replace(toy.model, toy.trajectory, toy.source, toy.source, toy.negative)
    routed = AtelierApplyConcepts.execute(toy.model)[0]
    guided = comfy_nodes.KSamplerAdvanced().sample(
        routed, "disable", 0, STEPS, CFG, "euler", "ddim_uniform", toy.source, toy.negative, toy.noise, 0, 10000,
        "disable",
    )[0]["samples"]  # fmt: skip
    original = toy.latent["samples"]
    peak = float(original.max() - original.min())
    assert psnr(same, guided, peak)[0] > 40
    assert psnr(same, original, peak)[0] > psnr(guided, original, peak)[0] - 0.5
    assert "No word differs: the picture is painted as it was; attention of 24 of 24" in report


def test_fixed_attention_keeps_what_is_around_the_subject(toy):
    fixed, report = replace(*inputs(toy))
    free = replace(*inputs(toy), subject=", ".join({word for word in toy.target[0][1][WORDS] if word}))[0]
    around = outside(toy.old, toy.new)
    errors = [(toy.vae.decode(latent) - toy.picture)[0][around].square().mean() for latent in (fixed, free)]
    assert errors[0] < 0.8 * errors[1]
    assert report.startswith(f"New subject: {toy.new.subject}; attention of 23 of 24 tokens fixed; maps recomputed")


def final_attention(model, conds, options):
    """What each cross-attention of one call hands on, before its output projection: {layer name: (B, h * w, C)}."""
    seen, hooks = {}, []
    for name, module in model.model.diffusion_model.named_modules():
        if name.endswith("attn2.to_out"):
            hooks.append(module.register_forward_pre_hook(lambda _, given, name=name: seen.update({name: given[0]})))
    model.pre_run()
    comfy.samplers.calc_cond_batch(model.model, conds, LATENTS, torch.tensor([2.0]), {"transformer_options": options})
    model.cleanup()
    for hook in hooks:
        hook.remove()
    return list(seen.values())


def cond(context):
    return [{"model_conds": {"c_crossattn": comfy.conds.CONDCrossAttn(context)}, "uuid": object()}]


@pytest.mark.parametrize("longer", [1, 2])
def test_the_fixed_columns_of_every_layer_are_the_source_prompts(small, longer):
    """Beside a negative prompt of twice the length, the positive one is repeated in the batch."""
    model, (source, target, empty) = small.model, (c[0][0] for c in (small.source, small.target, small.empty))
    comfy.model_management.load_models_gpu([model])
    columns = match_columns(small.source[0][1][WORDS], small.target[0][1][WORDS])
    maps, own, values = {}, {}, []
    final_attention(model, [cond(source)], seen_in({}, maps, torch.device("cpu"), LATENTS))
    final_attention(model, [cond(target)], seen_in({}, own, torch.device("cpu"), LATENTS))

    def note_values(function, q, k, v, heads, *args, **kwargs):
        if k.shape[1] != q.shape[1]:
            values.append(v.unflatten(-1, (heads, -1)).transpose(1, 2))
        return function(q, k, v, heads, *args, **kwargs)

    final_attention(model, [cond(target)], {"optimized_attention_override": note_values})
    conds = [cond(target), cond(empty.repeat(1, longer, 1))]
    stock = final_attention(model, conds, {})
    fixed = final_attention(model, conds, with_fixed_columns({}, maps, columns, False))
    # The first layer alone has the same queries in both runs, and its input does not depend on the attention.
    layer = next(iter(maps))
    a = own[layer].float().clone()
    a[..., columns.fixed] = maps[layer][..., columns.source].float()
    expected = (a @ values[0]).transpose(1, 2).flatten(2)
    positive = 1  # ComfyUI runs the prompts of a call in reverse
    torch.testing.assert_close(fixed[0].chunk(2)[positive], expected, rtol=0, atol=2e-3)
    assert torch.equal(fixed[0].chunk(2)[1 - positive], stock[0].chunk(2)[1 - positive])
    assert len(maps) == len(fixed) == 16
    assert all(not torch.equal(f, s) for f, s in zip(fixed, stock))


def test_renormalise_changes_the_picture_a_little(small):
    literal, divided = (replace(*inputs(small), renormalise=r)[0] for r in (False, True))
    assert 0 < (literal - divided).abs().max() < 0.5 * literal.abs().max()


def test_a_subject_named_by_hand_fixes_the_other_words_that_differ(small):
    target = encode(small.clip, "a dog on snow")
    given = (small.model, small.trajectory, small.source, target, small.negative)
    assert replace(*given)[1].startswith("New subject: dog, snow; attention of 75 of 77")
    assert replace(*given, subject="Dog,")[1].startswith("New subject: dog; attention of 76 of 77")


def test_every_topology(any_tiny):
    model, clip, _ = any_tiny
    source, target, empty = (encode(clip, text) for text in ("a cat", "a dog", ""))
    latent = {"samples": torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))}
    trajectory = invert(model, source, latent, 2)[1]
    new, same = (replace(model, trajectory, source, p, empty, 2.0)[0] for p in (target, source))
    assert new.shape == latent["samples"].shape
    assert new.isfinite().all() and not torch.equal(new, same)


# Concepts


@pytest.mark.parametrize("stages", [1, 2])
def test_rows_at_the_tail_are_the_subjects_columns(small, stages):
    """Beside the words that the placeholder reads as, where they differ."""
    layout = Layout(tokens=5, stages=stages, place="tail residual")
    concepts = (make_concept(small, "rex", layout, seed=1, init_word=word) for word in ("cat", "brown dog"))
    targets = [encode(small.clip, "a <rex> on grass", concept) for concept in concepts]
    given = (small.model, small.trajectory, small.source)
    (same, report), (other, other_report) = (replace(*given, target, small.negative) for target in targets)
    assert report.startswith("New subject: <rex>; attention of 72 of 77")
    assert other_report.startswith("New subject: brown, dog, <rex>; attention of 70 of 77")
    unchanged = replace(*given, small.source, small.negative)[0]
    assert (same - unchanged).abs().max() > 1e-3 and (other - same).abs().max() > 1e-3


def test_the_stages_of_a_concept_are_read_without_apply_concepts(small):
    layers, [[context, values]] = cross_attention_layers(small.model), small.target
    added = torch.randn(2, 1, context.shape[2], generator=torch.Generator().manual_seed(1))
    contexts = [context.clone() for _ in added]
    for own, row in zip(contexts, added):
        own[:, 2] += row
    staged = StagedContext((0, 500), tuple(TextContext.plain(own, layers) for own in contexts), {"dog": (2,)})
    target = concept_conditioning(staged, layers, values[WORDS])
    mean = [[target[0][0], {WORDS: values[WORDS]}]]
    given = (small.model, small.trajectory, small.source)
    by_stage = replace(*given, target, small.negative)[0]
    assert (by_stage - replace(*given, mean, small.negative)[0]).abs().max() > 1e-3
    routed = AtelierApplyConcepts.execute(small.model)[0]
    assert torch.equal(replace(routed, *given[1:], target, small.negative)[0], by_stage)


# What other nodes did to the MODEL


def test_other_patches_stay_in_effect(small):
    model, seen = small.model.clone(), set()

    def attn2_patch(n, context, value, extra):
        seen.add("patch")
        return n, context, value

    def attn2_output_patch(n, extra):
        seen.add("output")
        return n

    def override(function, *args, **kwargs):
        seen.add("override")
        return 0.5 * function(*args, **kwargs)

    model.set_model_attn2_patch(attn2_patch)
    model.set_model_attn2_output_patch(attn2_output_patch)
    unchanged = replace(*inputs(small))[0]
    assert torch.equal(replace(model, *inputs(small)[1:])[0], unchanged)
    model.model_options["transformer_options"]["optimized_attention_override"] = override
    assert not torch.equal(replace(model, *inputs(small)[1:])[0], unchanged)
    assert seen == {"patch", "output", "override"}


def test_an_attention_that_another_node_replaced_is_named(small):
    model = small.model.clone()

    def adapter(q, k, v, extra):
        return q

    model.set_model_attn2_replace(adapter, "input", 4)
    with pytest.raises(ValueError, match=r"Another node \(.*adapter of .*\) replaces the cross-attention of 1 layers"):
        replace(model, *inputs(small)[1:])


@pytest.mark.parametrize("together", [False, True])
def test_tiles_are_refused(small, together):
    with pytest.raises(ValueError, match="cuts the picture into tiles"):
        replace(in_halves(small.model, together), *inputs(small)[1:])


def test_prompts_that_run_one_after_another_give_the_same(small, monkeypatch):
    model, calls = calls_of_unet(small.model)
    together = replace(model, *inputs(small)[1:])[0]
    assert calls == [[0], [1, 0]] * 2
    calls.clear()
    monkeypatch.setattr(type(model), "get_free_memory", lambda self, device: 0)
    apart = replace(model, *inputs(small)[1:])[0]
    assert calls == [[0], [0], [1]] * 2 or calls == [[0], [1], [0]] * 2
    torch.testing.assert_close(apart, together, rtol=1e-3, atol=1e-3)


# Memory


def test_stored_maps_are_the_recomputed_ones_and_save_a_call_a_step(small):
    model, calls = calls_of_unet(small.model)
    given = (model, *inputs(small)[1:])
    recomputed = replace(*given)[0]
    first, report = replace(*given, maps="store")
    calls.clear()
    second = replace(*given, maps="store")[0]
    assert torch.equal(first, recomputed) and torch.equal(second, recomputed)
    assert calls == [[1, 0]] * 2
    kept = sum(
        a.nbytes for maps in replacement.STORE.of(small.trajectory, model, small.source).values() for a in maps.values()
    )
    assert f"maps of 2 steps kept in {replacement.gigabytes(kept)}" in report
    other = encode(small.clip, "a horse on grass")
    calls.clear()
    replace(model, small.trajectory, small.source, other, small.negative, maps="store")
    assert calls == [[1, 0]] * 2


@pytest.mark.parametrize("changed", ["model", "source"])
def test_maps_of_another_model_or_prompt_are_not_used(small, changed):
    replace(*inputs(small), maps="store")
    model = small.model.clone() if changed == "model" else small.model
    source = list(small.source) if changed == "source" else small.source
    assert not replacement.STORE.of(small.trajectory, model, source)


def test_maps_are_freed_with_their_picture_and_by_recompute(small):
    replace(*inputs(small), maps="store")
    assert replacement.STORE.of(small.trajectory, small.model, small.source)
    replace(*inputs(small))
    assert not replacement.STORE.of(small.trajectory, small.model, small.source)
    own = invert(small.model, small.source, small.latent, 2)[1]
    replace(small.model, own, *inputs(small)[2:], maps="store")
    maps = replacement.STORE.of(own, small.model, small.source)
    assert maps
    steps = replacement.STORE._steps
    del own, maps
    gc.collect()
    assert replacement.STORE._steps is not steps and not replacement.STORE._steps


@pytest.mark.parametrize("size", [(16, 16), (10, 13)])
def test_the_memory_estimate_is_exact(any_tiny, size):
    model, clip, _ = any_tiny
    source, empty = encode(clip, "a cat"), encode(clip, "")
    latent = {"samples": torch.randn(1, 4, *size, generator=torch.Generator().manual_seed(0))}
    trajectory = invert(model, source, latent, 1)[1]
    replace(model, trajectory, source, source, empty, maps="store")
    [maps] = replacement.STORE.of(trajectory, model, source).values()
    assert sum(a.nbytes for a in maps.values()) == replacement.maps_bytes(model, size, 77)


def test_maps_that_do_not_fit_are_refused_before_any_work(small, monkeypatch):
    model, calls = calls_of_unet(small.model)
    needed = replacement.maps_bytes(model, (16, 16), 77)
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda *_, **__: needed + 1)
    with pytest.raises(
        ValueError, match=r"maps need [\d.]+ MB of main memory and [\d.]+ MB are free: set maps to recomp"
    ):
        replace(model, *inputs(small)[1:], maps="store")
    assert not calls
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda *_, **__: needed - 1)
    with pytest.raises(ValueError, match="invert a smaller picture"):
        replace(model, *inputs(small)[1:])
    assert not calls


def test_maps_go_where_they_are_to_be_kept(small):
    maps = {}
    comfy.model_management.load_models_gpu([small.model])
    final_attention(small.model, [cond(small.source[0][0])], seen_in({}, maps, torch.device("meta"), LATENTS))
    assert {a.device.type for a in maps.values()} == {"meta"} and len(maps) == 16


def test_memory_is_told_in_figures_one_can_read():
    one_step = 8 * (5 * 4096 + 5 * 1024 + 5 * 256 + 64) * 77 * 2  # SD1.5 at 512 x 512
    assert replacement.gigabytes(one_step) == "33.2 MB"
    assert replacement.gigabytes(50 * one_step) == "1.66 GB"


# Progress and Cancel


def test_progress_counts_the_steps(small, monkeypatch):
    seen = []
    monkeypatch.setattr(comfy.utils.ProgressBar, "update_absolute", lambda bar, n, *_: seen.append((n, bar.total)))
    replace(*inputs(small))
    assert seen == [(1, 2), (2, 2)]


def test_cancel_takes_effect_within_a_step_and_keeps_what_is_stored(small):
    model, calls = calls_of_unet(small.model)
    stock = model.model_options["model_function_wrapper"]

    def cancel(apply, given):
        if len(calls) == 2:
            comfy.model_management.interrupt_current_processing()
        return stock(apply, given)

    model.set_model_unet_function_wrapper(cancel)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        replace(model, *inputs(small)[1:], maps="store")
    assert len(calls) == 3
    assert 0 in replacement.STORE.of(small.trajectory, model, small.source)
    model.set_model_unet_function_wrapper(stock)
    comfy.model_management.interrupt_current_processing(False)
    assert torch.equal(replace(model, *inputs(small)[1:])[0], replace(*inputs(small))[0])


# Bad input


def test_a_trajectory_of_another_model_or_of_several_pictures_is_refused(small, tiny):
    with pytest.raises(ValueError, match="found with another MODEL"):
        replace(with_ones_added(small.model), *inputs(small)[1:])
    two = {"samples": small.latent["samples"].repeat(2, 1, 1, 1)}
    trajectory = invert(small.model, small.source, two, 2)[1]
    with pytest.raises(ValueError, match="holds 2 pictures"):
        replace(small.model, trajectory, *inputs(small)[2:])


def test_a_null_text_of_another_trajectory_or_cfg_is_refused(small):
    other_picture = {"samples": small.latent["samples"].flip(-1)}
    for latent, steps in ((small.latent, 3), (other_picture, 2)):
        trajectory = invert(small.model, small.source, latent, steps)[1]
        with pytest.raises(ValueError, match="negative conditioning was optimised along another trajectory"):
            replace(small.model, trajectory, *inputs(small)[2:])
    with pytest.raises(ValueError, match=r"optimised for cfg 3, and cfg is 7\.5 here"):
        replace(*inputs(small), cfg=7.5)
    plain = replace(small.model, small.trajectory, small.source, small.target, small.empty, cfg=1.0)[0]
    assert plain.isfinite().all()


def test_prompts_that_cannot_be_matched_are_named(small, tiny, toy):
    model, trajectory, source, target, negative = inputs(small)
    with pytest.raises(ValueError, match="The target prompt does not have horse: choose the subject among its words"):
        replace(*inputs(small), subject="horse")
    stock = stock_encode(small.clip, "a dog on grass")
    with pytest.raises(ValueError, match="target conditioning does not tell which token is which word"):
        replace(model, trajectory, source, stock, negative)
    with pytest.raises(ValueError, match="source conditioning is not one prompt"):
        replace(model, trajectory, source + source, target, negative)
    area = comfy_nodes.ConditioningSetArea().append(target, 64, 64, 0, 0, 1.0)[0]
    with pytest.raises(ValueError, match="target conditioning is not one prompt"):
        replace(model, trajectory, source, area, negative)
    early = comfy_nodes.ConditioningSetTimestepRange().set_range(source, 0.0, 0.5)[0]
    with pytest.raises(ValueError, match="source conditioning is not one prompt for the whole picture and all steps"):
        replace(model, trajectory, early, target, negative)
    with pytest.raises(ValueError, match="takes 77 tokens and the target prompt 154"):
        replace(model, trajectory, source, encode(small.clip, "a dog on grass " * 30), negative)
    with pytest.raises(ValueError, match="target is 128 wide and the MODEL reads contexts 64 wide"):
        replace(model, trajectory, source, toy.target, negative)
