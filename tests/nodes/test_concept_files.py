"""Concepts as files: what was saved comes back, stock prompt nodes find one-token concepts, errors name the file."""

import json
from dataclasses import replace

import folder_paths
import prompting
import pytest
import tiny_models
import torch
from comfy.cli_args import args
from comfy_api.latest._io import HiddenHolder
from concept_atelier.kernels.layouts import Layout
from concept_atelier.nodes.apply import AtelierTextEncode
from concept_atelier.nodes.files import FOLDER, AtelierLoadConcept, AtelierSaveConcept, register_folders
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import nodes as comfy_nodes


@pytest.fixture
def output(tmp_path, monkeypatch):
    """An output folder of this test's own, known to ComfyUI."""
    output = tmp_path / "output"
    output.mkdir()
    folders = {key: ([*paths], set(endings)) for key, (paths, endings) in folder_paths.folder_names_and_paths.items()}
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", folders)
    monkeypatch.setattr(folder_paths, "output_directory", str(output))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    folders.pop(FOLDER)
    register_folders()
    monkeypatch.setattr(AtelierSaveConcept, "hidden", HiddenHolder.from_dict({}))
    return output


def make_concept(tiny, layout, seed=0, **metadata):
    return prompting.make_concept(tiny, "salute", layout, seed, **metadata)


def save(concept, file_name="", overwrite=False):
    """Run the node; returns the text that it shows."""
    return AtelierSaveConcept.execute(concept, file_name, overwrite).ui.value


def load(file_name):
    return AtelierLoadConcept.execute(file_name)[0]


def header(path):
    with safe_open(str(path), framework="pt") as file:
        return file.metadata()


@pytest.mark.parametrize("layout", [Layout(), Layout("layer", tokens=2), Layout("block", stages=5, split_kv=True)])
def test_what_was_saved_comes_back(any_tiny, output, layout):
    concept = make_concept(any_tiny, layout, method="adi", init_word="action", steps="300")
    text = save(concept)
    assert str(output / FOLDER / "salute.safetensors") in text
    assert AtelierLoadConcept.define_schema().inputs[0].options == ["salute.safetensors"]
    loaded = load("salute.safetensors")
    assert {t: v.tolist() for t, v in loaded.vectors.items()} == {t: v.tolist() for t, v in concept.vectors.items()}
    for field in ("name", "layout", "family", "layers", "metadata"):
        assert getattr(loaded, field) == getattr(concept, field)


@pytest.mark.parametrize("topology", ["sd1", "sd2", "sdxl"])
def test_one_token_is_a_stock_embedding(output, topology):
    """CLIPTextEncode with embedding:name gives what our node gives with <name>, both SDXL towers included."""
    tiny = tiny_models.build(topology, embedding_directory=folder_paths.get_folder_paths("embeddings"))
    concept = make_concept(tiny, Layout(tokens=2))
    text = save(concept, "people/anna")
    assert "embedding:people/anna" in text
    assert str(output / "embeddings" / "people" / "anna.safetensors") in text
    ours = AtelierTextEncode.execute(tiny.clip, "a <salute> on grass", {"concept0": concept})[0]
    stock = comfy_nodes.CLIPTextEncode().encode(tiny.clip, "a embedding:people/anna on grass")[0]
    plain = comfy_nodes.CLIPTextEncode().encode(tiny.clip, "a on grass")[0]
    assert torch.equal(ours[0][0], stock[0][0])
    assert torch.equal(ours[0][1]["pooled_output"], stock[0][1]["pooled_output"])
    assert not torch.equal(plain[0][0], stock[0][0])


def test_learned_weights_are_in_the_concept_file_alone(tiny, output):
    weights = {"diffusion_model.some.diff": torch.ones(2, 3)}
    text = save(replace(make_concept(tiny("sd1"), Layout()), weights=weights))
    assert "without the weights" in text
    ours, stock = (load_file(output / folder / "salute.safetensors") for folder in (FOLDER, "embeddings"))
    assert torch.equal(ours.pop("diffusion_model.some.diff"), torch.ones(2, 3))
    assert ours.keys() == stock.keys()
    assert "without the weights" not in save(make_concept(tiny("sd1"), Layout()))


def test_layered_concepts_are_no_stock_embeddings(tiny, output):
    assert "embedding:" not in save(make_concept(tiny("sd1"), Layout("layer")))
    assert not (output / "embeddings").exists()


def test_nothing_is_overwritten_unasked(tiny, output):
    first, second = (make_concept(tiny("sd1"), Layout(), seed) for seed in (1, 2))
    (output / "embeddings").mkdir()
    (output / "embeddings" / "salute_2.safetensors").write_bytes(b"of another pack")
    save(first)
    assert "salute_3.safetensors" in save(second)
    assert torch.equal(load("salute.safetensors").vectors["l"], first.vectors["l"])
    assert torch.equal(load("salute_3.safetensors").vectors["l"], second.vectors["l"])
    save(second, "salute", overwrite=True)
    assert torch.equal(load("salute.safetensors").vectors["l"], second.vectors["l"])
    assert (output / "embeddings" / "salute_2.safetensors").read_bytes() == b"of another pack"


def test_a_changed_file_is_loaded_again(tiny, output):
    save(make_concept(tiny("sd1"), Layout(), 1))
    before = AtelierLoadConcept.fingerprint_inputs("salute.safetensors")
    assert AtelierLoadConcept.fingerprint_inputs("salute.safetensors") == before
    save(make_concept(tiny("sd1"), Layout(), 2), overwrite=True)
    assert AtelierLoadConcept.fingerprint_inputs("salute.safetensors") != before


def test_the_workflow_travels_in_the_file(tiny, output, monkeypatch):
    hidden = AtelierSaveConcept.hidden
    monkeypatch.setattr(hidden, "prompt", {"1": {"class_type": "AtelierTrain"}})
    monkeypatch.setattr(hidden, "extra_pnginfo", {"workflow": {"nodes": []}})
    save(make_concept(tiny("sd1"), Layout(), method="adi"))
    written = header(output / FOLDER / "salute.safetensors")
    assert json.loads(written["prompt"]) == {"1": {"class_type": "AtelierTrain"}}
    assert json.loads(written["workflow"]) == {"nodes": []}
    assert (written["format_version"], written["family"], written["method"]) == ("1", "sd1", "adi")

    monkeypatch.setattr(args, "disable_metadata", True)
    save(make_concept(tiny("sd1"), Layout()), "private")
    save(load("salute.safetensors"), "loaded")
    for name in ("private", "loaded"):
        assert not {"prompt", "workflow"} & header(output / FOLDER / f"{name}.safetensors").keys()


@pytest.mark.parametrize("file_name", ["../salute", "/etc/salute", "people/../../salute", "sal ute", "a//b"])
def test_file_names_stay_in_the_folder(tiny, output, file_name):
    with pytest.raises(ValueError, match="file_name"):
        save(make_concept(tiny("sd1"), Layout()), file_name)
    assert not list(output.parent.rglob("salute*"))


def test_damaged_files_say_so(tiny, output):
    save(make_concept(tiny("sd1"), Layout()))
    path = output / FOLDER / "salute.safetensors"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"salute.safetensors is damaged"):
        load("salute.safetensors")


LAYERS_OF_NONE = json.dumps([["input", "1", 0]])


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"format_version": "two"}, "header of the file .*salute.safetensors is damaged .*version"),
        ({"layout": "{granularity"}, "header of the file .*salute.safetensors is damaged .*Expecting"),
        ({"layout": "3"}, "header of the file .*salute.safetensors is damaged"),
        ({"layout": json.dumps({"tokens": "1"})}, "header of the file .*salute.safetensors is damaged"),
        ({"layers": json.dumps([["input", 1]])}, "header of the file .*salute.safetensors is damaged"),
        ({"layers": LAYERS_OF_NONE}, "header of the file .*salute.safetensors is damaged"),
        ({"layers": "[]"}, "header of the file .*salute.safetensors is damaged"),
        ({"layout": json.dumps({"tokens": 2})}, r"salute.safetensors is damaged .*1 slots of 2 tokens.*\(1, 1, 64\)"),
        ({"layout": json.dumps({"stages": 4})}, r"salute.safetensors is damaged .*4 slots of 1 tokens.*\(1, 1, 64\)"),
        ({"format_version": "2", "layers": "{}"}, "salute.safetensors was written by a newer Concept Atelier: update"),
        ({"layout": json.dumps({"colours": 3})}, "salute.safetensors was written by a newer Concept Atelier"),
        ({"layout": json.dumps({"granularity": "head"})}, "salute.safetensors was written by a newer Concept Atelier"),
        ({"layout": json.dumps({"place": "picture"})}, "salute.safetensors was written by a newer Concept Atelier"),
    ],
)
def test_headers_that_cannot_be_read_name_the_file(tiny, output, changed, what):
    save(make_concept(tiny("sd1"), Layout()))
    path = output / FOLDER / "salute.safetensors"
    save_file(load_file(path), path, metadata=header(path) | changed)
    with pytest.raises(ValueError, match=what):
        load("salute.safetensors")


def test_layouts_written_before_a_field_was_added_are_read(tiny, output):
    concept = make_concept(tiny("sd1"), Layout("layer"))
    save(concept)
    path = output / FOLDER / "salute.safetensors"
    save_file(load_file(path), path, metadata=header(path) | {"layout": json.dumps({"granularity": "layer"})})
    assert load("salute.safetensors").layout == concept.layout


def test_a_folder_that_cannot_be_written_says_so(tiny, output):
    (output / FOLDER).write_text("a file where the folder should be")
    with pytest.raises(ValueError, match=f"Cannot write salute.safetensors into the folder .*{FOLDER}"):
        save(make_concept(tiny("sd1"), Layout()))
