"""The ready form of GCFG that needs a checkpoint: a concept model, and a prompt with a ControlNet."""

from __future__ import annotations

from comfy_server import SD_CHECKPOINT, SD_CONTROLNET, SD_DOMAIN_PICTURES, SD_PICTURE
from workflow_builder import LEARN, LOOK, PAINT, PICTURES, Workflow
from workflow_parts import SD_CHECKPOINT_SOURCE, SD_CONTROLNET_SOURCE, guided_picture, guided_sampling


def gcfg_control_sd() -> Workflow:
    """A concept model of the artist's own pictures, and a prompt with a ControlNet of the base model."""
    w = Workflow()
    with w.group("1  Your pictures of one subject or style", PICTURES):
        w.note(
            f"1. Put pictures of *one domain* (faces, a style, one subject) into `input/{SD_DOMAIN_PICTURES}`: as many "
            "as you have, no captions needed.\n2. Press R to refresh, choose checkpoint, folder and ControlNet, press "
            "Run.\n\nThe **concept model** learns what the pictures have in common, without words. The checkpoint "
            "itself stays as it is and goes on reading prompts.",
            270,
        )
        loader = w.node(
            "CheckpointLoaderSimple", properties={"models": [SD_CHECKPOINT_SOURCE]}, ckpt_name=SD_CHECKPOINT
        )
        null = w.node("AtelierNullTextSurgery", room=180, model=loader["MODEL"], clip=loader["CLIP"], vae=loader["VAE"])
    with w.group("2  Learn the concept model", LEARN):
        w.note(
            "The settings are the paper's, which trained for days; some thousand steps show something. Watch the "
            "samples: *Stop and keep* when they look right.\n\n- *steps*: raise it later to go on.\n- *accumulation*: "
            "raise it when memory runs out.",
            210,
        )
        trained = w.node(
            "AtelierTrainNullText",
            room=240,
            model=null["MODEL"],
            clip=loader["CLIP"],
            vae=loader["VAE"],
            folder=SD_DOMAIN_PICTURES,
            name="my_domain",
        )
    with w.group("3  A prompt, and the edges of a picture", LOOK):
        w.note("The prompt says what the concept model was not told; the ControlNet keeps to the edges.", 110)
        positive = w.node(
            "CLIPTextEncode", "Prompt", node_size=(340, 100), clip=loader["CLIP"], text="wearing sunglasses, smiling"
        )
        nothing = w.node("CLIPTextEncode", "Empty prompt", node_size=(340, 100), clip=loader["CLIP"], text="")
        picture = w.node("LoadImage", "Its edges are kept", room=240, image=SD_PICTURE)
        scaled = w.node(
            "ImageScale",
            upscale_method="lanczos",
            width=512,
            height=512,
            crop="center",
            image=picture["IMAGE"],
        )
        w.column()
        edges = w.node("Canny", image=scaled["IMAGE"])
        net = w.node("ControlNetLoader", properties={"models": [SD_CONTROLNET_SOURCE]}, control_net_name=SD_CONTROLNET)
        control = w.node(
            "ControlNetApplyAdvanced",
            positive=positive["CONDITIONING"],
            negative=nothing["CONDITIONING"],
            control_net=net["CONTROL_NET"],
            image=edges["IMAGE"],
        )
        latent = w.node("EmptyLatentImage", width=512, height=512, batch_size=4)
    with w.group("4  Paint with both", PAINT):
        w.note(
            "- *weight* of the concept: up for more of the pictures, down for more of the prompt (released code: 2.5 "
            "each; 1.5 to 2.5 tried).\n- Only the branch with the prompt sees the ControlNet.",
            150,
        )
        concept = w.node(
            "AtelierGuidanceBranch",
            "The concept, without words",
            model=trained["MODEL"],
            conditioning=nothing["CONDITIONING"],
        )
        controlled = w.node(
            "AtelierGuidanceBranch",
            "The prompt, with ControlNet",
            model=loader["MODEL"],
            conditioning=control["positive"],
        )
        guided_picture(
            w,
            "Concept and control",
            loader,
            loader["MODEL"],
            nothing,
            [concept, controlled],
            latent,
            guided_sampling(w, loader["MODEL"], "dpmpp_2m"),  # with 25 steps, as in the released code
        )
    return w
