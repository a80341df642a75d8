"""GCFG through /prompt: what it costs is shown, and bad input gets one sentence."""

import math

import prompts
import pytest
from bad_input import assert_one_sentence
from comfy_server import TINY_CHECKPOINT
from prompts import GCFG_OFF


def guided(*branches, model=("toy", 0)):
    """SamplerCustomAdvanced under a GCFG Guider. branches: what differs from a plain one of weight 2."""
    prompt = {
        "toy": prompts.node("AtelierToyCheckpoint"),
        "tiny": prompts.node("CheckpointLoaderSimple", ckpt_name=TINY_CHECKPOINT),
        "nothing": prompts.node("CLIPTextEncode", clip=["toy", 1], text=""),
        "panda": prompts.node("CLIPTextEncode", clip=["toy", 1], text="a panda sits on grass"),
        "guider": prompts.node("AtelierGCFGGuider", model=list(model), unconditional=["nothing", 0], **GCFG_OFF),
        "cost": prompts.node("PreviewAny", source=["guider", 1]),
        "noise": prompts.node("RandomNoise", noise_seed=1),
        "euler": prompts.node("KSamplerSelect", sampler_name="euler"),
        "sigmas": prompts.node("BasicScheduler", model=list(model), scheduler="normal", steps=2, denoise=1.0),
        "latent": prompts.node("EmptyLatentImage", width=64, height=64, batch_size=1),
        "sampler": prompts.node(
            "SamplerCustomAdvanced",
            noise=["noise", 0],
            guider=["guider", 0],
            sampler=["euler", 0],
            sigmas=["sigmas", 0],
            latent_image=["latent", 0],
        ),
        "decode": prompts.node("VAEDecode", samples=["sampler", 0], vae=["toy", 2]),
        "picture": prompts.node("PreviewImage", images=["decode", 0]),
    }
    for number, changes in enumerate(branches):
        values = {"model": ["toy", 0], "conditioning": ["panda", 0], "weight": 2.0, "start_percent": 0.0}
        prompt[f"branch{number}"] = prompts.node("AtelierGuidanceBranch", **values | {"end_percent": 1.0} | changes)
        prompt["guider"]["inputs"][f"branches.branch{number}"] = [f"branch{number}", 0]
    return prompt


def test_branches_paint_and_the_cost_is_shown(server):
    outcome = server.run(guided({}, {"conditioning": ["nothing", 0], "weight": 0.5}, {"end_percent": 0.5}))
    assert outcome.status == "success", outcome.error
    assert outcome.outputs["picture"]["images"]
    lines = outcome.outputs["cost"]["text"][0].splitlines()
    assert lines[0] == "0% to 50%: 1 forward of the U-Net a step"
    assert lines[-1] == "- unconditional, branch0, branch1 together"


def test_a_curve_of_core_is_a_weight(server):
    prompt = guided({"weight_curve": ["curve", 0]})
    points = {"points": [[0, 1], [1, 0]], "interpolation": "linear"}
    prompt["curve"] = prompts.node("CurveEditor", curve=points)
    outcome = server.run(prompt)
    assert outcome.status == "success", outcome.error
    assert outcome.outputs["picture"]["images"]


CASES = {
    "no branch": ((), "No guidance branch is connected"),
    "all weights 0": (({"weight": 0.0}, {"weight": 0.0}), "All guidance weights are 0"),
    "weight is no number": (({"weight": math.nan},), "give it a finite number"),
    "start after end": (({"start_percent": 0.7, "end_percent": 0.3},), "exchange start and end"),
    "another latent space": (({"model": ["tiny", 0]},), "combine models with the same VAE"),
}


@pytest.mark.parametrize(("branches", "words"), CASES.values(), ids=CASES)
def test_bad_input_gets_one_sentence(server, branches, words):
    outcome = server.run(guided(*branches))
    assert outcome.status == "error"
    assert_one_sentence(outcome.error, [words])
