"""The shipped workflows through /prompt: the API forms as they are, made small, on the stock loaders."""

import shutil

import numpy as np
import prompts
import pytest
import torch
from comfy_server import PACK
from concept_atelier.toyworld.judge import load_judge
from PIL import Image

WORKFLOWS = sorted(path.stem for path in (PACK / "workflows" / "api").glob("*.json"))
TRAINING = ("AtelierTrain", "AtelierTrainNullText")
FIGURES = 40  # a picture has far more than this many colours; a blank one has one


def test_all_workflows_are_here():
    ready_forms = {"gcfg_negative_toy", "gcfg_two_prompts_toy", "gcfg_rectified_toy", "gcfg_subjects_toy"}
    of_hifi_tuner = {
        f"{task}_{model}" for task in ("subject", "reference", "replace", "inversion") for model in ("toy", "sd")
    }
    assert {"adi_toy", "adi_sd", "gcfg_control_sd", *ready_forms} <= set(WORKFLOWS)
    assert {"mask_subject_sd", *of_hifi_tuner} <= set(WORKFLOWS)
    assert {"compose_toy", "compose_sd"} <= set(WORKFLOWS)


@pytest.mark.parametrize("name", WORKFLOWS)
def test_it_runs_and_returns_at_once_the_second_time(server, name):
    server.forget()  # another workflow may train the same
    shutil.rmtree(server.folder / "output" / "concept_atelier_runs", ignore_errors=True)
    prompt = prompts.small(prompts.shipped(name))
    outcome = server.run(prompt)
    assert outcome.status == "success", outcome.error
    assert {*outcome.executed, *outcome.cached} == set(prompt)

    trained = {i for i, entry in prompt.items() if entry["class_type"] in TRAINING}
    assert {event["node"] for event in outcome.training} == trained
    assert trained <= set(outcome.previews)
    for event in outcome.training:
        assert event["loss"] > 0

    for i, entry in prompt.items():
        if entry["class_type"] not in ("SaveImage", "PreviewImage"):
            continue
        for file in server.pictures(outcome, i):
            with Image.open(file) as picture:
                assert picture.convert("RGB").getcolors(FIGURES) is None, f"{entry} painted nothing"

    again = server.run(prompt)
    assert (again.status, again.executed) == ("success", [])


def test_the_judge_sees_the_learned_action_in_what_adi_toy_paints(server):
    prompt = prompts.shipped("adi_toy")
    (saved,) = (i for i, entry in prompt.items() if entry["inputs"].get("filename_prefix") == "concept_atelier/adi")
    outcome = server.run(prompts.leading_to(prompt, saved))  # not the plain word beside it
    assert outcome.status == "success", outcome.error
    files = server.pictures(outcome, saved)
    pictures = np.stack([np.asarray(Image.open(file).convert("RGB"), np.float32) / 255 for file in files])
    read = load_judge().read(torch.from_numpy(pictures).movedim(-1, 1))
    assert read["subject"].count("panda") >= 6  # of 8; guessing would find one in fourteen
    assert read["action"].count("tpose") >= 4  # guessing: one in eighteen


def test_the_stable_diffusion_workflow_has_the_settings_of_the_paper():
    nodes = {entry["class_type"]: entry["inputs"] for entry in prompts.shipped("adi_sd").values()}
    trained, sampled = nodes["AtelierTrain"], nodes["KSampler"]
    assert (trained["steps"], trained["learning_rate"], trained["init_word"]) == (3000, 2e-4, "action")
    assert (nodes["AtelierGradientMask"]["beta"], nodes["AtelierGradientMask"]["merge"]) == (0.6, "intersection")
    assert (trained["sample_cfg"], trained["sample_eta"], nodes["AtelierTriples"]["sampling_eta"]) == (7.5, 0, 0)
    assert (sampled["sampler_name"], sampled["steps"], sampled["cfg"]) == ("ddim", 50, 7.5)


@pytest.mark.parametrize("name", ["reference_toy", "reference_sd"])
def test_the_reference_guides(server, name):
    prompt = prompts.small(prompts.shipped(name))
    (guidance,) = (i for i, entry in prompt.items() if entry["class_type"] == "AtelierReferenceGuidance")
    outcome = server.run(prompt)
    assert outcome.status == "success", outcome.error
    assert "steps guided" in outcome.outputs[guidance]["text"][0]


def test_hifi_tuner_has_the_settings_of_the_paper():
    nodes = {entry["class_type"]: entry["inputs"] for entry in prompts.shipped("reference_sd").values()}
    trained, layout, guidance = (nodes[f"Atelier{node}"] for node in ("Train", "TokenLayout", "ReferenceGuidance"))
    assert (trained["steps"], trained["learning_rate"], trained["steps_each_stage"]) == (1000, 5e-3, 10)
    assert (layout["tokens"], layout["stages"], layout["place"]) == (5, 50, "tail rows, added")
    assert [guidance[key] for key in ("t_s", "t_e", "inner_steps", "learning_rate")] == [40, 10, 10, 0.01]
    assert (nodes["CFGGuider"]["cfg"], nodes["AtelierDDIMInversion"]["steps"]) == (7.5, 50)
    assert (nodes["BasicScheduler"]["steps"], nodes["AtelierPickReference"]["by"]) == (50, "DINO")
