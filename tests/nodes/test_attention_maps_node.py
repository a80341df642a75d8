"""Attention maps: the picture is untouched, the maps are those of the modules themselves, the words are found."""

import pytest
import torch
from comfy_extras.nodes_pag import PerturbedAttentionGuidance
from comfy_extras.nodes_sag import SelfAttentionGuidance
from concept_atelier.kernels.concept import Concept
from concept_atelier.kernels.heatmaps import colour
from concept_atelier.kernels.layouts import Layout
from concept_atelier.nodes.apply import AtelierApplyConcepts, AtelierTextEncode
from concept_atelier.nodes.attention import LAYER_GROUPS, AtelierAttentionMaps
from concept_atelier.nodes.guidance import AtelierGCFG
from concept_atelier.nodes.native.attention_maps import AttentionRecorder, Place, find_words
from concept_atelier.nodes.native.model_kind import cross_attention_layers
from concept_atelier.nodes.native.payload import WORDS
from concept_atelier.nodes.native.text import describe_clip
from guiding import OFF, branch
from patched_models import in_halves

import nodes as comfy_nodes

STEPS = 3


@pytest.fixture(autouse=True)
def inference_mode():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def scene(tiny):
    """MODEL, positive, negative, VAE: two words beside a per-layer concept, in a picture that is not square."""
    model, clip, vae = tiny("sd1")
    layers, kind = cross_attention_layers(model), describe_clip(clip)
    generator = torch.Generator().manual_seed(0)
    vectors = {tower: torch.randn(16, 1, width, generator=generator) for tower, width in kind.towers.items()}
    concept = Concept("salute", vectors, Layout("layer"), kind.family, layers)
    with torch.inference_mode():
        positive = AtelierTextEncode.execute(clip, "a photographer <salute> on grass", {"concept0": concept})[0]
        negative = comfy_nodes.CLIPTextEncode().encode(clip, "blurry, " * 60)[0]
        return AtelierApplyConcepts.execute(model)[0], positive, negative, vae


def latent(batch=1, size=(8, 12)):
    return {"samples": torch.zeros(batch, 4, *size)}


SETTINGS = {"seed": 3, "steps": STEPS, "cfg": 5.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}


def look(scene, words, layers="all", steps=(0, 10000), average=True, batch=1, vae=None, size=(8, 12), **changed):
    model, positive, negative, _ = scene
    maps = AtelierAttentionMaps.execute
    more = {"opacity": 0.6, "vae": vae, **SETTINGS, **changed}
    return maps(model, positive, negative, latent(batch, size), words, layers, *steps, average, **more)


def ksample(scene, model=None, **changed):
    settings = {**SETTINGS, **changed}
    positions = [settings[key] for key in ("seed", "steps", "cfg", "sampler_name", "scheduler")]
    return comfy_nodes.KSampler().sample(model or scene[0], *positions, *scene[1:3], latent())[0]["samples"]


@pytest.mark.parametrize("sampler_name", ["euler", "heun", "dpmpp_2m"])
def test_the_picture_is_the_one_of_ksampler(scene, sampler_name):
    _, mask, sampled = look(scene, "<salute>", sampler_name=sampler_name, average=False).args
    assert torch.equal(sampled["samples"], ksample(scene, sampler_name=sampler_name))
    assert len(mask) == STEPS


def module_maps(scene, positions, steps):
    """{layer: [(h * w,) a step]} from the modules' own q and k; the positive is the second of the batch."""
    unet = scene[0].model.diffusion_model
    modules = [module for name, module in unet.named_modules() if name.endswith(".attn2")]
    q, k, hooks = {}, {}, []
    for number, module in enumerate(modules):
        for projection, kept in ((module.to_q, q), (module.to_k, k)):
            keep = kept.setdefault(number, [])
            hooks.append(projection.register_forward_hook(lambda _m, _i, out, keep=keep: keep.append(out)))
    ksample(scene, steps=steps)
    for hook in hooks:
        hook.remove()
    maps = {}
    for number, module in enumerate(modules):
        for q_all, k_all in zip(q[number], k[number]):
            heads = [x[1].unflatten(-1, (module.heads, -1)).transpose(0, 1) for x in (q_all, k_all[:, :77])]
            scores = heads[0] @ heads[1].transpose(-1, -2) * module.dim_head**-0.5
            maps.setdefault(number, []).append(scores.softmax(-1)[..., positions].sum(-1).mean(0))
    return maps


def test_maps_are_those_of_the_modules(scene):
    """The negative is twice as long, so that ComfyUI repeats the positive's tokens; they count once."""
    recorder = AttentionRecorder({"photographer", "<salute>"}, *LAYER_GROUPS["all"])
    words = scene[1][0][1][WORDS]
    positions = [at for at, word in enumerate(words) if word in recorder.words]
    assert len(positions) == 2
    ksample(scene, recorder.watch(scene[0]))
    expected = module_maps(scene, positions, STEPS)
    layers = cross_attention_layers(scene[0])
    sizes = {96: 0, 24: 1, 6: 2, 2: 3}
    for step in range(STEPS):
        for block in ("input", "middle", "output"):
            for level in range(4):
                here = [
                    maps[step]
                    for number, maps in expected.items()
                    if layers[number].block == block and sizes[len(maps[step])] == level
                ]
                place = Place(step, block, level)
                assert recorder.counts[place] == len(here)
                if here:
                    got = (recorder.sums[place] / recorder.counts[place]).flatten()
                    assert torch.allclose(got, torch.stack(here).mean(0), rtol=1e-4, atol=1e-7)


def test_all_tokens_together_get_all_attention(scene):
    recorder = AttentionRecorder({""} | set(scene[1][0][1][WORDS]), *LAYER_GROUPS["all"])
    ksample(scene, recorder.watch(scene[0]), steps=1)
    for place, total in recorder.sums.items():
        assert torch.allclose(total / recorder.counts[place], torch.ones(()), atol=1e-5)


def test_steps_and_groups_are_told_apart(scene):
    each = look(scene, "<salute>", average=False).args[1]
    later = look(scene, "<salute>", average=False, steps=(1, 2)).args[1]
    assert each.shape == (STEPS, 64, 96)
    assert torch.equal(later, each[1:])
    groups = [look(scene, "<salute>", group).args[1] for group in ("down", "middle", "up", "full resolution")]
    assert not any(torch.equal(a, b) for i, a in enumerate(groups) for b in groups[:i])


def test_batches_come_step_after_step(scene):
    overlay, mask, sampled = look(scene, "grass", average=False, batch=2, vae=scene[3]).args
    assert overlay.shape == (2 * STEPS, 64, 96, 3)
    assert mask.shape == (2 * STEPS, 64, 96)
    assert float(mask.min()) == 0
    assert float(mask.amax((1, 2)).min()) == 1
    pictures = scene[3].decode(sampled["samples"])
    clear = look(scene, "grass", average=False, batch=2, vae=scene[3], opacity=0.0).args[0]
    assert torch.allclose(clear, pictures.repeat(STEPS, 1, 1, 1), atol=1e-6)


def test_without_vae_the_map_alone(scene):
    overlay, mask, _ = look(scene, "grass").args
    assert torch.equal(overlay, colour(mask))


def test_sdxl(tiny):
    model, clip, _ = tiny("sdxl")
    positive = AtelierTextEncode.execute(clip, "a red ball", {})[0]
    scene = model, positive, comfy_nodes.CLIPTextEncode().encode(clip, "blurry")[0], None
    assert look(scene, "red ball", "middle", steps=(0, 0)).args[1].shape == (1, 64, 96)
    with pytest.raises(ValueError, match=r"no cross-attention in the layers asked for, only in input 1/2"):
        look(scene, "red ball", "full resolution")


def test_words_are_found_in_the_prompt(scene, tiny):
    positive = scene[1]
    assert find_words(positive, "Photographer, <salute>") == {"photographer", "<salute>"}
    assert positive[0][1][WORDS][:7] == ("", "a", "photographer", "<salute>", "on", "grass", "")
    with pytest.raises(ValueError, match=r"does not have cat: choose among its words <salute>, a, grass"):
        find_words(positive, "cat grass")
    with pytest.raises(ValueError, match="words is empty"):
        find_words(positive, " ,")
    with pytest.raises(ValueError, match="Text Encode with Concepts"):
        find_words(scene[2], "blurry")


def test_words_of_many_pieces_and_long_prompts(tiny):
    clip = tiny("sd1").clip
    [[context, values]] = AtelierTextEncode.execute(clip, "a (xylophonist:1.2) " + "red " * 80 + "pneumonoultra", {})[0]
    words = values[WORDS]
    assert len(words) == context.shape[1] == 154
    assert words[0] == words[76] == words[77] == words[153] == ""
    assert words.count("red") == 80
    ids = [token for chunk in clip.tokenize("xylophonist")["l"] for token, _ in chunk]
    pieces = ids.index(49407) - 1
    assert pieces > 1
    assert words.count("xylophonist") == pieces
    assert words.count("pneumonoultra") > 1


def test_steps_out_of_range_are_refused_before_sampling(scene):
    with pytest.raises(ValueError, match="count from 0 to 2"):
        look(scene, "grass", steps=(3, 5))


def test_areas_are_refused(scene):
    area = comfy_nodes.ConditioningSetAreaPercentage().append(scene[1], 0.5, 0.5, 0.0, 0.0, 1.0)[0]
    with pytest.raises(ValueError, match=r"limited to an area.*with set_cond_area 'default'"):
        look((scene[0], area, *scene[2:]), "grass")


def test_two_prompts_are_each_read_by_their_own_words(scene, tiny):
    """In a combined prompt the same word stands at different positions."""
    other = AtelierTextEncode.execute(tiny("sd1").clip, "green grass", {})[0]
    combined = comfy_nodes.ConditioningCombine().combine(scene[1], other)[0]
    recorder = AttentionRecorder({"grass"}, *LAYER_GROUPS["middle"])
    ksample((None, combined, scene[2]), recorder.watch(scene[0]), steps=1)
    assert set(recorder.counts.values()) == {2}


def test_other_attention_overrides_stay_in_effect(scene):
    calls = []

    def counted(function, *args, **kwargs):
        calls.append(function)
        return function(*args, **kwargs)

    model = scene[0].clone()
    model.model_options["transformer_options"]["optimized_attention_override"] = counted
    look((model, *scene[1:]), "grass", steps=(0, 0))
    assert len(calls) == 2 * 16 * STEPS  # self- and cross-attention of every layer


@pytest.mark.parametrize("together", [False, True])
def test_tiles_are_refused(scene, together):
    with pytest.raises(ValueError, match="cuts the picture into tiles"):
        look((in_halves(scene[0], together), *scene[1:]), "grass")


@pytest.fixture(scope="module")
def same_words(scene, tiny):
    """The scene with a negative prompt that knows its words, and says the positive's."""
    with torch.inference_mode():
        return scene[0], scene[1], AtelierTextEncode.execute(tiny("sd1").clip, "dead grass", {})[0], None


def guided_by(guidance, scene, tiny):
    """MODEL with another guidance than plain cfg, at whose first step the latents are still the same."""
    if guidance == "SAG":
        return SelfAttentionGuidance.execute(scene[0], 0.5, 2.0)[0]
    if guidance == "PAG":
        return PerturbedAttentionGuidance.execute(scene[0], 3.0)[0]
    other = AtelierTextEncode.execute(tiny("sd1").clip, "green grass", {})[0]
    return AtelierGCFG.execute(scene[0], {"branch0": branch(scene[0], other, float(guidance))}, **OFF)[0]


@pytest.mark.parametrize("guidance", ["SAG", "PAG", "2.0", "-4.0"])
def test_under_other_guidances_the_maps_are_those_of_the_positive(same_words, tiny, guidance):
    """At cfg 5, a branch of GCFG with weight -4 takes the unconditional out of the call."""
    plain, guided = (
        look((model, *same_words[1:]), "grass", steps=(0, 0), size=(16, 16)).args[1]
        for model in (same_words[0], guided_by(guidance, same_words, tiny))
    )
    assert torch.allclose(guided, plain, atol=1e-4)


def test_where_the_positive_does_not_count_gcfg_shows_no_map(same_words, tiny):
    early = comfy_nodes.ConditioningSetTimestepRange().set_range(same_words[1], 0.0, 0.2)[0]
    model = guided_by("2.0", same_words, tiny)
    assert len(look((model, early, *same_words[2:]), "grass", average=False).args[1]) == 1
