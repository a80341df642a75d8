"""Photos as starting points: the noise that a picture is sampled from, and prompts that lead back to it."""

from __future__ import annotations

import comfy.samplers
from comfy_api.latest import io, ui

from ..kernels.inversion import PivotalSettings, psnr
from .native.inversion import invert_latent, null_text_conditioning
from .native.live import show_text
from .types import Trajectory

CATEGORY = "Concept Atelier/Inversion"


class AtelierDDIMInversion(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AtelierDDIMInversion",
            display_name="DDIM Inversion",
            category=CATEGORY,
            description="Finds the noise from which a sampler paints exactly this picture, with euler or ddim at cfg 1 "
            "and the same prompt. It samples once to see how exactly, and says so.",
            search_aliases=["unsampler", "invert image", "noise from picture", "real image editing", "null text"],
            has_intermediate_output=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Model.Input("model", tooltip="The MODEL to sample with later, LoRAs and Apply Concepts included."),
                io.Conditioning.Input(
                    "conditioning",
                    tooltip="What the picture shows. A prompt that fits leads to noise that is easier to edit.",
                ),
                io.Latent.Input(
                    "latent", tooltip="The picture, from VAE Encode. A batch is inverted picture by picture."
                ),
                io.Int.Input(
                    "steps", default=50, min=1, max=1000, tooltip="Sampling steps, the same as later in the sampler."
                ),
                io.Combo.Input(
                    "scheduler",
                    options=comfy.samplers.SCHEDULER_NAMES,
                    default="ddim_uniform",
                    tooltip="The noise levels, the same as later in the sampler. ddim_uniform has those of the paper "
                    "and gives the most exact round trip.",
                ),
                io.Int.Input(
                    "iterations",
                    default=5,
                    min=0,
                    max=50,
                    tooltip="Fixed-point iterations: at most so many more predictions a step, fewer where the step is "
                    "exact already. 0: plain DDIM inversion, as published; the picture comes back softer.",
                ),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="Shows the picture that comes back, and measures on pictures. Without it, on latents.",
                ),
            ],
            outputs=[
                io.Latent.Output(
                    display_name="noise",
                    tooltip="The noise. For SamplerCustomAdvanced with DisableNoise, or KSampler (Advanced) with "
                    "add_noise disabled: it is complete as it is.",
                ),
                Trajectory.Output(
                    display_name="trajectory", tooltip="The picture at every noise level, for nodes that follow it."
                ),
                io.Sigmas.Output(display_name="sigmas", tooltip="The noise levels, for SamplerCustomAdvanced."),
                io.String.Output(
                    display_name="report",
                    tooltip="How exactly the picture comes back: PSNR in dB. Above 40 no eye sees a difference.",
                ),
            ],
        )

    @classmethod
    def execute(cls, model, conditioning, latent, steps, scheduler, iterations, vae=None) -> io.NodeOutput:
        original = latent["samples"]
        inversion = invert_latent(model, conditioning, original, scheduler, steps, iterations)
        if vae is None:
            shown, of = None, "latents"
            original = original.to(inversion.reconstruction)
            peaks = original.amax(dim=(1, 2, 3)) - original.amin(dim=(1, 2, 3))
            values = psnr(inversion.reconstruction, original, peaks)
        else:
            pictures, of = vae.decode(inversion.reconstruction), "the picture"
            shown = ui.PreviewImage(pictures, cls=cls)
            values = psnr(pictures, vae.decode(original), 1.0)
        report = f"Round trip in {inversion.trajectory.steps} steps at cfg 1: PSNR of {of} {decibels(values)}"
        show_text(report, cls)
        return io.NodeOutput({"samples": inversion.noise}, inversion.trajectory, inversion.sigmas, report, ui=shown)


def decibels(values: list[float]) -> str:
    """43.2 dB, one for each picture."""
    return ", ".join(f"{value:.1f}" for value in values) + " dB"


class AtelierNullTextOptimize(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        default = PivotalSettings()
        return io.Schema(
            node_id="AtelierNullTextOptimize",
            display_name="Null-Text Optimize",
            category=CATEGORY,
            description="Finds an unconditional prompt for each step with which a sampler paints an inverted picture "
            "at a cfg above 1 too. Change the prompt afterwards, and the picture changes only where it must.",
            search_aliases=["null text inversion", "pivotal", "real image editing", "prompt to prompt"],
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Model.Input("model", tooltip="The MODEL of DDIM Inversion."),
                Trajectory.Input("trajectory", tooltip="One picture's, from DDIM Inversion."),
                io.Conditioning.Input("conditioning", tooltip="The conditioning of DDIM Inversion."),
                io.Conditioning.Input(
                    "unconditional", tooltip="Where the optimisation starts: an empty prompt from CLIP Text Encode."
                ),
                io.Float.Input(
                    "cfg",
                    default=default.w,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="The guidance scale that the sampler will use (reference code: 7.5). At 1 there is nothing "
                    "to optimise.",
                ),
                io.Int.Input(
                    "inner_steps",
                    default=default.inner_steps,
                    min=1,
                    max=500,
                    tooltip="Optimisation steps for each sampling step, at most (reference code: 10). More come nearer "
                    "to the picture and take longer.",
                ),
                io.Float.Input(
                    "learning_rate",
                    default=default.learning_rate,
                    min=1e-6,
                    max=1.0,
                    step=1e-6,
                    round=False,
                    tooltip="Of Adam at the first sampling step; it falls to half by the last (reference code: 0.01).",
                ),
                io.Float.Input(
                    "early_stop",
                    default=default.early_stop,
                    min=0.0,
                    max=1.0,
                    step=1e-6,
                    round=False,
                    advanced=True,
                    tooltip="Distance to the picture, as a mean square of latents, at which the first sampling step is "
                    "good enough; it grows a hundredfold by the last (reference code: 0.00001). 0: never stop early.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    display_name="negative",
                    tooltip="For the sampler's negative, with the noise, the steps and the scheduler of DDIM "
                    "Inversion, this cfg, and the MODEL through Apply Concepts.",
                ),
                io.String.Output(
                    display_name="report", tooltip="How near it comes: PSNR in dB of latents, and the distance a step."
                ),
            ],
        )

    @classmethod
    def execute(
        cls, model, trajectory, conditioning, unconditional, cfg, inner_steps, learning_rate, early_stop
    ) -> io.NodeOutput:
        settings = PivotalSettings(cfg, inner_steps, learning_rate, early_stop)
        negative, found = null_text_conditioning(model, trajectory, conditioning, unconditional, settings)
        x_0 = trajectory.latents[-1]
        near = psnr(found.x_0, x_0, float(x_0.max() - x_0.min()))
        report = (
            f"{trajectory.steps} steps at cfg {cfg:g}: PSNR of latents {decibels(near)}; mean distance a step "
            f"{sum(found.before) / trajectory.steps:.2e} before, {sum(found.after) / trajectory.steps:.2e} after"
        )
        show_text(report, cls)
        return io.NodeOutput(negative, report)


NODES = [AtelierDDIMInversion, AtelierNullTextOptimize]
