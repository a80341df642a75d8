"""API-form prompts for the tests: small ones written here, and the shipped workflows made small."""

from __future__ import annotations

import copy
import json
from typing import Any

from comfy_server import PACK

Prompt = dict[str, dict[str, Any]]

TOY = MODEL, CLIP, VAE = (["toy", 0], ["toy", 1], ["toy", 2])  # links to the outputs of a toy checkpoint, node "toy"
MANY = 200_000  # steps, more than a test waits for
# The corrections of a GCFG node, off.
GCFG_OFF = {"rescale": 0.0, "apg_eta": 1.0, "apg_norm_threshold": 0.0, "apg_momentum": 0.0}

# What makes a shipped workflow small enough for a test, by node class; only inputs that are widgets are replaced.
SMALL = {
    "AtelierExemplars": {"size": 64},
    "AtelierTriples": {"context_steps": 2, "sampling_steps": 2, "pictures_per_exemplar": 2},
    "AtelierTrain": {"steps": 6, "steps_each_stage": 0, "sample_every": 3, "sample_steps": 2},
    "AtelierNullTextSurgery": {"timesteps": 2, "size": 64},
    "AtelierTrainNullText": {
        "steps": 6,
        "batch_size": 2,
        "size": 64,
        "sample_count": 2,
        "sample_every": 3,
        "sample_steps": 2,
    },
    "TrainLoraNode": {"steps": 3},
    "AtelierDetect": {"threshold": 0.0, "resolution": 96},
    "AtelierDDIMInversion": {"steps": 3},
    "AtelierNullTextOptimize": {"inner_steps": 1},
    "AtelierReferenceGuidance": {"inner_steps": 1},
    "AtelierAttentionMaps": {"steps": 3},
    "BasicScheduler": {"steps": 3},
    "ImageScale": {"width": 64, "height": 64},
    "KSampler": {"steps": 3},
    "EmptyLatentImage": {"width": 64, "height": 64, "batch_size": 1},  # a reference guides one picture
}


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    """One node of an API-form prompt; a link is [node id, output index]."""
    return {"class_type": class_type, "inputs": inputs}


def shipped(name: str) -> Prompt:
    """The API form of a shipped workflow, as it is."""
    return json.loads((PACK / "workflows" / "api" / f"{name}.json").read_text(encoding="utf-8"))


def small(prompt: Prompt) -> Prompt:
    """The same prompt with few steps and small pictures."""
    result = copy.deepcopy(prompt)
    for entry in result.values():
        replaced = {key: value for key, value in SMALL.get(entry["class_type"], {}).items() if key in entry["inputs"]}
        entry["inputs"] |= {key: value for key, value in replaced.items() if not isinstance(entry["inputs"][key], list)}
    return result


def leading_to(prompt: Prompt, target: str) -> Prompt:
    """What node `target` needs, and itself."""
    needed, waiting = set(), [target]
    while waiting:
        needed.add(number := waiting.pop())
        links = [value[0] for value in prompt[number]["inputs"].values() if isinstance(value, list)]
        waiting += [source for source in links if source in prompt and source not in needed]
    return {number: entry for number, entry in prompt.items() if number in needed}


def training(**changes: Any) -> Prompt:
    """Toy model, toy pictures, one-token training as node "train", saved by node "save"."""
    settings = {
        "name": "test",
        "init_word": "poses",
        "steps": 5,
        "learning_rate": 5e-3,
        "batch_size": 1,
        "seed": 0,
        "sample_prompts": "",
        "sample_every": 0,
        "weight_decay": 0.01,
        "timestep_sampling": "uniform",
        "use_masks": True,
        "sample_steps": 2,
        "sample_cfg": 3.0,
        "sample_eta": 1.0,
        "start_fresh": False,
    }
    return {
        "toy": node("AtelierToyCheckpoint"),
        "pictures": node("AtelierToyPictures", action=HELD_OUT, count=3, seed=0, other_actions=1),
        "exemplars": node(
            "AtelierExemplars", images=["pictures", 0], captions=["pictures", 1], masks=["pictures", 2], size=0
        ),
        "layout": node("AtelierTokenLayout", granularity="one token", tokens=1),
        "train": node(
            "AtelierTrain",
            model=MODEL,
            clip=CLIP,
            vae=VAE,
            exemplars=["exemplars", 0],
            layout=["layout", 0],
            **(settings | changes),
        ),
        "save": node("AtelierSaveConcept", concept=["train", 0], file_name="", overwrite=True),
    }


HELD_OUT = "tpose (held out)"


def painting(model: list, clip: list, vae: list, text: str, concept: list | None, apply: bool = True) -> Prompt:
    """A picture from a prompt: nodes to add to another prompt. The sampler is "sampler", the output "picture"."""
    concepts = {} if concept is None else {"concepts.concept0": concept}
    return {
        "positive": node("AtelierTextEncode", clip=clip, text=text, **concepts),
        "negative": node("CLIPTextEncode", clip=clip, text=""),
        "latent": node("EmptyLatentImage", width=64, height=64, batch_size=1),
        "apply": node("AtelierApplyConcepts", model=model),
        "sampler": node(
            "KSampler",
            model=["apply", 0] if apply else model,
            positive=["positive", 0],
            negative=["negative", 0],
            latent_image=["latent", 0],
            seed=1,
            steps=2,
            cfg=3.0,
            sampler_name="euler",
            scheduler="normal",
            denoise=1.0,
        ),
        "decode": node("VAEDecode", samples=["sampler", 0], vae=vae),
        "picture": node("PreviewImage", images=["decode", 0]),
    }
