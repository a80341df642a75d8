"""Bad input through /prompt: one sentence that names the input and the remedy, and nothing lost."""

import prompts
import pytest
from bad_input import assert_one_sentence, unwritable_runs
from comfy_server import TINY_CHECKPOINT
from prompts import TOY


def masked(prompt):
    """Let the training of `prompt` use a gradient mask on triples."""
    prompt["triples"] = prompts.node(
        "AtelierTriples",
        exemplars=["exemplars", 0],
        other_action_pictures=["pictures", 3],
        other_actions="stands",
        pictures_per_exemplar=1,
        context_steps=1,
        context_rank=1,
        context_learning_rate=1e-4,
        sampling_steps=1,
        cfg=3.0,
        sampling_eta=1.0,
        seed=0,
    )
    prompt["mask"] = prompts.node(
        "AtelierGradientMask",
        beta=0.6,
        merge="intersection",
        strategy="adi",
        mask_what="gradient",
        share_noise=True,
        share_timestep=True,
    )
    prompt["train"]["inputs"] |= {"exemplars": ["triples", 0], "gradient_rule": ["mask", 0]}
    return prompt


def no_blank():
    prompt = prompts.training()
    prompt["exemplars"]["inputs"]["captions"] = "a man on grass\na woman on grass\na robot on grass"
    return prompt


def fewer_captions():
    prompt = prompts.training()
    prompt["exemplars"]["inputs"]["captions"] = "a man {} on grass\na woman {} on grass"
    return prompt


def one_exemplar():
    prompt = masked(prompts.training())
    prompt["pictures"]["inputs"]["count"] = 1
    return prompt


def no_triples():
    prompt = masked(prompts.training())
    prompt["train"]["inputs"]["exemplars"] = ["exemplars", 0]
    return prompt


def long_init_word():
    return prompts.training(init_word="meditates on grass")


def bad_name():
    return prompts.training(name="my action")


def unknown_concept():
    return {**prompts.training(), **prompts.painting(*TOY, "a panda <nobody>", ["train", 0])}


def not_routed():
    prompt = prompts.training()
    prompt["layout"]["inputs"]["granularity"] = "per layer"  # a concept of one token needs no routing
    return {**prompt, **prompts.painting(*TOY, "a panda <test>", ["train", 0], apply=False)}


def another_base():
    sd = {"sd": prompts.node("CheckpointLoaderSimple", ckpt_name=TINY_CHECKPOINT)}
    parts = (["sd", 0], ["sd", 1], ["sd", 2])
    return {**sd, **prompts.training(), **prompts.painting(*parts, "a panda <test>", ["train", 0])}


def bad_file_name():
    prompt = prompts.training()
    prompt["save"]["inputs"]["file_name"] = "../outside"
    return prompt


# Each with the words that the sentence must hold: what is wrong and what to do.
CASES = [
    (no_blank, ["caption", "{}", "a man on grass"]),
    (fewer_captions, ["captions", "3", "2"]),
    (one_exemplar, ["exemplars", "at least two"]),
    (no_triples, ["Exemplar", "Triples"]),
    (long_init_word, ["init word", "meditates on grass", "choose"]),
    (bad_name, ["name", "my action"]),
    (unknown_concept, ["<nobody>", "test"]),
    (not_routed, ["Apply Concepts"]),
    (another_base, ["<test>", "load"]),
    (bad_file_name, ["file_name", "../outside"]),
]


@pytest.mark.parametrize(("make", "words"), CASES, ids=[make.__name__ for make, _ in CASES])
def test_the_sentence_names_input_and_remedy(server, make, words):
    outcome = server.run(make())
    assert outcome.status in ("error", "rejected")
    assert_one_sentence(outcome.error, words)
    assert "Traceback" not in outcome.error


def test_bad_input_is_refused_before_training(server):
    assert server.run(long_init_word()).training == []
    assert server.run(bad_name()).training == []


def test_a_damaged_file_is_named(server):
    server.run(prompts.training())
    broken = server.folder / "output" / "concept_atelier" / "broken.safetensors"
    broken.write_bytes(b"no tensors here")
    prompt = {
        "load": prompts.node("AtelierLoadConcept", file_name="broken.safetensors"),
        "save": prompts.node("AtelierSaveConcept", concept=["load", 0], file_name="", overwrite=True),
    }
    outcome = server.run(prompt)
    assert outcome.status == "error"
    assert "broken.safetensors" in outcome.error
    assert "damaged" in outcome.error


def test_a_folder_that_cannot_be_written_is_named_before_training(server):
    server.run(prompts.training())  # makes the folder
    with unwritable_runs(server) as runs:
        outcome = server.run(prompts.training(name="unwritable"))
    assert outcome.status == "error"
    assert str(runs) in outcome.error
    assert outcome.training == []
