"""The null-text concept model on real ComfyUI objects: a light patch, trained as deltas, the base untouched."""

from __future__ import annotations

import gc
import sys
import weakref
from functools import cache
from pathlib import Path

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.sd
import comfy.utils
import folder_paths
import numpy as np
import pytest
import torch
from cancelling import after_each_step, cancel_at_step
from comfy.model_patcher import ModelPatcher
from comfy_api.latest._io import HiddenHolder
from comparing import digest, relative
from concept_atelier.kernels.diffusers_attention import transformer_blocks
from concept_atelier.kernels.diffusers_backbone import DiffusersBackbone
from concept_atelier.kernels.latent_cache import tensor_pictures
from concept_atelier.kernels.nulltext import ConceptModel, null_context, save_concept_model
from concept_atelier.kernels.nulltext_run import NullTextRun
from concept_atelier.kernels.nulltext_unet import is_text_weight, make_concept_model
from concept_atelier.kernels.schedule import NoiseSchedule
from concept_atelier.nodes.native.backbone import NativeBackbone, native_session
from concept_atelier.nodes.native.live import stop_requests
from concept_atelier.nodes.native.nulltext import (
    apply_concept_model,
    null_text_form,
    operate,
    trainable_weights,
    training_session,
)
from concept_atelier.nodes.nulltext import AtelierLoadConceptModel, AtelierNullTextSurgery
from concept_atelier.nodes.train_nulltext import NO_FOLDER, AtelierTrainNullText, encode_once
from patched_models import with_uniform_attention
from PIL import Image
from torch import Tensor

sys.path.append(str(Path(__file__).parents[1] / "kernels"))
import tiny_diffusers

NODE_ID = "7"
SIZE = 64
NOISE = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def as_in_a_prompt(monkeypatch, tmp_path, cancellable):
    hidden = HiddenHolder.from_dict({"UNIQUE_ID": NODE_ID})
    for node in (AtelierTrainNullText, AtelierNullTextSurgery):
        monkeypatch.setattr(node, "hidden", hidden, raising=False)
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path / "input"))


def pictures(count: int = 3) -> Tensor:
    return torch.rand(count, SIZE, SIZE, 3, generator=torch.Generator().manual_seed(0))


def in_lists(parts, model: ModelPatcher, values: dict) -> dict:
    """As ComfyUI calls a node that takes lists; without what is not connected."""
    values = values | {"model": model, "clip": parts.clip, "vae": parts.vae}
    return {name: value if isinstance(value, list) else [value] for name, value in values.items() if value is not None}


def surgery(parts, **changes):
    values = {"form": "calibrated", "timesteps": 2, "seed": 0, "size": SIZE, "file_name": "", "images": pictures(2)}
    with torch.inference_mode():
        return AtelierNullTextSurgery.execute(**in_lists(parts, parts.model, values | changes))


def train(parts, model: ModelPatcher, **changes):
    values = {
        "folder": NO_FOLDER,
        "name": "faces",
        "steps": 3,
        "learning_rate": 1e-3,
        "batch_size": 2,
        "accumulation": 1,
        "size": SIZE,
        "seed": 0,
        "sample_count": 0,
        "sample_every": 0,
        "mirror": True,
        "ema_decay": 0.9999,
        "weight_decay": 0.01,
        "clip_norm": 1.0,
        "sample_steps": 2,
        "sample_eta": 0.0,
        "start_fresh": False,
        "images": pictures(),
    }
    with torch.inference_mode():
        return AtelierTrainNullText.execute(**in_lists(parts, model, values | changes))


def load(model: ModelPatcher, file: str, monkeypatch) -> ModelPatcher:
    output = Path(folder_paths.get_output_directory()) / "concept_atelier_models" / file
    monkeypatch.setattr(folder_paths, "get_full_path_or_raise", lambda *_: str(output))
    return AtelierLoadConceptModel.execute(model, file).args[0]


def conditioning(parts, text: str):
    return parts.clip.encode_from_tokens_scheduled(parts.clip.tokenize(text))


def sample(model: ModelPatcher, positive, negative=None, cfg: float = 1.0) -> Tensor:
    """What a stock KSampler gives after two steps."""
    with torch.inference_mode():
        return comfy.sample.sample(
            model, NOISE, 2, cfg, "euler", "normal", positive, negative or positive, torch.zeros_like(NOISE), seed=0
        )


def test_the_output_does_not_depend_on_the_prompt(any_tiny):
    model = surgery(any_tiny).args[0]
    cat, long = conditioning(any_tiny, "a cat"), conditioning(any_tiny, "a dog, " * 30)
    assert torch.equal(sample(model, cat), sample(model, long))
    assert not torch.equal(sample(any_tiny.model, cat), sample(any_tiny.model, long))


def test_sizes_in_the_prompt_of_sdxl_do_not_matter_either(tiny):
    model = surgery(tiny("sdxl")).args[0]
    cat = conditioning(tiny("sdxl"), "a cat")
    elsewhere = [[rows, {**options, "width": 64, "height": 2048, "crop_w": 99}] for rows, options in cat]
    assert torch.equal(sample(model, cat), sample(model, elsewhere))


def test_the_base_is_left_as_it_was(tiny):
    parts = tiny("sd1")
    cat = conditioning(parts, "a cat")
    before, weights = sample(parts.model, cat), digest(parts)
    surgery(parts)
    assert torch.equal(sample(parts.model, cat), before)
    assert digest(parts) == weights


@pytest.mark.parametrize("topology", ["sd1", "sdxl"])
def test_with_uniform_attention_it_is_the_models_null_prompt(tiny, topology):
    """METHODS 5.9, 8 and 9: K projections of zero, patched like any other weight."""
    parts = tiny(topology)
    model = with_uniform_attention(parts.model)
    uniform_attention = parts._replace(model=model)
    null = conditioning(parts, "")
    with torch.inference_mode():
        painted = sample(model, null)
        for form in ("calibrated", "uniform"):
            operated, errors = operate(*uniform_attention, pictures(2), form, 2, 0, SIZE)
            assert max(errors.values()) < 1e-4
            assert relative(sample(operated, conditioning(parts, "a cat")), painted) < 1e-3
    # Where attention is not uniform, the constant is not exact, so that the above says something.
    with torch.inference_mode():
        assert min(operate(*parts, pictures(2), "calibrated", 2, 0, SIZE)[1].values()) > 1e-3


def test_cross_attention_costs_nothing(tiny, monkeypatch):
    """Every attn2 sees one position and one token."""
    model = surgery(tiny("sd1")).args[0]
    shapes = []

    def look(function, q, k, v, heads, *args, **kwargs):
        shapes.append((q.shape[1], k.shape[1]))
        return function(q, k, v, heads, *args, **kwargs)

    model.model_options["transformer_options"]["optimized_attention_override"] = look
    sample(model, conditioning(tiny("sd1"), "a cat"))
    assert len(shapes) == 2 * 2 * 16
    assert set(shapes[1::2]) == {(1, 1)}  # after each self-attention a cross-attention
    assert min(q for q, _ in shapes[::2]) > 1


def test_the_node_tells_its_error_and_saves(tiny, monkeypatch):
    output = surgery(tiny("sd1"), file_name="form")
    text = output.ui.as_dict()["text"][0]
    assert "999: " in text and "499: " in text and "form.safetensors" in text
    cat = conditioning(tiny("sd1"), "a cat")
    loaded = load(tiny("sd1").model, "form.safetensors", monkeypatch)
    assert torch.equal(sample(loaded, cat), sample(output.args[0], cat))


def test_noise_stands_in_where_there_are_no_pictures(tiny):
    forms = [null_text_form(surgery(tiny("sd1"), images=i).args[0]).features for i in (None, None, pictures())]
    assert all(torch.equal(forms[0][layer], forms[1][layer]) for layer in forms[0])
    assert not any(torch.equal(forms[0][layer], forms[2][layer]) for layer in forms[0])


# ---- both implementations


@cache
def random_concept_model(family: str, topology: str) -> ConceptModel:
    """Random constants and deltas for a tiny model."""
    generator = torch.Generator().manual_seed(5)
    backbone = diffusers_unet(topology, None)
    features = {
        layer: torch.randn(block_width, generator=generator) for layer, block_width in widths(backbone.unet).items()
    }
    weights = {n: w for n, w in backbone.unet.named_parameters() if not is_text_weight(n)}
    deltas = {n: (0.1 * torch.randn(w.shape, generator=generator) * w.abs().mean()).half() for n, w in weights.items()}
    width = tiny_diffusers.TOWERS["sdxl"]["g"][0]
    pooled = torch.randn(width, generator=generator) if family == "sdxl" else None
    return ConceptModel(family, features, pooled, deltas)


def widths(unet):
    return {layer: len(block.norm2.weight) for layer, block in transformer_blocks(unet)}


def diffusers_unet(topology: str, model: ModelPatcher | None) -> DiffusersBackbone:
    """A diffusers U-Net without text encoders; with the weights of a native MODEL."""
    family = topology.removesuffix("_v")
    unet = tiny_diffusers.build_unet(family)
    if model is not None:
        state = model.model.diffusion_model.state_dict()
        names = comfy.utils.unet_to_diffusers(model.model.model_config.unet_config)
        wanted = unet.state_dict().keys()
        unet.load_state_dict({ours: state[theirs] for ours, theirs in names.items() if ours in wanted})
    prediction = "v_prediction" if topology == "sd2_v" else "epsilon"
    return DiffusersBackbone(family, unet, [], None, 8, NoiseSchedule.scaled_linear().alphas_cumprod, prediction)


@pytest.mark.parametrize("topology", ["sd1", "sd2_v", "sdxl"])
def test_native_and_diffusers_agree(tiny, topology):
    """The same file of constants and deltas through both: the same eps, and the base is untouched."""
    parts = tiny(topology)
    sample(parts.model, conditioning(parts, ""))  # what another test merged is taken out
    before = digest(parts)
    concept_model = random_concept_model(topology.removesuffix("_v"), topology)
    x_t = torch.randn(2, 4, 8, 16, generator=torch.Generator().manual_seed(3))
    t = torch.tensor([60, 850])
    diffusers = diffusers_unet(topology, parts.model)
    make_concept_model(diffusers.unet, concept_model, diffusers.family)
    native = apply_concept_model(parts.model, concept_model)
    with native_session(native, parts.clip, parts.vae) as backbone, torch.no_grad():
        context = null_context(backbone).repeat(2)
        ours = backbone.predict_noise(x_t, t, context)
        pooled = None if concept_model.pooled is None else concept_model.pooled.expand(2, -1)
        theirs = diffusers.predict_noise(x_t, t, type(context)(context.rows, context.key, context.value, pooled))
        assert relative(ours, theirs) < 1e-4
    sample(parts.model, conditioning(parts, ""))  # the base is loaded again
    assert digest(parts) == before


def test_every_weight_without_text_is_trained(any_tiny):
    keys = trainable_weights(any_tiny.model)
    unet = diffusers_unet("sdxl" if "label_emb.0.0.weight" in str(keys.values()) else "sd1", None).unet
    expected = {name for name, _ in unet.named_parameters() if not is_text_weight(name)}
    assert keys.keys() == expected
    everything = {"diffusion_model." + name for name, _ in any_tiny.model.model.diffusion_model.named_parameters()}
    left = everything - set(keys.values())
    assert left and all(".attn2." in key or (".transformer_blocks." in key and ".norm2." in key) for key in left)


# ---- training


@pytest.mark.parametrize("topology", ["sd2_v", "sdxl"])
def test_training_gives_deltas_and_leaves_the_base(tiny, topology, monkeypatch):
    parts = tiny(topology)
    cat = conditioning(parts, "a cat")
    stock = sample(parts.model, cat)
    before = digest(parts)
    operated = surgery(parts).args[0]
    untrained = sample(operated, cat)
    model, _, loss_map = train(parts, operated, steps=1).args
    trained = sample(model, cat)
    # ComfyUI merges patches in place and takes them out again for the next MODEL of the same checkpoint.
    assert torch.equal(sample(parts.model, cat), stock) and digest(parts) == before
    assert torch.equal(sample(operated, cat), untrained) and not torch.equal(trained, untrained)
    assert len(loss_map["loss"]) == 1
    deltas = null_text_form(model).deltas
    assert deltas.keys() == trainable_weights(parts.model).keys()
    assert all(delta.any() for delta in deltas.values())
    assert all(not feature.requires_grad for feature in null_text_form(model).features.values())
    # The saved file on the untouched checkpoint is the same model.
    assert torch.equal(sample(load(parts.model, "faces.safetensors", monkeypatch), cat), trained)


def test_the_trained_model_is_what_the_session_computed_with(tiny):
    """Patched deltas give the averaged weights: the forward pass in training and the one after it agree."""
    parts = tiny("sd1")
    operated = surgery(parts).args[0]
    x_t, t = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1)), torch.tensor([500])
    with training_session(operated, parts.clip, parts.vae) as (backbone, weights), torch.no_grad():
        generator = torch.Generator().manual_seed(2)
        deltas = {
            n: (0.05 * w.abs().mean() * torch.randn(w.shape, generator=generator)).half() for n, w in weights.items()
        }
        untouched = backbone.predict_noise(x_t, t, null_context(backbone))
        for name, weight in weights.items():
            weight += deltas[name]
        training = backbone.predict_noise(x_t, t, null_context(backbone))
    form = null_text_form(operated)
    patched = apply_concept_model(parts.model, ConceptModel(form.family, form.features, form.pooled, deltas))
    with native_session(patched, parts.clip, parts.vae) as backbone, torch.no_grad():
        after = backbone.predict_noise(x_t, t, null_context(backbone))
    assert relative(after, training) < 1e-4 < relative(untouched, training)


def test_weights_and_gradients_are_freed_after_training(tiny, monkeypatch):
    parts = tiny("sd1")
    operated, cat = surgery(parts).args[0], conditioning(parts, "a cat")
    stock = sample(parts.model, cat)
    kept = []
    unwatched = NullTextRun.learn

    def learn(run, backbone, weights, *args, **options):
        result = unwatched(run, backbone, weights, *args, **options)
        kept.extend(weakref.ref(tensor) for weight in weights.values() for tensor in (weight, weight.grad))
        return result

    monkeypatch.setattr(NullTextRun, "learn", learn)
    first = train(parts, operated, steps=1).args[0]
    gc.collect()
    assert len(kept) == 2 * len(trainable_weights(parts.model)) and not any(ref() is not None for ref in kept)
    # What comes next on the same checkpoint is right.
    second = train(parts, operated, steps=1, name="again", start_fresh=True).args[0]
    assert torch.equal(sample(second, cat), sample(first, cat))
    assert torch.equal(sample(parts.model, cat), stock)


def test_after_an_error_in_training_the_layers_compute_with_their_own_weights(tiny):
    parts = tiny("sd1")
    layer = parts.model.model.diffusion_model.time_embed[0]
    x = torch.randn(1, layer.in_features, generator=torch.Generator().manual_seed(0))

    def fail():
        with training_session(surgery(parts).args[0], parts.clip, parts.vae) as (_, weights):
            with torch.no_grad():
                weights["time_embedding.linear_1.weight"] += 1
            raise InterruptedError

    with pytest.raises(InterruptedError):
        fail()
    with torch.no_grad():
        assert torch.equal(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias))


def test_lora_keeps_working(tiny):
    """Before training it is learned with, after training it is added."""
    parts = tiny("sd1")
    key = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
    patch = {key: ("diff", (0.5 * torch.randn(32, 32, generator=torch.Generator().manual_seed(0)),))}
    cat = conditioning(parts, "a cat")
    with_lora = parts.model.clone()
    with_lora.add_patches(patch)
    operated = surgery(parts._replace(model=with_lora)).args[0]
    assert not torch.equal(sample(operated, cat), sample(surgery(parts).args[0], cat))
    model = train(parts, operated, steps=1, learning_rate=0.0).args[0]
    assert relative(sample(model, cat), sample(operated, cat)) < 1e-4
    after = train(parts, surgery(parts).args[0], steps=1).args[0]
    plain = sample(after, cat)
    after.add_patches(patch)
    assert not torch.equal(sample(after, cat), plain)


def test_cancel_keeps_the_work_and_resuming_is_exact(tiny, monkeypatch, tmp_path):
    operated = surgery(tiny("sd1")).args[0]
    whole = train(tiny("sd1"), operated).args
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "other"))
    with monkeypatch.context() as patch:
        cancel_at_step(patch, 2)  # what is cancelled is step 3, in its first layer
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            train(tiny("sd1"), operated)
    resumed = train(tiny("sd1"), operated).args
    assert resumed[2]["loss"] == whole[2]["loss"]
    first, second = (null_text_form(result[0]).deltas for result in (whole, resumed))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_stop_and_keep_ends_the_run(tiny, monkeypatch):
    after_each_step(monkeypatch, lambda _: stop_requests.add(NODE_ID))
    model, _, loss_map = train(tiny("sd1"), surgery(tiny("sd1")).args[0], steps=50).args
    assert len(loss_map["loss"]) == 1 and null_text_form(model).metadata["steps"] == "1"


def test_a_finished_run_returns_at_once_under_its_own_file(tiny, monkeypatch, tmp_path):
    operated = surgery(tiny("sd1")).args[0]
    train(tiny("sd1"), operated)
    with monkeypatch.context() as patch:
        patch.setattr("concept_atelier.kernels.nulltext_run.train_null_text", None)  # training again would fail
        train(tiny("sd1"), operated)
    train(tiny("sd1"), operated, steps=4)
    train(tiny("sd1"), operated, seed=1)  # another run of the same name
    folder = tmp_path / "output" / "concept_atelier_models"
    assert sorted(file.name for file in folder.iterdir()) == ["faces.safetensors", "faces_2.safetensors"]


def test_more_accumulation_goes_on_with_the_run_and_its_file(tiny, monkeypatch, tmp_path):
    operated = surgery(tiny("sd1")).args[0]
    first = train(tiny("sd1"), operated, steps=2).args[2]["loss"]
    output = train(tiny("sd1"), operated, accumulation=2)
    assert output.args[2]["loss"][:2] == first and len(output.args[2]["loss"]) == 3
    assert [file.name for file in (tmp_path / "output" / "concept_atelier_models").iterdir()] == ["faces.safetensors"]


def test_a_damaged_file_of_the_name_is_left_alone(tiny, tmp_path, monkeypatch):
    folder = tmp_path / "output" / "concept_atelier_models"
    folder.mkdir(parents=True)
    (folder / "faces.safetensors").write_bytes(b"123")
    operated = surgery(tiny("sd1")).args[0]
    for _ in range(2):  # the second time its own file is found
        assert "faces_2.safetensors" in train(tiny("sd1"), operated, steps=1).ui["text"][0]
    assert (folder / "faces.safetensors").read_bytes() == b"123"
    assert len(list(folder.iterdir())) == 2
    assert null_text_form(load(tiny("sd1").model, "faces_2.safetensors", monkeypatch)).metadata["steps"] == "1"


def test_latents_of_one_vae_are_kept_by_the_models_scale(tiny):
    """SDXL scales latents by another factor than SD1; a VAE may be used with both."""
    vae, seen = tiny("sd1").vae, tensor_pictures(pictures(1))
    scales = [tiny(topology).model.model.latent_format.scale_factor for topology in ("sdxl", "sd1")]
    with torch.inference_mode():
        of_sdxl, of_sd1, again = (
            encode_once(tiny(topology).model, vae, seen, NODE_ID)[0] for topology in ("sdxl", "sd1", "sdxl")
        )
    assert again.files == of_sdxl.files
    ratio = of_sd1.read(0, mirrored=False) / of_sdxl.read(0, mirrored=False)
    torch.testing.assert_close(ratio, torch.full_like(ratio, scales[1] / scales[0]), rtol=1e-2, atol=0)


def test_samples_are_painted_and_shown(tiny):
    output = train(tiny("sd1"), surgery(tiny("sd1")).args[0], sample_count=2, sample_every=2)
    samples = output.args[1]
    assert samples.shape == (2, SIZE, SIZE, 3) and samples.min() >= 0 and samples.max() <= 1
    assert output.ui["images"] and "faces.safetensors" in output.ui["text"][0]


def test_without_samples_what_is_connected_to_them_is_told(tiny):
    assert "sample_count" in train(tiny("sd1"), surgery(tiny("sd1")).args[0], steps=1).args[1].message


def test_a_folder_of_pictures(tiny, tmp_path):
    folder = tmp_path / "input" / "faces"
    folder.mkdir(parents=True)
    for number in range(2):
        pixels = np.random.default_rng(number).integers(0, 256, (90, 70, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    before = AtelierTrainNullText.fingerprint_inputs(["faces"], [SIZE])
    (folder / "broken.png").write_text("no picture")
    assert AtelierTrainNullText.fingerprint_inputs(["faces"], [SIZE]) != before
    output = train(tiny("sd1"), surgery(tiny("sd1")).args[0], folder="faces", images=None, steps=1)
    assert "Skipped, cannot be read" in output.ui["text"][0] and "broken.png" in output.ui["text"][0]
    assert null_text_form(output.args[0]).metadata["pictures"] == "2"


def test_a_dataset_comes_as_a_list_of_any_sizes(tiny):
    whole = pictures(4)
    larger = torch.rand(1, 96, 80, 3, generator=torch.Generator().manual_seed(1))
    output = train(tiny("sd1"), surgery(tiny("sd1")).args[0], images=[whole[:1], larger, whole[1:]], steps=1)
    assert null_text_form(output.args[0]).metadata["pictures"] == "5"
    listed, batched = (
        null_text_form(surgery(tiny("sd1"), images=images).args[0]).features
        for images in ([whole[:1], whole[1:]], whole)
    )
    assert all(torch.equal(listed[layer], batched[layer]) for layer in batched)
    surgery(tiny("sd1"), images=[whole, larger])  # cut to the size of the first


def test_a_file_of_the_training_script_loads(tiny, tmp_path, monkeypatch):
    """python -m concept_atelier.kernels.train_nulltext on diffusers: the same picture through ComfyUI and its U-Net."""
    accelerate = pytest.importorskip("accelerate")
    from concept_atelier.kernels.train_nulltext import main

    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    tiny_diffusers.build("sd1").save_pretrained(tmp_path / "pipeline")
    (tmp_path / "faces").mkdir()
    for number in range(2):
        pixels = np.random.default_rng(number).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "faces" / f"{number}.png")
    file = Path(folder_paths.get_output_directory()) / "concept_atelier_models" / "script.safetensors"
    arguments = f"--steps 1 --batch-size 2 --size {SIZE} --learning-rate 1e-3 --form uniform --work {tmp_path}/work"
    places = ["--model", tmp_path / "pipeline", "--pictures", tmp_path / "faces", "--output", file]
    main([*map(str, places), *arguments.split()])
    parts = tiny("sd1")
    loaded = load(parts.model, file.name, monkeypatch)
    form = null_text_form(loaded)
    assert form.metadata["steps"] == "1" and form.deltas.keys() == trainable_weights(parts.model).keys()
    diffusers = diffusers_unet("sd1", parts.model)
    make_concept_model(diffusers.unet, form, "sd1")
    x_t, t = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3)), torch.tensor([500])
    with native_session(loaded, parts.clip, parts.vae) as backbone, torch.no_grad():
        null = null_context(backbone)
        assert relative(backbone.predict_noise(x_t, t, null), diffusers.predict_noise(x_t, t, null)) < 1e-4


def test_a_trained_model_is_trained_further(tiny, monkeypatch):
    operated = surgery(tiny("sd1")).args[0]
    train(tiny("sd1"), operated)
    cat = conditioning(tiny("sd1"), "a cat")
    loaded = load(tiny("sd1").model, "faces.safetensors", monkeypatch)
    more = train(tiny("sd1"), loaded, name="more", seed=5).args[0]
    assert not torch.equal(sample(more, cat), sample(loaded, cat))
    again = load(tiny("sd1").model, "more.safetensors", monkeypatch)
    assert relative(sample(again, cat), sample(more, cat)) < 1e-3


def test_bad_input_gets_one_sentence(tiny, tmp_path, monkeypatch):
    parts = tiny("sd1")
    operated = surgery(parts).args[0]
    (tmp_path / "input" / "empty").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"still has its text.*Null-Text Surgery"):
        train(parts, parts.model)
    with pytest.raises(ValueError, match=r"There are no pictures in .*empty"):
        train(parts, operated, images=None, folder="empty")
    with pytest.raises(ValueError, match='connect some to "images"'):
        train(parts, operated, images=None)
    with pytest.raises(ValueError, match="multiple of 3"):
        train(parts, operated, accumulation=3)
    with pytest.raises(ValueError, match="file_name"):
        train(parts, operated, name="../elsewhere")
    with pytest.raises(ValueError, match="concept model already"):
        surgery(parts._replace(model=operated))
    (tmp_path / "full").write_text("no folder")
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "full"))
    with pytest.raises(ValueError, match="full"):
        train(parts, operated)


@pytest.mark.parametrize(("made_of", "used_with"), [("sd1", "sd2"), ("sdxl", "sd1"), ("sd2", "sdxl")])
def test_a_file_of_another_base_is_refused(tiny, monkeypatch, tmp_path, made_of, used_with):
    folder = tmp_path / "output" / "concept_atelier_models"
    save_concept_model(folder / "a.safetensors", random_concept_model(made_of, made_of))
    with pytest.raises(ValueError, match=f"made of {made_of} .* this {used_with} model"):
        load(tiny(used_with).model, "a.safetensors", monkeypatch)


@pytest.mark.parametrize(("made_of", "used_with"), [("sd2", "sd2_v"), ("sd2_v", "sd2")])
def test_a_file_of_another_prediction_is_refused(tiny, monkeypatch, made_of, used_with):
    """SD2 at 512 and at 768 pixels: the same shapes, but what comes out of one means nothing in the other."""
    surgery(tiny(made_of), file_name="a")
    load(tiny(made_of).model, "a.safetensors", monkeypatch)
    says = {"sd2": '"epsilon"', "sd2_v": '"v_prediction"'}
    with pytest.raises(ValueError, match=f"MODEL of {says[made_of]} prediction, and this one is of {says[used_with]}"):
        load(tiny(used_with).model, "a.safetensors", monkeypatch)
    train(tiny(made_of), surgery(tiny(made_of)).args[0], steps=1)
    with pytest.raises(ValueError, match=says[made_of]):
        load(tiny(used_with).model, "faces.safetensors", monkeypatch)


def test_a_loaded_model_is_refused_where_the_base_is_wanted(tiny):
    model = surgery(tiny("sd1")).args[0]
    with pytest.raises(ValueError, match="concept model already"):
        apply_concept_model(model, null_text_form(model))


def test_clones_share_nothing_but_weights(tiny):
    """NativeBackbone objects of the base and of its null-text clone in one session differ as they should."""
    parts = tiny("sd1")
    operated = surgery(parts).args[0]
    x_t, t = torch.randn(1, 4, 16, 16), torch.tensor([500])
    with native_session(parts.model, parts.clip, parts.vae) as backbone, torch.no_grad():
        null = null_context(backbone)
        first = backbone.predict_noise(x_t, t, null)
        other = NativeBackbone(operated, parts.clip, parts.vae).predict_noise(x_t, t, null)
        assert torch.equal(backbone.predict_noise(x_t, t, null), first) and not torch.equal(other, first)
