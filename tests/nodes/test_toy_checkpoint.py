"""The toy model as native MODEL, CLIP and VAE: the numbers of diffusers and transformers, under stock nodes."""

import comfy.sample
import latent_preview
import numpy as np
import pytest
import torch
from concept_atelier.nodes.native import toy as native
from concept_atelier.nodes.native.model_kind import model_family
from concept_atelier.nodes.native.text import describe_clip
from concept_atelier.nodes.toy import ACTION_NAMES, AtelierToyCheckpoint, AtelierToyPictures
from concept_atelier.toyworld import model as toyworld
from safetensors.torch import save_file

import nodes as stock

PROMPT = "a man in red salutes on grass with a ball on the left"


@pytest.fixture(scope="module")
def toy() -> toyworld.ToyModel:
    return toyworld.load_toy(random_weights=True)


@pytest.fixture(scope="module")
def parts(toy) -> native.ToyParts:
    state = (toy.unet.state_dict(), toyworld.text_encoder_state(toy.text_encoder), toy.autoencoder.state_dict())
    with torch.inference_mode():
        return native.build_toy(*state)


def token_ids(toy: toyworld.ToyModel, text: str) -> torch.Tensor:
    return torch.tensor(toy.tokenizer([text], padding="max_length")["input_ids"])


@torch.inference_mode()
def test_the_unet_gives_the_numbers_of_diffusers(toy, parts):
    x, t = torch.randn(2, toy.autoencoder.latent_channels, 8, 8), torch.tensor([10, 700])
    context = torch.randn(2, 24, 128)
    expected = toy.unet(x, t, context).sample
    torch.testing.assert_close(parts.model.model.diffusion_model(x, t, context=context), expected, rtol=0, atol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("text", ["", PROMPT, "a Qz7! unknown"])
def test_the_text_encoder_gives_the_numbers_of_transformers(toy, parts, text):
    [[hidden, values]] = stock.CLIPTextEncode().encode(parts.clip, text)[0]
    output = toy.text_encoder(input_ids=token_ids(toy, text))
    torch.testing.assert_close(hidden, output.last_hidden_state, rtol=0, atol=1e-5)
    torch.testing.assert_close(values["pooled_output"], output.pooler_output, rtol=0, atol=1e-5)


@torch.inference_mode()
def test_the_vae_is_the_autoencoder(toy, parts):
    pictures = torch.rand(2, 64, 48, 3)
    latents = toy.autoencoder.encode(pictures.movedim(-1, 1) * 2 - 1)
    torch.testing.assert_close(parts.vae.encode(pictures), latents)
    decoded = (toy.autoencoder.decode(latents) / 2 + 0.5).clamp(0, 1).movedim(1, -1)
    torch.testing.assert_close(parts.vae.decode(latents.clone()), decoded)


@torch.inference_mode()
def test_stock_nodes_paint_with_it(toy, parts):
    [positive], [negative] = (stock.CLIPTextEncode().encode(parts.clip, text) for text in (PROMPT, ""))
    [empty] = stock.EmptyLatentImage().generate(64, 64, 2)
    [latent] = stock.KSampler().sample(parts.model, 3, 3, 2.0, "euler", "normal", positive, negative, empty, 1.0)
    assert latent["samples"].shape == (2, toy.autoencoder.latent_channels, 8, 8)
    [picture] = stock.VAEDecode().decode(parts.vae, latent)
    assert picture.shape == (2, 64, 64, 3)
    [again] = stock.VAEEncode().encode(parts.vae, picture)
    assert again["samples"].shape == latent["samples"].shape
    [tiled] = stock.VAEDecodeTiled().decode(parts.vae, latent, 64, 16)
    assert tiled.shape == picture.shape


@torch.inference_mode()
def test_inpainting_keeps_what_is_outside_the_mask(parts):
    [positive], [negative] = (stock.CLIPTextEncode().encode(parts.clip, text) for text in (PROMPT, ""))
    latents = parts.vae.encode(torch.rand(1, 64, 64, 3))
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., :32] = 1
    latent = {"samples": latents, "noise_mask": mask}
    [out] = stock.KSampler().sample(parts.model, 3, 3, 2.0, "euler", "normal", positive, negative, latent, 1.0)
    torch.testing.assert_close(out["samples"][..., 4:], latents[..., 4:])
    assert not torch.allclose(out["samples"][..., :4], latents[..., :4])


@torch.inference_mode()
def test_the_preview_shows_the_mean_color_of_each_patch(toy, parts):
    latent_format = parts.model.model.latent_format
    latents = torch.randn(1, toy.autoencoder.latent_channels, 8, 8) * 0.05
    preview = latent_preview.Latent2RGBPreviewer(
        latent_format.latent_rgb_factors, latent_format.latent_rgb_factors_bias
    ).decode_latent_to_preview(latents)
    assert preview.size == (8, 8)
    patches = torch.nn.functional.avg_pool2d(toy.autoencoder.decode(latents) / 2 + 0.5, 8)[0].clamp(0, 1)
    shown = torch.from_numpy(np.array(preview)).movedim(-1, 0) / 255
    torch.testing.assert_close(shown, patches, rtol=0, atol=0.01)


def test_the_backbone_knows_its_family(parts):
    assert model_family(parts.model) == "toy"
    assert describe_clip(parts.clip) == ("toy", {"l": 128})


@torch.inference_mode()
def test_stock_embeddings_work(parts, tmp_path, monkeypatch):
    vector = torch.randn(1, 128)
    save_file({"clip_l": vector}, str(tmp_path / "wave.safetensors"))
    monkeypatch.setattr(parts.clip.tokenizer.clip_l, "embedding_directory", [str(tmp_path)])
    tokens = parts.clip.tokenize("a panda embedding:wave on grass")["l"][0]
    assert len(tokens) == 24
    assert torch.equal(tokens[3][0], vector[0])


@torch.inference_mode()
def test_a_second_copy_shares_no_weights(parts):
    copy = parts.model.clone(force_deepcopy=True)
    weight, other = (m.model.diffusion_model.out[2].weight for m in (parts.model, copy))
    assert weight is not other and torch.equal(weight, other)


def test_an_empty_latent_of_four_channels_fits(toy, parts):
    fixed = comfy.sample.fix_empty_latent_channels(parts.model, torch.zeros(1, 4, 8, 8))
    assert fixed.shape == (1, toy.autoencoder.latent_channels, 8, 8)


def test_the_node_gives_the_bundled_weights_once_and_clones_of_them(monkeypatch, parts):
    monkeypatch.setattr("concept_atelier.nodes.toy.toy_checkpoint", lambda: parts)
    model, clip, vae = AtelierToyCheckpoint.execute().args
    assert model is not parts.model and model.model is parts.model.model
    assert clip is not parts.clip and clip.cond_stage_model is parts.clip.cond_stage_model
    assert vae is parts.vae


def test_the_bundled_weights_fit(toy):
    bundled = native.toy_checkpoint()
    assert bundled is native.toy_checkpoint()
    trained = toyworld.load_toy()
    x, t, context = torch.randn(1, toy.autoencoder.latent_channels, 8, 8), torch.tensor([500]), torch.randn(1, 24, 128)
    with torch.inference_mode():
        out = bundled.model.model.diffusion_model(x, t, context=context)
        torch.testing.assert_close(out, trained.unet(x, t, context).sample, rtol=0, atol=1e-5)


def test_pictures_captions_masks_and_other_actions_belong_together():
    images, captions, masks, others = AtelierToyPictures.execute("star (held out)", 5, 7, 3).args
    assert images.shape == (5, 64, 64, 3) and masks.shape == (5, 64, 64) and others.shape == (15, 64, 64, 3)
    assert images.dtype == masks.dtype == torch.float32 and images.max() <= 1
    lines = captions.splitlines()
    assert len(lines) == 5
    assert all(line.count("{}") == 1 and "star" not in line for line in lines)
    # Far from the figure, a picture of another action is the picture itself.
    corners = images[:, :6, :6], others.view(5, 3, 64, 64, 3)[:, :, :6, :6]
    assert all(torch.allclose(corners[0][i], corners[1][i, k], atol=0.02) for i in range(5) for k in range(3))


def test_the_seed_decides_the_pictures():
    first, again, other = (AtelierToyPictures.execute("dab (held out)", 3, seed, 1).args for seed in (0, 0, 1))
    assert torch.equal(first[0], again[0]) and torch.equal(first[3], again[3])
    assert not torch.equal(first[0], other[0])


def test_pictures_of_one_subject():
    images, captions, masks, others = AtelierToyPictures.execute("dab (held out)", 30, 0, 1, "wizard (held out)").args
    assert images.shape == (30, 64, 64, 3) and masks.shape == (30, 64, 64) and others.shape == images.shape
    lines = captions.splitlines()
    assert all(line.startswith("a {} ") and "wizard" not in line and "dab" not in line for line in lines)
    assert len(set(lines)) > 20  # several things in several places
    woman = AtelierToyPictures.execute("dab (held out)", 3, 0, 1, "woman").args[1].splitlines()
    assert all(line.startswith("a {} in ") for line in woman)


def test_held_out_actions_are_marked():
    combo = next(i for i in AtelierToyPictures.define_schema().inputs if i.id == "action")
    assert combo.options == list(ACTION_NAMES)
    assert sum(option.endswith("(held out)") for option in combo.options) == 5
