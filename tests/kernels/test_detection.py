"""GroundingDINO: its two engines on one published file, the map of its names, captions, and what comes out as boxes."""

import importlib.util
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import tiny_segmenters
import torch
from concept_atelier.kernels.detection import detect, input_size, phrases, prepare, read_out, tidy_caption
from concept_atelier.kernels.grounding_dino import (
    PackageEngine,
    TransformersEngine,
    build_with_package,
    build_with_transformers,
    read_shape,
    read_vocabulary,
)
from concept_atelier.kernels.grounding_dino_keys import to_hub_layout
from concept_atelier.kernels.published_weights import PublishedWeights
from PIL import Image

# The reference and the files are made with the package; without it only what needs neither is tested.
needs_package = pytest.mark.skipif(
    importlib.util.find_spec("groundingdino") is None, reason="groundingdino-py is not installed"
)
CAPTION = "a red dog. ball."


class Engines(NamedTuple):
    transformers: TransformersEngine
    package: PackageEngine


@pytest.fixture(autouse=True)
def inference_mode():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    return tiny_segmenters.write_vocabulary(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def weights():
    return PublishedWeights("groundingdino_swint_ogc.pth", tiny_segmenters.dino_weights())


@pytest.fixture(scope="module")
def engines(weights, vocabulary):
    return Engines(build_with_transformers(weights, vocabulary), build_with_package(weights, vocabulary))


def picture(height=64, width=90, seed=0):
    return torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(seed)) / 255


def check_agreement(engines, height, width, side):
    pixels = prepare(picture(height, width), side)
    ours, our_boxes = engines.transformers(pixels, CAPTION)
    theirs, their_boxes = engines.package(pixels, CAPTION)
    assert ours.shape == theirs.shape == (30, 256)
    there = torch.isfinite(ours)
    assert torch.equal(there, torch.isfinite(theirs))
    assert there.sum(dim=1).tolist() == [8] * 30  # [CLS] a red dog . ball . [SEP]
    assert ours[there].std() > 1  # else agreement would mean nothing
    assert our_boxes.std() > 0.1
    torch.testing.assert_close(ours[there], theirs[there], atol=1e-3, rtol=0)
    torch.testing.assert_close(our_boxes, their_boxes, atol=1e-5, rtol=0)


@needs_package
@pytest.mark.parametrize(("height", "width", "side"), [(64, 90, 128), (90, 64, 97)])
def test_the_engines_agree(engines, height, width, side):
    check_agreement(engines, height, width, side)


@needs_package
def test_the_engines_agree_on_a_swin_b(vocabulary):
    weights = weights_of("swin_B_384_22k")
    check_agreement(
        Engines(build_with_transformers(weights, vocabulary), build_with_package(weights, vocabulary)), 50, 80, 100
    )


@needs_package
def test_the_package_engine_is_the_package(engines, vocabulary):
    network = tiny_segmenters.dino()
    network.tokenizer = read_vocabulary(vocabulary, read_shape(weights_of("swin_T_224_1k")))
    pixels = prepare(picture(), 128)
    expected = network(pixels, captions=[CAPTION])
    logits, boxes = engines.package(pixels, CAPTION)
    assert torch.equal(logits, expected["pred_logits"][0])
    assert torch.equal(boxes, expected["pred_boxes"][0])


def weights_of(backbone):
    return PublishedWeights("some_name.pth", tiny_segmenters.dino_weights(backbone))


@needs_package
def test_boxes_are_those_of_transformers_own_post_processing(engines):
    from transformers import GroundingDinoProcessor
    from transformers.models.grounding_dino.modeling_grounding_dino import GroundingDinoObjectDetectionOutput

    engine = engines.transformers
    logits, boxes = engine(prepare(picture(), 128), CAPTION)
    tokens = engine.tokenizer(CAPTION, return_tensors="pt")["input_ids"]
    output = GroundingDinoObjectDetectionOutput(logits=logits[None], pred_boxes=boxes[None], input_ids=tokens)
    processor = GroundingDinoProcessor.__new__(GroundingDinoProcessor)
    processor.tokenizer = engine.tokenizer
    threshold = float(logits.sigmoid().amax(dim=1).median())
    expected = processor.post_process_grounded_object_detection(
        output, tokens, threshold=threshold, text_threshold=0.0, target_sizes=[(64, 90)]
    )[0]
    found = detect(engine, picture(), "A red dog. Ball", threshold, 128)
    order = expected["scores"].argsort(descending=True)
    low, high = torch.zeros(4), torch.tensor([90.0, 64.0, 90.0, 64.0])
    corners = expected["boxes"][order].clamp(low, high)
    kept = ((corners[:, 2:] - corners[:, :2]) >= 1).all(dim=1)
    assert 0 < len(found) == kept.sum() < 30
    assert [one.score for one in found] == expected["scores"][order][kept].tolist()
    torch.testing.assert_close(torch.tensor([one.box for one in found]), corners[kept], atol=1e-4, rtol=0)


@needs_package
@pytest.mark.parametrize(
    ("backbone", "name", "depths", "window"),
    [("swin_T_224_1k", "SwinT", [2, 2, 6, 2], 7), ("swin_B_384_22k", "SwinB", [2, 2, 18, 2], 12)],
)
def test_the_kind_is_told_from_the_tensors(backbone, name, depths, window):
    shape = read_shape(weights_of(backbone))
    assert shape.name == "GroundingDINO " + name
    assert (shape.depths, shape.window) == (depths, window)
    assert (shape.d_model, shape.levels, shape.outputs, shape.points) == (256, 4, 3, 4)
    assert shape.bert == tiny_segmenters.BERT


@needs_package
def test_the_map_leaves_nothing_out(weights):
    """Every published tensor arrives but BERT's pooler and the training's label_enc, and no number is lost."""
    mapped = to_hub_layout(weights.tensors)
    unused = [key for key in weights.tensors if key.startswith(("bert.pooler", "label_enc"))]
    assert len(unused) == 3
    numbers = sum(value.numel() for key, value in weights.tensors.items() if key not in unused)
    assert sum(value.numel() for value in mapped.values()) == numbers


@needs_package
@pytest.mark.parametrize("build", [build_with_transformers, build_with_package])
@pytest.mark.parametrize(
    "key",
    [
        "transformer.decoder.layers.1.ca_text.in_proj_weight",
        "backbone.0.norm2.bias",
        "bert.encoder.layer.0.output.dense.weight",
    ],
)
def test_a_missing_tensor_is_an_error(weights, vocabulary, build, key):
    without = {name: value for name, value in weights.tensors.items() if name != key}
    with pytest.raises(ValueError, match=r"^cut\.pth is incomplete.*download it again"):
        build(PublishedWeights("cut.pth", without), vocabulary)


def test_another_model_is_refused(vocabulary):
    with pytest.raises(ValueError, match=r"^sam\.pth is no GroundingDINO.*groundingdino_swint_ogc\.pth"):
        build_with_transformers(PublishedWeights("sam.pth", {"image_encoder.pos_embed": torch.zeros(1)}), vocabulary)


@needs_package
@pytest.mark.parametrize("build", [build_with_transformers, build_with_package])
def test_another_vocabulary_is_refused(weights, tmp_path, build):
    file = tiny_segmenters.write_vocabulary(tmp_path)
    file.write_text(file.read_text(encoding="utf-8") + "onemore\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"vocab\.txt is not the vocabulary of bert-base-uncased \(1101 words.*1100"):
        build(weights, file)


@needs_package
def test_the_package_is_left_as_it_was(engines):
    from groundingdino.models.GroundingDINO import groundingdino as package
    from groundingdino.util import get_tokenlizer as loaders

    assert package.BertModelWarper.__module__.startswith("groundingdino")
    assert loaders.get_tokenlizer.__module__.startswith("groundingdino")
    assert loaders.get_pretrained_language_model.__module__.startswith("groundingdino")


@needs_package
@pytest.mark.parametrize(("height", "width"), [(64, 90), (90, 64), (50, 50), (30, 100), (101, 33)])
def test_pictures_are_prepared_like_by_the_package(height, width):
    from groundingdino.datasets import transforms

    image = picture(height, width)
    theirs = transforms.Compose(
        [
            transforms.RandomResize([120], max_size=200),
            transforms.ToTensor(),
            transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    expected, _ = theirs(Image.fromarray((image * 255).round().byte().numpy()), None)
    ours = prepare(image, 120)[0]
    assert ours.shape == expected.shape
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=0)


def test_sizes():
    assert input_size(512, 512, 800) == (800, 800)
    assert input_size(480, 640, 800) == (800, 1066)
    assert input_size(640, 480, 800) == (1066, 800)
    assert input_size(400, 1600, 800) == (333, 1332)


@pytest.fixture(scope="module")
def tokenizer(vocabulary):
    return read_vocabulary(vocabulary, SimpleNamespace(bert=tiny_segmenters.BERT))


class TestCaptions:
    def test_tidy(self):
        assert tidy_caption(" A Dog") == "a dog."
        assert tidy_caption("a dog. a ball.") == "a dog. a ball."

    def test_each_token_knows_its_phrase(self, tokenizer):
        red = ["a red dog"] * 3
        assert phrases(tokenizer, "a red dog. ball. man?cat.") == ["", *red, "", "ball", "", "man", "", "cat", "", ""]

    def test_words_in_pieces_stay_one_phrase(self, tokenizer):
        assert phrases(tokenizer, "dogs.") == ["", "dogs", "dogs", "", ""]

    @pytest.mark.parametrize("caption", [".", "..?", ""])
    def test_captions_without_a_word_are_refused(self, tokenizer, caption):
        with pytest.raises(ValueError, match="names nothing to look for"):
            phrases(tokenizer, caption)

    def test_long_captions_are_refused(self, tokenizer):
        assert len(phrases(tokenizer, "dog " * 253 + ".")) == 256
        with pytest.raises(ValueError, match="257 tokens and GroundingDINO reads 256"):
            phrases(tokenizer, "dog " * 254 + ".")


def test_boxes_are_cut_off_at_the_border_and_sorted():
    logits = torch.full((5, 256), -torch.inf)
    #        [CLS]  dog   .   ball    .   [SEP]
    rows = [[-9.0, 0.0, -9.0, -1.0, -9.0, -9.0], [-9.0, 1.0, 2.0, 1.5, -9.0, -9.0], [-9.0] * 6, [3.0] * 6, [3.0] * 6]
    logits[:, :6] = torch.tensor(rows)
    boxes = torch.tensor(
        [[0.5, 0.5, 0.5, 0.5], [0.1, 0.9, 0.4, 0.4], [0.5] * 4, [0.5, 0.5, 0.001, 0.5], [1.2, 0.5, 0.2, 0.2]]
    )
    words = ["", "dog", "", "ball", "", ""]
    found = read_out(logits, boxes, words, 100, 200, threshold=0.4)
    assert [one.phrase for one in found] == ["ball", "dog"]
    assert [one.score for one in found] == pytest.approx([float(torch.tensor(2.0).sigmoid()), 0.5])
    assert found[0].box == pytest.approx((0, 70, 60, 100), abs=1e-3)
    assert found[1].box == pytest.approx((50, 25, 150, 75), abs=1e-3)
    assert read_out(logits, boxes, words, 100, 200, threshold=0.99) == []
