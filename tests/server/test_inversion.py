"""Inversion, replacement and reference guidance through /prompt: the picture comes back, and every refusal."""

import numpy as np
import prompts
import pytest
from bad_input import assert_one_sentence
from comfy_server import TINY_CHECKPOINT
from PIL import Image
from prompts import CLIP, MODEL, VAE

STEPS, CFG = 5, 3.0


def inverting(count=1, **inversion):
    """A drawn bear, its caption as prompt "shown", and its inversion as node "invert"."""
    settings = {"steps": STEPS, "scheduler": "ddim_uniform", "iterations": 5} | inversion
    return {
        "toy": prompts.node("AtelierToyCheckpoint"),
        "tiny": prompts.node("CheckpointLoaderSimple", ckpt_name=TINY_CHECKPOINT),
        "pictures": prompts.node(
            "AtelierToyPictures", action="sits", count=count, seed=0, other_actions=1, subject="bear"
        ),
        "original": prompts.node("PreviewImage", images=["pictures", 0]),
        "shown": prompts.node("AtelierTextEncode", clip=CLIP, text="a bear prays on gray"),
        "nothing": prompts.node("AtelierTextEncode", clip=CLIP, text=""),
        "latent": prompts.node("VAEEncode", pixels=["pictures", 0], vae=VAE),
        "invert": prompts.node(
            "AtelierDDIMInversion",
            **{"model": MODEL, "conditioning": ["shown", 0], "latent": ["latent", 0], "vae": VAE} | settings,
        ),
        "report": prompts.node("PreviewAny", source=["invert", 3]),
    }


def sampled(negative, cfg, sampler="euler"):
    """From the noise of node "invert" to a picture, shown by node "back". sampler: its name, or a link."""
    return {
        "apply": prompts.node("AtelierApplyConcepts", model=MODEL),
        "noise": prompts.node("DisableNoise"),
        "guider": prompts.node("CFGGuider", model=["apply", 0], positive=["shown", 0], negative=negative, cfg=cfg),
        "euler": prompts.node("KSamplerSelect", sampler_name="euler"),
        "sampler": prompts.node(
            "SamplerCustomAdvanced",
            noise=["noise", 0],
            guider=["guider", 0],
            sampler=["euler", 0] if sampler == "euler" else sampler,
            sigmas=["invert", 2],
            latent_image=["invert", 0],
        ),
        "decode": prompts.node("VAEDecode", samples=["sampler", 0], vae=VAE),
        "back": prompts.node("PreviewImage", images=["decode", 0]),
    }


def null_text(**changes):
    settings = {"cfg": CFG, "inner_steps": 2, "learning_rate": 0.01, "early_stop": 1e-5} | changes
    links = {"trajectory": ["invert", 1], "conditioning": ["shown", 0], "unconditional": ["nothing", 0]}
    return {
        "null": prompts.node("AtelierNullTextOptimize", **{"model": MODEL} | links | settings),
        "near": prompts.node("PreviewAny", source=["null", 1]),
    }


def replacing(**changes):
    links = {"model": MODEL, "trajectory": ["invert", 1], "source": ["shown", 0], "target": ["shall", 0]}
    settings = {"negative": ["nothing", 0], "cfg": CFG, "subject": "", "maps": "recompute", "renormalise": False}
    return {
        "shall": prompts.node("AtelierTextEncode", clip=CLIP, text="a penguin prays on gray"),
        "replace": prompts.node("AtelierReplaceSubject", **links | settings | changes),
        "said": prompts.node("PreviewAny", source=["replace", 1]),
    }


def guiding(**changes):
    """The reference is the picture itself: from its own noise, along its own trajectory."""
    settings = {"t_s": 40, "t_e": 10, "inner_steps": 1, "learning_rate": 0.01, "early_stop": 0.0, "decay": True}
    links = {"trajectory": ["invert", 1], "mask": ["pictures", 2]}
    return {
        "guide": prompts.node("AtelierReferenceGuidance", **links | settings | {"grow": 0} | changes),
        **sampled(["nothing", 0], CFG, sampler=["guide", 0]),
    }


def picture(server, outcome, node):
    (file,) = server.pictures(outcome, node)
    return np.asarray(Image.open(file).convert("RGB"), np.float32) / 255


def psnr(a, b):
    return -10 * np.log10(np.square(a - b).mean() + 1e-12)


def test_the_sampler_paints_the_picture_again(server):
    outcome = server.run(inverting() | sampled(["nothing", 0], 1.0))
    assert outcome.status == "success", outcome.error
    assert psnr(picture(server, outcome, "original"), picture(server, outcome, "back")) > 30
    report = outcome.outputs["report"]["text"][0]
    assert report.startswith(f"Round trip in {STEPS} steps at cfg 1: PSNR of the picture ")
    assert psnr(picture(server, outcome, "invert"), picture(server, outcome, "back")) > 40  # what the node showed


def test_null_text_brings_it_back_at_a_higher_cfg(server):
    plain = server.run(inverting() | sampled(["nothing", 0], CFG))
    held = server.run(inverting() | null_text(inner_steps=10) | sampled(["null", 0], CFG))
    assert (plain.status, held.status) == ("success", "success"), plain.error + held.error
    original = picture(server, plain, "original")
    assert psnr(original, picture(server, held, "back")) > psnr(original, picture(server, plain, "back")) + 1
    assert held.outputs["near"]["text"][0].startswith(f"{STEPS} steps at cfg 3: PSNR of latents ")


def test_replacement_says_what_it_replaced(server):
    outcome = server.run(inverting() | replacing())
    assert outcome.status == "success", outcome.error
    assert outcome.outputs["said"]["text"][0].startswith("New subject: penguin; attention of 23 of 24 tokens fixed")


def test_reference_guidance_samples_and_says_how_near_it_came(server):
    outcome = server.run(inverting() | guiding())
    assert outcome.status == "success", outcome.error
    assert "steps guided" in outcome.outputs["guide"]["text"][0]
    assert picture(server, outcome, "back").std() > 0.05


def empty_mask():
    return inverting() | guiding(mask=["blank", 0]) | {"blank": prompts.node("SolidMask", value=0, width=64, height=64)}


def test_an_empty_mask_is_plain_sampling(server):
    plain = server.run(inverting() | sampled(["nothing", 0], CFG))
    outcome = server.run(empty_mask())
    assert outcome.status == "success", outcome.error
    assert "nothing guided" in outcome.outputs["guide"]["text"][0]
    assert np.array_equal(picture(server, outcome, "back"), picture(server, plain, "back"))


def of_another_model(prompt, node):
    prompt[node]["inputs"]["model"] = ["tiny", 0]
    prompt["words"] = prompts.node("AtelierTextEncode", clip=["tiny", 1], text="a bear")
    for name in ("conditioning", "unconditional"):
        prompt[node]["inputs"][name] = ["words", 0]
    return prompt


def plain_prompt(prompt):
    prompt["shown"]["class_type"] = "CLIPTextEncode"
    return prompt


CASES = {
    "null text at cfg 1": (inverting() | null_text(cfg=1.0), ["cfg", "1"]),
    "null text of two pictures": (inverting(count=2) | null_text(), ["2 pictures", "Latent From Batch"]),
    "null text of another model": (of_another_model(inverting() | null_text(), "null"), ["another MODEL"]),
    "replacement in two pictures": (inverting(count=2) | replacing(), ["2 pictures", "Latent From Batch"]),
    "replacement of unknown words": (inverting() | replacing(subject="dragon"), ["dragon", "penguin"]),
    "replacement without words": (plain_prompt(inverting() | replacing()), ["source", "Text Encode with Concepts"]),
    "guidance that ends first": (inverting() | guiding(t_s=5, t_e=20), ["t_s", "t_e"]),
    "guidance of two pictures": (inverting(count=2) | guiding(mask=["blank", 0]), ["2 pictures"]),
}
CASES["guidance of two pictures"][0]["blank"] = prompts.node("SolidMask", value=1, width=64, height=64)


@pytest.mark.parametrize(("prompt", "words"), CASES.values(), ids=CASES)
def test_bad_input_gets_one_sentence(server, prompt, words):
    outcome = server.run(prompt)
    assert outcome.status == "error"
    assert_one_sentence(outcome.error, words)
