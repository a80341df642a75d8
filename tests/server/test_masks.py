"""Masks through /prompt: what the nodes say when nothing is found, what runs again, and files that cannot be read."""

import prompts
import pytest
from bad_input import assert_one_sentence
from comfy_server import SD_GROUNDING_DINO, SD_PICTURE, SD_SAM
from PIL import Image

WIDTH, HEIGHT = 80, 96  # of the picture


def masking(**detect):
    """Grounded SAM on the picture: nodes "detect", "encode", "mask", and "shown", which shows the mask."""
    settings = {"text": "a dog", "threshold": 0.0, "max_detections": 1, "resolution": 96} | detect
    return {
        "picture": prompts.node("LoadImage", image=SD_PICTURE),
        "dino": prompts.node("AtelierGroundingDINOLoader", checkpoint=SD_GROUNDING_DINO, engine="transformers"),
        "detect": prompts.node("AtelierDetect", detector=["dino", 0], images=["picture", 0], **settings),
        **pointing(),
    }


def pointing(positive="", negative="", boxes=True):
    """SAM on the picture, with the boxes of node "detect" or without any."""
    return {
        "picture": prompts.node("LoadImage", image=SD_PICTURE),
        "sam": prompts.node("AtelierSAMLoader", checkpoint=SD_SAM, encoder_precision="auto"),
        "encode": prompts.node("AtelierSAMEncode", sam=["sam", 0], images=["picture", 0]),
        "mask": prompts.node(
            "AtelierSAMMask",
            embedding=["encode", 0],
            positive_coords=positive,
            negative_coords=negative,
            **({"bboxes": ["detect", 0]} if boxes else {}),
        ),
        "shown": prompts.node("MaskPreview", mask=["mask", 0]),
    }


def shown_mask(server, outcome):
    """The mask that the preview shows, as a grey picture."""
    (file,) = server.pictures(outcome, "shown")
    return Image.open(file).convert("L")


def test_a_text_becomes_a_box_and_the_box_a_mask(server):
    outcome = server.run(masking())
    assert outcome.status == "success", outcome.error
    mask = shown_mask(server, outcome)
    assert mask.size == (WIDTH, HEIGHT)
    assert mask.getextrema() == (0, 255)
    assert "Picture 1: " in outcome.outputs["detect"]["text"][0]
    assert "% of it, quality" in outcome.outputs["mask"]["text"][0]


def test_nothing_found_gives_an_empty_mask_and_says_so(server):
    outcome = server.run(masking(threshold=1.0))
    assert outcome.status == "success", outcome.error
    assert shown_mask(server, outcome).getextrema() == (0, 0)
    assert outcome.outputs["detect"]["text"] == ['Picture 1: no "a dog" found. Lower the threshold, or say it simpler.']
    assert outcome.outputs["mask"]["text"] == ["Picture 1: nothing to mask, no box and no point: its mask is empty."]


def test_another_point_does_not_look_at_the_picture_again(server):
    first = server.run(pointing(positive="40, 40", boxes=False))
    assert first.status == "success", first.error
    moved = server.run(pointing(positive="20, 70", negative="70, 10", boxes=False))
    assert moved.status == "success", moved.error
    assert moved.executed == ["mask", "shown"]


CASES = {
    "a point outside": (pointing("500, 10", boxes=False), ["positive_coords", "500"]),
    "no point at all": (pointing(boxes=False), ["Nothing says what to mask", "bboxes", "positive_coords"]),
    "a point that is no point": (pointing("left of the tree", boxes=False), ["positive_coords", "left of the tree"]),
    "texts that fit no picture": (masking(text="a dog\na cat"), ["2 lines", "1 picture"]),
}


@pytest.mark.parametrize(("prompt", "words"), CASES.values(), ids=CASES)
def test_bad_input_gets_one_sentence(server, prompt, words):
    outcome = server.run(prompt)
    assert outcome.status == "error"
    assert_one_sentence(outcome.error, words)


FILES = {"AtelierSAMLoader": ("sams", SD_SAM), "AtelierGroundingDINOLoader": ("grounding-dino", SD_GROUNDING_DINO)}


@pytest.mark.parametrize("loader", FILES)
@pytest.mark.parametrize("damage", ["cut", "other weights"])
def test_a_damaged_file_gets_one_sentence(server, loader, damage):
    import torch

    folder, name = FILES[loader]
    file = server.folder / "models" / folder / f"{damage}.pth"
    if damage == "cut":
        file.write_bytes((file.parent / name).read_bytes()[:5000])
    else:
        torch.save({"something.weight": torch.zeros(2)}, file)
    prompt = {
        "load": prompts.node(loader, checkpoint=file.name, encoder_precision="auto", engine="transformers"),
        "shown": prompts.node("PreviewAny", source=["load", 0]),
    }
    outcome = server.run(prompt)
    file.unlink()
    assert outcome.status == "error"
    assert_one_sentence(outcome.error, [file.name])


@pytest.mark.parametrize("loader", FILES)
def test_a_missing_file_is_refused_with_its_folder_and_its_source(server, loader):
    folder, _ = FILES[loader]
    prompt = {
        "load": prompts.node(loader, checkpoint="not_here.pth", encoder_precision="auto", engine="transformers"),
        "shown": prompts.node("PreviewAny", source=["load", 0]),
    }
    outcome = server.run(prompt)
    assert outcome.status == "rejected"
    for word in ("not_here.pth", f"models/{folder}", "https://github.com/"):
        assert word in outcome.error
