"""Null-text surgery on diffusers U-Nets: what is gone, what is constant, how close it starts (METHODS 5.9, 7 to 9)."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache, partial

import pytest
import tiny_diffusers
import torch
from concept_atelier.kernels.backbone import Layer
from concept_atelier.kernels.conditioning import StagedContext
from concept_atelier.kernels.diffusers_attention import ldm_name, transformer_blocks
from concept_atelier.kernels.diffusers_backbone import DiffusersBackbone
from concept_atelier.kernels.files import write_safetensors
from concept_atelier.kernels.nulltext import (
    ConceptModel,
    calibrated_features,
    layer_of,
    load_concept_model,
    null_context,
    null_text_errors,
    save_concept_model,
    uniform_features,
)
from concept_atelier.kernels.nulltext_unet import (
    is_text_weight,
    make_concept_model,
    remove_cross_attention,
    watch_unet,
)
from concept_atelier.kernels.sampling import classifier_free, ddim_sample, noise_source
from concept_atelier.toyworld.exemplars import exemplar_scenes
from concept_atelier.toyworld.model import load_toy
from concept_atelier.toyworld.render import render
from concept_atelier.toyworld.vocabulary import ACTIONS
from diffusers import UNet2DConditionModel
from torch import Tensor

SD15 = {
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
}


@cache
def backbone_of(topology: str) -> DiffusersBackbone:
    """Built once; no test changes it."""
    return DiffusersBackbone.from_pipeline(tiny_diffusers.build(topology))


def latents(backbone: DiffusersBackbone, count: int = 2) -> Tensor:
    return torch.randn(count, backbone.latent_channels, 8, 8, generator=torch.Generator().manual_seed(1))


def calibrated(backbone: DiffusersBackbone, x_0: Tensor, timesteps: int = 4) -> dict[Layer, Tensor]:
    return calibrated_features(backbone, partial(watch_unet, backbone.unet), x_0, timesteps)


def copied(backbone: DiffusersBackbone) -> DiffusersBackbone:
    """The backbone with a U-Net of its own."""
    other = copy.copy(backbone)
    other.unet = copy.deepcopy(backbone.unet)
    return other


def operated(backbone: DiffusersBackbone, features: dict[Layer, Tensor]) -> DiffusersBackbone:
    """A copy of the backbone after surgery."""
    other = copied(backbone)
    remove_cross_attention(other.unet, features)
    return other


def with_uniform_attention(topology: str) -> DiffusersBackbone:
    """With K projections of zero every token gets the same score."""
    backbone = copied(backbone_of(topology))
    for _, block in transformer_blocks(backbone.unet):
        torch.nn.init.zeros_(block.attn2.to_k.weight)
    return backbone


@pytest.fixture(params=["sd1", "sd2_v", "sdxl"])
def any_backbone(request) -> DiffusersBackbone:
    return backbone_of(request.param)


def test_no_parameter_of_text_is_left(any_backbone):
    unet = operated(any_backbone, calibrated(any_backbone, latents(any_backbone), 1)).unet
    names = [name for name, _ in unet.named_parameters()]
    before = [name for name, _ in any_backbone.unet.named_parameters()]
    assert not [name for name in names if "attn2" in name or is_text_weight(name)]
    removed = set(before) - set(names)
    # q, k, v, out and its bias, norm2 and its bias: of every layer, and of the residual blocks' norm2 none.
    assert len(removed) == 7 * len(any_backbone.layers)
    assert any(".resnets.0.norm2." in name for name in names)
    assert len([name for name, _ in unet.named_buffers() if name.endswith("attn2.feature")]) == len(any_backbone.layers)


def test_sd15_keeps_815_53_million_parameters():
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SD15)
        assert round(sum(p.numel() for p in unet.parameters()) / 1e6, 2) == 859.52
        widths = {layer: len(block.norm2.weight) for layer, block in transformer_blocks(unet)}
        remove_cross_attention(unet, {layer: torch.zeros(width) for layer, width in widths.items()})
    assert sorted(widths.values()) == [320] * 5 + [640] * 5 + [1280] * 6
    assert round(sum(p.numel() for p in unet.parameters()) / 1e6, 2) == 815.53


def test_output_does_not_depend_on_the_prompt(any_backbone):
    x_0 = latents(any_backbone)
    null_text = operated(any_backbone, calibrated(any_backbone, x_0, 1))
    null = null_context(any_backbone).repeat(2)
    other = replace(null, rows=torch.randn(null.rows.shape, generator=torch.Generator().manual_seed(4)))
    t = torch.tensor([10, 900])
    with torch.no_grad():
        assert not torch.equal(any_backbone.predict_noise(x_0, t, null), any_backbone.predict_noise(x_0, t, other))
        assert torch.equal(null_text.predict_noise(x_0, t, null), null_text.predict_noise(x_0, t, other))


def test_what_replaces_attention_is_the_same_everywhere(any_backbone):
    x_0 = latents(any_backbone)
    features = calibrated(any_backbone, x_0, 1)
    null_text = operated(any_backbone, features)
    seen = {}
    with torch.no_grad(), watch_unet(null_text.unet, seen.__setitem__):
        null_text.predict_noise(x_0, torch.tensor([5, 500]), null_context(any_backbone).repeat(2))
    assert list(seen) == list(any_backbone.layers)
    assert max(output.shape[1] for output in seen.values()) == (16 if any_backbone.family == "sdxl" else 64)
    for layer, output in seen.items():
        assert (output.shape[0] == 3 and output.shape[1] > 1) or layer.block == "middle" or output.shape[1] >= 1
        assert torch.equal(output, features[layer].expand_as(output))


def test_features_are_means_over_all_positions_latents_and_timesteps():
    backbone = backbone_of("sd1")
    x_0 = latents(backbone, 11)  # more than one batch, the last one smaller
    seen = {layer: [] for layer in backbone.layers}
    with torch.no_grad(), watch_unet(backbone.unet, lambda layer, output: seen[layer].append(output.flatten(0, 1))):
        features = calibrated(backbone, x_0, 3)
    for layer, outputs in seen.items():
        torch.testing.assert_close(features[layer], torch.cat(outputs).mean(dim=0), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("topology", ["sd1", "sd2_v"])
def test_with_uniform_attention_both_forms_are_the_model_itself(topology):
    """METHODS 5.9, 8: K projections zeroed."""
    backbone = with_uniform_attention(topology)
    x_0 = latents(backbone)
    exact, uniform = calibrated(backbone, x_0, 2), uniform_features(backbone)
    for layer in backbone.layers:
        torch.testing.assert_close(exact[layer], uniform[layer], atol=1e-5, rtol=1e-4)
    for features in (exact, uniform):
        errors = null_text_errors(backbone, operated(backbone, features), x_0, 2)
        assert list(errors) == [999, 499] and max(errors.values()) < 1e-5
    wrong = {layer: -feature for layer, feature in exact.items()}
    assert min(null_text_errors(backbone, operated(backbone, wrong), x_0, 2).values()) > 1e-2


def test_pictures_are_those_of_the_null_prompt_where_surgery_is_exact():
    """METHODS 5.9, 9: a guided combination of concept model and base, w1 arbitrary, paints the unconditional base."""
    backbone = with_uniform_attention("sd1")
    null_text = operated(backbone, calibrated(backbone, latents(backbone)))
    null = null_context(backbone)
    weight = 2.5

    class Guided:
        schedule = backbone.schedule

        def predict_noise(self, x_t: Tensor, t: Tensor, context) -> Tensor:
            eps_0 = backbone.predict_noise(x_t, t, context)
            return eps_0 + weight * (null_text.predict_noise(x_t, t, context) - eps_0)

    def paint(model) -> Tensor:
        noise = noise_source(backbone, [0], (64, 64))
        predict_noise = classifier_free(model, StagedContext((0,), (null,), {}), null, cfg=1)
        return ddim_sample(model.schedule, predict_noise, noise, 5)

    stock = paint(backbone)
    torch.testing.assert_close(paint(Guided()), stock, atol=1e-4 * stock.abs().max().item(), rtol=0)


def test_on_the_toy_model_the_calibrated_form_starts_closer():
    """METHODS 5.4: closer to the model's own null prompt than the uniform form, over all timesteps together."""
    backbone = DiffusersBackbone.from_toy(load_toy())
    scenes = [scene for action in ACTIONS for scene in exemplar_scenes(action, 1, 0)]
    x_0 = backbone.encode_image(torch.stack([torch.tensor(render(scene)) for scene in scenes]).float() / 255)
    overall = {}
    for name, features in (("calibrated", calibrated(backbone, x_0, 5)), ("uniform", uniform_features(backbone))):
        errors = null_text_errors(backbone, operated(backbone, features), x_0, 5)
        overall[name] = (sum(error**2 for error in errors.values()) / len(errors)) ** 0.5
    assert overall["calibrated"] < overall["uniform"], overall
    assert overall["calibrated"] < 0.2, overall


def test_file_round_trip(tmp_path):
    backbone = backbone_of("sdxl")
    features = calibrated(backbone, latents(backbone, 1), 1)
    weights = {name: p for name, p in backbone.unet.named_parameters() if not is_text_weight(name)}
    deltas = {name: 0.01 * torch.randn(weight.shape) for name, weight in weights.items()}
    model = ConceptModel("sdxl", features, null_context(backbone).pooled[0], deltas, {"form": "calibrated"})
    save_concept_model(tmp_path / "a" / "model.safetensors", model)
    loaded = load_concept_model(tmp_path / "a" / "model.safetensors")
    assert loaded.family == "sdxl" and loaded.metadata == {"form": "calibrated"}
    assert torch.equal(loaded.pooled, model.pooled)
    assert loaded.features.keys() == features.keys()
    assert all(torch.equal(loaded.features[layer], feature) for layer, feature in features.items())
    for name, delta in deltas.items():
        torch.testing.assert_close(loaded.deltas[name].float(), delta, atol=1e-7, rtol=1e-3)

    made = copy.deepcopy(backbone.unet)
    make_concept_model(made, loaded, "sdxl")
    name = "conv_in.weight"
    torch.testing.assert_close(made.get_parameter(name), weights[name] + deltas[name], atol=3e-5, rtol=0)


def test_layer_names_round_trip(any_backbone):
    assert [layer_of(ldm_name(layer)) for layer in any_backbone.layers] == list(any_backbone.layers)


@pytest.mark.parametrize(("other", "sentence"), [("sd2", "made of sd1 .* this sd2"), ("sdxl", "this sdxl model")])
def test_a_file_of_another_architecture_is_refused(other, sentence):
    backbone = backbone_of("sd1")
    model = ConceptModel("sd1", calibrated(backbone, latents(backbone, 1), 1))
    unet = tiny_diffusers.build_unet(other)
    before = {name: weight.clone() for name, weight in unet.named_parameters()}
    with pytest.raises(ValueError, match=sentence):
        make_concept_model(unet, model, other)
    assert all(torch.equal(weight, before[name]) for name, weight in unet.named_parameters())


def test_weights_that_do_not_fit_are_refused():
    backbone = backbone_of("sd1")
    features = calibrated(backbone, latents(backbone, 1), 1)
    model = ConceptModel("sd1", features, deltas={"conv_in.weight": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"another shape .* 1 weights"):
        make_concept_model(copied(backbone).unet, model, "sd1")


def test_other_files_are_refused(tmp_path):
    write_safetensors(tmp_path / "lora.safetensors", {"a": torch.zeros(1)}, {})
    with pytest.raises(ValueError, match="holds no concept model"):
        load_concept_model(tmp_path / "lora.safetensors")
    header = {"concept_model": "sd1", "format_version": "99"}
    write_safetensors(tmp_path / "new.safetensors", {"a": torch.zeros(1)}, header)
    with pytest.raises(ValueError, match="newer Concept Atelier"):
        load_concept_model(tmp_path / "new.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"bad\.safetensors is damaged"):
        load_concept_model(tmp_path / "bad.safetensors")
