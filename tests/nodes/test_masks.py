"""Masks through the nodes: files in the artists' folders, what the packages themselves give, and every refusal."""

import asyncio
import importlib.util
from pathlib import Path

import comfy.model_management
import execution
import folder_paths
import numpy as np
import pytest
import torch
from comfy_extras.nodes_images import BoundingBox
from comfy_extras.nodes_mask import MaskPreview
from comfy_extras.nodes_rtdetr import DrawBBoxes
from concept_atelier.kernels.detection import detect
from concept_atelier.kernels.grounding_dino import build_with_transformers
from concept_atelier.kernels.published_weights import PublishedWeights
from concept_atelier.nodes import detection, masks
from concept_atelier.nodes.detection import AtelierDetect, AtelierGroundingDINOLoader
from concept_atelier.nodes.masks import AtelierSAMEncode, AtelierSAMLoader, AtelierSAMMask
from concept_atelier.nodes.native import segmenters
from concept_atelier.nodes.native.boxes import boxes_by_picture, corners, read_points
from safetensors.torch import save_file
from segment_anything import SamPredictor

import nodes as comfy_nodes

PACK = Path(__file__).resolve().parents[2]


def load_tiny_segmenters():
    spec = importlib.util.spec_from_file_location("tiny_segmenters", PACK / "tests/kernels/tiny_segmenters.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tiny_segmenters = load_tiny_segmenters()
needs_package = pytest.mark.skipif(
    importlib.util.find_spec("groundingdino") is None, reason="groundingdino-py is not installed"
)
DETECT = {"text": "a red dog", "threshold": 0.0, "max_detections": 3, "resolution": 96}


@pytest.fixture(autouse=True)
def inference_mode():
    with torch.inference_mode():
        yield


@pytest.fixture
def models(tmp_path, monkeypatch):
    """A models folder of this test's own."""
    folders = {key: ([*paths], set(endings)) for key, (paths, endings) in folder_paths.folder_names_and_paths.items()}
    for key in ("sams", "grounding-dino", "groundingdino", "bert-base-uncased"):
        folders.pop(key, None)
        (tmp_path / key).mkdir()
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", folders)
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    segmenters.SAM_FILES.register()
    segmenters.register_detector_folders()
    return tmp_path


@pytest.fixture
def sam(models):
    torch.save(tiny_segmenters.sam().state_dict(), models / "sams" / "sam_tiny.pth")
    return AtelierSAMLoader.execute("sam_tiny.pth", "auto")[0]


@pytest.fixture(scope="module")
def dino_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dino")
    torch.save({"model": tiny_segmenters.dino_weights()}, folder / "tiny.pth")
    tiny_segmenters.write_vocabulary(folder)
    return folder


@pytest.fixture(scope="module")
def detector(dino_files):
    weights = PublishedWeights("tiny.pth", tiny_segmenters.dino_weights())
    return segmenters.evictable(build_with_transformers(weights, dino_files / "vocab.txt"))


def pictures(count=1, height=48, width=72, seed=0):
    pixels = torch.randint(0, 256, (count, height, width, 3), generator=torch.Generator().manual_seed(seed))
    return pixels / 255


def box(x, y, width, height, **more):
    return {"x": x, "y": y, "width": width, "height": height, **more}


def mask(embedding, **inputs):
    """Run the node; returns the masks and the text that it shows."""
    output = AtelierSAMMask.execute(embedding, **inputs)
    return output[0], output.ui.value


def expected_mask(image, **prompt):
    """What the package's own predictor gives for one picture."""
    predictor = SamPredictor(tiny_segmenters.sam())
    predictor.set_image((image * 255).round().numpy().astype(np.uint8))
    found, _, _ = predictor.predict(multimask_output=False, **prompt)
    return torch.from_numpy(found[0]).float()


# SAM


def test_masks_are_the_packages_own(sam):
    images = pictures(3)
    embedding = AtelierSAMEncode.execute(sam, images)[0]
    boxes = [[box(5, 6, 40, 30)], [box(0, 0, 72, 48)], [box(30.5, 10, 20, 20, label="dog", score=0.5)]]
    found, text = mask(embedding, bboxes=boxes)
    assert found.shape == (3, 48, 72)
    assert found.dtype == torch.float32
    for image, one, (given,) in zip(images, found, boxes):
        x, y = given["x"], given["y"]
        corners = np.array([x, y, x + given["width"], y + given["height"]])
        assert torch.equal(one, expected_mask(image, box=corners))
        assert 0 < one.mean() < 1
    assert [line.split(":")[0] for line in text.splitlines()] == ["Picture 1", "Picture 2", "Picture 3"]
    assert f"{float(found[0].mean()):.1%} of it" in text


def test_points_and_boxes_work_together(sam):
    image = pictures()
    embedding = AtelierSAMEncode.execute(sam, image)[0]
    found, _ = mask(
        embedding, bboxes=box(5, 6, 40, 30), positive_coords="20, 20", negative_coords='[{"x": 60, "y": 40}]'
    )
    expected = expected_mask(
        image[0],
        box=np.array([5, 6, 45, 36]),
        point_coords=np.array([[20.0, 20.0], [60.0, 40.0]]),
        point_labels=np.array([1, 0]),
    )
    assert torch.equal(found[0], expected)


class SilentServer:
    """What ComfyUI's executor talks to."""

    client_id = last_node_id = None

    def send_sync(self, *message):
        pass


def test_moving_a_point_runs_the_mask_alone(sam, monkeypatch, tmp_path):
    """Through ComfyUI's own executor, which keeps what the slow nodes gave."""
    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path))
    for node in (*masks.NODES, *detection.NODES, MaskPreview):
        monkeypatch.setitem(comfy_nodes.NODE_CLASS_MAPPINGS, node.GET_SCHEMA().node_id, node)
    prompt = {
        "picture": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 48, "batch_size": 2, "color": 255}},
        "sam": {
            "class_type": "AtelierSAMLoader",
            "inputs": {"checkpoint": "sam_tiny.pth", "encoder_precision": "full"},
        },
        "encode": {"class_type": "AtelierSAMEncode", "inputs": {"sam": ["sam", 0], "images": ["picture", 0]}},
        "mask": {
            "class_type": "AtelierSAMMask",
            "inputs": {"embedding": ["encode", 0], "positive_coords": "9, 9", "negative_coords": ""},
        },
        "look": {"class_type": "MaskPreview", "inputs": {"mask": ["mask", 0]}},
    }
    cache = {"lru": 0, "ram": 1, "ram_inactive": 1}
    executor = execution.PromptExecutor(SilentServer(), execution.CacheType.CLASSIC, cache)

    def run():
        """Queue the prompt; returns the nodes that did not run again."""
        valid, error, outputs, _ = asyncio.run(execution.validate_prompt("id", prompt, None))
        assert valid, error
        executor.execute(prompt, "id", {}, outputs)
        assert executor.success, executor.status_messages
        return set(dict(executor.status_messages)["execution_cached"]["nodes"])

    assert run() == set()
    prompt["mask"]["inputs"]["positive_coords"] = "30, 30"
    assert run() == {"picture", "sam", "encode"}


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_files_are_found_whatever_their_ending(models, ending):
    weights = {key: value.clone() for key, value in tiny_segmenters.sam().state_dict().items()}
    if ending == "pth":
        torch.save(weights, models / "sams" / "some_name.pth")
    else:
        save_file(weights, models / "sams" / "some_name.safetensors")
    assert AtelierSAMLoader.define_schema().inputs[0].options == [f"some_name.{ending}"]
    output = AtelierSAMLoader.execute(f"some_name.{ending}", "full")
    assert output.ui.value == "SAM of width 32"
    found, _ = mask(AtelierSAMEncode.execute(output[0], pictures())[0], bboxes=box(5, 6, 40, 30))
    assert torch.equal(found[0], expected_mask(pictures()[0], box=np.array([5, 6, 45, 36])))


def test_half_precision_is_for_the_encoder(models, sam):
    assert sam.encoder.model.image_encoder.pos_embed.dtype == torch.float32  # auto, on a CPU
    half = AtelierSAMLoader.execute("sam_tiny.pth", "half")[0]
    assert half.encoder.model.image_encoder.pos_embed.dtype == torch.float16
    assert {parameter.dtype for parameter in half.decoder.model.parameters()} == {torch.float32}
    full, less = (AtelierSAMEncode.execute(one, pictures())[0].pictures[0].features for one in (sam, half))
    torch.testing.assert_close(less, full, atol=0.03, rtol=0)
    assert less.dtype == torch.float32


def test_a_mask_needs_the_decoder_alone(sam):
    """Moving a point must not bring the large image encoder back to the GPU."""
    embedding = AtelierSAMEncode.execute(sam, pictures())[0]
    comfy.model_management.unload_all_models()
    mask(embedding, positive_coords="20, 20")
    loaded = [one.model for one in comfy.model_management.current_loaded_models]
    assert any(one is sam.decoder for one in loaded)
    assert not any(one is sam.encoder for one in loaded)


def is_loaded(patcher) -> bool:
    return any(one.model is patcher for one in comfy.model_management.current_loaded_models)


def test_evicted_models_come_back(sam):
    first = mask(AtelierSAMEncode.execute(sam, pictures())[0], bboxes=box(5, 6, 40, 30))
    assert is_loaded(sam.encoder)
    comfy.model_management.unload_all_models()
    assert not is_loaded(sam.encoder)
    second = mask(AtelierSAMEncode.execute(sam, pictures())[0], bboxes=box(5, 6, 40, 30))
    assert torch.equal(first[0], second[0])


def test_transparent_pictures_are_seen_on_white(sam):
    clear = torch.cat([pictures(), torch.zeros(1, 48, 72, 1)], dim=-1)
    seen, white = (AtelierSAMEncode.execute(sam, one)[0] for one in (clear, torch.ones(1, 48, 72, 3)))
    assert torch.equal(seen.pictures[0].features, white.pictures[0].features)


def test_nothing_found_is_an_empty_mask_and_a_sentence(sam):
    embedding = AtelierSAMEncode.execute(sam, pictures(2))[0]
    found, text = mask(embedding, bboxes=[[], [box(5, 6, 40, 30)]])
    assert not found[0].any()
    assert found[1].any()
    assert text.splitlines()[0] == "Picture 1: nothing to mask, no box and no point: its mask is empty."
    for nothing in ([], [[]], [[], []]):
        found, text = mask(embedding, bboxes=nothing)
        assert found.shape == (2, 48, 72)
        assert not found.any()
        assert text.count("its mask is empty") == 2


def test_masks_of_no_use_say_so():
    nothing, everything = torch.zeros(4, 4, dtype=torch.bool), torch.ones(4, 4, dtype=torch.bool)
    assert "its mask is empty. Move the points" in masks.mask_note(1, nothing, [0.4])
    assert masks.mask_note(2, everything, [0.4]).startswith("Picture 2: 100.0% of it, quality 0.40. The mask covers")
    assert masks.mask_note(1, torch.eye(4).bool(), [0.4, 0.9]) == "Picture 1: 25.0% of it, quality 0.40, 0.90"


def test_boxes_of_core_nodes_fit():
    drawn = BoundingBox.execute(1, 2, 3, 4)[0]
    assert boxes_by_picture(drawn, 2) == [[drawn], [drawn]]
    assert boxes_by_picture([drawn, drawn], 2) == [[drawn, drawn]] * 2
    assert boxes_by_picture([[drawn]], 2) == [[drawn]] * 2
    assert boxes_by_picture([[], [drawn]], 2) == [[], [drawn]]
    assert corners([drawn], 48, 72).tolist() == [[1, 2, 4, 6]]
    assert corners([box(-5, 40, 20, 20)], 48, 72).tolist() == [[0, 40, 15, 48]]
    assert corners([], 48, 72).shape == (0, 4)
    with pytest.raises(ValueError, match="boxes for 2 pictures and there are 3"):
        boxes_by_picture([[drawn], [drawn]], 3)


@pytest.mark.parametrize("outside", [box(72, 0, 10, 10), box(-10, 0, 10, 10), box(0, 48, 5, 5), box(5, 5, 0, 10)])
def test_boxes_outside_the_picture_are_refused(sam, outside):
    embedding = AtelierSAMEncode.execute(sam, pictures())[0]
    with pytest.raises(ValueError, match=r"The box from .* is outside the picture, which is 72 x 48 pixels"):
        mask(embedding, bboxes=outside)


@pytest.mark.parametrize("name", ["positive_coords", "negative_coords"])
def test_points_outside_the_picture_are_refused(sam, name):
    embedding = AtelierSAMEncode.execute(sam, pictures())[0]
    with pytest.raises(ValueError, match=f"The point 72, 5 on {name} is outside the picture, which is 72 x 48 pixels"):
        mask(embedding, **{"positive_coords": "1, 1", name: "72, 5"})


def test_points_are_read_from_lines_and_from_editors():
    assert read_points("", "positive_coords").shape == (0, 2)
    assert read_points(" 1, 2\n\n3.5,4 ", "positive_coords").tolist() == [[1, 2], [3.5, 4]]
    assert read_points('[{"x": 1, "y": 2}, {"x": 3, "y": 4}]', "positive_coords").tolist() == [[1, 2], [3, 4]]
    assert read_points("[]", "positive_coords").shape == (0, 2)


@pytest.mark.parametrize("text", ["here", "1", "1, 2, 3", "1 2", '[{"x": 1}]', "[1, 2]", "[", '[{"x": 1, "y": "?"}]'])
def test_what_is_no_point_is_refused(text):
    with pytest.raises(ValueError, match="on negative_coords is no list of points: write one point a line"):
        read_points(text, "negative_coords")


def test_without_a_prompt_the_node_says_what_it_needs(sam):
    embedding = AtelierSAMEncode.execute(sam, pictures())[0]
    with pytest.raises(ValueError, match=r'connect "bboxes", or write a point into positive_coords'):
        mask(embedding, negative_coords="1, 1")


# Files


def test_a_missing_file_says_where_to_get_it(models):
    assert AtelierSAMLoader.define_schema().inputs[0].options == ["sam_vit_b_01ec64.pth"]
    text = AtelierSAMLoader.validate_inputs("sam_vit_b_01ec64.pth")
    for part in ("sam_vit_b_01ec64.pth", "models/sams", str(models / "sams"), "github.com/facebookresearch"):
        assert part in text
    text = AtelierGroundingDINOLoader.validate_inputs("groundingdino_swint_ogc.pth")
    for part in ("models/grounding-dino or models/groundingdino", "github.com/IDEA-Research/GroundingDINO"):
        assert part in text
    assert AtelierSAMLoader.validate_inputs(None) is True  # through a link: known only when the node runs
    with pytest.raises(ValueError, match=r"no file gone\.pth in models/sams"):
        AtelierSAMLoader.execute("gone.pth", "auto")


class Program:
    """What runs a program when it is unpickled without care."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def test_programs_in_files_are_never_run(models):
    marker = models / "it_ran"
    torch.save({"model": Program(marker)}, models / "sams" / "evil.pth")
    torch.save({"model": Program(marker)}, models / "groundingdino" / "evil.pth")
    refused = r"evil\.pth could not be read as plain weights .*program code, which is never run"
    with pytest.raises(ValueError, match=refused):
        AtelierSAMLoader.execute("evil.pth", "auto")
    with pytest.raises(ValueError, match=refused):
        AtelierGroundingDINOLoader.execute("evil.pth", "transformers")
    assert not marker.exists()


def test_programs_beside_files_are_never_run(models):
    """Repositories of GroundingDINO bring a .py with its configuration; it is neither offered nor looked at."""
    (models / "grounding-dino" / "GroundingDINO_SwinT_OGC.py").write_text("raise SystemExit", encoding="utf-8")
    (models / "grounding-dino" / "groundingdino_swint_ogc.pth").write_bytes(b"")
    assert AtelierGroundingDINOLoader.define_schema().inputs[0].options == ["groundingdino_swint_ogc.pth"]


@pytest.mark.parametrize("name", ["cut.pth", "cut.safetensors"])
def test_damaged_files_say_so(models, name):
    weights = {key: value.clone() for key, value in tiny_segmenters.sam().state_dict().items()}
    file = models / "sams" / name
    (save_file if name.endswith("safetensors") else torch.save)(weights, file)
    file.write_bytes(file.read_bytes()[:-2000])
    with pytest.raises(ValueError, match=rf"{name} could not be read as plain weights .*it is damaged"):
        AtelierSAMLoader.execute(name, "auto")
    file.write_bytes(b"")
    with pytest.raises(ValueError, match=rf"{name} could not be read as plain weights"):
        AtelierSAMLoader.execute(name, "auto")


def test_other_content_is_refused(models):
    torch.save([1, 2], models / "sams" / "list.pth")
    with pytest.raises(ValueError, match="could not be read as plain weights"):
        AtelierSAMLoader.execute("list.pth", "auto")
    torch.save({"steps": 3, "names": {"a": 1}}, models / "sams" / "numbers.pth")
    with pytest.raises(ValueError, match=r"numbers\.pth is no Segment Anything model"):
        AtelierSAMLoader.execute("numbers.pth", "auto")


def test_a_changed_file_is_loaded_again(models, sam):
    before = AtelierSAMLoader.fingerprint_inputs("sam_tiny.pth", "auto")
    assert AtelierSAMLoader.fingerprint_inputs("sam_tiny.pth", "auto") == before
    torch.save({**tiny_segmenters.sam().state_dict(), "more": torch.zeros(9)}, models / "sams" / "sam_tiny.pth")
    assert AtelierSAMLoader.fingerprint_inputs("sam_tiny.pth", "auto") != before


@pytest.mark.parametrize("loader", [AtelierSAMLoader, AtelierGroundingDINOLoader])
def test_a_file_name_through_a_link_is_not_yet_known(loader):
    assert loader.fingerprint_inputs(None, "auto") == loader.fingerprint_inputs(None, "auto")


def test_a_missing_package_says_how_to_get_it(models, monkeypatch):
    monkeypatch.setattr(segmenters, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"segment-anything is missing: run \"pip install segment-anything==1\.0\""):
        AtelierSAMLoader.execute("sam_vit_b_01ec64.pth", "auto")
    with pytest.raises(ValueError, match=r"pip install groundingdino-py==0\.4\.0.*pypi\.org/project/groundingdino-py"):
        AtelierGroundingDINOLoader.execute("groundingdino_swint_ogc.pth", "groundingdino-py")
    # The default engine needs no package of its own: the file is what it misses.
    with pytest.raises(ValueError, match=r"no file groundingdino_swint_ogc\.pth"):
        AtelierGroundingDINOLoader.execute("groundingdino_swint_ogc.pth", "transformers")


# GroundingDINO


@needs_package
@pytest.mark.parametrize("folder", ["grounding-dino", "groundingdino"])
@pytest.mark.parametrize("engine", ["transformers", "groundingdino-py"])
def test_published_files_are_read_by_both_engines(models, dino_files, detector, folder, engine):
    (models / folder / "swint.pth").symlink_to(dino_files / "tiny.pth")
    tiny_segmenters.write_vocabulary(models / "bert-base-uncased")
    assert AtelierGroundingDINOLoader.define_schema().inputs[0].options == ["swint.pth"]
    assert AtelierGroundingDINOLoader.validate_inputs("swint.pth") is True
    output = AtelierGroundingDINOLoader.execute("swint.pth", engine)
    assert output.ui.value == "GroundingDINO SwinT"
    found, expected = (AtelierDetect.execute(one, pictures(), **DETECT)[0][0] for one in (output[0], detector))
    assert len(found) == 3
    for one, other in zip(found, expected):
        assert one == {**other, "score": pytest.approx(other["score"], abs=1e-4)}


@needs_package
def test_the_vocabulary_is_looked_for_and_never_downloaded(models, dino_files):
    (models / "groundingdino" / "swint.pth").symlink_to(dino_files / "tiny.pth")
    with pytest.raises(ValueError, match=r"download vocab\.txt .*huggingface\.co/google-bert/.*bert-base-uncased"):
        AtelierGroundingDINOLoader.execute("swint.pth", "transformers")
    cache = models / "hub" / "models--bert-base-uncased"
    tiny_segmenters.write_vocabulary(cache / "snapshots" / "0123")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0123", encoding="utf-8")
    assert segmenters.find_vocabulary() == cache / "snapshots" / "0123" / "vocab.txt"
    mine = tiny_segmenters.write_vocabulary(models / "bert-base-uncased" / "downloaded")
    assert segmenters.find_vocabulary() == mine


@needs_package
def test_each_picture_has_its_own_caption(detector):
    images = pictures(3)
    captions = ["a red dog", "cat. ball on grass. a man", "ball"]
    output = AtelierDetect.execute(detector, images, **{**DETECT, "text": "\n".join(captions), "max_detections": 900})
    assert len(output[0]) == 3
    for image, caption, boxes in zip(images, captions, output[0]):
        expected = detect(detector.model, image, caption, 0.0, 96)
        assert [found["score"] for found in boxes] == [found.score for found in expected]
        assert {found["label"] for found in boxes} <= set(caption.split(". "))
        for found, other in zip(boxes, expected):
            assert (found["x"], found["y"]) == (round(other.box[0]), round(other.box[1]))
            assert found["x"] + found["width"] == pytest.approx(other.box[2], abs=1)
            assert all(isinstance(found[key], int) for key in ("x", "y", "width", "height"))
    assert "Picture 2: " in output.ui.value
    with pytest.raises(ValueError, match="text has 2 lines and there are 3 pictures"):
        AtelierDetect.execute(detector, images, **{**DETECT, "text": "dog\n\ncat"})
    with pytest.raises(ValueError, match="text has 0 lines"):
        AtelierDetect.execute(detector, images, **{**DETECT, "text": " \n"})


@needs_package
def test_detections_become_masks_and_pictures(detector, sam):
    """Grounded SAM, and core's own node that draws boxes."""
    images = pictures(2)
    boxes = AtelierDetect.execute(detector, images, **DETECT)[0]
    found, text = mask(AtelierSAMEncode.execute(sam, images)[0], bboxes=boxes)
    assert found.shape == (2, 48, 72)
    assert text.splitlines()[0].count(".") >= 4  # a share and three qualities
    first = boxes[0][0]
    edges = np.array([first["x"], first["y"], first["x"] + first["width"], first["y"] + first["height"]])
    inside = expected_mask(images[0], box=edges) > 0
    assert found[0][inside].all()
    drawn = DrawBBoxes.execute(boxes, images)[0]
    assert drawn.shape == images.shape
    assert not torch.equal(drawn, images)


@needs_package
def test_nothing_found_is_no_box_and_a_sentence(detector, sam):
    images = pictures(2)
    output = AtelierDetect.execute(detector, images, **{**DETECT, "threshold": 1.0})
    assert output[0] == [[], []]
    assert output.ui.value.splitlines()[0] == (
        'Picture 1: no "a red dog" found. Lower the threshold, or say it simpler.'
    )
    found, _ = mask(AtelierSAMEncode.execute(sam, images)[0], bboxes=output[0])
    assert not found.any()


@needs_package
def test_a_detector_can_be_evicted(detector):
    first = AtelierDetect.execute(detector, pictures(), **DETECT)[0]
    assert any(one.model is detector for one in comfy.model_management.current_loaded_models)
    comfy.model_management.unload_all_models()
    assert AtelierDetect.execute(detector, pictures(), **DETECT)[0] == first
