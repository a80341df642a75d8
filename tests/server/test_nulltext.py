"""The null-text concept model through /prompt: cancel, resume, stop and keep, files that load, pictures in folders."""

import prompts
import pytest
from bad_input import assert_one_sentence, unwritable_runs
from comfy_server import at_step
from PIL import Image
from prompts import CLIP, GCFG_OFF, MANY, MODEL, VAE


def training(**changes):
    """Toy model, toy pictures of one subject, surgery, and training as node "train", whose model paints a picture."""
    settings = {
        "folder": "(images)",
        "name": "test",
        "steps": 4,
        "learning_rate": 1e-3,
        "batch_size": 2,
        "accumulation": 1,
        "size": 64,
        "seed": 0,
        "sample_count": 0,
        "sample_every": 0,
        "mirror": True,
        "ema_decay": 0.99,
        "weight_decay": 0.01,
        "clip_norm": 1.0,
        "sample_steps": 2,
        "sample_eta": 1.0,
        "start_fresh": False,
        "images": ["pictures", 0],
    }
    kept = {key: value for key, value in (settings | changes).items() if value is not None}
    return {
        "toy": prompts.node("AtelierToyCheckpoint"),
        "pictures": prompts.node(
            "AtelierToyPictures", action="sits", count=3, seed=0, other_actions=1, subject="wizard (held out)"
        ),
        "surgery": surgery(),
        "train": prompts.node("AtelierTrainNullText", model=["surgery", 0], clip=CLIP, vae=VAE, **kept),
        **prompts.painting(["train", 0], CLIP, VAE, "", None, apply=False),
    }


def surgery(**changes):
    settings = {"form": "uniform", "timesteps": 1, "seed": 0, "size": 64, "file_name": ""} | changes
    return prompts.node("AtelierNullTextSurgery", model=MODEL, clip=CLIP, vae=VAE, **settings)


def test_cancel_keeps_the_work_and_the_same_prompt_goes_on(server):
    prompt = training(steps=MANY, name="cancelled")
    outcome = server.run(prompt, at_step(3, lambda: server.post("/interrupt", {})))
    assert outcome.status == "interrupted", outcome.error
    reached = outcome.training[-1]["step"]
    assert 3 <= reached < MANY

    stop = at_step(reached + 3, lambda: server.post("/concept-atelier/stop", {"node": "train"}))
    resumed = server.run(prompt, stop)
    assert resumed.status == "success", resumed.error
    assert resumed.training[0]["step"] > reached
    assert len(resumed.training[0]["curve"]) > 1  # the history came along
    assert resumed.training[-1]["step"] < MANY
    assert resumed.outputs["picture"]["images"]


def test_stopped_and_finished_runs_return_at_once(server):
    prompt = training(steps=MANY, name="stopped")
    stopped = server.run(prompt, at_step(3, lambda: server.post("/concept-atelier/stop", {"node": "train"})))
    assert stopped.status == "success", stopped.error
    server.forget()
    again = server.run(prompt)
    assert (again.status, again.training) == ("success", []), again.error

    assert server.run(training(name="finished")).training[-1]["step"] == 4
    server.forget()
    again = server.run(training(name="finished"))
    assert (again.status, again.training) == ("success", [])
    longer = server.run(training(name="finished", steps=6))
    assert [event["step"] for event in (longer.training[0], longer.training[-1])] == [5, 6]


def test_the_node_shows_samples_and_keeps_its_curve(server):
    outcome = server.run(training(name="shown", sample_count=2, sample_every=2))
    assert outcome.previews["train"] >= 2
    assert len(outcome.outputs["train"]["images"]) == 1
    assert "shown.safetensors" in outcome.outputs["train"]["text"][0]


def test_a_saved_model_is_listed_loaded_and_guides(server):
    saved = server.run(training(name="listed"))
    assert saved.status == "success", saved.error
    assert "listed.safetensors" in server.choices("AtelierLoadConceptModel", "file_name")
    whole = {"weight": 2.0, "start_percent": 0.0, "end_percent": 1.0}
    prompt = {
        "toy": prompts.node("AtelierToyCheckpoint"),
        "load": prompts.node("AtelierLoadConceptModel", model=MODEL, file_name="listed.safetensors"),
        "branch": prompts.node("AtelierGuidanceBranch", model=["load", 0], conditioning=["negative", 0], **whole),
        "gcfg": prompts.node("AtelierGCFG", model=MODEL, **{"branches.branch0": ["branch", 0]}, **GCFG_OFF),
        **prompts.painting(["gcfg", 0], CLIP, VAE, "a panda sits", None, apply=False),
        "cost": prompts.node("PreviewAny", source=["gcfg", 1]),
    }
    outcome = server.run(prompt)
    assert outcome.status == "success", outcome.error
    assert outcome.outputs["picture"]["images"]
    assert outcome.outputs["cost"]["text"][0].startswith("2 forwards of the U-Net a step")


def test_what_surgery_saves_is_listed(server):
    prompt = {"toy": prompts.node("AtelierToyCheckpoint"), "surgery": surgery(file_name="untrained")}
    prompt |= prompts.painting(["surgery", 0], CLIP, VAE, "", None, apply=False)
    outcome = server.run(prompt)
    assert outcome.status == "success", outcome.error
    assert "untrained.safetensors" in outcome.outputs["surgery"]["text"][0]
    assert "999: " in outcome.outputs["surgery"]["text"][0]


def test_an_unreadable_picture_is_skipped_and_named(server):
    folder = server.folder / "input" / "partly_broken"
    folder.mkdir()
    for number in range(2):
        Image.effect_noise((80, 70), 50 + number).save(folder / f"{number}.png")
    (folder / "broken.png").write_text("no picture")
    outcome = server.run(training(name="partly", folder="partly_broken", images=None))
    assert outcome.status == "success", outcome.error
    text = outcome.outputs["train"]["text"][0]
    assert "Skipped, cannot be read: " in text
    assert "broken.png" in text


def test_a_dataset_trains_one_model(server):
    """The loaders of core give a list of pictures, for which a plain node would run once each."""
    folder = server.folder / "input" / "data_set"
    folder.mkdir()
    for number in range(3):
        Image.effect_noise((80, 70 + number), 50 + number).convert("RGB").save(folder / f"{number}.png")
    prompt = training(name="data", images=["data", 0])
    prompt["data"] = prompts.node("LoadImageDataSetFromFolder", folder="data_set")
    prompt["surgery"]["inputs"]["images"] = ["data", 0]
    outcome = server.run(prompt)
    assert outcome.status == "success", outcome.error
    assert [event["step"] for event in outcome.training][-1] == 4
    assert len([event for event in outcome.training if event["step"] == 4]) == 1
    assert len(outcome.outputs["picture"]["images"]) == 1


def no_pictures(server):
    (server.folder / "input" / "no_pictures").mkdir()
    return training(folder="no_pictures", images=None)


def no_surgery(server):
    prompt = training()
    prompt["train"]["inputs"]["model"] = MODEL
    return prompt


def surgery_twice(server):
    prompt = training()
    prompt["train"]["inputs"]["model"] = ["again", 0]
    prompt["again"] = surgery()
    prompt["again"]["inputs"]["model"] = ["surgery", 0]
    return prompt


def nothing_chosen(server):
    return training(images=None)


def outside(server):
    return training(name="../outside")


CASES = [
    (no_pictures, ["There are no pictures in", "no_pictures"]),
    (no_surgery, ["still has its text", "Null-Text Surgery"]),
    (surgery_twice, ["concept model already"]),
    (nothing_chosen, ["images", "folder"]),
    (outside, ["file_name", "../outside"]),
]


@pytest.mark.parametrize(("make", "words"), CASES, ids=[make.__name__ for make, _ in CASES])
def test_bad_input_gets_one_sentence_before_training(server, make, words):
    outcome = server.run(make(server))
    assert outcome.status == "error"
    assert_one_sentence(outcome.error, words)
    assert outcome.training == []


def test_a_folder_that_cannot_be_written_is_named_before_training(server):
    server.run(training())  # makes the folder
    with unwritable_runs(server) as runs:
        outcome = server.run(training(name="unwritable"))
    assert outcome.status == "error"
    assert str(runs) in outcome.error
    assert outcome.training == []
