"""The diffusers backbone on tiny random models of every topology: the shared invariants of METHODS.md section 8."""

from __future__ import annotations

import functools
import hashlib
import subprocess
import sys
from types import SimpleNamespace

import pytest
import tiny_diffusers
import torch
from concept_atelier.kernels.backbone import Layer, TextContext
from concept_atelier.kernels.diffusers_backbone import DiffusersBackbone, KLAutoencoder
from concept_atelier.kernels.layouts import Layout
from concept_atelier.kernels.prompts import parse_prompt
from concept_atelier.toyworld.model import load_toy
from torch import Tensor

ALL = ("toy", *tiny_diffusers.TOPOLOGIES)
LAYER_COUNT = {"toy": 7, "sd1": 16, "sd2": 16, "sd2_v": 16, "sdxl": 70}


class Case:
    """A backbone over a tiny model, its raw U-Net, and inputs for a batch of 2."""

    def __init__(self, topology: str) -> None:
        if topology == "toy":
            self.pipeline = None
            toy = load_toy(random_weights=True)
            self.unet = tiny_diffusers.fill(toy.unet, 0)
            tiny_diffusers.fill(toy.text_encoder, 1)
            self.backbone = DiffusersBackbone.from_toy(toy)
            self.autoencoder = toy.autoencoder
        else:
            # At the lowest level, 1 x 1, a group of GroupNorm holds two values. Some seeds make them nearly equal: too
            # stiff for finite differences.
            self.pipeline = tiny_diffusers.build(topology, seed=10)
            self.unet = self.pipeline.unet
            self.backbone = DiffusersBackbone.from_pipeline(self.pipeline)
            self.autoencoder = self.pipeline.vae
        b = self.backbone
        generator = torch.Generator().manual_seed(5)
        self.x_t = torch.randn(2, b.latent_channels, 8, 8, generator=generator)
        self.t = torch.tensor([20, 700])
        self.hidden = torch.randn(2, 24, b.context_width, generator=generator)
        self.pooled = torch.randn(2, b.towers["g"], generator=generator) if b.family == "sdxl" else None
        self.conditions = None
        if b.family == "sdxl":
            sizes = torch.tensor([[64, 64, 0, 0, 64, 64]] * 2)
            self.conditions = {"text_embeds": self.pooled, "time_ids": sizes}

    def stock(self, hidden: Tensor) -> Tensor:
        """What the U-Net itself gives with its own attention processors and one context."""
        self.backbone.close()
        out = self.unet(self.x_t, self.t, hidden, added_cond_kwargs=self.conditions).sample
        self.reopen()
        return out

    def reopen(self) -> None:
        """A new backbone over the same parts."""
        b = self.backbone
        self.backbone = DiffusersBackbone(
            b.family,
            self.unet,
            b.text_towers,
            b.autoencoder,
            b.latent_scale,
            b.schedule.alphas_cumprod,
            b.prediction_type,
        )

    def plain(self) -> TextContext:
        return TextContext.plain(self.hidden, self.backbone.layers, self.pooled)

    def apart(self, requires_grad: bool = False) -> TextContext:
        """Every layer reads rows of its own, K and V apart: 2 L distinct rows."""
        count = len(self.backbone.layers)
        rows = torch.randn(2 * count, *self.hidden.shape, generator=torch.Generator().manual_seed(6))
        key, value = tuple(range(count)), tuple(range(count, 2 * count))
        return TextContext(rows.requires_grad_(requires_grad), key, value, self.pooled)

    def word(self, variants: int = 1) -> dict[str, dict[str, Tensor]]:
        """Vectors of <x> that are the word "action", as `variants` leaves of different size."""
        scale = 1 + 0.1 * torch.arange(variants)[:, None, None]
        words = self.backbone.token_vectors("action")
        return {"x": {tower: (v[None] * scale).requires_grad_() for tower, v in words.items()}}

    def modules(self) -> list[torch.nn.Module]:
        return [self.unet, self.autoencoder, *(tower.encoder for tower in self.backbone.text_towers)]


open_case = functools.cache(Case)


@pytest.fixture(params=ALL)
def case(request: pytest.FixtureRequest) -> Case:
    return open_case(request.param)


@pytest.fixture
def sd1() -> Case:
    return open_case("sd1")


@pytest.fixture
def sdxl() -> Case:
    return open_case("sdxl")


def attn2(case: Case, layer: Layer) -> torch.nn.Module:
    """The attention module of a layer, found by its place in the stock U-Net's own order of modules."""
    by_stage = {"input": "down_blocks", "middle": "mid_block", "output": "up_blocks"}
    of_stage = [kept for kept in case.backbone.layers if kept.block == layer.block]
    modules = [m for name, m in case.unet.named_modules() if name.startswith(by_stage[layer.block])]
    return [m.attn2 for m in modules if hasattr(m, "attn2")][of_stage.index(layer)]


def test_plain_context_is_bit_exact(case: Case) -> None:
    stock = case.stock(case.hidden)
    eps = case.backbone.predict_noise(case.x_t, case.t, case.plain())
    if case.backbone.prediction_type == "v_prediction":
        stock = case.backbone.schedule.eps_from_v(case.x_t, case.t, stock)
    assert torch.equal(eps, stock)
    assert eps.shape == case.x_t.shape
    assert (case.backbone.predict_noise(case.x_t, case.t, case.apart()) - eps).abs().max() > 1e-3


def test_v_prediction_implies_the_same_clean_latents() -> None:
    case = open_case("sd2_v")
    v = case.stock(case.hidden)
    eps = case.backbone.predict_noise(case.x_t, case.t, case.plain())
    abar = case.pipeline.scheduler.alphas_cumprod[case.t].view(-1, 1, 1, 1)
    x_0 = abar.sqrt() * case.x_t - (1 - abar).sqrt() * v
    assert torch.allclose((case.x_t - (1 - abar).sqrt() * eps) / abar.sqrt(), x_0, atol=2e-5)


def test_stock_calls_work_beside_the_backbone_and_after_it(sd1: Case) -> None:
    stock = sd1.stock(sd1.hidden)
    assert torch.equal(sd1.unet(sd1.x_t, sd1.t, sd1.hidden).sample, stock)
    padding = torch.ones(2, 24)
    padding[:, 12:] = 0
    masked = sd1.unet(sd1.x_t, sd1.t, sd1.hidden, encoder_attention_mask=padding).sample
    sd1.backbone.close()
    assert torch.equal(sd1.unet(sd1.x_t, sd1.t, sd1.hidden, encoder_attention_mask=padding).sample, masked)
    assert {type(p).__name__ for p in sd1.unet.attn_processors.values()} == {"AttnProcessor2_0"}
    sd1.reopen()


def test_layers_carry_ldm_numbers(case: Case) -> None:
    layers = case.backbone.layers
    assert len(layers) == len(set(layers)) == LAYER_COUNT[case.backbone.family]
    if case.backbone.family in ("sd1", "sd2"):
        inputs, outputs = (1, 2, 4, 5, 7, 8), range(3, 12)
        assert layers == (
            *(Layer("input", n, 0) for n in inputs),
            Layer("middle", 0, 0),
            *(Layer("output", n, 0) for n in outputs),
        )
    if case.backbone.family == "sdxl":
        assert list(dict.fromkeys(layer[:2] for layer in layers)) == [
            *(("input", n) for n in (4, 5, 7, 8)),
            ("middle", 0),
            *(("output", n) for n in range(6)),
        ]
        assert Layout("block").bind(layers).slots == 11


def test_execution_order_is_the_order_of_layers(case: Case) -> None:
    seen = []
    handles = [
        attn2(case, layer).register_forward_hook(lambda *_, layer=layer: seen.append(layer))
        for layer in case.backbone.layers
    ]
    case.backbone.predict_noise(case.x_t, case.t, case.plain())
    for handle in handles:
        handle.remove()
    assert tuple(seen) == case.backbone.layers


def test_keys_and_values_come_from_their_own_rows(case: Case) -> None:
    """Reference: the stock U-Net, the inputs of to_k and to_v replaced from outside."""
    context = case.apart()
    eps = case.backbone.predict_noise(case.x_t, case.t, context)
    handles = []
    for index, layer in enumerate(case.backbone.layers):
        module = attn2(case, layer)
        key, value = context.rows[index], context.rows[len(case.backbone.layers) + index]
        handles.append(module.to_k.register_forward_pre_hook(lambda *_, row=key: (row,)))
        handles.append(module.to_v.register_forward_pre_hook(lambda *_, row=value: (row,)))
    reference = case.stock(torch.zeros_like(case.hidden))
    for handle in handles:
        handle.remove()
    if case.backbone.prediction_type == "v_prediction":
        reference = case.backbone.schedule.eps_from_v(case.x_t, case.t, reference)
    assert torch.equal(eps, reference)


def test_a_layers_row_reaches_no_earlier_layer(case: Case) -> None:
    layers = case.backbone.layers
    context = case.apart(requires_grad=True)
    chosen = len(layers) // 2
    with case.backbone.attention(layers, range(24)) as recorded:
        case.backbone.predict_noise(case.x_t, case.t, context)
    weights = torch.randn(24, generator=torch.Generator().manual_seed(7))
    loss = sum((recorded.maps[layer][0] @ weights).pow(2).mean() for layer in layers[: chosen + 1])
    gradient = torch.autograd.grad(loss, context.rows)[0].flatten(1).norm(dim=1)
    keys, values = gradient[: len(layers)], gradient[len(layers) :]
    assert (keys[: chosen + 1] > 0).all()
    assert (keys[chosen + 1 :] == 0).all()
    # Values of the chosen layer act behind its own map.
    assert (values[:chosen] > 0).all()
    assert (values[chosen:] == 0).all()


def test_gradients_survive_recomputation(sd1: Case) -> None:
    """A counter of forwards would give recomputed layers the rows of others (METHODS.md 0.1)."""

    def gradient() -> Tensor:
        context = sd1.apart(requires_grad=True)
        loss = sd1.backbone.predict_noise(sd1.x_t, sd1.t, context).pow(2).mean()
        return torch.autograd.grad(loss, context.rows)[0]

    plain = gradient()
    sd1.unet.enable_gradient_checkpointing()
    recomputed = gradient()
    sd1.unet.disable_gradient_checkpointing()
    assert torch.equal(plain, recomputed)


def test_gradient_to_vectors_and_latents_is_the_finite_difference(case: Case) -> None:
    b = case.backbone
    prompt = parse_prompt("a man <x> on grass", ["x"])
    vectors = case.word()
    count = len(b.layers)
    # At 16 x 16: smaller latents are one cell in the middle of the U-Net, where group norms are too curved for steps.
    generator = torch.Generator().manual_seed(8)
    start, target = (torch.randn(2, b.latent_channels, 16, 16, generator=generator) for _ in range(2))

    def loss(vectors: dict, x_t: Tensor) -> Tensor:
        encoding = b.encode_text(prompt, vectors)
        context = TextContext(encoding.hidden[None], (0,) * count, (0,) * count, encoding.pooled).repeat(2)
        return (b.predict_noise(x_t, case.t, context) * target).mean()

    x_t = start.requires_grad_()
    leaves = [*vectors["x"].values(), x_t]
    gradients = torch.autograd.grad(loss(vectors, x_t), leaves)
    for number, (leaf, gradient) in enumerate(zip(leaves, gradients, strict=True)):
        step = 1e-2 * gradient / gradient.norm()
        ends = []
        for sign in (1, -1):
            moved = list(leaves)
            moved[number] = leaf + sign * step
            with torch.no_grad():
                ends.append(loss({"x": dict(zip(vectors["x"], moved, strict=False))}, moved[-1]))
        measured = (ends[0] - ends[1]) / 2e-2
        assert measured.item() == pytest.approx(gradient.norm().item(), rel=0.02)


def test_attention_maps_are_the_softmax_of_the_layers_own_q_and_k(case: Case) -> None:
    b = case.backbone
    context = case.apart()
    seen: dict[Layer, dict[str, Tensor]] = {layer: {} for layer in b.layers}
    handles = []
    for layer in b.layers:
        for name in ("to_q", "to_k", "to_v"):
            keep = lambda _, __, out, layer=layer, name=name: seen[layer].__setitem__(name, out)  # noqa: E731
            handles.append(getattr(attn2(case, layer), name).register_forward_hook(keep))
        keep_input = lambda _, inputs, layer=layer: seen[layer].__setitem__("attended", inputs[0])  # noqa: E731
        handles.append(attn2(case, layer).to_out[0].register_forward_pre_hook(keep_input))
    with b.attention(b.layers, range(24)) as every, b.attention(b.layers[1:2], [3, 1]) as some:
        eps = b.predict_noise(case.x_t, case.t, context)
    for handle in handles:
        handle.remove()
    assert torch.equal(eps, b.predict_noise(case.x_t, case.t, context))
    for layer in b.layers:
        (maps,) = every.maps[layer]
        heads = attn2(case, layer).heads
        q, k, v = (seen[layer][n].unflatten(-1, (heads, -1)).transpose(1, 2) for n in ("to_q", "to_k", "to_v"))
        assert maps.shape == (2, heads, q.shape[2], 24)
        assert torch.allclose(maps.sum(-1), torch.ones(()), atol=1e-5)
        expected = torch.einsum("bhqd,bhkd->bhqk", q, k).div(q.shape[-1] ** 0.5).softmax(-1)
        assert torch.allclose(maps, expected, atol=1e-6)
        attended = (maps @ v).transpose(1, 2).flatten(2)
        assert torch.allclose(attended, seen[layer]["attended"], atol=1e-5)
    assert list(some.maps) == [b.layers[1]]
    assert torch.equal(some.maps[b.layers[1]][0], every.maps[b.layers[1]][0][..., [3, 1]])
    b.predict_noise(case.x_t, case.t, context)
    assert len(every.maps[b.layers[0]]) == 1


def test_attention_refuses_a_layer_the_model_has_not(sd1: Case) -> None:
    with (
        pytest.raises(ValueError, match="no cross-attention layer"),
        sd1.backbone.attention([Layer("input", 3, 0)], [1]),
    ):
        pass


def test_batch_invariance(case: Case) -> None:
    b = case.backbone
    context = case.apart()
    both = b.predict_noise(case.x_t, case.t, context)
    for i in range(2):
        pooled = None if case.pooled is None else case.pooled[i : i + 1]
        single = TextContext(context.rows[:, i : i + 1], context.key, context.value, pooled)
        alone = b.predict_noise(case.x_t[i : i + 1], case.t[i : i + 1], single)
        assert (both[i : i + 1] - alone).abs().max() < 1e-4 * alone.abs().max()
    with pytest.raises(ValueError, match="2 prompts, the latents are 1"):
        b.predict_noise(case.x_t[:1], case.t[:1], context)


def test_the_words_own_vectors_encode_as_the_stock_pipeline(case: Case) -> None:
    b = case.backbone
    prompt = "a man action on grass with a ball"
    learned = b.encode_text(parse_prompt("a man <x> on grass with a ball", ["x"]), case.word())
    written = b.encode_text(parse_prompt(prompt, []), {})
    assert learned.positions == {"x": (3,)}
    assert written.positions == {}
    assert torch.equal(learned.hidden, written.hidden)
    if case.pipeline is None:
        (tower,) = b.text_towers
        ids = tower.tokenizer(prompt, padding="max_length", max_length=24, return_tensors="pt").input_ids
        assert torch.equal(tower.encoder(ids).last_hidden_state, written.hidden)
    elif b.family == "sdxl":
        hidden, _, pooled, _ = case.pipeline.encode_prompt(prompt, device="cpu", do_classifier_free_guidance=False)
        assert torch.equal(hidden, written.hidden)
        assert torch.equal(pooled, written.pooled)
        assert torch.equal(pooled, learned.pooled)
    else:
        hidden, _ = case.pipeline.encode_prompt(prompt, "cpu", 1, False)
        assert torch.equal(hidden, written.hidden)


def test_variants_share_a_batch_without_touching_each_other(case: Case) -> None:
    prompt = parse_prompt("a man <x> on grass", ["x"])
    vectors = case.word(variants=5)
    together = case.backbone.encode_text(prompt, vectors)
    assert together.hidden.shape == (5, 24, case.backbone.context_width)
    for i in range(5):
        one = {"x": {tower: v[i : i + 1] for tower, v in vectors["x"].items()}}
        alone = case.backbone.encode_text(prompt, one)
        assert torch.allclose(together.hidden[i : i + 1], alone.hidden, atol=1e-5)
    loss = together.hidden[3].pow(2).sum()
    for tower, gradient in zip(vectors["x"], torch.autograd.grad(loss, vectors["x"].values()), strict=True):
        norms = gradient.flatten(1).norm(dim=1)
        assert norms[3] > 0, tower
        assert (norms[[0, 1, 2, 4]] == 0).all(), tower


def test_rows_before_a_placeholder_do_not_depend_on_it(case: Case) -> None:
    encoding = case.backbone.encode_text(parse_prompt("a man on grass <x> with a ball", ["x"]), case.word(variants=2))
    (first,) = encoding.positions["x"]
    assert first == 5
    assert torch.allclose(encoding.hidden[0, :first], encoding.hidden[1, :first], atol=1e-6)
    change = (encoding.hidden[0, first:] - encoding.hidden[1, first:]).abs().amax(dim=-1)
    assert (change > 1e-4).all()


def test_vectors_of_several_tokens_stand_at_every_occurrence(case: Case) -> None:
    b = case.backbone
    two = b.token_vectors("sits man")
    one = b.token_vectors("cat")
    prompt = parse_prompt("<x> a <y> on <x>", ["x", "y"])
    vectors = {name: {k: v[None] for k, v in rows.items()} for name, rows in (("x", two), ("y", one))}
    encoding = b.encode_text(prompt, vectors)
    assert encoding.positions == {"x": (1, 2, 6, 7), "y": (4,)}
    assert torch.equal(encoding.hidden, b.encode_text(parse_prompt("sits man a cat on sits man", []), {}).hidden)


def test_a_prompt_that_does_not_fit_is_refused(sdxl: Case) -> None:
    fits = " ".join(["man"] * 21) + " <x>"
    sdxl.backbone.encode_text(parse_prompt(fits, ["x"]), sdxl.word())
    with pytest.raises(ValueError, match=r"23 tokens, the text encoder reads 22: shorten it"):
        sdxl.backbone.encode_text(parse_prompt("man " + fits, ["x"]), sdxl.word())


def test_sdxl_needs_its_pooled_text(sdxl: Case) -> None:
    with pytest.raises(ValueError, match="pooled"):
        sdxl.backbone.predict_noise(sdxl.x_t, sdxl.t, TextContext.plain(sdxl.hidden, sdxl.backbone.layers))


def test_token_vectors_are_the_embeddings_of_the_pieces(sdxl: Case) -> None:
    vectors = sdxl.backbone.token_vectors("a man")
    assert {tower: tuple(v.shape) for tower, v in vectors.items()} == {"l": (2, 24), "g": (2, 40)}
    for tower in sdxl.backbone.text_towers:
        a, man = tower.tokenizer.convert_tokens_to_ids(["a</w>", "man</w>"])
        weight = tower.encoder.get_input_embeddings().weight
        assert torch.equal(vectors[tower.name], weight[[a, man]])
    assert sdxl.backbone.towers == {"l": 24, "g": 40}
    assert sdxl.backbone.context_width == 64


def test_pictures_and_latents(case: Case) -> None:
    b = case.backbone
    images = torch.rand(2, 64, 32, 3, generator=torch.Generator().manual_seed(9))
    latents = b.encode_image(images)
    assert latents.shape == (2, b.latent_channels, 8, 4)
    decoded = b.decode_latent(latents)
    assert decoded.shape == images.shape
    assert 0 <= decoded.min() < decoded.max() <= 1
    pixels = images.permute(0, 3, 1, 2) * 2 - 1
    with torch.no_grad():
        if case.pipeline is None:
            expected = case.autoencoder.encode(pixels)
            painted = case.autoencoder.decode(expected)
        else:
            expected = case.autoencoder.encode(pixels).latent_dist.mean * case.autoencoder.config.scaling_factor
            painted = case.autoencoder.decode(expected / case.autoencoder.config.scaling_factor).sample
    assert torch.allclose(latents, expected, atol=1e-5)
    assert torch.allclose(decoded, (painted / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1), atol=1e-5)


def test_a_half_precision_vae_that_overflows_runs_in_single() -> None:
    vae = tiny_diffusers.build_vae()
    pixels = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(9)) * 2 - 1
    vae.half()
    single = KLAutoencoder(vae)
    assert vae.dtype == torch.float16
    assert single.encode(pixels).dtype == torch.float32


def test_nothing_of_the_model_is_written_or_trainable(case: Case) -> None:
    def fingerprint() -> str:
        digest = hashlib.sha256()
        for module in case.modules():
            for name, value in sorted(module.state_dict().items()):
                digest.update(name.encode() + value.numpy().tobytes())
        return digest.hexdigest()

    before = fingerprint()
    b = case.backbone
    vectors = case.word(variants=len(b.layers))
    encoding = b.encode_text(parse_prompt("a man <x> on grass", ["x"]), vectors)
    own = tuple(range(len(b.layers)))
    pooled = None if encoding.pooled is None else encoding.pooled.mean(0, keepdim=True)
    context = TextContext(encoding.hidden[:, None], own, own, pooled).repeat(2)
    optimiser = torch.optim.AdamW(vectors["x"].values(), lr=1e-2)
    (b.predict_noise(b.encode_image(torch.rand(2, 64, 64, 3)), case.t, context).pow(2).mean()).backward()
    assert all((v.grad.flatten(1).norm(dim=1) > 0).all() for v in vectors["x"].values())
    optimiser.step()
    assert fingerprint() == before
    assert not any(p.requires_grad or p.grad is not None for m in case.modules() for p in m.parameters())


def test_a_half_precision_unet_takes_and_gives_single_precision(sdxl: Case) -> None:
    pipeline = tiny_diffusers.build("sdxl", seed=10)
    pipeline.unet.to(torch.bfloat16)
    conditions = {**sdxl.conditions, "text_embeds": sdxl.pooled.bfloat16()}
    stock = pipeline.unet(sdxl.x_t.bfloat16(), sdxl.t, sdxl.hidden.bfloat16(), added_cond_kwargs=conditions).sample
    b = DiffusersBackbone.from_pipeline(pipeline)
    assert torch.equal(b.predict_noise(sdxl.x_t, sdxl.t, sdxl.plain()), stock.float())
    context = sdxl.apart(requires_grad=True)
    eps = b.predict_noise(sdxl.x_t, sdxl.t, context)
    (gradient,) = torch.autograd.grad(eps.square().mean(), context.rows)
    assert gradient.dtype == torch.float32
    assert (gradient.flatten(1).norm(dim=1) > 0).all()
    assert b.gradient_scale == sdxl.backbone.gradient_scale == 1
    pipeline.unet.half()
    assert DiffusersBackbone.from_pipeline(pipeline).gradient_scale > 1


def test_adapters_hook_into_the_linears(sd1: Case) -> None:
    b = sd1.backbone
    linears = b.linears()
    assert len(linears) == 16 * 2 * 4
    names = list(linears)
    assert names[0] == "input_blocks.1.1.transformer_blocks.0.attn1.to_q"
    assert names[-1] == "output_blocks.11.1.transformer_blocks.0.attn2.to_out.0"
    plain = b.predict_noise(sd1.x_t, sd1.t, sd1.plain())
    delta = torch.zeros(32, 64, requires_grad=True)
    chosen = linears["output_blocks.11.1.transformer_blocks.0.attn2.to_k"]
    assert chosen is sd1.unet.up_blocks[3].attentions[2].transformer_blocks[0].attn2.to_k
    handle = chosen.register_forward_hook(lambda _, inputs, out: out + inputs[0] @ delta.T)
    adapted = b.predict_noise(sd1.x_t, sd1.t, sd1.plain())
    handle.remove()
    assert torch.equal(adapted, plain)
    (gradient,) = torch.autograd.grad(adapted.pow(2).mean(), delta)
    assert gradient.norm() > 0


def test_models_that_do_not_fit_are_refused(sd1: Case, sdxl: Case) -> None:
    b = sd1.backbone
    rest = (b.text_towers, b.autoencoder, 8, b.schedule.alphas_cumprod)
    inpainting = SimpleNamespace(config=SimpleNamespace(in_channels=9, out_channels=4))
    with pytest.raises(ValueError, match="inpainting"):
        DiffusersBackbone("sd1", inpainting, *rest)
    with pytest.raises(ValueError, match='predicts "sample"'):
        DiffusersBackbone("sd1", sd1.unet, *rest, prediction_type="sample")
    refiner = SimpleNamespace(text_encoder=None, text_encoder_2=sdxl.pipeline.text_encoder_2)
    with pytest.raises(ValueError, match="refiner"):
        DiffusersBackbone.from_pipeline(refiner)


def test_the_family_is_read_from_the_pipeline(case: Case) -> None:
    towers = {"toy": {"l"}, "sd1": {"l"}, "sd2": {"h"}, "sdxl": {"l", "g"}}
    assert set(case.backbone.towers) == towers[case.backbone.family]


def test_importing_the_backbone_imports_no_heavy_package() -> None:
    code = (
        "import sys, concept_atelier.kernels.diffusers_backbone\n"
        "print([m for m in ('diffusers', 'transformers') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
