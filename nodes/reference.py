"""A picture of the real subject as a guide: lay it over the generated one, and sample along it."""

from __future__ import annotations

from functools import partial

import torch
from comfy_api.latest import io, ui

from ..kernels.alignment import OBJECTIVES, fit_masks, warp_mask, warp_picture
from ..kernels.reference import ReferenceSettings, latent_mask
from .native.live import show_text
from .native.pictures import cover, measures, opaque, outlined, resized_mask
from .native.reference import reference_sampler
from .types import Trajectory

CATEGORY = "Concept Atelier/Reference"
EVERYTHING = 0.995  # of a picture: a mask that large leaves nothing out


def one_picture(batch: torch.Tensor, name: str) -> torch.Tensor:
    """The only element of a batch. Raises ValueError when there are several."""
    if len(batch) != 1:
        raise ValueError(
            f'There are {len(batch)} pictures on "{name}", and it takes one: choose it with Pick Reference or core\'s '
            "Image From Batch (Mask From Batch)."
        )
    return batch[0]


class AtelierAlignReference(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AtelierAlignReference",
            display_name="Align Reference",
            category=CATEGORY,
            description="Scales, turns and moves a picture of the real subject so that its mask lies over the mask of "
            "the generated one, and shows the result with the outline of the place to take.",
            search_aliases=["similarity transform", "mask alignment", "fit subject", "hifi tuner"],
            has_intermediate_output=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Image.Input("reference", tooltip="One picture of the subject, for example from Pick Reference."),
                io.Mask.Input("reference_mask", tooltip="Where the subject is in it."),
                io.Mask.Input(
                    "target_mask",
                    tooltip="Where the subject is in the generated picture, for example from SAM Mask. The result has "
                    "the size of this mask. Where it is empty, there is nothing to guide and the result says so.",
                ),
                io.Combo.Input(
                    "fit",
                    options=list(OBJECTIVES),
                    advanced=True,
                    tooltip="What is made small. Symmetric chamfer: the distances of both masks from each other. The "
                    "others are the paper's words: Eq. 9, and Algorithm 4, which shrinks the subject.",
                ),
                io.Float.Input(
                    "max_rotation",
                    default=180.0,
                    min=0.0,
                    max=180.0,
                    step=1.0,
                    tooltip="Degrees that the subject may be turned by, either way. 0 keeps it upright, which is right "
                    "for most subjects that stand.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="image",
                    tooltip="The aligned picture, its borders filled by reflection. For VAE Encode and DDIM Inversion.",
                ),
                io.Mask.Output(display_name="mask", tooltip="The aligned mask, for Reference Guidance."),
            ],
        )

    @classmethod
    def execute(cls, reference, reference_mask, target_mask, fit, max_rotation) -> io.NodeOutput:
        picture = one_picture(opaque(reference), "reference").cpu()
        given = one_picture(reference_mask, "reference_mask").cpu()
        target = one_picture(target_mask, "target_mask").cpu()
        mask = resized_mask(given, picture.shape[:2])
        notes = [] if mask is given else [f"reference_mask is {measures(given)} and was scaled to {measures(mask)}."]
        if not (mask >= 0.5).any():
            raise ValueError("reference_mask is empty, so there is no subject to align: mark it, or pick another mask.")
        if (mask >= 0.5).float().mean() > EVERYTHING:
            notes.append("reference_mask covers everything: the whole picture will be laid over the target.")
        if not (target >= 0.5).any():
            notes.append("target_mask is empty: no place to put the subject, so Reference Guidance will do nothing.")
            aligned, moved = cover(picture[None], *target.shape)[0], torch.zeros_like(target)
        else:
            with torch.inference_mode(False):  # tensors made in inference mode have no gradients
                transform = fit_masks(mask.clone(), target.clone(), fit, max_rotation)
            aligned, moved = (
                warp(own, transform, target.shape) for warp, own in ((warp_picture, picture), (warp_mask, mask))
            )
            overlap = torch.minimum(moved, target).sum() / torch.maximum(moved, target).sum()
            notes.append(
                f"Scaled by {transform.scale.item():.2f}, turned by {transform.degrees:.0f} degrees; {overlap:.0%} of "
                "both subjects together is common to them."
            )
        show_text("\n".join(notes), cls)
        shown = ui.PreviewImage(outlined(aligned, moved, target)[None], cls=cls)
        return io.NodeOutput(aligned[None], moved[None], ui=shown)


class AtelierReferenceGuidance(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        default = ReferenceSettings()
        return io.Schema(
            node_id="AtelierReferenceGuidance",
            display_name="Reference Guidance",
            category=CATEGORY,
            description="A sampler that draws the subject of a picture along a real picture of it (HiFi Tuner). For "
            "SamplerCustomAdvanced, with the noise of the first picture, and the MODEL and sigmas of DDIM Inversion.",
            search_aliases=["hifi tuner", "reference sampler", "subject fidelity", "pivotal guidance"],
            has_intermediate_output=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                Trajectory.Input("trajectory", tooltip="Of the aligned reference, from DDIM Inversion."),
                io.Mask.Input("mask", tooltip="Where the subject is in it, from Align Reference."),
                io.Int.Input(
                    "t_s",
                    default=default.t_s,
                    min=1,
                    max=50,
                    tooltip="Where the reference takes over, counted down from 50 (the first step) to 1 (the last), "
                    "whatever the number of steps (paper: 40). Earlier keeps more of its layout.",
                ),
                io.Int.Input(
                    "t_e",
                    default=default.t_e,
                    min=1,
                    max=50,
                    tooltip="The last guided step, counted likewise (paper: 10). The steps after it blend the subject "
                    "into the picture.",
                ),
                io.Int.Input(
                    "inner_steps",
                    default=default.inner_steps,
                    min=0,
                    max=500,
                    tooltip="Optimisation steps for each guided step, at most (paper: 10). More come nearer to the "
                    "reference and take longer. 0: the reference is pasted at t_s, and no more.",
                ),
                io.Float.Input(
                    "learning_rate",
                    default=default.learning_rate,
                    min=1e-6,
                    max=1.0,
                    step=1e-6,
                    round=False,
                    tooltip="Of Adam (paper: 0.01).",
                ),
                io.Float.Input(
                    "early_stop",
                    default=default.early_stop,
                    min=0.0,
                    max=1.0,
                    step=1e-6,
                    round=False,
                    advanced=True,
                    tooltip="Distance to the reference, as a mean square of latents, at which the first sampling step "
                    "is good enough; it grows a hundredfold by the last (after null-text optimisation: 0.00001). 0: "
                    "never stop early, as in the paper.",
                ),
                io.Boolean.Input(
                    "decay",
                    default=default.decay,
                    advanced=True,
                    tooltip="Lets the learning rate fall to half by the last sampling step, so that the prompt does "
                    "not drift far. Off: as in the paper.",
                ),
                io.Int.Input(
                    "grow",
                    default=1,
                    min=0,
                    max=16,
                    advanced=True,
                    tooltip="Widens the mask by so many latents (of 8 pixels), so that it does not cut the subject.",
                ),
            ],
            outputs=[
                io.Sampler.Output(
                    display_name="sampler",
                    tooltip="For SamplerCustomAdvanced with a guider of a cfg above 1. To save the steps before t_s, "
                    "split the sigmas there and start from the first picture's latents with DisableNoise.",
                )
            ],
        )

    @classmethod
    def execute(cls, trajectory, mask, t_s, t_e, inner_steps, learning_rate, early_stop, decay, grow) -> io.NodeOutput:
        settings = ReferenceSettings(t_s, t_e, inner_steps, learning_rate, early_stop, decay)
        height, width = trajectory.latents.shape[-2:]
        given = one_picture(mask, "mask").cpu()
        inside = latent_mask(given, (height, width), grow)
        sampler = reference_sampler(trajectory, inside, settings, partial(show_text, node=cls))
        levels = settings.levels(trajectory.steps)
        text = f"{len(levels)} of {trajectory.steps} steps guided, {inside.float().mean():.1%} of the latents inside."
        if not inside.any():
            text = f"The mask is empty at the size of the latents ({width} x {height}): plain sampling, nothing guided."
        if given.shape[0] * width != given.shape[1] * height:
            text += (
                f" The mask ({measures(given)}) has other proportions than the latents ({width} x {height}): stretched."
            )
        show_text(text, cls)
        return io.NodeOutput(sampler, ui=ui.PreviewText(text))


NODES = [AtelierAlignReference, AtelierReferenceGuidance]
