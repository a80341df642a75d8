"""Layout guidance with core's samplers: nothing changes at strength 0, and otherwise what the equations say."""

import comfy.controlnet
import comfy.model_management
import comfy.samplers
import pytest
import tiny_models
import torch
from comfy_extras import nodes_custom_sampler as custom
from comfy_extras.nodes_freelunch import FreeU_V2
from concept_atelier.benchmarks import speed_layout
from concept_atelier.kernels.backbone import TextContext
from concept_atelier.kernels.concept import Concept
from concept_atelier.kernels.layout_guidance import Box, LayoutGuidance, Placement, guidance_layers, layout_loss
from concept_atelier.kernels.layouts import Layout
from concept_atelier.kernels.prompts import Prompt
from concept_atelier.nodes.apply import AtelierApplyConcepts, AtelierTextEncode
from concept_atelier.nodes.attention import AtelierAttentionMaps
from concept_atelier.nodes.guidance import AtelierGCFG
from concept_atelier.nodes.layout_guidance import AtelierLayoutGuidance, AtelierLayoutPredictor
from concept_atelier.nodes.native import layout_predictor
from concept_atelier.nodes.native.attention_maps import AttentionRecorder
from concept_atelier.nodes.native.backbone import native_session
from concept_atelier.nodes.native.gradients import differentiable_model
from concept_atelier.nodes.native.layout_guidance import GuidedPrompt, LayoutGuide, phrase_tokens
from concept_atelier.nodes.native.model_kind import cross_attention_layers
from concept_atelier.nodes.native.payload import WORDS
from concept_atelier.nodes.native.text import describe_clip
from concept_atelier.nodes.toy import AtelierToyCheckpoint
from concept_atelier.toyworld.judge import load_judge
from guiding import OFF, advanced, branch, empty_latent, gcfg
from patched_models import KEYS_AND_VALUES, make_dynamic, with_lora

import nodes as comfy_nodes

PROMPT = "a <salute> cat and a panda on grass"
SIZE = 512


pytestmark = pytest.mark.usefixtures("inference_mode", "cancellable")


def per_layer_concept(model, clip):
    layers, kind = cross_attention_layers(model), describe_clip(clip)
    generator = torch.Generator().manual_seed(0)
    vectors = {t: torch.randn(len(layers), 1, width, generator=generator) for t, width in kind.towers.items()}
    return Concept("salute", vectors, Layout("layer"), kind.family, layers)


def scene_of(model, clip):
    """MODEL through Apply Concepts, positive with a concept that differs from layer to layer, negative."""
    concept = per_layer_concept(model, clip)
    positive = AtelierTextEncode.execute(clip, PROMPT, {"concept0": concept})[0]
    return AtelierApplyConcepts.execute(model)[0], positive, AtelierTextEncode.execute(clip, "", {})[0]


@pytest.fixture(scope="module")
def scene(tiny):
    with torch.inference_mode():
        return scene_of(*tiny("sd1")[:2])


def guided(model, positive, words="cat, panda", bboxes=None, width=SIZE, height=SIZE, **settings):
    every = {"strength": 30.0, "steps": 2, "iterations": 2, "threshold": 0.0, "power": "1 (paper)", "largest_move": 0.0}
    return AtelierLayoutGuidance.execute(model, positive, words, width, height, bboxes=bboxes, **every | settings)[0]


def box(x, y, width, height, **more):
    return {"x": x, "y": y, "width": width, "height": height, **more}


def sample(model, positive, negative, sampler="euler", steps=3, batch=1, latent=None, cfg=5.0):
    channels = model.model.latent_format.latent_channels
    latent = latent or {"samples": torch.zeros(batch, channels, 16, 16)}
    sampled = comfy_nodes.KSampler().sample(model, 3, steps, cfg, sampler, "normal", positive, negative, latent)
    return sampled[0]["samples"]


# KSampler


@pytest.mark.parametrize("off", [{"strength": 0.0}, {"steps": 0}, {"iterations": 0}, {"threshold": 1.0}])
def test_without_strength_or_steps_ksampler_paints_the_same_bits(scene, off):
    model, *conditioning = scene
    before = sample(model, *conditioning)
    assert torch.equal(sample(guided(model, conditioning[0], **off), *conditioning), before)
    assert torch.equal(sample(model, *conditioning), before)


def test_the_model_from_before_is_untouched_by_a_guided_run(scene):
    model, *conditioning = scene
    before = sample(model, *conditioning)
    assert not torch.equal(sample(guided(model, conditioning[0]), *conditioning), before)
    assert torch.equal(sample(model, *conditioning), before)
    assert torch.is_inference_mode_enabled()


def test_a_dynamic_model_is_guided_through_a_whole_copy():
    """Dynamic VRAM needs a GPU; a patcher that says so and reloads itself stands for it."""
    with torch.inference_mode():
        built, clip, _ = tiny_models.build("sd1")
    model, *conditioning = scene_of(built, clip)
    expected = sample(guided(model, conditioning[0]), *conditioning)
    reloaded = []

    def reload():
        reloaded.append(tiny_models.build_unet("sd1"))
        return reloaded[-1]

    dynamic = AtelierApplyConcepts.execute(tiny_models.build_unet("sd1"))[0]
    make_dynamic(dynamic, reload)
    weights = list(dynamic.model.parameters())
    torch.testing.assert_close(sample(guided(dynamic, conditioning[0]), *conditioning), expected)
    assert reloaded and all(one is other for one, other in zip(weights, dynamic.model.parameters(), strict=True))


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m", "euler_ancestral", "lms"])
def test_every_sampler_is_guided(scene, sampler):
    model, *conditioning = scene
    moved = sample(guided(model, conditioning[0]), *conditioning, sampler)
    assert moved.isfinite().all()
    assert not torch.equal(moved, sample(model, *conditioning, sampler))


def test_every_topology(any_tiny):
    model, *conditioning = scene_of(*any_tiny[:2])
    moved = sample(guided(model, conditioning[0], steps=1, iterations=1), *conditioning, steps=2)
    assert moved.isfinite().all()
    assert not torch.equal(moved, sample(model, *conditioning, steps=2))


def test_custom_guiders_are_guided_alike(scene):
    model, positive, negative = scene
    patched = guided(model, positive)
    guider = custom.CFGGuider.execute(patched, positive, negative, 5.0)[0]
    sampler = custom.KSamplerSelect.execute("euler")[0]
    sigmas = custom.BasicScheduler.execute(patched, "normal", 3, 1.0)[0]
    latent = {"samples": torch.zeros(1, 4, 16, 16)}
    noise = custom.RandomNoise.execute(3)[0]
    out = custom.SamplerCustomAdvanced.execute(noise, guider, sampler, sigmas, latent)[0]["samples"]
    torch.testing.assert_close(out, sample(patched, positive, negative))


def test_gcfg_is_guided_once(scene, tiny):
    """A KSampler handed over to GCFG without branches of weight has the guided picture, up to its own rounding."""
    model, positive, negative = scene
    other = AtelierTextEncode.execute(tiny("sd1").clip, "grass", {})[0]
    patched = guided(model, positive)
    pictures = []
    for one in (model, patched):
        branches = {"branch0": branch(one, other, 1e-6)}
        pictures.append(sample(AtelierGCFG.execute(one, branches, **OFF)[0], positive, negative))
    plain, moved = pictures
    torch.testing.assert_close(moved, sample(patched, positive, negative), rtol=0, atol=2e-2)
    assert (moved - plain).abs().max() > 0.1


def losses_of(monkeypatch, guider):
    """The losses of a guided sampling, forward by forward."""
    losses, stock = [], LayoutGuide.loss

    def loss(*given):
        losses.append(stock(*given))
        return losses[-1]

    monkeypatch.setattr(LayoutGuide, "loss", loss)
    sigmas = comfy.samplers.calculate_sigmas(guider.model_patcher.model.model_sampling, "normal", 3)
    noise, latent = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)), torch.zeros(1, 4, 16, 16)
    guider.sample(noise, latent, comfy.samplers.ksampler("euler"), sigmas, disable_pbar=True)
    monkeypatch.undo()
    return [round(loss.item(), 5) for loss in losses]


def test_a_branch_of_gcfg_is_read_with_its_own_keys(scene, monkeypatch):
    model, positive, negative = scene
    once = {"steps": 1, "iterations": 1}
    patched = guided(model, positive, **once)
    learned = branch(with_lora(patched, 5, layers=KEYS_AND_VALUES), positive, 5.0)
    guider, _ = gcfg(patched, negative, learned)
    trained = guided(with_lora(model, 5, layers=KEYS_AND_VALUES), positive, **once)
    plain, untrained = (custom.CFGGuider.execute(one, positive, negative, 5.0)[0] for one in (trained, patched))
    expected = losses_of(monkeypatch, plain)
    assert losses_of(monkeypatch, guider) == pytest.approx(expected, abs=2e-5)
    assert losses_of(monkeypatch, untrained) != pytest.approx(expected, abs=1e-3)


def test_a_gcfg_that_cannot_be_guided_says_why(scene):
    model, positive, negative = scene
    patched = guided(model, positive)

    def run(unconditional, of_branch):
        advanced(gcfg(unconditional, negative, branch(of_branch, positive, 5.0))[0], latent=empty_latent(16))

    with pytest.raises(ValueError, match="put the same LoRAs on the MODELs of all branches"):
        run(patched, with_lora(patched, 5))
    with pytest.raises(ValueError, match="put one such node before both"):
        run(model, patched)
    elsewhere = AtelierApplyConcepts.execute(tiny_models.build_unet("sd1", seed=7))[0]
    with pytest.raises(ValueError, match="a branch on the same checkpoint as the unconditional"):
        run(patched, elsewhere)


def test_a_silenced_prompt_does_not_count(scene, monkeypatch):
    """Conditioning Zero Out keeps the words of the prompt that it silences."""
    model, positive, negative = scene
    patched, zero = guided(model, positive), comfy_nodes.ConditioningZeroOut().zero_out(positive)[0]
    silenced, empty = (
        losses_of(monkeypatch, custom.CFGGuider.execute(patched, positive, other, 1.0)[0]) for other in (zero, negative)
    )
    assert silenced == empty


def test_maps_of_a_guided_model_are_those_of_the_sampling(scene, monkeypatch):
    model, positive, negative = scene
    seen, add = [], AttentionRecorder.add

    def record(self, place, maps):
        seen.append((place, maps.requires_grad))
        add(self, place, maps)

    monkeypatch.setattr(AttentionRecorder, "add", record)
    latent = {"samples": torch.zeros(1, 4, 16, 16)}
    counts = []
    for one in (model, guided(model, positive)):
        seen.clear()
        AtelierAttentionMaps.execute(
            one, positive, negative, latent, "cat", "all", 0, 10000, True, 0.6, seed=3, steps=2, cfg=3.0,
            sampler_name="euler", scheduler="normal", denoise=1.0,
        )  # fmt: skip
        counts.append(len(seen))
        assert not any(graph for _, graph in seen)
    assert counts[0] == counts[1] > 0


def test_patches_that_write_in_place_leave_the_gradient_right(scene):
    """FreeU V2 multiplies activations in place."""
    model, positive, _ = scene
    words = positive[0][1][WORDS]
    placed = {words: [Placement(phrase_tokens(words, "cat"), (Box(0, 0, 0.5, 1),))]}
    guide = LayoutGuide(placed, LayoutGuidance(), guidance_layers(cross_attention_layers(model)))
    free = FreeU_V2.execute(model, 1.3, 1.4, 0.9, 0.2)[0]
    x = 3 * torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    direction, h = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)), 2e-3
    up, down = (loss_and_gradient(guide, free, positive, x + d * direction, 2.5)[0] for d in (h, -h))
    slope = (loss_and_gradient(guide, free, positive, x, 2.5)[1] * direction).sum((1, 2, 3))
    torch.testing.assert_close((up - down) / (2 * h), slope, rtol=0.03, atol=2e-4)
    assert slope.abs() > 1e-3


def test_tiles_are_refused(scene):
    model, *conditioning = scene

    def halves(apply_model, given):
        halves = [apply_model(half, given["timestep"], **given["c"]) for half in given["input"].chunk(2, dim=-1)]
        return torch.cat(halves, dim=-1)

    tiled = model.clone()
    tiled.set_model_unet_function_wrapper(halves)
    with pytest.raises(ValueError, match="cuts the picture into tiles"):
        sample(guided(tiled, conditioning[0]), *conditioning)


def test_a_second_guidance_on_a_model_is_refused(scene):
    model, positive, _ = scene
    with pytest.raises(ValueError, match="name all things and their boxes in one node"):
        guided(guided(model, positive, "cat", box(0, 0, 99, 99)), positive, "panda", box(0, 0, 99, 99))


def test_the_benchmark_compares_three_sides(capsys):
    layouts = speed_layout.Layouts(speed_layout.Task("toy", 8, 1), 5)
    took = speed_layout.measure(layouts)
    assert list(took) == [speed_layout.PLAIN, speed_layout.UNTRUNCATED, speed_layout.OURS]
    ratio = speed_layout.print_table(layouts, took)
    assert 1 < ratio < 10
    assert "1 guided steps of 5" in capsys.readouterr().out


# The move


def test_euler_goes_on_from_the_moved_latents(scene):
    """One guided step by hand: x moved by sigma^2 strength dL/dx, then the stock step from there."""
    model, positive, negative = scene
    patched = guided(model, positive, steps=1, iterations=1, strength=50.0)
    guide = patched.wrappers["predict_noise"]["concept_atelier_layout"][0].__self__
    seen = {}

    def spy(executor, x, timestep, model_options, seed=None):
        if not seen:
            seen["before"], seen["sigma"] = x.clone(), float(timestep[0])
        out = executor(x, timestep, model_options, seed)
        if "after" not in seen:
            seen["after"] = x.clone()
            guider = executor.class_obj
            [prompt] = guide.prompts(guider)
            with torch.inference_mode(False), torch.enable_grad():
                x_k = seen["before"].clone().requires_grad_(True)
                loss = guide.loss(guider.inner_model, prompt, x_k, seen["sigma"], model_options)
                (seen["gradient"],) = torch.autograd.grad(loss.sum(), x_k)
        return out

    spied = patched.clone()
    spied.wrappers["predict_noise"] = {"spy": [spy], **patched.wrappers["predict_noise"]}
    sample(spied, positive, negative, steps=2)
    expected = seen["before"] - seen["sigma"] ** 2 * 50 * seen["gradient"]
    torch.testing.assert_close(seen["after"], expected, rtol=1e-4, atol=1e-4)
    assert (expected - seen["before"]).abs().max() > 1e-2


def loss_and_gradient(guide, model, positive, x, sigma):
    """L_loc and dL/dx of latents x in ComfyUI's units, as the wrapper computes them."""
    out = {}

    class Probe(comfy.samplers.Sampler):
        def sample(self, wrap, sigmas, extra_args, *_, **__):
            [cond] = wrap.conds["positive"]
            with torch.inference_mode(False), torch.enable_grad():
                x_k = x.clone().requires_grad_(True)
                prompt = GuidedPrompt(cond, {})
                loss = guide.loss(wrap.inner_model, prompt, x_k, sigma, extra_args["model_options"])
                (gradient,) = torch.autograd.grad(loss.sum(), x_k)
            out["loss"], out["gradient"] = loss.detach().clone(), gradient.clone()
            return x

    with differentiable_model(model) as whole, torch.inference_mode():
        guider = comfy.samplers.CFGGuider(whole)
        guider.inner_set_conds({"positive": positive})
        sigmas = torch.tensor([sigma, 0.0])
        guider.sample(torch.zeros_like(x), torch.zeros_like(x), Probe(), sigmas, disable_pbar=True)
    return out["loss"], out["gradient"]


@pytest.fixture(scope="module", params=["sd1", "sd2_v", "sdxl"])
def probed(request, tiny):
    """MODEL, positive, its placements, latents and a noise level."""
    with torch.inference_mode():
        model, positive, _ = scene_of(*tiny(request.param)[:2])
        words = positive[0][1][WORDS]
        places = {"<salute> cat": Box(0.0, 0.2, 0.5, 1.0), "panda": Box(0.5, 0.0, 0.8, 0.7)}
        placed = {words: [Placement(phrase_tokens(words, phrase), (place,)) for phrase, place in places.items()]}
        x = 3 * torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
        return model, positive, placed, x, 2.5


def test_the_truncated_forward_has_the_full_ones_loss_and_gradient(probed):
    model, positive, placed, x, sigma = probed
    layers = guidance_layers(cross_attention_layers(model))
    ran = []

    watched = model.clone()
    watched.set_model_output_block_patch(lambda h, hsp, options: (ran.append(1), (h, hsp))[1])
    results = []
    for truncated in (True, False):
        ran.clear()
        guide = LayoutGuide(placed, LayoutGuidance(), layers, truncated)
        results.append((*loss_and_gradient(guide, watched, positive, x, sigma), len(ran)))
    (short, short_gradient, stopped), (full, full_gradient, whole) = results
    assert torch.equal(short, full)
    assert torch.equal(short_gradient, full_gradient)
    assert stopped == 1 + layers[-1].number < whole


def test_the_gradient_equals_finite_differences(probed):
    model, positive, placed, x, sigma = probed
    guide = LayoutGuide(placed, LayoutGuidance(), guidance_layers(cross_attention_layers(model)))
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    h = 2e-3
    up, down = (loss_and_gradient(guide, model, positive, x + d * direction, sigma)[0] for d in (h, -h))
    loss, gradient = loss_and_gradient(guide, model, positive, x, sigma)
    slopes = (gradient * direction).sum((1, 2, 3))
    torch.testing.assert_close((up - down) / (2 * h), slopes, rtol=0.03, atol=2e-4)
    assert (loss > 0).all() and (loss < 1).all()
    assert slopes.abs().max() > 1e-3


def test_the_loss_is_that_of_the_backbone(tiny):
    """The whole path of CONDITIONING and payload against the training backbone's maps of the same contexts."""
    model, clip, vae = tiny("sd1")
    positive = AtelierTextEncode.execute(clip, "a cat and a panda", {})[0]
    words = positive[0][1][WORDS]
    objects = [Placement(phrase_tokens(words, "panda"), (Box(0, 0, 0.5, 1),))]
    layers = guidance_layers(cross_attention_layers(model))
    x_t = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    with native_session(model, clip, vae) as backbone:
        encoding = backbone.encode_text(Prompt(("a cat and a panda",)), {})
        context = TextContext.plain(encoding.hidden.detach(), backbone.layers)
        with torch.no_grad(), backbone.attention(layers, objects[0].tokens) as recorded:
            backbone.predict_noise(x_t, torch.tensor([500]), context)
        maps = [a for by in recorded.maps.values() for a in by]
        expected = layout_loss(maps, objects[0].tokens, objects, (16, 16))
        abar = float(backbone.schedule.alphas_cumprod[500])
    sigma = ((1 - abar) / abar) ** 0.5
    guide = LayoutGuide({words: objects}, LayoutGuidance(), layers)
    got = loss_and_gradient(guide, model, positive, x_t * (1 + sigma**2) ** 0.5, sigma)[0]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_it_reads_the_concepts_rows(scene, tiny):
    """The same prompt with the concept's plain mean in its place has another loss."""
    model, positive, _ = scene
    words = positive[0][1][WORDS]
    plain = [[positive[0][0], {k: v for k, v in positive[0][1].items() if k != "model_conds"}]]
    placed = {words: [Placement(phrase_tokens(words, "<salute>"), (Box(0, 0, 0.5, 1),))]}
    guide = LayoutGuide(placed, LayoutGuidance(), guidance_layers(cross_attention_layers(model)))
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    with_rows, without = (loss_and_gradient(guide, model, c, x, 1.0)[0] for c in (positive, plain))
    assert (with_rows - without).abs().max() > 1e-4


def test_a_controlnet_is_left_out_of_the_guidance_alone(scene):
    model, positive, negative = scene
    asked = []

    class Control(comfy.controlnet.ControlBase):
        def copy(self):
            return self

        def get_control(self, x, *_):
            asked.append(x.requires_grad)

    controlled = [[context, {**values, "control": Control()}] for context, values in positive]
    sample(guided(model, positive, steps=1), controlled, negative, steps=2)
    assert asked == [False, False]


def test_prompts_outside_of_their_range_are_left_alone(scene):
    model, positive, negative = scene
    late = comfy_nodes.ConditioningSetTimestepRange().set_range(positive, 0.6, 1.0)[0]
    both = [*late, *negative]
    before = sample(model, both, negative)
    assert torch.equal(sample(guided(model, late, steps=1), both, negative), before)
    assert not torch.equal(sample(guided(model, late, steps=3), both, negative), before)


# Words and boxes


def test_words_are_found_as_they_stand():
    words = ("", "a", "red", "ball", "and", "xyl", "xyl", "<dog>", "<dog>", "red", "cat", "t", "-", "shirt", "", "")
    assert phrase_tokens(words, "Red  ball") == (2, 3)
    assert phrase_tokens(words, "red") == (2, 9)
    assert phrase_tokens(words, "xyl") == (5, 6)
    assert phrase_tokens(words, "<dog> red") == (7, 8, 9)
    assert phrase_tokens(words, "t-shirt") == (11, 12, 13)
    assert phrase_tokens(words, "ball red") == ()
    assert phrase_tokens(("", "cat", "'s", "toy", ""), "Cat's toy") == (1, 2, 3)


def layout(model):
    guide = model.wrappers["predict_noise"]["concept_atelier_layout"][0].__self__
    [objects] = guide.placed.values()
    return objects


def test_boxes_go_to_words_by_label_or_in_order(scene):
    model, positive, _ = scene
    drawn = [box(0, 64, 256, 256, label="panda"), box(300, 0, 128, 512, label="cat")]
    bare = [{key: value for key, value in one.items() if key != "label"} for one in drawn]
    one, other = Box(0, 0.125, 0.5, 0.625), Box(300 / 512, 0, 428 / 512, 1)

    def places(words, bboxes):
        words_of = positive[0][1][WORDS]
        return {words_of[p.tokens[0]]: p.boxes for p in layout(guided(model, positive, words, bboxes))}

    assert places("cat, panda", [bare]) == {"cat": (one,), "panda": (other,)}
    assert places(" ", drawn) == places("cat, panda", drawn) == {"panda": (one,), "cat": (other,)}
    assert places("cat", drawn) == {"cat": (other,)}
    spoken = [{**one, "label": f"A {one['label'].title()}"} for one in drawn]  # as Detect by Text may label them
    assert places("cat, panda", spoken) == {"panda": (one,), "cat": (other,)}
    assert places("cat, cat", bare) == {"cat": (one, other)}
    assert [p.boxes[0].x0 for p in layout(guided(model, positive, "cat, panda"))] == [0.1, 0.6]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"words": "dog, panda"}, "does not have dog: choose among"),
        ({"words": "grass panda, cat"}, 'No prompt says all of "grass panda"'),
        ({"words": "cat"}, 'words says "cat": name two different things'),
        ({"bboxes": [box(0, 0, 100, 100)] * 3}, "3 boxes and words names 2 things"),
        ({"words": "", "bboxes": [box(0, 0, 9, 9)]}, "no label"),
        ({"words": "", "bboxes": []}, "0 boxes"),
        ({"words": "cat, cat"}, 'says "cat, cat": name two different things'),
        ({"words": "cat", "bboxes": box(0, 0, 99, 99, label="dog")}, 'No box on bboxes is labelled "cat", only dog'),
        ({"words": "cat", "bboxes": box(10, 10, 0, 100)}, 'box of "cat" goes .* no area'),
        ({"words": "cat", "bboxes": box(500, 10, 100, 100)}, 'box of "cat" goes .* beyond its borders'),
        ({"words": "cat", "bboxes": box(-1, 10, 100, 100)}, "beyond its borders"),
        ({"words": "cat", "bboxes": [[box(0, 0, 9, 9)]] * 2}, "boxes for 2 pictures"),
    ],
)
def test_words_and_boxes_that_do_not_match_are_refused(scene, change, what):
    model, positive, _ = scene
    with pytest.raises(ValueError, match=what):
        guided(model, positive, **change)


def test_conditionings_that_cannot_guide_are_refused(scene, tiny):
    model, positive, negative = scene
    area = comfy_nodes.ConditioningSetAreaPercentage().append(positive, 0.5, 0.5, 0.0, 0.0, 1.0)[0]
    with pytest.raises(ValueError, match=r"limited to an area.*with set_cond_area 'default'"):
        guided(model, area)
    mask = torch.zeros(1, 16, 16)
    mask[:, :8] = 1
    cut = comfy_nodes.ConditioningSetMask().append(positive, mask, "mask bounds", 1.0)[0]
    with pytest.raises(ValueError, match="limited to an area"):
        sample(guided(model, cut), cut, negative)
    soft = comfy_nodes.ConditioningSetMask().append(positive, mask, "default", 1.0)[0]
    assert not torch.equal(sample(guided(model, soft), soft, negative), sample(model, soft, negative))
    plain = comfy_nodes.CLIPTextEncode().encode(tiny("sd1").clip, "a cat and a panda")[0]
    with pytest.raises(ValueError, match="Text Encode with Concepts"):
        guided(model, plain)
    with pytest.raises(ValueError, match="No conditioning of this sampler"):
        sample(guided(model, positive), plain, negative)


def test_masked_latents_are_refused_and_the_model_works_afterwards(scene):
    model, *conditioning = scene
    masked = {"samples": torch.ones(1, 4, 16, 16), "noise_mask": torch.ones(1, 128, 128)}
    before = sample(model, *conditioning)
    with pytest.raises(ValueError, match="noise mask"):
        sample(guided(model, conditioning[0]), *conditioning, latent=masked)
    assert torch.equal(sample(model, *conditioning), before)


def replacement(q, k, v, extra_options):
    return q


@pytest.mark.parametrize("block", [("middle", 0), ("output", 4, 0)])
def test_replaced_attention_is_named(scene, block):
    model, *conditioning = scene
    other = model.clone()
    other.set_model_attn2_replace(replacement, *block[:2], *(block[2:]))
    with pytest.raises(ValueError, match=r"node \(replacement of .*test_layout_guidance\) replaces .* 1 layers"):
        sample(guided(other, conditioning[0]), *conditioning)
    elsewhere = model.clone()
    elsewhere.set_model_attn2_replace(replacement, "output", 8)
    assert sample(guided(elsewhere, conditioning[0]), *conditioning).isfinite().all()


def test_cancel_is_heard_within_the_guidance(scene):
    model, *conditioning = scene
    patched = guided(model, conditioning[0])
    before = sample(model, *conditioning)
    comfy.model_management.interrupt_current_processing()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(patched, *conditioning)
    comfy.model_management.interrupt_current_processing(False)
    assert torch.is_inference_mode_enabled()
    assert torch.equal(sample(model, *conditioning), before)


def test_other_models_are_refused(scene, tiny):
    model, positive, _ = scene
    flow = model.clone()

    class Flow(torch.nn.Module):
        sigma_data = 1

    flow.add_object_patch("model_sampling", Flow())
    with pytest.raises(ValueError, match="neither eps- nor v-prediction"):
        guided(flow, positive)


# The predictor


@pytest.fixture(scope="module")
def toy():
    with torch.inference_mode():
        return AtelierToyCheckpoint.execute().args


@pytest.mark.parametrize("sampler", ["euler_ancestral", "uni_pc"])  # uni_pc hands over a copy of its latents
def test_in_the_toy_world_the_figure_named_first_goes_to_its_box(toy, sampler):
    model, clip, vae = toy
    positive, negative = (AtelierTextEncode.execute(clip, text, {})[0] for text in ("a cat and a panda on grass", ""))
    latent = {"samples": torch.zeros(6, model.model.latent_format.latent_channels, 8, 8)}
    found = {}
    for side, x in (("left", 6), ("right", 38)):
        patched = guided(model, positive, "cat", box(x, 13, 24, 38), 64, 64, steps=4, iterations=5, threshold=0.2)
        images = vae.decode(sample(patched, positive, negative, sampler, 12, latent=latent, cfg=3.0))
        read = load_judge().read(images.clamp(0, 1).movedim(-1, 1))
        found[side] = list(zip(read["subject"], read["second"], strict=True))  # from left to right
    assert found["left"].count(("cat", "panda")) >= 5
    assert found["right"].count(("panda", "cat")) >= 5


def predict(clip, words, predictor=layout_predictor.TOY, concepts=None, **training):
    every = {"train_steps": 300, "seed": 0, "file_name": "mine"}
    return AtelierLayoutPredictor.execute(clip, words, predictor, 64, 48, concepts or {}, **every | training)[0]


def test_predicted_boxes_are_labelled_and_guide(toy):
    model, clip, _ = toy
    [[left, right]] = predict(clip, "panda, ball")
    assert (left["label"], right["label"]) == ("panda", "ball")
    assert 0 <= left["x"] < right["x"] and right["x"] + right["width"] <= 64
    assert right["y"] > left["y"] and right["y"] + right["height"] <= 48
    positive = AtelierTextEncode.execute(clip, "a panda stands with a ball on the right", {})[0]
    assert len(layout(guided(model, positive, "", [[left, right]], 64, 48))) == 2


def test_concepts_and_unseen_words_stand_like_the_nearest_noun(toy):
    _, clip, _ = toy
    vectors = {t: v[None] + 0.01 for t, v in layout_predictor.token_vectors(clip, "cat").items()}
    concept = Concept("mine", vectors, Layout("prompt"), "toy", ())
    named = predict(clip, "<mine>, ball", concepts={"concept0": concept})
    assert [{**b, "label": ""} for b in named[0]] == [{**b, "label": ""} for b in predict(clip, "cat, ball")[0]]
    with pytest.raises(ValueError, match="<mine>, but no concept of that name"):
        predict(clip, "<mine>, ball")


def test_it_trains_from_detections_and_keeps_the_file(toy, tmp_path, monkeypatch):
    _, clip, _ = toy
    monkeypatch.setattr(layout_predictor.folder_paths, "get_output_directory", lambda: str(tmp_path))
    monkeypatch.setitem(
        layout_predictor.folder_paths.folder_names_and_paths,
        layout_predictor.FOLDER,
        ([str(tmp_path / layout_predictor.FOLDER)], {".safetensors"}),
    )
    frames = [
        [box(40, 4, 20, 40, label="A cat"), box(2, 30, 10, 10, label="the ball")],
        [box(2, 4, 20, 40, label="a cat"), box(50, 30, 10, 10, label="a ball")],
    ]
    images = torch.zeros(2, 48, 64, 3)
    trained = predict(clip, "ball, cat", images=images, bboxes=frames)
    assert abs(trained[0][0]["x"] - 2) <= 3 and abs(trained[0][1]["x"] - 40) <= 3
    assert [p.name for p in (tmp_path / layout_predictor.FOLDER).iterdir()] == ["mine.safetensors"]
    assert "mine.safetensors" in layout_predictor.predictor_names()
    again = predict(clip, "ball, cat", "mine.safetensors")
    assert all(abs(a["x"] - b["x"]) <= 1 for a, b in zip(again[0], trained[0]))
    with pytest.raises(ValueError, match="connect both"):
        predict(clip, "ball, cat", images=images)
    with pytest.raises(ValueError, match="no label"):
        predict(clip, "ball, cat", images=images, bboxes=[box(0, 0, 9, 9)])
    with pytest.raises(ValueError, match="two different things"):
        predict(clip, "ball, cat", images=images, bboxes=[box(0, 0, 9, 9, label="cat")])
    with pytest.raises(ValueError, match="file_name"):
        predict(clip, "ball, cat", images=images, bboxes=frames, file_name="../x")


def test_predictors_of_other_words_are_refused(toy, tiny):
    with pytest.raises(ValueError, match="choose a predictor for this kind of checkpoint"):
        predict(tiny("sd1").clip, "cat, ball")
    with pytest.raises(ValueError, match="words names 1 things"):
        predict(toy[1], "cat")
