"""Where the words of a prompt look."""

from __future__ import annotations

import comfy.samplers
from comfy_api.latest import io, ui

from nodes import common_ksampler  # ComfyUI's nodes.py

from ..kernels.heatmaps import colour, overlay, resize, stretch
from .native.attention_maps import AttentionRecorder, find_words

ALL_BLOCKS, ALL_LEVELS = ("input", "middle", "output"), range(8)
LAYER_GROUPS = {
    "all": (ALL_BLOCKS, ALL_LEVELS),
    "down": (("input",), ALL_LEVELS),
    "middle": (("middle",), ALL_LEVELS),
    "up": (("output",), ALL_LEVELS),
    "full resolution": (ALL_BLOCKS, [0]),
    "1/2 resolution": (ALL_BLOCKS, [1]),
    "1/4 resolution": (ALL_BLOCKS, [2]),
    "1/8 resolution": (ALL_BLOCKS, [3]),
}


class AtelierAttentionMaps(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AtelierAttentionMaps",
            display_name="Attention Maps",
            category="Concept Atelier/Look",
            description="Samples like KSampler and shows where the words you name look: which places of the picture "
            "attend to them, for a group of layers and a range of steps.",
            search_aliases=["heatmap", "cross attention", "daam", "ksampler"],
            inputs=[
                io.Model.Input("model", tooltip="The MODEL to look into, after Apply Concepts."),
                io.Conditioning.Input("positive", tooltip="The prompt, from Text Encode with Concepts."),
                io.Conditioning.Input("negative", tooltip="The negative prompt, as for KSampler."),
                io.Latent.Input("latent_image", tooltip="The latents to denoise, as for KSampler."),
                io.String.Input(
                    "words",
                    default="",
                    tooltip="Words of the prompt, or <names> of concepts, separated by spaces or commas. Their "
                    "attention is added up.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="Seed of the noise. The same settings as in a KSampler look into the same picture.",
                ),
                io.Int.Input("steps", default=20, min=1, max=10000, tooltip="Sampling steps."),
                io.Float.Input("cfg", default=7.5, min=0.0, max=100.0, step=0.1, tooltip="Guidance scale."),
                io.Combo.Input("sampler_name", options=comfy.samplers.SAMPLER_NAMES, tooltip="The sampler."),
                io.Combo.Input("scheduler", options=comfy.samplers.SCHEDULER_NAMES, tooltip="The noise schedule."),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="How much of latent_image to repaint. 1: all of it.",
                ),
                io.Combo.Input(
                    "layers",
                    options=list(LAYER_GROUPS),
                    tooltip="The cross-attention layers whose maps are averaged: by their side of the U-Net, or by the "
                    "size of their maps against the latents. Coarse ones place things, fine ones draw them.",
                ),
                io.Int.Input("first_step", default=0, min=0, max=10000, tooltip="First step to show, from 0."),
                io.Int.Input("last_step", default=10000, min=0, max=10000, tooltip="Last step to show."),
                io.Boolean.Input(
                    "average_steps",
                    default=True,
                    tooltip="On: one map, the mean of these steps. Off: one map for each step.",
                ),
                io.Float.Input(
                    "opacity",
                    default=0.6,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="Of the map over the picture. 1: the map alone.",
                ),
                io.Vae.Input(
                    "vae", optional=True, tooltip="Paints the picture under the map. Without it, the map alone."
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="overlay",
                    tooltip="The map over the picture, from dark blue (little attention) to yellow (most). One for "
                    "each step shown and each picture of the batch, step after step.",
                ),
                io.Mask.Output(
                    display_name="mask",
                    tooltip="The same maps, each stretched from 0 (least attention) to 1 (most), as large as the "
                    "picture.",
                ),
                io.Latent.Output(display_name="latent", tooltip="What KSampler gives with the same settings."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model, positive, negative, latent_image, words, layers, first_step, last_step, average_steps,
                opacity, vae=None, **settings) -> io.NodeOutput:  # fmt: skip
        if first_step > last_step or first_step >= settings["steps"]:
            raise ValueError(
                f"There is no step from first_step {first_step} to last_step {last_step}: steps count from 0 to "
                f"{settings['steps'] - 1}."
            )
        recorder = AttentionRecorder(find_words(positive, words), *LAYER_GROUPS[layers])
        latent = common_ksampler(
            recorder.watch(model), positive=positive, negative=negative, latent=latent_image, **settings
        )[0]
        maps = recorder.maps(range(first_step, last_step + 1), *latent["samples"].shape[-2:])
        maps = (maps.mean(dim=0) if average_steps else maps.flatten(0, 1)).float().cpu()
        scale = 8 if vae is None else vae.spacial_compression_decode()
        masks = stretch(resize(maps, maps.shape[1] * scale, maps.shape[2] * scale))
        if vae is None:
            pictures = colour(masks)
        else:
            decoded = vae.decode(latent["samples"]).cpu()
            pictures = overlay(decoded.repeat(len(masks) // len(decoded), 1, 1, 1), masks, opacity)
        return io.NodeOutput(pictures, masks, latent, ui=ui.PreviewImage(pictures, cls=cls))


NODES = [AtelierAttentionMaps]
