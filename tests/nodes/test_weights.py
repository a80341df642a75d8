"""Weights that learn along, on real ComfyUI objects: trained by Train, kept in the concept, put on by either loader."""

import hashlib
import sys
from pathlib import Path

import comfy.model_management
import comfy.utils
import folder_paths
import pytest
import tiny_models
import torch
from cancelling import cancel_at_step
from comparing import digest
from concept_atelier.kernels.backbone import TextContext
from concept_atelier.kernels.concept import load_concept, save_concept
from concept_atelier.kernels.exemplars import Exemplar
from concept_atelier.kernels.gradient_mask import GradientMask
from concept_atelier.kernels.layouts import Layout
from concept_atelier.kernels.ldm_names import ldm_modules
from concept_atelier.kernels.weight_plan import ATTENTION, KEY_AND_VALUE, WHOLE_UNET, WeightPlan
from concept_atelier.nodes.apply import AtelierApplyConcepts, AtelierTextEncode
from concept_atelier.nodes.native.backbone import native_session
from concept_atelier.nodes.native.toy import build_toy
from concept_atelier.nodes.native.weights import apply_weights
from concept_atelier.nodes.weights import AtelierTrainWeights
from concept_atelier.toyworld.model import load_toy, text_encoder_state
from train_node import run_train

import nodes as stock

sys.path.append(str(Path(__file__).parents[1] / "kernels"))
import tiny_diffusers

PLANS = {
    "Custom Diffusion": WeightPlan(KEY_AND_VALUE, 0, 1e-2),
    "LoRA": WeightPlan(ATTENTION, 2, 1e-2),
    "DreamBooth": WeightPlan(WHOLE_UNET, 0, 1e-2),
}
TOPOLOGIES = ["toy", "sd1", "sd2_v", "sdxl"]
# Every plan on small models, one on the others: what differs between models is where K and V are.
CASES = [(topology, name) for topology in ("toy", "sd1") for name in PLANS]
CASES += [("sd2_v", "Custom Diffusion"), ("sdxl", "Custom Diffusion"), ("sdxl", "LoRA")]

pytestmark = pytest.mark.usefixtures("as_in_a_prompt")


@pytest.fixture(scope="module")
def model_of(tiny):
    """model_of(topology) -> MODEL, CLIP, VAE; the toy model has random weights."""
    toy = load_toy(random_weights=True)
    for seed, part in enumerate((toy.unet, toy.text_encoder, toy.autoencoder)):
        tiny_diffusers.fill(part, seed)
    with torch.inference_mode():
        toy = build_toy(toy.unet.state_dict(), text_encoder_state(toy.text_encoder), toy.autoencoder.state_dict())
    return lambda topology: toy if topology == "toy" else tiny(topology)


def exemplars(count: int = 2) -> tuple[Exemplar, ...]:
    images = torch.rand(2 * count, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    masks = torch.zeros(64, 64)
    masks[16:48, 16:48] = 1
    return tuple(Exemplar(images[i], "a {} here", masks, (images[count + i],)) for i in range(count))


def train(parts, plan: WeightPlan | None, **changes):
    values = {
        "exemplars": exemplars(),
        "layout": Layout("prompt"),
        "weights": plan,
        "name": "pet",
        "init_word": "man",
        "steps": 2,
    }
    return run_train(parts, **values | changes)


def prediction(parts, model=None) -> torch.Tensor:
    """What a MODEL predicts for fixed noise and a fixed context."""
    with native_session(model or parts.model, parts.clip, parts.vae) as backbone, torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        x_t = torch.randn(1, backbone.latent_channels, 8, 8, generator=generator)
        hidden = torch.randn(1, 20, backbone.context_width, generator=generator)
        pooled = torch.randn(1, backbone.towers["g"], generator=generator) if "g" in backbone.towers else None
        context = TextContext.plain(hidden, backbone.layers, pooled)
        return backbone.predict_noise(x_t, torch.tensor([700]), context)


def patched_weights(model) -> dict[str, torch.Tensor]:
    """The weights that a MODEL's patches make."""
    with torch.inference_mode():
        comfy.model_management.load_models_gpu([model], force_full_load=True)
        weights = {key: v.clone() for key, v in model.model.diffusion_model.state_dict().items()}
        model.unpatch_model()
    return weights


def load_lora(monkeypatch, model, file: Path, strength: float = 1.0):
    """ComfyUI's own loader on a file."""
    monkeypatch.setattr(folder_paths, "get_full_path_or_raise", lambda _kind, _name: str(file))
    with torch.inference_mode():
        return stock.LoraLoaderModelOnly().load_lora_model_only(model, file.name, strength)[0]


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_modules_have_the_names_of_core(model_of, topology):
    parts = model_of(topology)
    family = topology.removesuffix("_v")
    unet = load_toy(random_weights=True).unet if topology == "toy" else tiny_diffusers.build_unet(family)
    ours = dict(ldm_modules(unet))
    with native_session(*parts) as backbone:
        native = backbone.modules()
    assert set(ours) == set(native)
    assert all(ours[name].weight.shape == module.weight.shape for name, module in native.items())
    core = comfy.utils.unet_to_diffusers(parts.model.model.model_config.unet_config)
    paths = {module: path for path, module in unet.named_modules()}
    assert all(core[f"{paths[module]}.weight"] == f"{name}.weight" for name, module in ours.items())


@pytest.mark.parametrize(("topology", "name"), CASES)
def test_weights_are_trained_kept_and_put_on_by_either_loader(model_of, topology, name, tmp_path, monkeypatch):
    parts, plan = model_of(topology), PLANS[name]
    before, plain = digest(parts), prediction(parts)
    concept = train(parts, plan).args[0]
    assert digest(parts) == before and torch.equal(prediction(parts), plain)

    with native_session(*parts) as backbone:
        adapted = plan.bind(backbone)
        with adapted.applied({name: w.clone() for name, w in concept.weights.items()}):
            trained = prediction(parts)
    assert (trained - plain).abs().max() > 1e-2 * plain.abs().max()

    ours = AtelierApplyConcepts.execute(parts.model, {"concept0": concept}).args[0]
    applied = prediction(parts, ours)
    assert (applied - trained).abs().max() < 2e-4 * plain.abs().max()
    file = tmp_path / "pet.safetensors"
    save_concept(file, concept)
    core = load_lora(monkeypatch, parts.model, file)
    assert (prediction(parts, core) - applied).abs().max() <= 1e-6 * plain.abs().max()
    mine, theirs = patched_weights(ours), patched_weights(core)
    assert all(torch.equal(mine[key], value) for key, value in theirs.items())
    assert digest(parts) == before


def test_strength_scales_what_was_learned(model_of, tmp_path, monkeypatch):
    parts = model_of("sd1")
    concept = train(parts, PLANS["Custom Diffusion"]).args[0]
    before = {key: v.clone() for key, v in parts.model.model.diffusion_model.state_dict().items()}
    half = patched_weights(apply_weights(parts.model, concept, 0.5))
    for name, weight in concept.weights.items():
        key = name.removeprefix("diffusion_model.").replace(".diff", ".weight")
        torch.testing.assert_close(half.pop(key), before.pop(key) + 0.5 * weight)
    assert all(torch.equal(half[key], value) for key, value in before.items())
    none = AtelierApplyConcepts.execute(parts.model, {"concept0": concept}, 0.0).args[0]
    assert torch.equal(prediction(parts, none), prediction(parts))


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_cancel_leaves_the_model_alone_and_resuming_is_exact(model_of, plan, monkeypatch, tmp_path):
    parts = model_of("toy")
    before = digest(parts)
    whole = train(parts, plan, steps=3, sample_prompts="a {}").args
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "other"))
    with monkeypatch.context() as patch:
        cancel_at_step(patch, 1)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            train(parts, plan, steps=3, sample_prompts="a {}")
    assert digest(parts) == before
    resumed = train(parts, plan, steps=3, sample_prompts="a {}").args
    assert resumed[2]["loss"] == whole[2]["loss"] and torch.equal(resumed[1], whole[1])
    assert all(torch.equal(resumed[0].weights[name], w) for name, w in whole[0].weights.items())


def test_an_error_leaves_the_model_alone(model_of):
    parts = model_of("toy")
    before = digest(parts)
    with pytest.raises(ValueError, match="not finite"):
        train(parts, WeightPlan(WHOLE_UNET, 0, 1e30))
    assert digest(parts) == before


def test_samples_are_painted_with_the_weights(model_of):
    parts = model_of("toy")
    options = {"sample_prompts": "a {}", "learning_rate": 0.0}
    plain, with_weights = (train(parts, plan, **options).args[1] for plan in (None, PLANS["DreamBooth"]))
    assert (plain - with_weights).abs().max() > 0.01


@pytest.mark.parametrize(
    ("dtype", "plan"), [(torch.float16, PLANS["Custom Diffusion"]), (torch.bfloat16, PLANS["DreamBooth"])]
)
def test_a_half_precision_checkpoint_learns_too(model_of, dtype, plan, monkeypatch, tmp_path):
    parts = model_of("sd1")._replace(model=tiny_models.build_unet("sd1", dtype=dtype))
    before, plain = digest_unet(parts), prediction(parts)
    concept = train(parts, plan).args[0]
    assert digest_unet(parts) == before and torch.equal(prediction(parts), plain)
    assert all(w.dtype == torch.float16 and w.any() for w in concept.weights.values())
    file = tmp_path / "pet.safetensors"
    save_concept(file, concept)
    ours, core = apply_weights(parts.model, load_concept(file), 1.0), load_lora(monkeypatch, parts.model, file)
    changed = prediction(parts, ours)
    assert torch.equal(changed, prediction(parts, core)) and not torch.equal(changed, plain)


def digest_unet(parts) -> str:
    weights = parts.model.model.diffusion_model.state_dict().values()
    return hashlib.sha256(b"".join(w.float().numpy().tobytes() for w in weights)).hexdigest()


def test_a_lora_on_the_model_stays_beneath(model_of, monkeypatch, tmp_path):
    """What is learned on a patched MODEL is the change of the patched weights."""
    parts = model_of("toy")
    first = train(parts, PLANS["LoRA"]).args[0]
    patched = parts._replace(model=apply_weights(parts.model, first, 1.0))
    concept = train(patched, PLANS["Custom Diffusion"], name="other").args[0]
    before = patched_weights(patched.model)
    after = patched_weights(apply_weights(patched.model, concept, 1.0))
    for name, weight in concept.weights.items():
        key = name.removeprefix("diffusion_model.").replace(".diff", ".weight")
        torch.testing.assert_close(after[key] - before[key], weight, atol=1e-6, rtol=1e-4)


def test_two_concepts_weights_add_up_and_others_do_nothing(model_of):
    parts = model_of("toy")
    one = train(parts, PLANS["Custom Diffusion"], name="one").args[0]
    two = train(parts, PLANS["LoRA"], name="two").args[0]
    word = train(parts, None, name="word").args[0]
    both = AtelierApplyConcepts.execute(parts.model, {"concept0": one, "concept1": word, "concept2": two}).args[0]
    by_hand = apply_weights(apply_weights(parts.model, one, 1.0), two, 1.0)
    assert torch.equal(prediction(parts, both), prediction(parts, by_hand))
    assert AtelierApplyConcepts.execute(parts.model, {"concept0": word}).args[0].patches == {}
    with pytest.raises(ValueError, match="Two connected concepts are called <one>"):
        AtelierApplyConcepts.execute(parts.model, {"concept0": one, "concept1": one})


def test_weights_of_another_kind_of_model_are_refused(model_of):
    concept = train(model_of("sd1"), PLANS["LoRA"]).args[0]
    with pytest.raises(ValueError, match=r"learned on sd1.*sdxl model"):
        AtelierApplyConcepts.execute(model_of("sdxl").model, {"concept0": concept})


def test_a_prompt_of_such_a_concept_says_that_it_has_weights(model_of):
    parts = model_of("toy")
    concept, word = (train(parts, plan, name=n).args[0] for n, plan in (("pet", PLANS["LoRA"]), ("word", None)))
    concepts = {"concept0": concept, "concept1": word}
    with torch.inference_mode():
        told = AtelierTextEncode.execute(parts.clip, "a <pet> and a <word>", concepts)
        silent = AtelierTextEncode.execute(parts.clip, "a <word>", concepts)
    assert "<pet>" in told.ui.as_dict()["text"][0] and silent.ui is None


def test_a_gradient_mask_and_weights_are_refused_together(model_of):
    with pytest.raises(ValueError, match="no say over weights"):
        train(model_of("toy"), PLANS["LoRA"], gradient_rule=GradientMask())


def test_the_node_makes_plans():
    plan = AtelierTrainWeights.execute(KEY_AND_VALUE, 4, 1e-4).args[0]
    assert plan == WeightPlan(KEY_AND_VALUE, 4, 1e-4)
