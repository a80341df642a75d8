"""Concepts together with everything else an artist connects, against attention modules that were rewired by hand.

The hand-built side runs stock nodes on the stock MODEL with stock CONDITIONING; its attn2 modules recognise the
concept's plain context in what they are given, and read the contexts that were encoded by hand for their layer.
"""

from contextlib import contextmanager
from itertools import pairwise

import comfy.sample
import comfy.samplers
import pytest
import tiny_models
import torch
from comfy_extras import nodes_custom_sampler as custom
from comparing import relative
from concept_atelier.kernels.layouts import Layout
from patched_models import KEYS_AND_VALUES, in_halves, with_lora
from prompting import CFG, SEED, STEPS, encode, ksampler, make_concept, route, stock_encode

import nodes as comfy_nodes

TOLERANCE = 2e-5
WORD = "x"  # one token; by hand, its place is where a concept's vector goes

pytestmark = pytest.mark.usefixtures("inference_mode")


def encode_by_hand(clip, text, vectors):
    """Stock CONDITIONING of `text` with the tokens of WORD replaced by vectors [{tower: (width,)}], in that order."""
    tokens = clip.tokenize(text)
    for tower, chunks in tokens.items():
        word = clip.tokenize(WORD)[tower][0][1][0]
        following = iter(vectors)
        tokens[tower] = [[(next(following)[tower] if t == word else t, w) for t, w in chunk] for chunk in chunks]
    return clip.encode_from_tokens_scheduled(tokens)


def without_payload(conditioning):
    return [[c, {k: v for k, v in values.items() if k != "model_conds"}] for c, values in conditioning]


@contextmanager
def rewired(model, *prompts):
    """While open, the attn2 modules of MODEL give each of `prompts`, (plain context, contexts_of), its own contexts.

    contexts_of(layer number, timestep) -> contexts (1, T, d) of K and of V.
    """
    unet = model.model.diffusion_model
    modules = [module for name, module in unet.named_modules() if name.endswith(".attn2")]

    def read(module, number):
        def forward(x, context=None, value=None, mask=None, transformer_options={}):  # noqa: B006
            t = int(model.model.model_sampling.timestep(transformer_options["sigmas"])[0])
            keys, values = context.clone(), context.clone()
            for sample in range(len(context)):
                for at in range(0, context.shape[1], 77):
                    for plain, contexts_of in prompts:
                        if torch.equal(context[sample, at : at + 77], plain[0]):
                            k, v = contexts_of(number, t)
                            keys[sample, at : at + 77], values[sample, at : at + 77] = k[0], v[0]
            return type(module).forward(module, x, keys, values, mask, transformer_options)

        return forward

    for number, module in enumerate(modules):
        module.forward = read(module, number)
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def sampler_custom_advanced(model, positive, negative):
    noise = custom.RandomNoise.execute(SEED)[0]
    guider = custom.CFGGuider.execute(model, positive, negative, CFG)[0]
    sampler = custom.KSamplerSelect.execute("euler")[0]
    sigmas = custom.BasicScheduler.execute(model, "karras", STEPS, 1.0)[0]
    latent = {"samples": torch.zeros(1, 4, 8, 8)}
    return custom.SamplerCustomAdvanced.execute(noise, guider, sampler, sigmas, latent)[0]["samples"]


class Prompted:
    """A prompt with one concept on a tiny model, through our nodes and by hand."""

    def __init__(self, tiny, layout, seed=0):
        self.tiny = tiny
        self.concept = make_concept(tiny, "salute", layout, seed)
        self.positive = encode(tiny.clip, "a man <salute> on grass", self.concept)
        self.negative = stock_encode(tiny.clip, "blurry")
        self.bound = layout.bind(self.concept.layers)
        vectors = self.concept.vectors
        self.by_slot = [
            encode_by_hand(tiny.clip, f"a man {WORD} on grass", [{t: v[slot, 0] for t, v in vectors.items()}])
            for slot in range(self.bound.slots)
        ]

    @property
    def prompt(self):
        return self.positive[0][0], self.contexts_of

    def contexts_of(self, layer, t):
        key, value = self.bound.table(self.bound.stage(t, 1000))
        return self.by_slot[key[layer]][0][0], self.by_slot[value[layer]][0][0]


@pytest.fixture(scope="module")
def sd1(tiny):
    with torch.inference_mode():
        return Prompted(tiny("sd1"), Layout("layer"))


def compare(prompted, compose=lambda positive, negative: (positive, negative), sampler=ksampler, change=route):
    """Sample with payload and by hand; both agree, and both differ from the plain context's picture."""
    model = prompted.tiny.model
    ours = sampler(change(model), *compose(prompted.positive, prompted.negative))
    stock = compose(without_payload(prompted.positive), prompted.negative)
    with rewired(model, prompted.prompt):
        by_hand = sampler(model, *stock)
    plain = sampler(model, *stock)
    assert relative(ours, by_hand) < TOLERANCE
    assert relative(plain, by_hand) > 1e-2
    return ours


@pytest.mark.parametrize("sampler", [ksampler, sampler_custom_advanced])
@pytest.mark.parametrize(
    "layout", [Layout("layer"), Layout("block"), Layout("prompt", stages=5, split_kv=True), Layout("layer", 1, 3, True)]
)
def test_samplers_see_every_layout(tiny, layout, sampler):
    compare(Prompted(tiny("sd1"), layout), sampler=sampler)


@pytest.mark.parametrize("topology", ["sd2", "sd2_v", "sdxl"])
def test_other_architectures(tiny, topology):
    compare(Prompted(tiny(topology), Layout("block")))


def test_separate_forward_passes_by_hand(sd1):
    """Once without any of ComfyUI's batching: Euler written out, prompt and negative one after the other."""
    model = sd1.tiny.model
    unet, sampling = model.model.diffusion_model, model.model.model_sampling
    sigmas = comfy.samplers.calculate_sigmas(sampling, "normal", STEPS)
    latent = torch.zeros(1, 4, 8, 8)

    def eps(x, sigma, context):
        options = {"sigmas": sigma}
        t = sampling.timestep(sigma).float()
        return unet(sampling.calculate_input(sigma, x), t, context=context, transformer_options=options)

    with rewired(model, sd1.prompt):
        x = sampling.noise_scaling(sigmas[0], comfy.sample.prepare_noise(latent, SEED), latent, True)
        for sigma, following in zip(sigmas[:-1, None], sigmas[1:, None]):
            conditioned = eps(x, sigma, sd1.positive[0][0])
            unconditioned = eps(x, sigma, sd1.negative[0][0])
            x = x + (unconditioned + CFG * (conditioned - unconditioned)) * (following - sigma)
    ours = ksampler(route(model), sd1.positive, sd1.negative)
    assert relative(ours, model.model.process_latent_out(x)) < TOLERANCE


def test_contexts_are_those_of_the_stock_encoder(sd1):
    """The plain context, which ControlNets read, is the mean over all rows."""
    mean = torch.stack([conditioning[0][0] for conditioning in sd1.by_slot]).mean(0)
    pooled = torch.stack([conditioning[0][1]["pooled_output"] for conditioning in sd1.by_slot]).mean(0)
    assert relative(sd1.positive[0][0], mean) < 1e-5
    assert relative(sd1.positive[0][1]["pooled_output"], pooled) < 1e-5


def test_batch_of_latents(sd1):
    compare(sd1, sampler=lambda model, *prompts: ksampler(model, *prompts, latent={"samples": torch.zeros(2, 4, 8, 8)}))


@pytest.mark.parametrize("together", [False, True])
def test_tiles_of_a_batch(sd1, together):
    latent = {"samples": torch.zeros(2, 4, 8, 16)}
    compare(sd1, sampler=lambda model, *prompts: ksampler(in_halves(model, together), *prompts, latent=latent))


def test_a_batch_sample_by_sample(sd1):
    def one_by_one(apply_model, given):
        x, t, c = given["input"], given["timestep"], given["c"]
        # Both prompts of one sample at a time.
        parts = [apply_model(x[i::2], t[i::2], **c | {"c_crossattn": c["c_crossattn"][i::2]}) for i in range(2)]
        return torch.stack(parts, dim=1).flatten(0, 1)

    def sampler(model, *prompts):
        model = model.clone()
        model.set_model_unet_function_wrapper(one_by_one)
        return ksampler(model, *prompts, latent={"samples": torch.zeros(2, 4, 8, 8)})

    compare(sd1, sampler=sampler)


def test_negative_of_another_length(sd1):
    long = stock_encode(sd1.tiny.clip, "blurry, " * 60)
    assert long[0][0].shape[1] == 154
    compare(sd1, lambda positive, negative: (positive, long))


def test_concept_in_the_negative_alone(sd1):
    compare(sd1, lambda positive, negative: (negative, positive))


def test_combine(sd1):
    other = stock_encode(sd1.tiny.clip, "a dog in snow")
    compare(sd1, lambda positive, negative: (comfy_nodes.ConditioningCombine().combine(other, positive)[0], negative))


def test_combine_of_two_concepts(sd1):
    second = Prompted(sd1.tiny, Layout("layer"), seed=9)
    model = sd1.tiny.model
    ours = ksampler(route(model), sd1.positive + second.positive, sd1.negative)
    with rewired(model, sd1.prompt, second.prompt):
        by_hand = ksampler(model, without_payload(sd1.positive + second.positive), sd1.negative)
    assert relative(ours, by_hand) < TOLERANCE
    assert relative(ksampler(route(model), sd1.positive, sd1.negative), by_hand) > 1e-2


def test_concat_keeps_what_follows(sd1):
    other = stock_encode(sd1.tiny.clip, "a dog in snow")
    compare(sd1, lambda positive, negative: (comfy_nodes.ConditioningConcat().concat(positive, other)[0], negative))


def test_area_does_not_leak_into_the_negative(sd1):
    other = stock_encode(sd1.tiny.clip, "a dog in snow")

    def halves(positive, negative):
        set_area = comfy_nodes.ConditioningSetAreaPercentage().append
        return set_area(positive, 0.5, 1.0, 0.0, 0.0, 1.0)[0] + set_area(other, 0.5, 1.0, 0.5, 0.0, 1.0)[0], negative

    compare(sd1, halves)


def test_area_of_the_negative_does_not_reach_a_silenced_positive(sd1):
    def silenced(positive, negative):
        area = comfy_nodes.ConditioningSetAreaPercentage().append(positive, 0.5, 1.0, 0.0, 0.0, 1.0)[0]
        return comfy_nodes.ConditioningZeroOut().zero_out(positive)[0], area + negative

    compare(sd1, silenced)


def test_mask(sd1):
    mask = torch.zeros(1, 64, 64)
    mask[:, :, :32] = 1
    other = stock_encode(sd1.tiny.clip, "a dog in snow")

    def masked(positive, negative):
        return comfy_nodes.ConditioningSetMask().append(positive, mask, "default", 1.0)[0] + other, negative

    compare(sd1, masked)


def test_timestep_range(sd1):
    other = stock_encode(sd1.tiny.clip, "a dog in snow")

    def halves(positive, negative):
        set_range = comfy_nodes.ConditioningSetTimestepRange().set_range
        return set_range(positive, 0.0, 0.4)[0] + set_range(other, 0.4, 1.0)[0], negative

    compare(sd1, halves)


@pytest.fixture(scope="module")
def controlnet(tiny):
    return tiny_models.build_controlnet(tiny("sd1").model)


HINT = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(4))


def test_controlnet_on_both_prompts(sd1, controlnet):
    def controlled(positive, negative):
        return comfy_nodes.ControlNetApplyAdvanced().apply_controlnet(
            positive, negative, controlnet, HINT, 0.2, 0.0, 1.0
        )

    with_control = compare(sd1, controlled)
    assert relative(with_control, ksampler(route(sd1.tiny.model), sd1.positive, sd1.negative)) > 1e-2


def test_controlnet_on_the_positive_before_and_after_combine(sd1, controlnet):
    apply, combine = comfy_nodes.ControlNetApply().apply_controlnet, comfy_nodes.ConditioningCombine().combine
    other = stock_encode(sd1.tiny.clip, "a dog in snow")
    before = compare(sd1, lambda p, n: (combine(apply(p, controlnet, HINT, 0.2)[0], other)[0], n))
    after = compare(sd1, lambda p, n: (apply(combine(p, other)[0], controlnet, HINT, 0.2)[0], n))
    assert relative(before, after) > 1e-3


def add_lora(model):
    return with_lora(model, 5, layers=KEYS_AND_VALUES)


def test_lora_before_and_after_apply(sd1):
    model = sd1.tiny.model
    changed = add_lora(model)
    with rewired(model, sd1.prompt):
        by_hand = ksampler(changed, without_payload(sd1.positive), sd1.negative)
        without_lora = ksampler(model, without_payload(sd1.positive), sd1.negative)
    assert relative(ksampler(route(changed), sd1.positive, sd1.negative), by_hand) < TOLERANCE
    assert relative(ksampler(add_lora(route(model)), sd1.positive, sd1.negative), by_hand) < TOLERANCE
    assert relative(without_lora, by_hand) > 1e-2


def test_two_concepts_of_different_layouts_in_one_prompt(tiny):
    """One per layer, the other by stage with K and V apart: each reader gets its own combination."""
    model, clip, _ = tiny("sd1")
    per_layer = make_concept(tiny("sd1"), "salute", Layout("layer"), seed=1)
    by_stage = make_concept(tiny("sd1"), "anna", Layout("prompt", stages=3, split_kv=True), seed=2)
    positive = encode(clip, "a photo of <anna> doing <salute>", per_layer, by_stage)
    negative = stock_encode(clip, "blurry")
    encoded = {}

    def context(layer, slot):
        if (layer, slot) not in encoded:
            vectors = [{"l": by_stage.vectors["l"][slot, 0]}, {"l": per_layer.vectors["l"][layer, 0]}]
            encoded[layer, slot] = encode_by_hand(clip, f"a photo of {WORD} doing {WORD}", vectors)[0][0]
        return encoded[layer, slot]

    def contexts_of(layer, t):
        stage = 3 * t // 1000
        return context(layer, 2 * stage), context(layer, 2 * stage + 1)

    ours = ksampler(route(model), positive, negative)
    with rewired(model, (positive[0][0], contexts_of)):
        by_hand = ksampler(model, without_payload(positive), negative)
    assert relative(ours, by_hand) < TOLERANCE


def test_stages_equal_one_conditioning_a_step(tiny):
    """SeFi-IDE's layout against stock nodes alone: where K and V agree, a stage is a timestep range of its own."""
    prompted = Prompted(tiny("sd1"), Layout("prompt", stages=4))
    sampling = prompted.tiny.model.model.model_sampling
    sigmas = comfy.samplers.calculate_sigmas(sampling, "normal", STEPS)
    timesteps = [float(sampling.timestep(sigma)) for sigma in sigmas[:-1]]
    assert len({int(4 * t // 1000) for t in timesteps}) > 2
    # A range's edges lie midway between the timesteps of two steps.
    edges = [0.0] + [1 - (a + b) / 2 / 999 for a, b in pairwise(timesteps)] + [1.0]
    ranges = []
    for t, start, end in zip(timesteps, edges, edges[1:]):
        context = prompted.contexts_of(0, int(t))[0]
        one = [[context, {"pooled_output": prompted.positive[0][1]["pooled_output"]}]]
        ranges += comfy_nodes.ConditioningSetTimestepRange().set_range(one, start, end)[0]
    ours = ksampler(route(prompted.tiny.model), prompted.positive, prompted.negative)
    assert relative(ours, ksampler(prompted.tiny.model, ranges, prompted.negative)) < TOLERANCE


def test_one_forward_pass_a_step(sd1):
    """With a payload, prompt and negative still share a batch."""
    batches = []
    unet = sd1.tiny.model.model.diffusion_model
    hook = unet.register_forward_pre_hook(lambda module, args, kwargs: batches.append(len(args[0])), with_kwargs=True)
    ksampler(route(sd1.tiny.model), sd1.positive, sd1.negative)
    hook.remove()
    assert batches == [2] * STEPS
