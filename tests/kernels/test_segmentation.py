"""SAM in two halves: equal to the package's predictor, built from tensors alone, and what is no SAM refused."""

import numpy as np
import pytest
import tiny_segmenters
import torch
from concept_atelier.kernels.published_weights import PublishedWeights
from concept_atelier.kernels.segmentation import Prompt, build_sam, make_prompts, segment
from segment_anything import SamPredictor, sam_model_registry

NONE = torch.zeros(0, 2, dtype=torch.float64)


@pytest.fixture(autouse=True)
def inference_mode():
    with torch.inference_mode():
        yield


@pytest.fixture
def weights():
    return PublishedWeights("sam_tiny.pth", dict(tiny_segmenters.sam().state_dict()))


def picture(height=40, width=60, seed=0):
    pixels = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(seed))
    return pixels / 255


def points(*pairs):
    return torch.tensor(pairs, dtype=torch.float64).reshape(-1, 2)


@pytest.mark.parametrize(("height", "width"), [(40, 60), (61, 37), (64, 64), (200, 150)])
@pytest.mark.parametrize(
    "prompt",
    [
        Prompt(points((12, 20)), torch.tensor([1])),
        Prompt(points((12, 20), (30, 31)), torch.tensor([1, 0])),
        Prompt(NONE, torch.zeros(0), torch.tensor([3.0, 4.0, 33.0, 30.0])),
        Prompt(points((12, 20), (5, 6)), torch.tensor([1, 0]), torch.tensor([3.0, 4.0, 33.0, 30.0])),
    ],
    ids=["point", "points", "box", "box and points"],
)
def test_equal_to_the_packages_predictor(weights, height, width, prompt):
    encoder, decoder, _ = build_sam(weights)
    image = picture(height, width)
    predictor = SamPredictor(tiny_segmenters.sam())
    predictor.set_image((image * 255).round().numpy().astype(np.uint8))
    expected, expected_quality, _ = predictor.predict(
        point_coords=prompt.points.numpy() if len(prompt.points) else None,
        point_labels=prompt.labels.numpy() if len(prompt.points) else None,
        box=None if prompt.box is None else prompt.box.numpy(),
        multimask_output=prompt.ambiguous,
        return_logits=True,
    )
    features = encoder(image)
    masks, quality = decoder(features, prompt)
    assert torch.equal(features.features, predictor.get_image_embedding())
    assert masks.shape == (3 if prompt.ambiguous else 1, height, width)
    assert torch.equal(masks, torch.from_numpy(expected))
    assert torch.equal(quality, torch.from_numpy(expected_quality))
    assert masks.std() > 0.01


@pytest.mark.parametrize("kind", ["vit_b", "vit_l", "vit_h"])
def test_the_kind_is_told_from_the_tensors(kind):
    with torch.device("meta"):
        published = sam_model_registry[kind]()
    encoder, decoder, name = build_sam(PublishedWeights("any_name.pth", published.state_dict()))
    assert name == "SAM ViT-" + kind[-1].upper()
    ours, theirs = encoder.image_encoder, published.image_encoder
    assert str(ours) == str(theirs)
    assert [(b.window_size, b.attn.num_heads) for b in ours.blocks] == [
        (b.window_size, b.attn.num_heads) for b in theirs.blocks
    ]
    assert ours.img_size == theirs.img_size == 1024
    assert str(decoder.mask_decoder) == str(published.mask_decoder)
    assert str(decoder.prompt_encoder) == str(published.prompt_encoder)
    assert decoder.prompt_encoder.input_image_size == published.prompt_encoder.input_image_size
    heads = [layer.self_attn.num_heads for layer in decoder.mask_decoder.transformer.layers]
    assert heads == [layer.self_attn.num_heads for layer in published.mask_decoder.transformer.layers]


def test_half_precision_is_for_the_image_encoder_alone(weights):
    encoder, decoder, _ = build_sam(weights)
    full = encoder(picture())
    half = encoder.half()(picture())
    assert encoder.image_encoder.pos_embed.dtype == torch.float16
    assert half.features.dtype == torch.float32
    assert not torch.equal(half.features, full.features)
    torch.testing.assert_close(half.features, full.features, atol=0.03, rtol=0)
    prompt = Prompt(points((12, 20)), torch.tensor([1]))
    torch.testing.assert_close(decoder(half, prompt)[0], decoder(full, prompt)[0], atol=0.1, rtol=0.1)


def test_files_in_half_precision_are_read(weights):
    halves = PublishedWeights("half.safetensors", {key: value.half() for key, value in weights.tensors.items()})
    encoder, decoder, _ = build_sam(halves)
    assert {p.dtype for part in (encoder, decoder) for p in part.parameters()} == {torch.float32}


def test_the_best_of_three_masks_answers_a_lone_point(weights):
    encoder, decoder, _ = build_sam(weights)
    features = encoder(picture())
    prompts = make_prompts(torch.zeros(0, 4), points((12, 20)), NONE)
    masks, quality = decoder(features, prompts[0])
    mask, scores = segment(decoder, features, prompts)
    assert scores == [float(quality.max())]
    assert torch.equal(mask, masks[quality.argmax()] > 0)


def test_several_boxes_are_united(weights):
    encoder, decoder, _ = build_sam(weights)
    features = encoder(picture())
    boxes = torch.tensor([[3.0, 4.0, 33.0, 30.0], [20.0, 2.0, 55.0, 38.0]])
    mask, scores = segment(decoder, features, make_prompts(boxes, NONE, NONE))
    one, other = (segment(decoder, features, make_prompts(box[None], NONE, NONE))[0] for box in boxes)
    assert len(scores) == 2
    assert torch.equal(mask, one | other)
    assert not torch.equal(one, other)


def test_without_a_prompt_the_mask_is_empty(weights):
    encoder, decoder, _ = build_sam(weights)
    mask, scores = segment(decoder, encoder(picture()), [])
    assert mask.shape == (40, 60)
    assert not mask.any()
    assert scores == []


def test_points_go_to_the_boxes_that_hold_them():
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [20.0, 20.0, 30.0, 30.0]])
    first, second, free = make_prompts(boxes, points((5, 5), (15, 15), (10, 10)), points((25, 25)))
    assert first.points.tolist() == [[5, 5], [10, 10], [25, 25]]
    assert first.labels.tolist() == [1, 1, 0]
    assert (second.points.tolist(), second.labels.tolist()) == ([[25, 25]], [0])
    assert (free.points.tolist(), free.box) == ([[15, 15], [25, 25]], None)
    assert [prompt.ambiguous for prompt in (first, second, free)] == [False] * 3
    assert make_prompts(boxes[:0], points((5, 5)), NONE)[0].ambiguous


@pytest.mark.parametrize(
    ("key", "sentence"),
    [
        ("mask_decoder.hf_token.weight", "holds SAM-HQ"),
        ("image_encoder.layers.0.blocks.0.attn.qkv.weight", "holds MobileSAM"),
        ("image_encoder.trunk.pos_embed", "holds SAM 2"),
        ("detector.backbone.vision_backbone.trunk.pos_embed", "SAM3 Detect"),
        ("vision_encoder.pos_embed", "layout of transformers"),
        ("model.diffusion_model.out.0.weight", "is no Segment Anything model"),
    ],
)
def test_other_models_are_refused(key, sentence):
    with pytest.raises(ValueError, match=rf"^other.pth .*{sentence}.*sam_vit_b"):
        build_sam(PublishedWeights("other.pth", {key: torch.zeros(1)}))


@pytest.mark.parametrize(
    "key",
    ["image_encoder.neck.0.weight", "mask_decoder.iou_token.weight", "prompt_encoder.no_mask_embed.weight"],
)
def test_incomplete_and_damaged_files_are_refused(weights, key):
    without = {name: value for name, value in weights.tensors.items() if name != key}
    with pytest.raises(ValueError, match=rf"^sam_tiny.pth is incomplete.*{key}"):
        build_sam(PublishedWeights("sam_tiny.pth", without))
    key = "image_encoder.blocks.1.norm1.weight"
    with pytest.raises(ValueError, match=rf"^sam_tiny.pth is damaged.*{key}.*\(5,\)"):
        build_sam(PublishedWeights("sam_tiny.pth", {**weights.tensors, key: torch.zeros(5)}))
