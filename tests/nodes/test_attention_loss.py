"""AtelierSubjectAttentionLoss, and the attention loss through ComfyUI's own models."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from concept_atelier.kernels.attention_loss import SubjectAttentionLoss
from concept_atelier.kernels.backbone import TextContext
from concept_atelier.kernels.concept import new_vectors
from concept_atelier.kernels.conditioning import encode_prompt
from concept_atelier.kernels.layouts import Layout
from concept_atelier.kernels.losses import Learning, Prediction
from concept_atelier.kernels.prompts import fill_blank
from concept_atelier.nodes.attention_loss import AtelierSubjectAttentionLoss
from concept_atelier.nodes.native.backbone import native_session
from torch import Tensor

NAME = "x"
PROMPT = fill_blank("a photo of the face of {}", NAME)
PAIRS = Layout(stages=5, split_kv=True)
T = torch.tensor([500])
OF_STAGE = slice(4, 6)  # slots of K and V at T
INPUTS = {
    "weight": 0.003,
    "class_phrase": "",
    "largest_map": 32,
    "with_padding": False,
    "detach_query": True,
    "detach_reference": True,
}


def noise(*shape: int, seed: int = 7) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def learned(backbone) -> dict[str, Tensor]:
    """Vectors near "person" for five pairs of K and V."""
    vectors = new_vectors(backbone.token_vectors("person"), 10, 1)
    return {tower: (v + 0.3 * noise(*v.shape)).requires_grad_() for tower, v in vectors.items()}


def loss_of(backbone, term: SubjectAttentionLoss, vectors: dict[str, Tensor]) -> Tensor:
    layout = PAIRS.bind(backbone.layers)
    bound = term.bind(Learning(backbone, NAME, layout, "person", (PROMPT,)))
    with bound.watch([0], 1) as value:
        staged = encode_prompt(
            backbone.encode_text, backbone.layers, PROMPT, {NAME: vectors}, {NAME: layout}, len(backbone.schedule)
        )
        eps_hat = backbone.predict_noise(noise(1, 4, 16, 16), T, staged.at(500))
    return value(Prediction(eps_hat, eps_hat, T))[0]


def test_the_node_gives_the_loss_of_its_inputs():
    schema = AtelierSubjectAttentionLoss.GET_SCHEMA()
    assert {i.id: i.default for i in schema.inputs} == INPUTS
    assert AtelierSubjectAttentionLoss.execute(**INPUTS).args == (SubjectAttentionLoss(),)
    others = {
        "weight": 0.05,
        "class_phrase": "face",
        "largest_map": 16,
        "with_padding": True,
        "detach_query": False,
        "detach_reference": False,
    }
    (loss,) = AtelierSubjectAttentionLoss.execute(**others).args
    assert {name: getattr(loss, name) for name in others} == others
    names = {str(AtelierSubjectAttentionLoss.execute(**{**INPUTS, k: v}).args[0]) for k, v in others.items()}
    assert len(names) == 6 and str(SubjectAttentionLoss()) not in names  # str() takes part in a run's name


def test_published_lambdas_can_be_typed():
    """ComfyUI's page rounds to the decimals of the step."""
    assert 1e-4 % AtelierSubjectAttentionLoss.GET_SCHEMA().inputs[0].step == 0


def test_the_loss_teaches_the_keys_of_the_stage_alone(any_tiny):
    with native_session(*any_tiny) as backbone:
        vectors = learned(backbone)
        loss = loss_of(backbone, SubjectAttentionLoss(0.05), vectors)
        loss.backward()
        assert loss.item() > 0
        for v in vectors.values():
            key, value = v.grad[OF_STAGE]
            assert key.any() and not value.any()
            assert v.grad.abs().sum() == key.abs().sum()
        person = {tower: v.detach() for tower, v in new_vectors(backbone.token_vectors("person"), 10, 1).items()}
        assert loss_of(backbone, SubjectAttentionLoss(0.05), person).item() < 1e-9


@pytest.mark.parametrize("topology", ["sd1", "sd2"])  # padded with the end token, and with another
def test_captions_of_several_chunks_are_compared_by_their_words(tiny, topology, monkeypatch):
    prompt = fill_blank("red " * 80 + "{}", NAME)
    with native_session(*tiny(topology)) as backbone:
        layout = PAIRS.bind(backbone.layers)
        bound = SubjectAttentionLoss().bind(Learning(backbone, NAME, layout, "person", (prompt,)))
        attention, seen = backbone.attention, []

        def spy(layers, tokens, *more):
            seen.extend(tokens)
            return attention(layers, tokens, *more)

        monkeypatch.setattr(backbone, "attention", spy)
        with bound.watch([0], 1):
            assert seen == [*range(1, 76), *range(78, 84)]  # 76 ends the first chunk, 77 starts the second


def test_keys_of_the_reference_are_those_of_the_patched_model():
    """A LoRA on to_k changes both: with the reference's keys as context, a first layer has the reference's map."""
    with torch.inference_mode():
        model, clip, vae = tiny_models.build("sd1")
    patched = model.clone()
    key = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    patched.add_patches({key: ("diff", (0.3 * noise(32, 64),))})
    maps = []
    for each in (model, patched):
        with native_session(each, clip, vae) as backbone, torch.no_grad():
            first = backbone.layers[:1]
            plain, reference = (TextContext.plain(noise(1, 77, 64, seed=s), backbone.layers) for s in (1, 2))
            with backbone.attention(first, range(77), reference) as recorded:
                backbone.predict_noise(noise(1, 4, 16, 16), T, plain)
                backbone.predict_noise(noise(1, 4, 16, 16), T, reference)
            assert torch.equal(recorded.reference[first[0]][0], recorded.maps[first[0]][1])
            maps.append(recorded.reference[first[0]][0])
    assert not torch.allclose(*maps, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models_have_maps_in_single(dtype, tiny):
    with torch.inference_mode():
        model = tiny_models.build_unet("sd1", dtype=dtype)
        model.set_model_compute_dtype(dtype)
        _, clip, vae = tiny("sd1")
        with native_session(model, clip, vae) as backbone:
            vectors = learned(backbone)
            with backbone.attention(backbone.layers, [7]) as recorded:
                loss = loss_of(backbone, SubjectAttentionLoss(1.0), vectors)
            assert all(maps[0].dtype == torch.float32 for maps in recorded.maps.values())
            (loss * backbone.gradient_scale).backward()
            assert loss.isfinite() and loss > 0 and vectors["l"].grad.isfinite().all() and vectors["l"].grad.any()


class OtherPack:
    """What a face adapter does: attention of its own in the place of the model's."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, extra_options: dict) -> Tensor:
        return q


def test_whoever_replaced_the_attention_is_named(tiny):
    model, clip, vae = tiny("sd1")
    replaced = model.clone()
    replaced.set_model_attn2_replace(OtherPack(), "input", 4)
    with native_session(replaced, clip, vae) as backbone:
        vectors = learned(backbone)
        with pytest.raises(
            ValueError, match=r"Another node \(OtherPack of .*test_attention_loss\) replaces .* 1 layers"
        ):
            loss_of(backbone, SubjectAttentionLoss(), vectors)


def test_phrases_are_counted_by_the_tokenizer_of_the_clip(any_tiny):
    with native_session(*any_tiny) as backbone:
        vectors = learned(backbone)
        with pytest.raises(
            ValueError, match=r'"golden retriever" has 2 tokens .*<x> has 1: choose a class phrase of 1'
        ):
            loss_of(backbone, SubjectAttentionLoss(class_phrase="golden retriever"), vectors)
        assert loss_of(backbone, SubjectAttentionLoss(class_phrase="dog"), vectors).item() > 0
