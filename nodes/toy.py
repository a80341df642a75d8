"""The bundled toy model and its pictures: everything can be tried without a download."""

from __future__ import annotations

import numpy as np
import torch
from comfy_api.latest import io

from ..toyworld.exemplars import exemplar_scenes, other_action_scenes, subject_scenes
from ..toyworld.render import render, render_with_mask
from ..toyworld.vocabulary import ACTIONS, HELD_OUT_ACTIONS, HELD_OUT_SUBJECTS, SUBJECTS, caption
from .native.toy import toy_checkpoint

CATEGORY = "Concept Atelier/Toy World"
# What the combo shows -> the action's name in the toy world; the toy model has never seen the held-out ones.
ACTION_NAMES = {f"{name} (held out)": name for name in HELD_OUT_ACTIONS} | {name: name for name in ACTIONS}
SEVERAL = "several"
SUBJECT_NAMES = {f"{name} (held out)": name for name in HELD_OUT_SUBJECTS} | {name: name for name in SUBJECTS}


def to_batch(pictures: list[np.ndarray]) -> torch.Tensor:
    """uint8 pictures or masks as one batch in 0..1."""
    return torch.from_numpy(np.stack(pictures)).float() / 255


class AtelierToyCheckpoint(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AtelierToyCheckpoint",
            display_name="Toy Checkpoint",
            category=CATEGORY,
            description="A tiny diffusion model of a drawn world, bundled with the pack: works with all stock nodes at "
            "64 x 64 pixels, on any machine, in seconds. It reads sentences like 'a man in red salutes on grass with "
            "a ball on the left'.",
            search_aliases=["load toy model", "demo model", "test checkpoint"],
            inputs=[],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="The toy U-Net, 7 cross-attention layers."),
                io.Clip.Output(display_name="CLIP", tooltip="The toy text encoder, 22 words a prompt."),
                io.Vae.Output(display_name="VAE", tooltip="The toy autoencoder, 24 channels, 8 x 8 pixels a latent."),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        model, clip, vae = toy_checkpoint()
        return io.NodeOutput(model.clone(), clip.clone(), vae)


class AtelierToyPictures(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AtelierToyPictures",
            display_name="Toy Pictures",
            category=CATEGORY,
            description="Draws pictures of one action, or of one subject, in the toy world, with captions and masks, "
            "and pictures of the same figures at the same places doing other things.",
            search_aliases=["toy exemplars", "demo pictures", "example data set"],
            inputs=[
                io.Combo.Input(
                    "action",
                    options=list(ACTION_NAMES),
                    tooltip="What the figures do. The toy model was never trained on the held-out ones, so they are "
                    "something to teach it.",
                ),
                io.Int.Input("count", default=10, min=1, max=100, tooltip="Pictures of the action. ADI uses 10."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**31 - 1,
                    control_after_generate=io.ControlAfterGenerate.fixed,
                    tooltip="Another number draws other figures and places.",
                ),
                io.Int.Input(
                    "other_actions",
                    default=4,
                    min=1,
                    max=11,
                    tooltip="Pictures of other actions for each of these pictures.",
                ),
                io.Combo.Input(
                    "subject",
                    options=[SEVERAL, *SUBJECT_NAMES],
                    optional=True,
                    tooltip="several: four figures, each doing the action. One of the others: this figure alone, doing "
                    "several things in several places instead of the action. The toy model was never trained on the "
                    "held-out ones.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="images", tooltip="The pictures of the action, or of the subject."),
                io.String.Output(
                    display_name="captions",
                    tooltip="One line a picture, with the blank {} in the place of the action, or of the subject.",
                ),
                io.Mask.Output(display_name="masks", tooltip="Where the figure is."),
                io.Image.Output(
                    display_name="other_action_images",
                    tooltip="The other actions, picture by picture: first those of the first picture.",
                ),
            ],
        )

    @classmethod
    def execute(cls, action: str, count: int, seed: int, other_actions: int, subject: str = SEVERAL) -> io.NodeOutput:
        if subject == SEVERAL:
            scenes = exemplar_scenes(ACTION_NAMES[action], count, seed)
            captions = [caption(scene, action_text="{}") for scene in scenes]
        else:
            scenes = subject_scenes(SUBJECT_NAMES[subject], count, seed)
            captions = [caption(scene).replace(SUBJECT_NAMES[subject], "{}", 1) for scene in scenes]
        pictures, masks = zip(*(render_with_mask(scene) for scene in scenes))
        others = [
            render(other)
            for number, scene in enumerate(scenes)
            for other in other_action_scenes(scene, other_actions, seed + number)
        ]
        return io.NodeOutput(to_batch(pictures), "\n".join(captions), to_batch(masks), to_batch(others))


NODES = [AtelierToyCheckpoint, AtelierToyPictures]
