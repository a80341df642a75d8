"""The null-text concept model as a branch of the real GCFG guider (METHODS 5.9, 9; arXiv 2312.08195, section 4.2)."""

from __future__ import annotations

import comfy.samplers
import comfy.utils
import guiding
import pytest
import tiny_models
import torch
from comfy_extras import nodes_custom_sampler as custom
from comparing import relative
from concept_atelier.kernels.nulltext import ConceptModel
from concept_atelier.nodes.guidance import AtelierGCFG
from concept_atelier.nodes.native.nulltext import add_learned, null_text_form, operate, trainable_weights
from guiding import OFF, branch, counting, empty_latent, gcfg
from patched_models import with_uniform_attention
from prompting import STEPS, ksampler, stock_encode

SIZE, LATENT_SIZE = 64, 16
W1 = [-1.0, 0.7, 2.5, 7.5]

pytestmark = pytest.mark.usefixtures("inference_mode")


@pytest.fixture(scope="module", params=["sd1", "sdxl"])
def parts(request, tiny):
    return tiny(request.param)


@pytest.fixture(scope="module")
def prompts(parts):
    """The null prompt and two others."""
    with torch.inference_mode():
        return [stock_encode(parts.clip, text) for text in ("", "a man", "grass")]


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


def advanced(guider):
    return guiding.advanced(guider, latent=empty_latent(LATENT_SIZE))


def alone(model, conditioning):
    """What a stock guider paints of one conditioning, unguided."""
    return advanced(custom.CFGGuider.execute(model, conditioning, conditioning, 1.0)[0])


@pytest.mark.parametrize("w1", W1)
def test_where_surgery_is_exact_it_paints_the_unconditional_base(parts, prompts, w1):
    """With K projections of zero attention is uniform, and what replaces it says the same: any w1, w2 = 0."""
    u, a, b = prompts
    base = with_uniform_attention(parts.model)
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
    """Each prediction by a stock guider on its MODEL."""

    def clean(model, conditioning, x, sigma):
        taken = {}

        def sampler(wrapped, noise, sigmas, extra_args, callback, disable):
            taken["D"] = wrapped(x, sigma, **extra_args)
            return noise

        guider = custom.CFGGuider.execute(model, conditioning, conditioning, 1.0)[0]
        run, zeros = comfy.samplers.KSAMPLER(sampler), torch.zeros_like(x)
        guider.sample(zeros, zeros, run, torch.tensor([float(sigma), 0.0]), disable_pbar=True)
        return taken["D"]

    return guiding.by_hand(clean, unconditional, branches, LATENT_SIZE)


def test_concept_and_control_over_the_base(parts, prompts, trained):
    """(1 - w1 - w2) eps_sd + w1 eps_concept + w2 eps_control(p): three predictions, two forwards."""
    u, a, b = prompts
    three = (parts.model, u), [(trained, u, 2.0), (parts.model, a, 2.5)]
    guider, cost = gcfg(*three[0], *(branch(*one) for one in three[1])).args
    with counting(parts.model) as forwards:
        out = advanced(guider)
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


def test_the_concept_of_another_checkpoint(parts, prompts):
    """Alone, as weights that sum to 1 leave it: what a stock guider makes of it."""
    u, a, _ = prompts
    kind = "sdxl" if "SDXL" in type(parts.model.model).__name__ else "sd1"
    concept = surgery(parts, tiny_models.build_unet(kind, seed=7))
    out = advanced(gcfg(parts.model, u, branch(concept, a, 1.0))[0])
    assert relative(out, alone(concept, a)) < 1e-5


def test_the_concept_from_a_plain_ksampler(parts, prompts, trained):
    u, a, _ = prompts
    patched = AtelierGCFG.execute(parts.model, {"branch0": branch(trained, u, 2.0)}, **OFF)[0]
    out = ksampler(patched, a, u, empty_latent(LATENT_SIZE), cfg=2.5)
    guider = gcfg(parts.model, u, branch(parts.model, a, 2.5), branch(trained, u, 2.0))[0]
    assert relative(out, advanced(guider)) < 1e-5
