"""Training through /prompt: cancel, resume, stop and keep, instant return, files that can be loaded."""

import prompts
from comfy_server import TINY_CHECKPOINT, at_step
from prompts import MANY, TOY


def test_cancel_keeps_the_work_and_the_same_prompt_goes_on(server):
    prompt = prompts.training(steps=MANY, name="cancelled")
    outcome = server.run(prompt, at_step(5, lambda: server.post("/interrupt", {})))
    assert outcome.status == "interrupted", outcome.error
    reached = outcome.training[-1]["step"]
    assert 5 <= reached < MANY

    stop = at_step(reached + 5, lambda: server.post("/concept-atelier/stop", {"node": "train"}))
    resumed = server.run(prompt, stop)
    assert resumed.status == "success", resumed.error
    assert resumed.training[0]["step"] > reached
    assert len(resumed.training[0]["curve"]) > 1  # the history came along
    assert "save" in resumed.executed
    assert resumed.training[-1]["step"] < MANY


def test_stopped_and_finished_runs_return_at_once(server):
    prompt = prompts.training(steps=MANY, name="stopped")
    stopped = server.run(prompt, at_step(3, lambda: server.post("/concept-atelier/stop", {"node": "train"})))
    assert stopped.status == "success", stopped.error
    server.forget()
    again = server.run(prompt)
    assert again.status == "success", again.error
    assert "train" in again.executed
    assert again.training == []

    finished = prompts.training(steps=4, name="finished")
    assert server.run(finished).training[-1]["step"] == 4
    server.forget()
    again = server.run(finished)
    assert (again.status, again.training) == ("success", [])


def test_a_run_is_found_again_when_its_checkpoint_is_loaded_anew(server):
    prompt = prompts.training(steps=3, name="reloaded", init_word="person", sample_eta=0.0)
    prompt["toy"] = prompts.node("CheckpointLoaderSimple", ckpt_name=TINY_CHECKPOINT)
    assert server.run(prompt).training[-1]["step"] == 3
    for _ in range(3):
        server.forget()
        again = server.run(prompt)
        assert (again.status, again.training) == ("success", [])


def test_more_steps_go_on_and_start_fresh_starts_again(server):
    server.run(prompts.training(steps=4, name="more"))
    longer = server.run(prompts.training(steps=7, name="more"))
    assert longer.training[0]["step"] > 4
    assert longer.training[-1]["step"] == 7
    fresh = server.run(prompts.training(steps=7, name="more", start_fresh=True))
    assert fresh.training[0]["step"] == 1


def test_the_node_shows_previews_and_keeps_its_curve(server):
    outcome = server.run(prompts.training(steps=6, name="shown", sample_prompts="a panda {}", sample_every=3))
    assert outcome.previews["train"] >= 2
    assert len(outcome.outputs["train"]["images"]) == 1


def test_a_saved_concept_is_listed_loaded_and_painted_with(server):
    saved = server.run(prompts.training(name="listed"))
    assert saved.status == "success", saved.error
    assert "listed.safetensors" in server.choices("AtelierLoadConcept", "file_name")
    assert "listed" in server.get("/embeddings")
    prompt = {
        "toy": prompts.node("AtelierToyCheckpoint"),
        "load": prompts.node("AtelierLoadConcept", file_name="listed.safetensors"),
        **prompts.painting(*TOY, "a panda <listed>", ["load", 0]),
    }
    outcome = server.run(prompt)
    assert outcome.status == "success", outcome.error
    assert outcome.outputs["picture"]["images"]


def test_a_stop_for_another_node_changes_nothing(server):
    stop = at_step(2, lambda: server.post("/concept-atelier/stop", {"node": "another"}))
    assert server.run(prompts.training(steps=8, name="other"), stop).training[-1]["step"] == 8
