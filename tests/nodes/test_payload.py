"""What rides in CONDITIONING: nothing where stock suffices, nothing left behind, a sentence where it cannot work."""

from types import SimpleNamespace

import comfy.hooks
import comfy.model_sampling
import pytest
import torch
from comfy_extras.nodes_easycache import EasyCacheNode
from comfy_extras.nodes_hooks import SetClipHooks
from comfy_extras.nodes_model_advanced import ModelSamplingContinuousEDM
from comparing import digest
from concept_atelier.kernels.backbone import TextContext
from concept_atelier.kernels.concept import Concept
from concept_atelier.kernels.conditioning import StagedContext
from concept_atelier.kernels.layouts import Layout
from concept_atelier.nodes.native.payload import KEY, contexts_at
from patched_models import lora_file
from prompting import encode, ksampler, make_concept, route, stock_encode

import nodes as comfy_nodes

ONE_TOKEN, PER_LAYER, STAGED = Layout(), Layout("layer"), Layout("prompt", stages=2)

pytestmark = pytest.mark.usefixtures("inference_mode")


def sample(model, positive, negative, steps=2):
    return ksampler(model, positive, negative, steps=steps)


@pytest.fixture
def prompts(sd1):
    concept = make_concept(sd1, "salute", PER_LAYER)
    return encode(sd1.clip, "a man <salute> on grass", concept), stock_encode(sd1.clip, "blurry")


@pytest.mark.parametrize("text", ["a man on grass", "a (red:1.3) ball, [thing] \\(x\\)", "", "word " * 100])
def test_a_prompt_without_concepts_is_the_stock_encoding(any_tiny, text):
    [[ours, ours_more]], [[stock, stock_more]] = encode(any_tiny.clip, text), stock_encode(any_tiny.clip, text)
    assert torch.equal(ours, stock)
    assert torch.equal(ours_more["pooled_output"], stock_more["pooled_output"])
    assert "model_conds" not in ours_more


def test_unused_concepts_do_nothing(sd1):
    concept = make_concept(sd1, "salute", PER_LAYER)
    assert torch.equal(encode(sd1.clip, "a man", concept)[0][0], stock_encode(sd1.clip, "a man")[0][0])


def test_one_token_needs_no_routing(sd1):
    positive = encode(sd1.clip, "a man <salute>", make_concept(sd1, "salute", ONE_TOKEN))
    negative = stock_encode(sd1.clip, "blurry")
    assert "model_conds" not in positive[0][1]
    assert torch.equal(sample(sd1.model, positive, negative), sample(route(sd1.model), positive, negative))


def test_routing_without_payload_changes_no_bit(any_tiny):
    model, clip, _ = any_tiny
    positive, negative = stock_encode(clip, "a man on grass"), stock_encode(clip, "blurry")
    assert torch.equal(sample(model, positive, negative), sample(route(model), positive, negative))


def test_routing_twice_is_routing_once(sd1, prompts):
    once, twice = route(sd1.model), route(route(sd1.model))
    assert torch.equal(sample(once, *prompts), sample(twice, *prompts))
    assert [len(wrappers) for wrappers in twice.wrappers["calc_cond_batch"].values()] == [1]


def test_easycache_saves_forwards(sd1, prompts):
    cached, forwards = EasyCacheNode.execute(route(sd1.model), 0.8, 0.1, 0.95, False)[0], []
    hook = sd1.model.model.diffusion_model.out.register_forward_pre_hook(lambda _, given: forwards.append(given))
    sample(cached, *prompts, steps=20)
    hook.remove()
    assert len(forwards) < 15


def test_other_patches_see_the_contexts_of_their_layer(sd1, prompts):
    seen = []

    def look(n, context, value, extra):
        seen.append(context[extra["cond_or_uncond"].index(0)])
        return n, context, value

    model = sd1.model.clone()
    model.set_model_attn2_patch(look)
    sample(route(model), *prompts, steps=1)
    rows = prompts[0][0][1]["model_conds"][KEY].cond.staged.contexts[0].rows[:, 0]
    assert torch.equal(torch.stack(seen), rows)


def test_the_base_model_is_as_before(sd1, prompts):
    plain = stock_encode(sd1.clip, "a man"), prompts[1]
    picture, fingerprint = sample(sd1.model, *plain), digest(sd1)
    conditioning = prompts[0][0][0].clone()
    sample(route(sd1.model), *prompts)
    assert torch.equal(sample(sd1.model, *plain), picture)
    assert digest(sd1) == fingerprint
    assert torch.equal(prompts[0][0][0], conditioning)
    assert not sd1.model.wrappers.get("calc_cond_batch")


def test_an_unrouted_model_refuses(sd1, prompts):
    with pytest.raises(ValueError, match="route the MODEL through 'Apply Concepts'"):
        sample(sd1.model, *prompts)


def test_zeroed_out_conditioning_says_nothing_at_all(sd1, prompts):
    zeroed = comfy_nodes.ConditioningZeroOut().zero_out(prompts[0])[0]
    plain = comfy_nodes.ConditioningZeroOut().zero_out(stock_encode(sd1.clip, "a man"))[0]
    assert torch.equal(sample(route(sd1.model), prompts[1], zeroed), sample(route(sd1.model), prompts[1], plain))


def test_averaged_conditioning_refuses(sd1, prompts):
    averaged = comfy_nodes.ConditioningAverage().addWeighted(*prompts, 0.5)[0]
    with pytest.raises(ValueError, match="changed this conditioning's values"):
        sample(route(sd1.model), averaged, prompts[1])


def test_a_model_of_another_kind_refuses(tiny, prompts):
    with pytest.raises(ValueError, match=r"16 cross-attention layers .* this MODEL has 70 layers"):
        sample(route(tiny("sdxl").model), prompts[0], stock_encode(tiny("sdxl").clip, "blurry"))


def test_a_model_without_cross_attention_refuses():
    model = SimpleNamespace(model=SimpleNamespace(diffusion_model=torch.nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="no U-Net"):
        route(model)


def test_stages_need_timesteps(sd1):
    positive = encode(sd1.clip, "a man <salute>", make_concept(sd1, "salute", STAGED))
    negative = stock_encode(sd1.clip, "blurry")
    edm = ModelSamplingContinuousEDM().patch(sd1.model, "eps", 14.6, 0.03)[0]
    with pytest.raises(ValueError, match="does not count"):
        sample(route(edm), positive, negative)


def test_samples_at_different_noise_levels_get_their_own_stage():
    early, late = (TextContext(torch.full((1, 1, 2, 3), value), (0,), (0,)) for value in (1.0, 0.0))
    staged = StagedContext((0, 500), (late, early), {})
    sampling = comfy.model_sampling.ModelSamplingDiscrete()
    sigmas = sampling.sigmas[torch.tensor([499, 500, 999])]
    assert contexts_at(staged, sampling, sigmas) == (late, early, early)
    assert contexts_at(staged, sampling, sigmas[1:]) == (early,)


def test_payload_stays_on_the_cpu_and_out_of_the_stock_keys(prompts):
    [[context, values]] = prompts[0]
    payload = values["model_conds"][KEY].cond
    assert payload.staged.contexts[0].rows.device.type == "cpu"
    assert payload.staged.contexts[0].rows.shape == (16, 1, 77, 64)
    assert context.shape == (1, 77, 64)


def test_bad_prompts_and_concepts(tiny, sd1):
    concept = make_concept(sd1, "salute", PER_LAYER)
    with pytest.raises(ValueError, match=r"asks for <wave>.*<salute>"):
        encode(sd1.clip, "a man <wave>", concept)
    with pytest.raises(ValueError, match="none is connected"):
        encode(sd1.clip, "a man <wave>")
    with pytest.raises(ValueError, match="Two connected concepts are called <salute>"):
        encode(sd1.clip, "a man <salute>", concept, concept)
    with pytest.raises(ValueError, match=r"learned on sd1 .* cannot be used with this sdxl"):
        encode(tiny("sdxl").clip, "a man", concept)
    shorter = Concept("wave", concept.vectors, PER_LAYER, "sd1", concept.layers[:7])
    with pytest.raises(ValueError, match="different cross-attention layers"):
        encode(sd1.clip, "a man <salute> and <wave>", concept, shorter)


def test_weights_reach_placeholders(sd1):
    concept = make_concept(sd1, "salute", ONE_TOKEN)
    plain, weighted = (encode(sd1.clip, text, concept)[0][0] for text in ("a <salute>", "a (<salute>:1.5)"))
    changed = (plain != weighted).any(dim=-1)[0]
    assert changed.nonzero().flatten().tolist() == [2]


def with_hooks(sd1, scheduled=False):
    """A CLIP with a LoRA of U-Net and text encoder as hooks."""
    layer, generator = "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1", torch.Generator()
    text = {f"{layer}.lora_up.weight": torch.randn(128, 2, generator=generator.manual_seed(0))}
    text |= {f"{layer}.lora_down.weight": torch.randn(2, 64, generator=generator)}
    hooks = comfy.hooks.create_hook_lora(lora_file(sd1.model, 5) | text, 1.0, 1.0)
    return SetClipHooks().apply_hooks(sd1.clip, scheduled, True, hooks)[0]


def test_hooks_of_the_clip_ride_along(sd1):
    hooked, concept = with_hooks(sd1), make_concept(sd1, "salute", PER_LAYER)
    ours, stock = encode(hooked, "a man"), stock_encode(hooked, "a man")
    assert torch.equal(ours[0][0], stock[0][0])
    assert not torch.equal(ours[0][0], stock_encode(sd1.clip, "a man")[0][0])
    assert ours[0][1]["hooks"] is stock[0][1]["hooks"]
    negative, with_concept = stock_encode(sd1.clip, "blurry"), encode(hooked, "a <salute>", concept)
    assert torch.equal(sample(route(sd1.model), ours, negative), sample(sd1.model, stock, negative))
    without = [[with_concept[0][0], {k: v for k, v in with_concept[0][1].items() if k != "hooks"}]]
    pictures = [sample(route(sd1.model), positive, negative) for positive in (with_concept, without)]
    assert not torch.equal(*pictures)


def test_scheduled_hooks_of_the_clip_refuse(sd1):
    with pytest.raises(ValueError, match="turn schedule_clip off"):
        encode(with_hooks(sd1, scheduled=True), "a man")
