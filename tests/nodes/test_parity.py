"""The same tiny weights through ComfyUI's classes and through diffusers': both backbones must give the same numbers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import comfy.model_management
import comfy.sd1_clip
import comfy.utils
import pytest
import tiny_models
import torch
from comparing import relative
from concept_atelier.kernels.backbone import Backbone, TextContext, TextEncoding
from concept_atelier.kernels.conditioning import encode_prompt
from concept_atelier.kernels.diffusers_backbone import DiffusersBackbone, KLAutoencoder, Tower
from concept_atelier.kernels.layouts import Layout
from concept_atelier.kernels.prompts import Prompt, parse_prompt
from concept_atelier.kernels.schedule import NoiseSchedule
from concept_atelier.nodes.native.backbone import native_session
from concept_atelier.nodes.native.toy import build_toy
from concept_atelier.toyworld.model import load_toy, text_encoder_state
from torch import Tensor
from transformers import CLIPTokenizer

sys.path.append(str(Path(__file__).parents[1] / "kernels"))
import tiny_diffusers

TOLERANCE = 1e-4
PROMPT = "a photo of a man <x> on the grass, with a red ball"
TOKENIZER = Path(comfy.sd1_clip.__file__).parent / "sd1_tokenizer"


class Pair(NamedTuple):
    """One model, two backbones."""

    native: Backbone
    diffusers: Backbone


def clip_tokenizer(pad_token: str | None) -> CLIPTokenizer:
    """CLIP's own tokenizer; OpenCLIP's towers pad with "!", id 0."""
    special = {} if pad_token is None else {"pad_token": pad_token}
    return CLIPTokenizer.from_pretrained(str(TOKENIZER), model_max_length=77, **special)


def to_diffusers(tiny: tiny_models.TinyModel, topology: str) -> DiffusersBackbone:
    """The weights of a native model in diffusers' and transformers' classes."""
    family = topology.removesuffix("_v")
    unet = tiny_diffusers.build_unet(family)
    state = tiny.model.model.diffusion_model.state_dict()
    keys = comfy.utils.unet_to_diffusers(tiny.model.model.model_config.unet_config)
    wanted = unet.state_dict().keys()
    unet.load_state_dict({ours: state[theirs] for ours, theirs in keys.items() if ours in wanted})

    towers = []
    for name in tiny_diffusers.TOWERS[family]:
        tokenizer = clip_tokenizer(None if name == "l" else "!")
        encoder = tiny_diffusers.build_tower(family, name, tokenizer, positions=77)
        state = getattr(tiny.clip.cond_stage_model, f"clip_{name}").transformer.state_dict()
        wanted = encoder.state_dict().keys()
        if not any(key.startswith("text_model.") for key in wanted):
            state = {key.removeprefix("text_model."): value for key, value in state.items()}
        # SD2.x text encoders are published for diffusers without the last layer, which is never read.
        encoder.load_state_dict({key: state[key] for key in wanted})
        towers.append(Tower(name, tokenizer, encoder))
    return DiffusersBackbone(
        family,
        unet,
        towers,
        KLAutoencoder(tiny_diffusers.build_vae()),
        8,
        NoiseSchedule.scaled_linear().alphas_cumprod,
        "v_prediction" if topology == "sd2_v" else "epsilon",
    )


def both_toys() -> tuple[tiny_models.TinyModel, DiffusersBackbone]:
    """The toy model with random weights, as ComfyUI's objects and as a diffusers backbone."""
    toy = load_toy(random_weights=True)
    for seed, part in enumerate((toy.unet, toy.text_encoder, toy.autoencoder)):
        tiny_diffusers.fill(part, seed)
    native = build_toy(toy.unet.state_dict(), text_encoder_state(toy.text_encoder), toy.autoencoder.state_dict())
    return native, DiffusersBackbone.from_toy(toy)


@pytest.fixture(scope="module")
def both(tiny: Callable[[str], tiny_models.TinyModel]) -> Callable[[str], tuple]:
    """both(topology) -> the native MODEL, CLIP and VAE, and the diffusers backbone; built once."""

    @cache
    def build(topology: str) -> tuple:
        if topology == "toy":
            return both_toys()
        # A patched clone that another test left loaded has its patches in the weights until the model itself is loaded.
        comfy.model_management.load_models_gpu([tiny(topology).model], force_full_load=True)
        return tiny(topology), to_diffusers(tiny(topology), topology)

    return build


@pytest.fixture(params=("toy", *tiny_models.TOPOLOGIES))
def pair(request: pytest.FixtureRequest, both: Callable[[str], tuple]) -> Iterator[Pair]:
    parts, diffusers = both(request.param)
    with native_session(parts.model, parts.clip, parts.vae) as native:
        yield Pair(native, diffusers)


def inputs(backbone: Backbone) -> tuple[Tensor, Tensor]:
    """Noisy latents of two pictures, wider than high, and their timesteps."""
    x_t = torch.randn(2, backbone.latent_channels, 16, 24, generator=torch.Generator().manual_seed(3))
    return x_t, torch.tensor([60, 850])


def contexts(backbone: Backbone, encode: Callable[..., TextEncoding], vectors: dict[str, Tensor]) -> TextContext:
    """A context with K and V apart for every layer, from one vector for each of them."""
    layout = Layout("layer", split_kv=True).bind(backbone.layers)
    prompt = parse_prompt(PROMPT, ["x"])
    staged = encode_prompt(encode, backbone.layers, prompt, {"x": vectors}, {"x": layout}, 1000)
    return staged.at(0).repeat(2)


def new_vectors(backbone: Backbone) -> dict[str, Tensor]:
    """2 L different vectors, near a word."""
    generator = torch.Generator().manual_seed(4)
    vectors = {}
    for tower, word in backbone.token_vectors("man").items():
        noise = torch.randn(2 * len(backbone.layers), *word.shape, generator=generator)
        vectors[tower] = (word + 0.3 * noise).requires_grad_()
    return vectors


def test_both_describe_the_same_model(pair: Pair) -> None:
    native, diffusers = pair
    for name in ("family", "towers", "context_width", "layers", "latent_channels", "latent_scale", "gradient_scale"):
        assert getattr(native, name) == getattr(diffusers, name), name
    t = torch.arange(1000)
    assert relative(native.schedule.abar(t), diffusers.schedule.abar(t)) < 1e-6
    ours, theirs = diffusers.linears(), native.linears()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name].weight, theirs[name].weight) for name in ours)


@pytest.mark.parametrize("text", [PROMPT, "<x>", "<x> a cat <y>, <x>", "a man<x>on grass", "it's 2,  in ROME <y> ..."])
def test_text(pair: Pair, text: str) -> None:
    prompt: Prompt = parse_prompt(text, ["x", "y"])
    vectors = {
        name: {tower: torch.stack([word, 1.1 * word]) for tower, word in pair.diffusers.token_vectors(words).items()}
        for name, words in (("x", "red ball"), ("y", "cat"))
    }
    native, diffusers = (b.encode_text(prompt, {n: vectors[n] for n in prompt.names}) for b in pair)
    assert native.positions == diffusers.positions
    assert relative(native.hidden, diffusers.hidden) < TOLERANCE
    if diffusers.pooled is None:
        assert native.pooled is None
    else:
        assert relative(native.pooled, diffusers.pooled) < TOLERANCE


def test_token_vectors(pair: Pair) -> None:
    native, diffusers = (b.token_vectors("extraordinary jumping") for b in pair)
    assert list(native) == list(diffusers)
    for tower in native:
        assert len(diffusers[tower]) >= 2
        assert torch.equal(native[tower], diffusers[tower])


def test_word_tables(pair: Pair) -> None:
    for tower, width in pair.native.towers.items():
        (words, table), (words_, table_) = (b.word_table(tower) for b in pair)
        assert words == words_ and table.shape == (len(words), width) and torch.equal(table, table_)
        assert "cat" in words and all(word.isalpha() and word.isascii() for word in words)
        at = words.index("cat")
        assert torch.equal(table[at], pair.native.token_vectors("cat")[tower][0])


def test_eps_maps_and_gradients(pair: Pair) -> None:
    """Every layer has contexts of its own, K and V apart, made from token vectors by each backbone's text encoder."""
    results = []
    for backbone in pair:
        x_t, t = inputs(backbone)
        x_t.requires_grad_()
        vectors = new_vectors(pair.diffusers)
        context = contexts(backbone, backbone.encode_text, vectors)
        (placeholder,) = backbone.encode_text(
            parse_prompt(PROMPT, ["x"]), {"x": {tower: v[:1] for tower, v in vectors.items()}}
        ).positions["x"]
        with backbone.attention(backbone.layers, [placeholder, 2]) as recorded:
            eps = backbone.predict_noise(x_t, t, context)
        target = torch.randn(eps.shape, generator=torch.Generator().manual_seed(5))
        weights = torch.tensor([1.0, -0.5])
        on_eps = torch.autograd.grad((eps * target).mean(), [*vectors.values(), x_t], retain_graph=True)
        on_maps = torch.autograd.grad(
            sum((maps[0] @ weights).square().mean() for maps in recorded.maps.values()), [*vectors.values(), x_t]
        )
        results.append((eps, {layer: maps[0] for layer, maps in recorded.maps.items()}, on_eps, on_maps))
    (eps, maps, on_eps, on_maps), (eps_, maps_, on_eps_, on_maps_) = results
    assert relative(eps, eps_) < TOLERANCE
    assert list(maps) == list(maps_)
    for layer in maps:
        assert relative(maps[layer], maps_[layer]) < TOLERANCE, layer
    for ours, theirs in zip((*on_eps, *on_maps), (*on_eps_, *on_maps_), strict=True):
        assert relative(ours, theirs) < TOLERANCE


@pytest.mark.parametrize("detach_query", [True, False])
def test_attention_under_a_reference_and_its_gradients(pair: Pair, detach_query: bool) -> None:
    """The maps that the same queries have with the keys of another context, small maps alone."""
    results = []
    for backbone in pair:
        x_t, t = inputs(backbone)
        x_t.requires_grad_()
        vectors = new_vectors(pair.diffusers)
        context = contexts(backbone, backbone.encode_text, vectors)
        reference = contexts(backbone, backbone.encode_text, {tower: 1.2 * v.flip(0) for tower, v in vectors.items()})
        largest = 24 if backbone.family == "sdxl" else 96  # leaves out the finest layers: 8 x 12, else 16 x 24
        with backbone.attention(backbone.layers, range(1, 7), reference, detach_query, largest) as recorded:
            eps = backbone.predict_noise(x_t, t, context)
        assert torch.equal(eps, backbone.predict_noise(x_t, t, context))
        small = [layer for layer, maps in recorded.maps.items() if maps]
        maps = {layer: (recorded.maps[layer][0], recorded.reference[layer][0]) for layer in small}
        loss = sum((a_t - a_r).square().sum() for a_t, a_r in maps.values())
        gradients = torch.autograd.grad(loss, [*vectors.values(), x_t], allow_unused=True, materialize_grads=True)
        results.append((maps, gradients))
    (maps, gradients), (maps_, gradients_) = results
    assert list(maps) == list(maps_) and 0 < len(maps) < len(pair.native.layers)
    for layer in maps:
        for ours, theirs in zip(maps[layer], maps_[layer]):
            assert ours.shape[2] <= largest
            assert relative(ours, theirs) < TOLERANCE, layer
    for ours, theirs in zip(gradients, gradients_, strict=True):
        assert relative(ours, theirs) < TOLERANCE if theirs.any() else not ours.any()
    assert bool(gradients[-1].any()) != detach_query  # of the latents


def test_pictures_of_the_toy_model(both: Callable[[str], tuple]) -> None:
    parts, diffusers = both("toy")
    images = torch.rand(2, 64, 48, 3, generator=torch.Generator().manual_seed(6))
    with native_session(parts.model, parts.clip, parts.vae) as native:
        latents = native.encode_image(images)
        assert relative(latents, diffusers.encode_image(images)) < TOLERANCE
        assert relative(native.decode_latent(latents), diffusers.decode_latent(latents)) < TOLERANCE
