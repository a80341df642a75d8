"""What several workflows have in common: the files they ask for, and the nodes that paint a picture."""

from __future__ import annotations

from typing import NamedTuple

from comfy_server import SD_CHECKPOINT, SD_CONTROLNET, SD_DINO, SD_GROUNDING_DINO, SD_SAM
from workflow_builder import Link, Node, Workflow

SD_CHECKPOINT_SOURCE = {
    "name": SD_CHECKPOINT,
    "url": f"https://huggingface.co/Comfy-Org/stable-diffusion-v1-5-archive/resolve/main/{SD_CHECKPOINT}",
    "directory": "checkpoints",
}
SD_CONTROLNET_SOURCE = {
    "name": SD_CONTROLNET,
    "url": f"https://huggingface.co/comfyanonymous/ControlNet-v1-1_fp16_safetensors/resolve/main/{SD_CONTROLNET}",
    "directory": "controlnet",
}
SD_SAM_SOURCE = {
    "name": SD_SAM,
    "url": f"https://dl.fbaipublicfiles.com/segment_anything/{SD_SAM}",
    "directory": "sams",
}
SD_GROUNDING_DINO_SOURCE = {
    "name": SD_GROUNDING_DINO,
    "url": f"https://github.com/IDEA-Research/GroundingDINO/releases/download/v0.1.0-alpha/{SD_GROUNDING_DINO}",
    "directory": "grounding-dino",
}
SD_DINO_SOURCE = {
    "name": SD_DINO,
    "url": f"https://dl.fbaipublicfiles.com/dino/{SD_DINO.removesuffix('.pth')}/{SD_DINO}",
    "directory": "dino",
}

TOY_SAMPLING = {"steps": 25, "cfg": 3.0, "sampler_name": "euler_ancestral", "scheduler": "normal", "denoise": 1.0}
COST_ROOM = 130


def toy_prompt(w: Workflow, toy: Node, title: str, text: str) -> Node:
    """An encoded prompt in the toy's words."""
    return w.node("CLIPTextEncode", title, node_size=(320, 90), clip=toy["CLIP"], text=text)


def plain_picture(
    w: Workflow, title: str, toy: Node, prompt: Node, negative: Node, latent: Node, model: Link | None = None
) -> None:
    """KSampler and its pictures. model: instead of the toy's own."""
    sampled = w.node(
        "KSampler",
        model=model or toy["MODEL"],
        positive=prompt["CONDITIONING"],
        negative=negative["CONDITIONING"],
        latent_image=latent["LATENT"],
        seed=1,
        **TOY_SAMPLING,
    )
    decoded = w.node("VAEDecode", samples=sampled["LATENT"], vae=toy["VAE"])
    w.node("PreviewImage", title, node_size=(360, 300), images=decoded["IMAGE"])
    w.column()


class Sampling(NamedTuple):
    """What SamplerCustomAdvanced needs beside a guider; pictures of the same noise share it."""

    noise: Node
    sampler: Node
    sigmas: Node


def guided_sampling(w: Workflow, model: Link, sampler: str = TOY_SAMPLING["sampler_name"]) -> Sampling:
    """25 steps of a sampler from the noise of seed 1."""
    noise = w.node("RandomNoise", noise_seed=1)
    chosen = w.node("KSamplerSelect", sampler_name=sampler)
    return Sampling(noise, chosen, w.node("BasicScheduler", model=model, scheduler="normal", steps=25))


def guided_picture(
    w: Workflow,
    title: str,
    loader: Node,
    model: Link,
    nothing: Node,
    branches: list[Node],
    latent: Node,
    sampling: Sampling | None = None,
) -> Link:
    """GCFG Guider over the branches, what it costs, SamplerCustomAdvanced and its pictures, which it returns.

    sampling: None for the toy's.
    """
    guider = w.node(
        "AtelierGCFGGuider",
        model=model,
        unconditional=nothing["CONDITIONING"],
        **{f"branches__branch{number}": branch["branch"] for number, branch in enumerate(branches)},
    )
    w.node("PreviewAny", "Cost", room=COST_ROOM, source=guider["cost"])
    w.column()
    sampling = sampling or guided_sampling(w, model)
    sampled = w.node(
        "SamplerCustomAdvanced",
        noise=sampling.noise["NOISE"],
        guider=guider["GUIDER"],
        sampler=sampling.sampler["SAMPLER"],
        sigmas=sampling.sigmas["SIGMAS"],
        latent_image=latent["LATENT"],
    )
    w.column()
    decoded = w.node("VAEDecode", samples=sampled["output"], vae=loader["VAE"])
    w.node("SaveImage", title, node_size=(360, 300), images=decoded["IMAGE"], filename_prefix="concept_atelier/gcfg")
    return decoded["IMAGE"]


def sd_checkpoint(w: Workflow) -> Node:
    """Load Checkpoint."""
    return w.node("CheckpointLoaderSimple", properties={"models": [SD_CHECKPOINT_SOURCE]}, ckpt_name=SD_CHECKPOINT)


# ADI section 5.1, HiFi Tuner: DDIM, 50 steps, guidance 7.5.
SD_SAMPLING = {"steps": 50, "cfg": 7.5, "sampler_name": "ddim", "scheduler": "ddim_uniform", "denoise": 1.0}


class Painting(NamedTuple):
    """What KSampler painted from on a checkpoint, for those who look where words look."""

    loader: Node
    inputs: dict[str, Link]


def sd_painting(w: Workflow, loader: Node, applied: Node, positive: Node, negative: str, name: str) -> Painting:
    """Four pictures of a prompt on a checkpoint, saved under `name`. negative: the negative prompt."""
    against = w.node("CLIPTextEncode", "Negative prompt", node_size=(360, 100), clip=loader["CLIP"], text=negative)
    latent = w.node("EmptyLatentImage", width=512, height=512, batch_size=4)
    inputs = {
        "model": applied["MODEL"],
        "positive": positive["CONDITIONING"],
        "negative": against["CONDITIONING"],
        "latent_image": latent["LATENT"],
    }
    w.column()
    sampled = w.node("KSampler", **inputs, seed=1, **SD_SAMPLING)
    decoded = w.node("VAEDecode", samples=sampled["LATENT"], vae=loader["VAE"])
    w.node("SaveImage", node_size=(420, 460), images=decoded["IMAGE"], filename_prefix=f"concept_atelier/{name}")
    return Painting(loader, inputs)


def sd_look(w: Workflow, painting: Painting, words: str) -> None:
    """Where `words` look in those pictures."""
    vae = painting.loader["VAE"]
    w.node("AtelierAttentionMaps", room=320, **painting.inputs, vae=vae, words=words, seed=1, **SD_SAMPLING)


def concept_prompt(w: Workflow, loader: Node, title: str, text: str | Link, *trained: Node) -> Node:
    """A prompt that may name what was trained."""
    concepts = {f"concepts__concept{number}": node["concept"] for number, node in enumerate(trained)}
    return w.node("AtelierTextEncode", title, node_size=(360, 150), clip=loader["CLIP"], text=text, **concepts)


def invert(w: Workflow, loader: Node, model: Link, shown: Node, picture: Link, steps: int = 50) -> Node:
    """VAE Encode and DDIM Inversion with the paper's settings."""
    latent = w.node("VAEEncode", pixels=picture, vae=loader["VAE"])
    return w.node(
        "AtelierDDIMInversion",
        room=340,
        model=model,
        conditioning=shown["CONDITIONING"],
        latent=latent["LATENT"],
        steps=steps,
        vae=loader["VAE"],
    )


def sampled_picture(
    w: Workflow, loader: Node, noise: Link, guider: Link, sampler: Link, sigmas: Link, latent: Link
) -> Link:
    """SamplerCustomAdvanced and VAE Decode. Returns the picture."""
    sampled = w.node(
        "SamplerCustomAdvanced", noise=noise, guider=guider, sampler=sampler, sigmas=sigmas, latent_image=latent
    )
    return w.node("VAEDecode", samples=sampled["output"], vae=loader["VAE"])["IMAGE"]


def side_by_side(w: Workflow, pictures: list[Link], titles: list[str]) -> None:
    """Single pictures in one row, each under its title."""
    row = w.node("BatchImagesNode", **{f"images__image{number}": link for number, link in enumerate(pictures)})
    w.node(
        "AtelierCompareGrid",
        "Side by side",
        node_size=(900, 420),
        pictures__picture0=row["IMAGE"],
        column_titles="\n".join(titles),
    )


class Segmenters(NamedTuple):
    """The loaders of what finds and masks by text."""

    detector: Node
    sam: Node


def files_to_get(loaders: str) -> str:
    """The first step of a note on a workflow that finds and masks by text. loaders: the nodes that name a file."""
    return (
        f"1. Get the files that {loaders} name; each says where it is published and into which folder it goes. "
        "GroundingDINO also needs the small `vocab.txt` of "
        "[BERT](https://huggingface.co/google-bert/bert-base-uncased) in `models/bert-base-uncased`.\n"
    )


def load_segmenters(w: Workflow) -> Segmenters:
    """Load GroundingDINO and Load SAM, one under the other."""
    detector = w.node(
        "AtelierGroundingDINOLoader",
        room=40,
        properties={"models": [SD_GROUNDING_DINO_SOURCE]},
        checkpoint=SD_GROUNDING_DINO,
    )
    sam = w.node("AtelierSAMLoader", room=40, properties={"models": [SD_SAM_SOURCE]}, checkpoint=SD_SAM)
    return Segmenters(detector, sam)


def mask_by_text(w: Workflow, segmenters: Segmenters, images: Link, text: str) -> tuple[Node, Node]:
    """Detect by Text and SAM Mask for the one thing in each of the images that the text names."""
    detected = w.node(
        "AtelierDetect",
        room=60,
        node_size=(340, 200),
        detector=segmenters.detector["detector"],
        images=images,
        text=text,
        max_detections=1,
    )
    seen = w.node("AtelierSAMEncode", sam=segmenters.sam["sam"], images=images)
    masks = w.node(
        "AtelierSAMMask",
        room=60,
        node_size=(340, 220),
        embedding=seen["embedding"],
        bboxes=detected["bboxes"],
    )
    return detected, masks
