"""AtelierAnchorLoss, alone and inside AtelierTrain on real ComfyUI objects."""

import pytest
import torch
from concept_atelier.kernels.anchor_loss import AnchorLoss
from concept_atelier.kernels.exemplars import Exemplar
from concept_atelier.kernels.layouts import Layout
from concept_atelier.kernels.losses import Learning
from concept_atelier.nodes.anchor_loss import SCALES, SOURCES, AtelierAnchorLoss
from concept_atelier.nodes.native.backbone import native_session
from concept_atelier.nodes.native.live import LiveReport
from train_node import run_train


def loss_term(**changes) -> AnchorLoss:
    """What the node gives with its defaults, or with these inputs changed."""
    inputs = AtelierAnchorLoss.GET_SCHEMA().inputs
    return AtelierAnchorLoss.execute(**{**{given.id: given.default for given in inputs}, **changes})[0]


def test_defaults_are_the_papers():
    term = loss_term()
    assert term == AnchorLoss(lam=0.95, source="coco", class_word="", atoms=3, scale="class word")
    assert term.denoising_weight == pytest.approx(0.05)


def test_inputs_reach_the_loss():
    term = loss_term(
        weight=0.6, words="Cat, hot dog\npanda\ncat", anchors="my words", class_word=" Bear ", most_anchors=2,
        refresh_every=7, neighbours=9, scale="released code (1/77d)",
    )  # fmt: skip
    words = ("cat", "hot dog", "panda")
    assert term == AnchorLoss(0.6, "words", words, 9, "bear", atoms=2, refresh=7, scale="code")
    assert loss_term(words="cat", anchors="nearest words").words == ()


def test_an_empty_list_of_words_is_named():
    with pytest.raises(ValueError, match='"words", which is empty'):
        loss_term(anchors="my words", words=" ,\n")


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("anchors", SOURCES)
def test_every_choice_works_on_a_real_vocabulary(tiny, anchors, scale):
    term = loss_term(anchors=anchors, scale=scale, words="dog, giraffe", neighbours=3, most_anchors=2)
    parts = tiny("sdxl")
    with native_session(parts.model, parts.clip, parts.vae) as backbone:
        bound = term.bind(Learning(backbone, "x", Layout().bind(backbone.layers), "cat", ()))
        word, other = backbone.token_vectors("cat"), backbone.token_vectors("giraffe")
        vectors = {tower: (0.6 * v + 0.4 * other[tower])[None].requires_grad_() for tower, v in word.items()}
        memory = {}
        value = bound.value(vectors, 0, memory)
        value.backward()
        line = bound.describe(vectors, memory)
    expected = {
        "COCO names": "l: cat 0.60, giraffe 0.40; g: cat 0.60, giraffe 0.40",
        "my words": "l: cat 0.60, giraffe 0.40; g: cat 0.60, giraffe 0.40",
        "class word alone": "l: cat 1.00; g: cat 1.00",
    }
    counts = {"COCO names": 64, "my words": 3, "nearest words": 4, "class word alone": 1}
    assert all(len(dictionary.words) == counts[anchors] for dictionary in bound.dictionaries.values())
    assert line == expected.get(anchors, line) and "cat 0." in line.replace("1.00", "0.")
    pulled = any(v.grad.abs().max() > 1e-6 for v in vectors.values())
    assert pulled == (anchors in ("nearest words", "class word alone")) == (value.item() > 1e-9)


def train(parts, **changes):
    images = torch.rand(2, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    exemplars = tuple(Exemplar(image, "a {} cat here") for image in images)
    return run_train(parts, exemplars=exemplars, layout=Layout(), name="thing", init_word="cat", **changes)


def test_train_shows_the_anchors_and_their_share(any_tiny, monkeypatch, as_in_a_prompt):
    said, shown = [], []
    monkeypatch.setattr(LiveReport, "say", lambda _self, lines: said.extend(lines))
    monkeypatch.setattr(LiveReport, "step", lambda _self, _step, _losses, stats: shown.append(stats))
    train(any_tiny, loss_terms={"loss_term0": loss_term(weight=0.5)}, learning_rate=0.1)
    towers = said[-1].split("; ")
    assert all("cat 1.00" in line for line in towers)  # the code of step 0, where the word is the class word
    assert shown[0]["anchor : denoising"] == pytest.approx(0, abs=1e-9)
    assert shown[2]["anchor : denoising"] > 1e-4


def test_train_with_weight_zero_is_plain_training(tiny, as_in_a_prompt):
    plain, term = (train(tiny("sd1"), loss_terms=terms)[0] for terms in (None, {"loss_term0": loss_term(weight=0.0)}))
    assert torch.equal(plain.vectors["l"], term.vectors["l"])


def test_train_names_words_of_several_pieces(tiny, as_in_a_prompt):
    with pytest.raises(ValueError, match='class word "zxqvkw" is not one piece'):
        train(tiny("sd1"), loss_terms={"loss_term0": loss_term(class_word="zxqvkw")})
    with pytest.raises(ValueError, match=r"anchor words \(zxqvkw, hot dog\) is one piece"):
        train(tiny("sd1"), loss_terms={"loss_term0": loss_term(anchors="my words", words="zxqvkw, hot dog")})
