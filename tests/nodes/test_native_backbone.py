"""The backbone on real ComfyUI objects: against ComfyUI's own samplers, against hooks, against finite differences."""

import hashlib
from contextlib import ExitStack

import comfy.model_base
import comfy.model_sampling
import comfy.sample
import comfy.samplers
import comfy.sd
import comfy.supported_models
import pytest
import tiny_models
import torch
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_easycache import EasyCacheNode
from comparing import relative
from concept_atelier.kernels.backbone import Layer, TextContext
from concept_atelier.kernels.prompts import parse_prompt
from concept_atelier.kernels.schedule import NoiseSchedule
from concept_atelier.nodes.native.backbone import native_session
from concept_atelier.nodes.native.model_kind import cross_attention_layers, model_family
from patched_models import lora_file

PLAIN = parse_prompt("a photo of a cat", [])
LEARNED = parse_prompt("a photo of <cat>, in (snow:1.2)", ["cat"])
T = torch.tensor([37, 640])


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def conditioning(clip, text):
    hidden, pooled = clip.encode_from_tokens(clip.tokenize(text), return_pooled=True)
    return [[hidden, {"pooled_output": pooled}]]


def stock_eps(model, x_t, t, cond):
    """eps from one evaluation inside ComfyUI's own sampling machinery (SD's schedule is the test's own)."""
    sigma = model.get_model_object("model_sampling").sigmas[t].clone()
    s = sigma.view(-1, 1, 1, 1)
    x = x_t * (1 + s**2).sqrt()
    seen = {}

    def once(denoise, x_in, sigmas, extra_args=None, callback=None, disable=None):
        seen["denoised"] = denoise(x, sigma, **extra_args)
        return x_in

    sampler = comfy.samplers.KSAMPLER(once)
    start = torch.zeros_like(x)
    comfy.samplers.sample(
        model, start, cond, cond, 1.0, model.load_device, sampler, torch.tensor([1.0, 0.0]), latent_image=start, seed=0
    )
    return (x - seen["denoised"]) / s


def plain_context(backbone, prompt=PLAIN, batch=2):
    encoding = backbone.encode_text(prompt, {})
    return TextContext.plain(encoding.hidden, backbone.layers, encoding.pooled).repeat(batch)


def layer_context(backbone, batch=2, seed=5):
    """Every layer its own context for K and for V."""
    count = len(backbone.layers)
    rows = noise(2 * count, batch, 77, backbone.context_width, seed=seed)
    pooled = noise(batch, backbone.towers["g"], seed=seed) if backbone.family == "sdxl" else None
    return TextContext(rows, tuple(range(count)), tuple(range(count, 2 * count)), pooled)


def vectors(backbone, variants=1, tokens=2, seed=3):
    by_tower = {tower: noise(variants, tokens, width, seed=seed) for tower, width in backbone.towers.items()}
    return {tower: v.requires_grad_() for tower, v in by_tower.items()}


def with_lora(model):
    key = "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"
    changed = model.clone()
    changed.add_patches({key: ("diff", (noise(*model.model.state_dict()[key].shape),))}, 0.1)
    return changed


def with_attn2_patch(model):
    changed = model.clone()
    changed.set_model_attn2_patch(lambda n, context, value, extra: (n, context * 1.1, value * 0.9))
    return changed


def with_wrappers(model):
    changed = model.clone()
    changed.add_wrapper(WrappersMP.DIFFUSION_MODEL, lambda executor, *args, **kwargs: executor(*args, **kwargs) * 0.9)
    changed.set_model_unet_function_wrapper(lambda apply, a: apply(a["input"], a["timestep"], **a["c"]) * 1.1)
    return changed


@pytest.mark.parametrize("change", [lambda model: model, with_lora, with_attn2_patch, with_wrappers])
def test_plain_context_is_the_stock_model_bit_for_bit(any_tiny, change):
    model, clip, vae = any_tiny
    x_t = noise(2, 4, 16, 16)
    changed = change(model)
    with torch.inference_mode():
        expected = stock_eps(changed, x_t, T, conditioning(clip, PLAIN.text))
        unchanged = stock_eps(model, x_t, T, conditioning(clip, PLAIN.text))
    with native_session(changed, clip, vae) as backbone, torch.no_grad():
        assert torch.equal(backbone.predict_noise(x_t, T, plain_context(backbone)), expected)
    assert (changed is model) == torch.equal(expected, unchanged)


def test_with_gradients_it_is_the_stock_model_with_pytorch_attention(any_tiny):
    from comfy.ldm.modules.attention import attention_pytorch

    model, clip, vae = any_tiny
    pytorch = model.clone()
    pytorch.set_model_optimized_attention(attention_pytorch)
    x_t = noise(2, 4, 16, 16)
    with torch.inference_mode():
        expected = stock_eps(pytorch, x_t, T, conditioning(clip, PLAIN.text))
    with native_session(model, clip, vae) as backbone:
        assert torch.equal(backbone.predict_noise(x_t, T, plain_context(backbone)), expected)


def test_layers_read_their_own_contexts_for_k_and_v(any_tiny):
    model, clip, vae = any_tiny
    x_t = noise(2, 4, 16, 16)
    with native_session(model, clip, vae) as backbone, torch.no_grad():
        context = layer_context(backbone)
        got = backbone.predict_noise(x_t, T, context)
        plain = TextContext.plain(context.rows[0], backbone.layers, context.pooled)
        with ExitStack() as hooks:
            for number, module in enumerate(attn2_modules(model)):
                for projection, row in zip((module.to_k, module.to_v), context.sources(number)):
                    hook = projection.register_forward_pre_hook(lambda _module, _args, row=row: (row,))
                    hooks.callback(hook.remove)
            assert torch.equal(got, backbone.predict_noise(x_t, T, plain))
        assert relative(got, backbone.predict_noise(x_t, T, plain)) > 1e-2


def attn2_modules(model):
    return [m for name, m in model.model.diffusion_model.named_modules() if name.endswith(".attn2")]


def test_layer_table_follows_the_order_of_execution(any_tiny):
    model, clip, vae = any_tiny
    called = []
    watched = model.clone()
    watched.set_model_attn2_patch(
        lambda n, c, v, extra: called.append(Layer(*extra["block"], extra["block_index"])) or (n, c, v)
    )
    with native_session(watched, clip, vae) as backbone, torch.no_grad():
        backbone.predict_noise(noise(2, 4, 16, 16), T, plain_context(backbone))
    assert tuple(called) == cross_attention_layers(model)
    assert len(called) == (70 if model_family(model) == "sdxl" else 16)


def test_another_nodes_attn2_patch_sees_the_layers_own_contexts(tiny):
    model, clip, vae = tiny("sd1")
    seen = {}
    watched = model.clone()
    watched.set_model_attn2_patch(
        lambda n, c, v, extra: seen.update({(*extra["block"], extra["block_index"]): (c, v)}) or (n, c, v)
    )
    with native_session(watched, clip, vae) as backbone, torch.no_grad():
        context = layer_context(backbone)
        backbone.predict_noise(noise(2, 4, 16, 16), T, context)
    for number, layer in enumerate(backbone.layers):
        for got, expected in zip(seen[layer], context.sources(number)):
            assert torch.equal(got, expected)


def test_gradient_to_token_vectors_equals_finite_differences(any_tiny):
    model, clip, vae = any_tiny
    x_t, weight = noise(1, 4, 16, 16), noise(1, 4, 16, 16, seed=9)
    with native_session(model, clip, vae) as backbone:
        count = len(backbone.layers)
        learned = vectors(backbone, variants=count)

        def loss(shifted):
            encoding = backbone.encode_text(LEARNED, {"cat": shifted})
            pooled = None if encoding.pooled is None else encoding.pooled.mean(0, keepdim=True)
            table = tuple(range(count))
            context = TextContext(encoding.hidden[:, None], table, table[::-1], pooled)
            return (backbone.predict_noise(x_t, T[1:], context).double() * weight).mean()

        loss(learned).backward()
        # Along the gradient the loss changes most, well above float32's noise; a wrong gradient points elsewhere.
        direction = {tower: v.grad / v.grad.square().mean().sqrt() for tower, v in learned.items()}
        slope = sum(float((v.grad * direction[tower]).sum()) for tower, v in learned.items())
        with torch.no_grad():
            up, down = (loss({k: v + h * direction[k] for k, v in learned.items()}) for h in (1e-3, -1e-3))
        assert slope == pytest.approx(float(up - down) / 2e-3, rel=0.02)
        assert all(v.grad.abs().sum(-1).min() > 0 for v in learned.values())


def test_gradient_to_latents_equals_finite_differences(any_tiny):
    model, clip, vae = any_tiny
    with native_session(model, clip, vae) as backbone:
        context = layer_context(backbone)
        x_t = noise(2, 4, 16, 16).requires_grad_()
        weight, direction = noise(2, 4, 16, 16, seed=8), noise(2, 4, 16, 16, seed=9)

        def loss(x):
            return (backbone.predict_noise(x, T, context).double() * weight).mean()

        loss(x_t).backward()
        with torch.no_grad():
            slope = float(loss(x_t + 3e-4 * direction) - loss(x_t - 3e-4 * direction)) / 6e-4
    assert float((x_t.grad * direction).sum()) == pytest.approx(slope, rel=0.02)


def test_gradient_to_an_adapter_on_a_forward_hook(tiny):
    model, clip, vae = tiny("sd1")
    with native_session(model, clip, vae) as backbone:
        name, linear = next(item for item in backbone.linears().items() if item[0].endswith("attn2.to_v"))
        delta = torch.zeros(linear.out_features, linear.in_features, requires_grad=True)
        hook = linear.register_forward_hook(lambda _module, args, out: out + args[0] @ delta.T)
        context = plain_context(backbone)
        backbone.predict_noise(noise(2, 4, 16, 16), T, context).mean().backward()
        hook.remove()
    assert name == "input_blocks.1.1.transformer_blocks.0.attn2.to_v"
    assert delta.grad.abs().max() > 0 and linear.weight.grad is None


def test_linears_are_the_attention_projections(any_tiny):
    model, clip, vae = any_tiny
    with native_session(model, clip, vae) as backbone:
        linears = backbone.linears()
    assert len(linears) == 8 * len(backbone.layers)
    assert all(isinstance(linear, torch.nn.Linear) for linear in linears.values())


def test_timesteps_may_differ_in_a_batch(any_tiny):
    model, clip, vae = any_tiny
    x_t = noise(2, 4, 16, 16)
    with native_session(model, clip, vae) as backbone, torch.no_grad():
        context = layer_context(backbone, batch=1)
        together = backbone.predict_noise(x_t, T, context.repeat(2))
        for i in range(2):
            alone = backbone.predict_noise(x_t[i : i + 1], T[i : i + 1], context)
            assert relative(together[i : i + 1], alone) < 1e-4


def test_eps_is_that_of_the_network_also_for_v_prediction(any_tiny):
    model, clip, vae = any_tiny
    x_t = noise(2, 4, 16, 16)
    raw = {}
    hook = model.model.diffusion_model.register_forward_hook(lambda _module, _args, out: raw.update(out=out))
    with native_session(model, clip, vae) as backbone, torch.no_grad():
        eps = backbone.predict_noise(x_t, T, plain_context(backbone))
    hook.remove()
    is_v = isinstance(model.model.model_sampling, comfy.model_sampling.V_PREDICTION)
    expected = backbone.schedule.eps_from_v(x_t, T, raw["out"]) if is_v else raw["out"]
    assert relative(eps, expected) < 1e-5
    everywhere = torch.arange(1000)
    assert torch.allclose(backbone.schedule.abar(everywhere), NoiseSchedule.scaled_linear().abar(everywhere), rtol=1e-5)


def test_sdxl_reads_pooled_text_and_the_size_of_the_picture(tiny):
    model, clip, vae = tiny("sdxl")
    labels = []
    hook = model.model.diffusion_model.register_forward_pre_hook(
        lambda _module, _args, kwargs: labels.append(kwargs["y"]), with_kwargs=True
    )
    with native_session(model, clip, vae) as backbone, torch.no_grad():
        context = plain_context(backbone)
        backbone.predict_noise(noise(2, 4, 8, 12), T, context)
    hook.remove()
    sizes = [64, 96, 0, 0, 64, 96]  # height, width, crop top, crop left, target height, target width
    time_ids = torch.cat([model.model.embedder(torch.tensor([float(size)])) for size in sizes], dim=1)
    assert torch.equal(labels[0], torch.cat([context.pooled, time_ids.flatten().repeat(2, 1)], dim=1))


@pytest.mark.parametrize("gradients", [False, True])
def test_attention_maps_equal_a_recomputation_and_leave_the_output_alone(any_tiny, gradients):
    model, clip, vae = any_tiny
    x_t = noise(2, 4, 16, 16)
    with native_session(model, clip, vae) as backbone, torch.set_grad_enabled(gradients):
        context = layer_context(backbone)
        chosen = backbone.layers[1::5]
        expected = backbone.predict_noise(x_t, T, context)
        modules = dict(zip(backbone.layers, attn2_modules(model)))
        projected = {}
        with backbone.attention(chosen, range(77)) as everything, backbone.attention(chosen, [4, 9]) as few:
            with ExitStack() as hooks:
                for layer in chosen:
                    for name in ("to_q", "to_k"):
                        hook = getattr(modules[layer], name).register_forward_hook(
                            lambda _module, _args, out, key=(layer, name): projected.update({key: out})
                        )
                        hooks.callback(hook.remove)
                assert torch.equal(backbone.predict_noise(x_t, T, context), expected)
            backbone.predict_noise(x_t, T, context)
        assert set(everything.maps) == set(chosen)
        for layer in chosen:
            heads = modules[layer].heads
            q, k = (projected[layer, n].unflatten(-1, (heads, -1)).transpose(1, 2) for n in ("to_q", "to_k"))
            by_hand = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
            first, second = everything.maps[layer]
            assert torch.allclose(first, by_hand, atol=1e-6) and torch.equal(first, second)
            assert torch.allclose(first.sum(-1), torch.ones(first.shape[:-1]), atol=1e-5)
            assert torch.equal(few.maps[layer][0], first[..., [4, 9]])


def test_attention_maps_have_gradients_to_latents_and_context(tiny):
    model, clip, vae = tiny("sd1")
    x_t = noise(2, 4, 16, 16).requires_grad_()
    with native_session(model, clip, vae) as backbone:
        rows = noise(16, 2, 77, 64).requires_grad_()
        with backbone.attention(backbone.layers[3:5], [5]) as recorded:
            backbone.predict_noise(x_t, T, TextContext(rows, tuple(range(16)), tuple(range(16))))
        sum(maps[0].mean() for maps in recorded.maps.values()).backward()
    assert x_t.grad.abs().max() > 0
    read = rows.grad.abs().amax((1, 2, 3)) > 0
    assert read[:5].all() and not read[5:].any()  # later layers come after the recorded ones


def test_recording_goes_on_while_another_node_overrides_attention(tiny):
    model, clip, vae = tiny("sd1")
    calls = []
    changed = model.clone()
    changed.model_options["transformer_options"]["optimized_attention_override"] = lambda func, *args, **kwargs: (
        calls.append(1) or func(*args, **kwargs) * 0.5
    )
    with native_session(changed, clip, vae) as backbone:
        context = plain_context(backbone)
        expected = backbone.predict_noise(noise(2, 4, 16, 16), T, context)
        calls.clear()
        with backbone.attention(backbone.layers, [1]) as recorded:
            assert torch.equal(backbone.predict_noise(noise(2, 4, 16, 16), T, context), expected)
    assert len(calls) == 32 and all(len(maps) == 1 for maps in recorded.maps.values())


def test_maps_of_a_replaced_attention_are_refused(tiny):
    model, clip, vae = tiny("sd1")
    replaced = model.clone()
    replaced.set_model_attn2_replace(lambda q, k, v, extra: q, "input", 4)
    with native_session(replaced, clip, vae) as backbone, torch.no_grad():
        context = plain_context(backbone)
        with backbone.attention([Layer("input", 4, 0)], [1]), pytest.raises(ValueError, match="replaces the cross-att"):
            backbone.predict_noise(noise(2, 4, 16, 16), T, context)
        with backbone.attention([Layer("input", 5, 0)], [1]) as recorded:
            backbone.predict_noise(noise(2, 4, 16, 16), T, context)
    assert len(recorded.maps[Layer("input", 5, 0)]) == 1


def test_images_and_latents_are_those_of_the_vae_nodes(any_tiny):
    model, clip, vae = any_tiny
    images = torch.rand(2, 64, 48, 3, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        encoded = vae.encode(images)
        decoded = vae.decode(encoded)
    with native_session(model, clip, vae) as backbone:
        latents = backbone.encode_image(images)
        pictures = backbone.decode_latent(latents.requires_grad_())
        assert torch.equal(latents, model.model.latent_format.process_in(encoded))
        assert latents.shape == (2, backbone.latent_channels, 64 // backbone.latent_scale, 48 // backbone.latent_scale)
        assert torch.allclose(pictures, decoded, atol=1e-5) and pictures.shape == images.shape
        assert not pictures.requires_grad and not pictures.is_inference() and not latents.is_inference()


def weight_hash(model):
    return {
        name: hashlib.sha256(weight.detach().float().numpy().tobytes()).hexdigest()
        for part in (model.model.model, model.clip.cond_stage_model, model.vae.first_stage_model)
        for name, weight in part.state_dict().items()
    }


@pytest.mark.parametrize("fails", [False, True])
def test_a_session_leaves_everything_as_it_was(fails):
    with torch.inference_mode():
        built = tiny_models.build("sd2")
    learnable = {n for n, p in built.clip.cond_stage_model.named_parameters() if p.requires_grad}
    before = weight_hash(built)
    x_t = noise(2, 4, 16, 16)
    with torch.inference_mode():
        cond = conditioning(built.clip, "a cat")
        sampled = stock_eps(built.model, x_t, T, cond)

        class Interrupted(BaseException):
            pass

        def work():
            with native_session(*built) as backbone:
                assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
                learned = vectors(backbone)
                encoding = backbone.encode_text(LEARNED, {"cat": learned})
                context = TextContext.plain(encoding.hidden, backbone.layers).repeat(2)
                backbone.predict_noise(x_t, T, context).mean().backward()
                assert all(v.grad.abs().max() > 0 for v in learned.values())
                grads = [p.grad for p in [*built.model.model.parameters(), *built.clip.cond_stage_model.parameters()]]
                assert all(grad is None for grad in grads)
                if fails:
                    raise Interrupted

        if fails:
            with pytest.raises(Interrupted):
                work()
        else:
            work()
        assert torch.is_inference_mode_enabled()
        assert torch.equal(stock_eps(built.model, x_t, T, cond), sampled)
        assert torch.equal(conditioning(built.clip, "a cat")[0][0], cond[0][0])
    assert weight_hash(built) == before
    assert learnable == {n for n, p in built.clip.cond_stage_model.named_parameters() if p.requires_grad}
    assert not any(p.requires_grad for p in built.model.model.parameters())
    assert not any("forward" in vars(module) for module in built.clip.cond_stage_model.modules())
    assert built.model.model.current_patcher is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_have_gradients(dtype, tiny):
    with torch.inference_mode():
        model = tiny_models.build_unet("sd1", dtype=dtype)
    _, clip, vae = tiny("sd1")
    with torch.inference_mode(), native_session(model, clip, vae) as backbone:
        learned = vectors(backbone)
        hidden = backbone.encode_text(LEARNED, {"cat": learned}).hidden
        eps = backbone.predict_noise(noise(2, 4, 16, 16), T, TextContext.plain(hidden, backbone.layers).repeat(2))
        eps.mean().backward()
        assert eps.dtype == torch.float32 and learned["l"].grad.abs().max() > 0


def test_a_lora_on_model_and_clip_stays_under_gradients():
    with torch.inference_mode():
        model, clip, vae = tiny_models.build("sd1")
        clip = clip.clone()
        key = "clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.weight"
        clip.add_patches({key: ("diff", (0.1 * torch.ones(128, 64),))})
        model = with_lora(model)
        with native_session(model, clip, vae) as backbone:
            learned = vectors(backbone)
            encoding = backbone.encode_text(LEARNED, {"cat": learned})
            backbone.decode_latent(noise(1, 4, 16, 16))  # loads the VAE in between
            context = TextContext.plain(encoding.hidden, backbone.layers).repeat(2)
            backbone.predict_noise(noise(2, 4, 16, 16), T, context).mean().backward()
            assert learned["l"].grad.abs().max() > 0
            with torch.no_grad():
                plain = backbone.encode_text(PLAIN, {})
        assert torch.equal(plain.hidden, conditioning(clip, PLAIN.text)[0][0])


def test_parts_of_different_checkpoints_are_refused(tiny):
    sd1, sd2 = tiny("sd1"), tiny("sd2")
    with pytest.raises(ValueError, match=r"CLIP .* does not belong to the MODEL"), native_session(sd1.model, *sd2[1:]):
        pass
    wide = tiny_models.build_vae()
    wide.latent_channels = 16
    with pytest.raises(ValueError, match="VAE makes latents of 16 channels"), native_session(*sd1[:2], wide):
        pass


def test_bypass_loras_are_refused(tiny):
    model, clip, vae = tiny("sd1")
    bypassed = comfy.sd.load_bypass_lora_for_models(model, clip, lora_file(model, 5), 1.0, 0.0)[0]
    with pytest.raises(ValueError, match="use Load LoRA"), native_session(bypassed, clip, vae):
        pass


def test_a_cache_on_the_model_keeps_no_more_than_one_prediction(tiny):
    model, clip, vae = tiny("sd1")
    cached = EasyCacheNode.execute(model, 0.8, 0.1, 0.95, False)[0]
    with native_session(cached, clip, vae) as backbone:
        for t in (T, T + 1):
            backbone.predict_noise(noise(2, 4, 16, 16), t, layer_context(backbone))
    assert len(cached.model_options["transformer_options"]["easycache"].uuid_cache_diffs) == 1


def another_prediction(model, clip):
    class Velocity(comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.V_PREDICTION):
        pass

    changed = model.clone()
    changed.add_object_patch("model_sampling", Velocity(model.model.model_config))
    return changed, clip


def another_schedule(model, clip):
    sampling = type(model.get_model_object("model_sampling"))(model.model.model_config)
    sampling.set_sigmas(sampling.sigmas * 1.1)
    changed = model.clone()
    changed.add_object_patch("model_sampling", sampling)
    return changed, clip


def clip_skip(model, clip):
    skipping = clip.clone()
    skipping.clip_layer(-2)
    return model, skipping


def fingerprint(model, clip, vae):
    with native_session(model, clip, vae) as backbone:
        return backbone.fingerprint()


@pytest.mark.parametrize(
    "change", [lambda model, clip: (with_lora(model), clip), another_prediction, another_schedule, clip_skip]
)
def test_weights_and_how_they_are_read_make_the_fingerprint(tiny, change):
    model, clip, vae = tiny("sd1")
    assert fingerprint(*change(model, clip), vae) != fingerprint(model, clip, vae)
    assert fingerprint(with_attn2_patch(model), clip.clone(), vae) == fingerprint(model, clip, vae)


def test_model_family(tiny):
    assert [model_family(tiny(t).model) for t in tiny_models.TOPOLOGIES] == ["sd1", "sd2", "sd2", "sdxl"]
    named = tiny_models.build_unet("sd1")
    named.model.model_config.__class__ = type("Toy", (comfy.supported_models.SD15,), {"atelier_family": "toy"})
    assert model_family(named) == "toy"


def test_other_models_are_refused(tiny):
    other = tiny_models.build_unet("sd1")
    other.model.model_config.__class__ = comfy.supported_models.SDXLRefiner
    with pytest.raises(ValueError, match="MODEL is a SDXLRefiner"):
        model_family(other)

    editing = tiny_models.build_unet("sdxl")
    editing.model.__class__ = comfy.model_base.SDXL_instructpix2pix
    with pytest.raises(ValueError, match="Concept Atelier works with"):
        model_family(editing)

    class Flow(comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST):
        pass

    flow = tiny("sd1").model.clone()
    flow.add_object_patch("model_sampling", Flow())
    with pytest.raises(ValueError, match="neither eps- nor v-prediction"):
        model_family(flow)

    inpainting = tiny_models.build_unet("sd1")
    inpainting.model.concat_keys = ("mask", "masked_image")
    with pytest.raises(ValueError, match="made for inpainting"):
        model_family(inpainting)
