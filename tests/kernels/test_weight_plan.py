"""Weights that learn along: Custom Diffusion, DreamBooth, LoRA, as parts of the one loop."""

import dataclasses

import pytest
import tiny_diffusers
import torch
from concept_atelier.kernels.backbone import TextContext
from concept_atelier.kernels.concept import load_concept, save_concept
from concept_atelier.kernels.concept_run import ConceptRun, SamplePlan
from concept_atelier.kernels.diffusers_backbone import DiffusersBackbone
from concept_atelier.kernels.exemplars import Exemplar, encode_exemplars
from concept_atelier.kernels.gradient_mask import GradientMask
from concept_atelier.kernels.gradient_rules import MaskedTriples, PlainGradient
from concept_atelier.kernels.layouts import Layout
from concept_atelier.kernels.losses import Prediction, denoising_loss
from concept_atelier.kernels.objective import Objective
from concept_atelier.kernels.prompts import fill_blank
from concept_atelier.kernels.run_state import RunState
from concept_atelier.kernels.training import TrainingSettings, concept_gradients, train
from concept_atelier.kernels.weight_plan import (
    ATTENTION,
    KEY_AND_VALUE,
    NO_WEIGHTS,
    WHOLE_UNET,
    WeightPlan,
    concept_weights_applied,
)
from concept_atelier.toyworld.model import load_toy
from diffusers import UNet2DConditionModel

PLANS = [WeightPlan(KEY_AND_VALUE), WeightPlan(ATTENTION, 2), WeightPlan(WHOLE_UNET), WeightPlan(WHOLE_UNET, 2)]
NAMES = ["Custom Diffusion", "LoRA of attention", "DreamBooth", "LoRA of everything"]
each_plan = pytest.mark.parametrize("plan", PLANS, ids=NAMES)


@pytest.fixture(scope="module")
def backbone() -> DiffusersBackbone:
    return DiffusersBackbone.from_toy(load_toy(random_weights=True))


@pytest.fixture(scope="module", params=["toy", "sd1", "sdxl"])
def any_backbone(request) -> DiffusersBackbone:
    if request.param == "toy":
        return DiffusersBackbone.from_toy(load_toy(random_weights=True))
    return DiffusersBackbone.from_pipeline(tiny_diffusers.build(request.param))


def inputs(backbone) -> tuple[torch.Tensor, torch.Tensor, TextContext]:
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(2, backbone.latent_channels, 8, 8, generator=generator)
    rows = torch.randn(1, 2, 5, backbone.context_width, generator=generator)
    zeros = (0,) * len(backbone.layers)
    pooled = torch.randn(2, backbone.towers["g"], generator=generator) if "g" in backbone.towers else None
    return x_t, torch.tensor([100, 700]), TextContext(rows, zeros, zeros, pooled)


def moved(weights: dict[str, torch.Tensor], size: float = 0.02) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: w.detach() + size * torch.randn(w.shape, generator=generator) for name, w in weights.items()}


def unet_state(backbone) -> dict[str, torch.Tensor]:
    return {key: v.clone() for key, v in backbone.unet.state_dict().items()}


def unchanged(backbone, before) -> bool:
    after = backbone.unet.state_dict()
    return after.keys() == before.keys() and all(torch.equal(after[key], v) for key, v in before.items())


class Quiet:
    stop_requested = False

    def __init__(self, cancel_at: int = 0) -> None:
        self.cancel_at = cancel_at

    def step(self, step, loss_history, stats) -> None:
        if step == self.cancel_at:
            raise KeyboardInterrupt

    def samples(self, image_grid) -> None: ...

    def say(self, lines) -> None: ...


def a_run(steps: int = 4, **changes) -> ConceptRun:
    images = torch.rand(2, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    run = ConceptRun(
        name="pet",
        init_word="man",
        exemplars=tuple(Exemplar(image, "a {} on grass") for image in images),
        layout=Layout("prompt"),
        rule=PlainGradient(),
        settings=TrainingSettings(steps=steps, learning_rate=1e-2),
        samples=SamplePlan(("a {}",), every=0, steps=2),
        weights=WeightPlan(KEY_AND_VALUE, learning_rate=1e-3),
    )
    return dataclasses.replace(run, **changes)


@each_plan
def test_the_start_changes_nothing(any_backbone, plan):
    adapted = plan.bind(any_backbone)
    x_t, t, context = inputs(any_backbone)
    with torch.no_grad():
        plain = any_backbone.predict_noise(x_t, t, context)
        with adapted.applied(adapted.start(0)):
            assert torch.equal(any_backbone.predict_noise(x_t, t, context), plain)
        with adapted.applied(moved(adapted.start(0))):
            assert not torch.equal(any_backbone.predict_noise(x_t, t, context), plain)
        assert torch.equal(any_backbone.predict_noise(x_t, t, context), plain)


@each_plan
def test_every_weight_gets_a_gradient(any_backbone, plan):
    adapted = plan.bind(any_backbone)
    weights = {name: w.requires_grad_() for name, w in moved(adapted.start(0)).items()}
    with adapted.applied(weights):
        any_backbone.predict_noise(*inputs(any_backbone)).square().mean().backward()
    assert all(w.grad is not None and w.grad.abs().max() > 0 for w in weights.values())
    assert all(p.grad is None for p in any_backbone.unet.parameters())


def test_the_change_is_that_of_the_weights_themselves():
    pipeline = tiny_diffusers.build("sd1")
    backbone = DiffusersBackbone.from_pipeline(pipeline)
    adapted = WeightPlan(WHOLE_UNET).bind(backbone)
    weights = moved(adapted.start(0))
    x_t, t, context = inputs(backbone)
    with torch.no_grad():
        with adapted.applied(weights):
            changed = backbone.predict_noise(x_t, t, context)
        for name, module in backbone.modules().items():
            module.weight += weights[f"diffusion_model.{name}.diff"]
            if module.bias is not None:
                module.bias += weights[f"diffusion_model.{name}.diff_b"]
        torch.testing.assert_close(backbone.predict_noise(x_t, t, context), changed)


def test_the_whole_unet_is_all_of_it(any_backbone):
    weights = WeightPlan(WHOLE_UNET).bind(any_backbone).start(0)
    assert sum(w.numel() for w in weights.values()) == sum(p.numel() for p in any_backbone.unet.parameters())


def test_custom_diffusion_on_sd15_trains_two_matrices_a_layer():
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)
    backbone = DiffusersBackbone("sd1", unet, [], None, 8, torch.linspace(0.99, 0.01, 1000))
    adapted = WeightPlan(KEY_AND_VALUE).bind(backbone)
    weights = adapted.start(0)
    assert len(backbone.layers) == 16 and len(weights) == 32
    assert all(name.endswith(("attn2.to_k.diff", "attn2.to_v.diff")) for name in weights)
    assert round(sum(w.numel() for w in weights.values()) / 1e6, 2) == 19.17


def test_lora_is_small_and_starts_alike_in_any_order(backbone):
    plan = WeightPlan(WHOLE_UNET, 2)
    start = plan.bind(backbone).start(3)
    assert all(min(w.shape) == 2 for w in start.values())
    turned = dict(reversed(backbone.modules().items()))

    class Turned:
        device = backbone.device

        def modules(self):
            return turned

    again = plan.bind(Turned()).start(3)
    assert all(torch.equal(again[name], w) for name, w in start.items())


@each_plan
def test_training_moves_vectors_and_weights_and_leaves_the_model_alone(backbone, plan, tmp_path):
    before = unet_state(backbone)
    plan = dataclasses.replace(plan, learning_rate=1e-3)
    concept, state, _ = a_run(weights=plan).learn(backbone, tmp_path, Quiet())
    assert unchanged(backbone, before)
    start = plan.bind(backbone).start(0)
    changed = [not torch.equal(w, start[name]) for name, w in state.weights.items()]
    assert all(changed) and set(concept.weights) == set(start)
    assert not torch.equal(concept.vectors["l"], backbone.token_vectors("man")["l"][None])


def test_a_learning_rate_of_0_is_plain_textual_inversion(backbone, tmp_path):
    still = WeightPlan(KEY_AND_VALUE, learning_rate=0.0)
    with_weights, state, _ = a_run(weights=still).learn(backbone, tmp_path, Quiet())
    plain, _, _ = a_run(weights=None).learn(backbone, tmp_path, Quiet())
    assert torch.equal(with_weights.vectors["l"], plain.vectors["l"])
    assert not any(w.any() for w in state.weights.values()) and not plain.weights


@pytest.mark.parametrize("plan", PLANS[:2], ids=NAMES[:2])
def test_a_cancelled_run_resumes_bit_for_bit(backbone, plan, tmp_path):
    before, run = unet_state(backbone), a_run(weights=dataclasses.replace(plan, learning_rate=1e-3))
    with pytest.raises(KeyboardInterrupt):
        run.learn(backbone, tmp_path, Quiet(cancel_at=2))
    assert unchanged(backbone, before)
    resumed, state, samples = run.learn(backbone, tmp_path, Quiet())
    whole, whole_state, whole_samples = run.learn(backbone, tmp_path / "elsewhere", Quiet())
    assert state.losses == whole_state.losses and torch.equal(samples, whole_samples)
    assert all(torch.equal(resumed.weights[name], w) for name, w in whole.weights.items())


def test_an_error_leaves_the_model_alone(backbone, tmp_path):
    before = unet_state(backbone)
    with pytest.raises(ValueError, match="not finite"):
        a_run(weights=WeightPlan(WHOLE_UNET, learning_rate=1e30)).learn(backbone, tmp_path, Quiet())
    assert unchanged(backbone, before)


def test_the_plan_names_the_run(backbone):
    plans = [None, WeightPlan(KEY_AND_VALUE), WeightPlan(KEY_AND_VALUE, 4), WeightPlan(KEY_AND_VALUE, 0, 1e-4)]
    assert len({a_run(weights=plan).fingerprint(backbone) for plan in plans}) == 4


def test_the_gradient_is_that_of_the_masked_loss(backbone):
    """The sum over the batch of each sample's mean over masked elements (HiFi Tuner Eq. 6)."""
    plan = WeightPlan(KEY_AND_VALUE)
    adapted = plan.bind(backbone)
    layout = Layout("prompt").bind(backbone.layers)
    vectors = {tower: v[None] for tower, v in backbone.token_vectors("man").items()}
    mask = torch.zeros(1, 2, 1, 8, 8)
    mask[..., :4] = 1
    generator = torch.Generator().manual_seed(2)
    shape = (1, 2, backbone.latent_channels, 8, 8)
    x_0, eps = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    t = torch.tensor([[300, 800]])
    prompts = [fill_blank("a {} on grass", "pet")] * 2

    def gradients(noise: torch.Tensor, masks: torch.Tensor | None) -> dict[str, torch.Tensor]:
        weights = {name: w.requires_grad_() for name, w in adapted.start(0).items()}
        with adapted.applied(weights):
            concept_gradients(backbone, "pet", prompts, vectors, layout, x_0, t, noise, masks)
        return {name: w.grad for name, w in weights.items()}

    weights = {name: w.requires_grad_() for name, w in adapted.start(0).items()}
    encoded = backbone.encode_text(prompts[0], {"pet": vectors})
    context = TextContext.plain(encoded.hidden, backbone.layers).repeat(2)
    x_t = backbone.schedule.add_noise(x_0[0], t[0], eps[0])
    with adapted.applied(weights):
        eps_hat = backbone.predict_noise(x_t, t[0], context)
        loss = denoising_loss(Prediction(eps[0], eps_hat, t[0], mask[0])).sum()
        expected = torch.autograd.grad(loss, list(weights.values()))
    masked = gradients(eps, mask)
    for (name, gradient), reference in zip(masked.items(), expected, strict=True):
        torch.testing.assert_close(gradient, reference, msg=name)
    name = next(iter(masked))
    assert not torch.allclose(masked[name], gradients(eps, None)[name])


def test_loss_terms_weigh_the_weights_too(backbone):
    """lambda: with (1 - lambda) of the denoising loss, weights get (1 - lambda) of its gradient."""
    adapted = WeightPlan(KEY_AND_VALUE, learning_rate=1.0).bind(backbone)
    data = encode_exemplars(backbone, a_run().exemplars, "pet")
    layout = Layout("prompt").bind(backbone.layers)
    seen = []
    for objective in (Objective(), Objective(denoising_weight=0.25)):
        vectors = {tower: v[None] for tower, v in backbone.token_vectors("man").items()}
        state = RunState.start(vectors, adapted.start(0))
        settings = TrainingSettings(steps=1, batch_size=2, learning_rate=0.0)
        train(backbone, data, "pet", layout, PlainGradient(), settings, state, lambda _: True, objective, adapted)
        seen.append({name: w.grad for name, w in state.weights.items()})
    assert all(torch.allclose(seen[1][name], 0.25 * gradient, atol=1e-9) for name, gradient in seen[0].items())
    assert all(gradient.abs().max() > 1e-7 for gradient in seen[0].values())


def test_a_gradient_mask_and_weights_are_refused_together():
    with pytest.raises(ValueError, match="no say over weights"):
        exemplars = tuple(Exemplar(e.image, e.caption, None, (e.image,)) for e in a_run().exemplars)
        a_run(exemplars=exemplars, rule=MaskedTriples(GradientMask()))


def test_a_concept_brings_its_weights_along(backbone, tmp_path):
    run = a_run(weights=WeightPlan(ATTENTION, 2, 1e-3))
    concept, state, _ = run.learn(backbone, tmp_path, Quiet())
    save_concept(tmp_path / "pet.safetensors", concept)
    loaded = load_concept(tmp_path / "pet.safetensors")
    x_t, t, context = inputs(backbone)
    with torch.no_grad():
        plain = backbone.predict_noise(x_t, t, context)
        with run.weights.bind(backbone).applied(state.weights):
            expected = backbone.predict_noise(x_t, t, context)
        with concept_weights_applied(backbone, loaded.weights):
            assert torch.equal(backbone.predict_noise(x_t, t, context), expected)
    assert not torch.equal(plain, expected)
    other = DiffusersBackbone.from_pipeline(tiny_diffusers.build("sdxl"))
    with pytest.raises(ValueError, match="of another model"), concept_weights_applied(other, loaded.weights):
        pass


@pytest.mark.parametrize(("dtype", "kept"), [(torch.bfloat16, torch.float16), (torch.float32, torch.float32)])
def test_patches_are_as_precise_as_the_model(dtype, kept):
    unet = tiny_diffusers.build_unet("sd1").to(dtype)
    backbone = DiffusersBackbone("sd1", unet, [], None, 8, torch.linspace(0.99, 0.01, 1000))
    adapted = WeightPlan(KEY_AND_VALUE).bind(backbone)
    patches = adapted.patches(adapted.start(0))
    assert {patch.dtype for patch in patches.values()} == {kept}


def test_half_precision_learns_in_float32():
    unet = tiny_diffusers.build_unet("sd1").to(torch.bfloat16)
    backbone = DiffusersBackbone("sd1", unet, [], None, 8, torch.linspace(0.99, 0.01, 1000))
    backbone.context_width = tiny_diffusers.CONTEXT_WIDTH
    for plan in PLANS:
        adapted = plan.bind(backbone)
        weights = {name: w.requires_grad_() for name, w in adapted.start(0).items()}
        with adapted.applied(weights):
            backbone.predict_noise(*inputs(backbone)).square().mean().backward()
        assert all(w.grad.dtype == torch.float32 for w in weights.values())


@pytest.mark.parametrize(
    ("values", "sentence"),
    [(("attn2",), "is one of"), ((ATTENTION, -1), "at least 0"), ((ATTENTION, 0, -1.0), "at least 0")],
)
def test_plans_that_make_no_sense_are_refused(values, sentence):
    with pytest.raises(ValueError, match=sentence):
        WeightPlan(*values)


def test_a_model_without_such_layers_is_refused():
    class Bare:
        device = torch.device("cpu")

        def modules(self):
            return {"conv": torch.nn.Conv2d(1, 1, 1)}

    with pytest.raises(ValueError, match="no layers of the attention"):
        WeightPlan(ATTENTION).bind(Bare())


def test_no_weights_are_no_weights():
    with NO_WEIGHTS.applied({}):
        assert NO_WEIGHTS.start(0) == {} and NO_WEIGHTS.patches({}) == {}
