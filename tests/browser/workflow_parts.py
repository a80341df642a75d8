"""What several workflows have in common: the files they ask for, and the nodes that paint a picture."""

from __future__ import annotations

from comfy_server import SD_CHECKPOINT, SD_CONTROLNET
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


def guided_picture(
    w: Workflow,
    title: str,
    loader: Node,
    model: Link,
    nothing: Node,
    branches: list[Node],
    latent: Node,
    sampler: str = TOY_SAMPLING["sampler_name"],
) -> None:
    """GCFG Guider over the branches, what it costs, SamplerCustomAdvanced and its pictures."""
    guider = w.node(
        "AtelierGCFGGuider",
        model=model,
        unconditional=nothing["CONDITIONING"],
        **{f"branches__branch{number}": branch["branch"] for number, branch in enumerate(branches)},
    )
    w.node("PreviewAny", "Cost", room=COST_ROOM, source=guider["cost"])
    w.column()
    noise = w.node("RandomNoise", noise_seed=1)
    chosen = w.node("KSamplerSelect", sampler_name=sampler)
    sigmas = w.node("BasicScheduler", model=model, scheduler="normal", steps=25)
    sampled = w.node(
        "SamplerCustomAdvanced",
        noise=noise["NOISE"],
        guider=guider["GUIDER"],
        sampler=chosen["SAMPLER"],
        sigmas=sigmas["SIGMAS"],
        latent_image=latent["LATENT"],
    )
    w.column()
    decoded = w.node("VAEDecode", samples=sampled["output"], vae=loader["VAE"])
    w.node("SaveImage", title, node_size=(360, 300), images=decoded["IMAGE"], filename_prefix="concept_atelier/gcfg")
