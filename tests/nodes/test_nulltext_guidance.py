"""The null-text concept model as a branch of the real GCFG guider (METHODS 5.9, 9; arXiv 2312.08195, section 4.2)."""

from __future__ import annotations

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import pytest
import torch
from comfy_extras import nodes_custom_sampler as custom
from concept_atelier.kernels.nulltext import ConceptModel
from concept_atelier.nodes.guidance import AtelierGCFG, AtelierGCFGGuider, AtelierGuidanceBranch
from concept_atelier.nodes.native.nulltext import add_learned, null_text_form, operate, trainable_weights

import nodes as comfy_nodes

STEPS, SEED, SIZE = 3, 3, 64
OFF = {"rescale": 0.0, "apg_eta": 1.0, "apg_norm_threshold": 0.0, "apg_momentum": 0.0}
W1 = [-1.0, 0.7, 2.5, 7.5]


@pytest.fixture(autouse=True)
def inference_mode():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module", params=["sd1", "sdxl"])
def parts(request, tiny):
    return tiny(request.param)


@pytest.fixture(scope="module")
def prompts(parts):
    """The null prompt and two others."""
    with torch.inference_mode():
        return [comfy_nodes.CLIPTextEncode().encode(parts.clip, text)[0] for text in ("", "a man", "grass")]


def surgery(parts, model):
    pictures = torch.rand(2, SIZE, SIZE, 3, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return operate(model, parts.clip, parts.vae, pictures, "calibrated", 2, 0, SIZE)[0]


@pytest.fixture(scope="module")
def untrained(parts):
    """The base in null-text form."""
    return surgery(parts, parts.model)


@pytest.fixture(scope="module")
def trained(untrained):
    """The same with weights that differ everywhere, as training leaves them."""
    form, generator = null_text_form(untrained), torch.Generator().manual_seed(5)
    deltas = {}
    for name, key in trainable_weights(untrained).items():
        weight = comfy.utils.get_attr(untrained.model, key)
        deltas[name] = (0.1 * torch.randn(weight.shape, generator=generator) * weight.abs().mean()).half()
    return add_learned(untrained, ConceptModel(form.family, form.features, form.pooled, deltas))


def branch(model, conditioning, weight, start=0.0, end=1.0):
    return AtelierGuidanceBranch.execute(model, conditioning, weight, start, end)[0]


def gcfg(model, unconditional, *branches):
    named = {f"branch{i}": b for i, b in enumerate(branches)}
    return AtelierGCFGGuider.execute(model, unconditional, named, **OFF)


def advanced(guider):
    """SamplerCustomAdvanced."""
    sigmas = comfy.samplers.calculate_sigmas(guider.model_patcher.model.model_sampling, "normal", STEPS)
    noise, sampler = custom.RandomNoise.execute(SEED)[0], custom.KSamplerSelect.execute("euler")[0]
    latent = {"samples": torch.zeros(1, 4, 16, 16)}
    return custom.SamplerCustomAdvanced.execute(noise, guider, sampler, sigmas, latent)[0]["samples"]


def alone(model, conditioning):
    """What a stock guider paints of one conditioning, unguided."""
    return advanced(custom.CFGGuider.execute(model, conditioning, conditioning, 1.0)[0])


def relative(a, b):
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("w1", W1)
def test_where_surgery_is_exact_it_paints_the_unconditional_base(parts, prompts, w1):
    """With K projections of zero attention is uniform, and what replaces it says the same: any w1, w2 = 0."""
    u, a, b = prompts
    base = parts.model.clone()
    keys = [key for key in base.model.state_dict() if key.endswith("attn2.to_k.weight")]
    base.add_patches({key: ("set", (torch.zeros_like(comfy.utils.get_attr(base.model, key)),)) for key in keys})
    concept = surgery(parts, base)
    guider, cost = gcfg(base, u, branch(concept, a, w1), branch(base, b, 0.0)).args
    out = advanced(guider)
    assert relative(out, alone(base, u)) < 1e-4
    assert relative(out, alone(base, b)) > 1e-2  # the prompt of the branch without weight would show
    assert cost.splitlines()[-1] == "- branch1 left out: its weight is 0"


@pytest.mark.parametrize("w1", W1)
def test_a_concept_that_is_the_base_changes_nothing(parts, prompts, w1):
    """eps_concept := eps_sd."""
    u, a, _ = prompts
    guider = gcfg(parts.model, u, branch(parts.model, u, w1), branch(parts.model, a, 0.0))[0]
    assert relative(advanced(guider), alone(parts.model, u)) < 1e-5


def test_elsewhere_it_is_off_by_the_error_of_the_surgery_times_w1(parts, prompts, untrained):
    """At one noise level: D - D_0 = w1 (D_concept - D_0)."""
    u, a, _ = prompts
    x, sigma = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1)) * 3, torch.full((1,), 3.0)
    seen = {}

    def step(w1):
        def sampler(model, noise, sigmas, extra_args, callback, disable):
            seen[w1] = model(x, sigma, **extra_args)
            return noise

        guider = gcfg(parts.model, u, branch(untrained, a, w1), branch(parts.model, a, 0.0))[0]
        noise, latent = torch.zeros(1, 4, 16, 16), torch.zeros(1, 4, 16, 16)
        guider.sample(noise, latent, comfy.samplers.KSAMPLER(sampler), torch.tensor([3.0, 0.0]), disable_pbar=True)
        return seen[w1]

    D_concept = step(1.0)  # weights that sum to 1 ask the concept model alone
    D_0 = step(1e-9)
    assert relative(D_concept, D_0) > 1e-4
    for w1 in W1:
        assert relative(step(w1) - D_0, w1 * (D_concept - D_0)) < 1e-3


def by_hand(unconditional, branches):
    """Euler written out; each prediction after loading its MODEL. Both as (MODEL, conditioning[, weight])."""
    model = unconditional[0].model
    sigmas = comfy.samplers.calculate_sigmas(model.model_sampling, "normal", STEPS)
    latent = torch.zeros(1, 4, 16, 16)
    x = model.model_sampling.noise_scaling(sigmas[0], comfy.sample.prepare_noise(latent, SEED), latent, True)

    def clean(patcher, conditioning, sigma):
        taken = {}

        def sampler(wrapped, noise, sigmas, extra_args, callback, disable):
            taken["D"] = wrapped(x, sigma, **extra_args)
            return noise

        guider = custom.CFGGuider.execute(patcher, conditioning, conditioning, 1.0)[0]
        run = comfy.samplers.KSAMPLER(sampler)
        guider.sample(torch.zeros_like(x), latent, run, torch.tensor([float(sigma), 0.0]), disable_pbar=True)
        return taken["D"]

    for sigma, following in zip(sigmas[:-1, None], sigmas[1:, None]):
        D_0 = clean(*unconditional, sigma)
        D = D_0 + sum(w * (clean(patcher, conditioning, sigma) - D_0) for patcher, conditioning, w in branches)
        x = x + (x - D) / sigma * (following - sigma)
    return model.process_latent_out(x)


def forwards_of(model, run):
    """What run() gives, and the batch sizes of the forwards it took."""
    seen = []
    hook = model.model.diffusion_model.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    try:
        return run(), seen
    finally:
        hook.remove()


def test_concept_and_control_over_the_base(parts, prompts, trained):
    """(1 - w1 - w2) eps_sd + w1 eps_concept + w2 eps_control(p): three predictions, two forwards."""
    u, a, b = prompts
    three = (parts.model, u), [(trained, u, 2.0), (parts.model, a, 2.5)]
    guider, cost = gcfg(*three[0], *(branch(*one) for one in three[1])).args
    out, forwards = forwards_of(parts.model, lambda: advanced(guider))
    assert sorted(forwards) == [1] * STEPS + [2] * STEPS
    assert cost.splitlines()[0] == "2 forwards of the U-Net a step"
    assert relative(out, by_hand(*three)) < 1e-4
    # Whatever prompt the concept's branch gets, it is not read; the control's is.
    other = gcfg(parts.model, u, branch(trained, b, 2.0), branch(parts.model, a, 2.5))[0]
    assert relative(advanced(other), out) < 1e-5
    control = gcfg(parts.model, u, branch(trained, u, 2.0), branch(parts.model, b, 2.5))[0]
    assert relative(advanced(control), out) > 1e-2


def test_its_weights_are_its_own(parts, prompts, trained, untrained):
    u, a, _ = prompts
    before = alone(parts.model, a)
    outs = [
        advanced(gcfg(parts.model, u, branch(model, u, 2.0), branch(parts.model, a, 2.5))[0])
        for model in (trained, untrained)
    ]
    assert relative(*outs) > 1e-2
    assert torch.equal(alone(parts.model, a), before)


def test_the_concept_from_a_plain_ksampler(parts, prompts, trained):
    u, a, _ = prompts
    patched = AtelierGCFG.execute(parts.model, {"branch0": branch(trained, u, 2.0)}, **OFF)[0]
    latent = {"samples": torch.zeros(1, 4, 16, 16)}
    out = comfy_nodes.KSampler().sample(patched, SEED, STEPS, 2.5, "euler", "normal", a, u, latent)[0]["samples"]
    guider = gcfg(parts.model, u, branch(parts.model, a, 2.5), branch(trained, u, 2.0))[0]
    assert relative(out, advanced(guider)) < 1e-5
