"""DDIM inversion and null-text optimisation inside ComfyUI's own sampling, so that whatever rides on MODEL and
CONDITIONING (LoRAs, concepts, ControlNets, areas) counts as it does in KSampler.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import comfy.conds
import comfy.model_management
import comfy.samplers
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...kernels.backbone import HALF_PRECISION_SCALE, TextContext
from ...kernels.conditioning import StagedContext
from ...kernels.inversion import (
    NullText,
    PivotalSettings,
    PredictNoise,
    invert,
    optimise_null_text,
    reconstruct,
    stage_starts,
)
from ...kernels.run_state import tensors_fingerprint
from ...kernels.trajectory import Trajectory
from .gradients import attention_with_backward, differentiable_model, leave_inference, saved_for_backward
from .guiders import POST_CFG, REPLACE_CFG
from .layout_guidance import KEY as LAYOUT
from .model_groups import KEY as GCFG
from .model_kind import context_width, cross_attention_layers, model_family
from .payload import WORDS, Conditioning, concept_conditioning

# What a plain prompt may carry beside its context: SDXL's pooled vector and sizes.
PLAIN = {"pooled_output", WORDS, "width", "height", "crop_w", "crop_h", "target_width", "target_height"}
NULL_TEXT = "concept_atelier_null_text"  # under which a conditioning says what it was optimised for

NOT_PLAIN = (
    "The unconditional conditioning carries more than one plain prompt ({what}), which null-text optimisation cannot "
    "take apart: connect an empty prompt from CLIP Text Encode."
)
OTHER_GUIDANCE = (
    "The MODEL carries a node that changes guidance (such as Rescale CFG, APG, PAG, Layout Guidance or GCFG), which "
    "cannot be inverted: connect the MODEL from before that node."
)
EMPTY_LATENT = (
    "The latent is empty, so there is no picture to invert: connect the picture through VAE Encode, with the VAE "
    "of the MODEL's checkpoint."
)
NOT_FINITE = (
    "The latent holds values that are not finite, so there is no picture to invert: encode the picture with a VAE in "
    "fp32 (start ComfyUI with --fp32-vae), and look whether it comes back through VAE Decode."
)
SHARED_CONTROL = (
    "The ControlNet of the conditioning acts on the unconditional prompt too, which cannot be varied then: use Apply "
    "ControlNet with its positive output alone, on a prompt without an area."
)


class Inversion(NamedTuple):
    """noise: (B, C, h, w) as KSampler returns leftover noise. sigmas: (S + 1,) ComfyUI's. reconstruction: as noise."""

    noise: Tensor
    trajectory: Trajectory
    sigmas: Tensor
    reconstruction: Tensor


class OptimisedFor(NamedTuple):
    """What a null-text conditioning retraces. cfg: guidance scale. trajectory: its fingerprint."""

    cfg: float
    trajectory: str


def invert_latent(
    model: ModelPatcher, conditioning: Conditioning, latent: Tensor, scheduler: str, steps: int, iterations: int
) -> Inversion:
    """Invert clean latents (B, C, h, w), as VAE Encode gives them, at cfg 1, and sample them again for comparison.

    Raises ValueError for a MODEL, conditioning or latents that cannot be inverted.
    """
    check_invertible(model, conditioning)
    if not latent.any():
        raise ValueError(EMPTY_LATENT)
    if not latent.isfinite().all():
        raise ValueError(NOT_FINITE)
    channels = model.model.latent_format.latent_channels
    if latent.ndim != 4 or latent.shape[1] != channels:
        raise ValueError(
            f"The latent has the shape {tuple(latent.shape)}, and the MODEL needs pictures of {channels} channels: "
            "encode the picture with the VAE of the same checkpoint."
        )
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), scheduler, steps)
    sampler = _InversionSampler(iterations, comfy.utils.ProgressBar(2 * (len(sigmas) - 1)))
    guider = InversionGuider(model, positive=conditioning)
    noise = guider.sample(torch.zeros_like(latent), latent, sampler, sigmas, disable_pbar=True)
    trajectory = Trajectory(sampler.latents.cpu(), abar_of(sigmas), model_fingerprint(model))
    device = comfy.model_management.intermediate_device()
    return Inversion(noise.to(device), trajectory, sigmas, sampler.reconstruction.to(device))


def null_text_conditioning(
    model: ModelPatcher,
    trajectory: Trajectory,
    conditioning: Conditioning,
    unconditional: Conditioning,
    settings: PivotalSettings,
) -> tuple[Conditioning, NullText]:
    """`unconditional` with a context of its own for each step of the trajectory, and how near each step came.

    Raises ValueError for a trajectory of another MODEL, and for what cannot be optimised.
    """
    settings.check()
    for name, given in (("conditioning", conditioning), ("unconditional", unconditional)):
        check_invertible(model, given, name)
    more = [] if len(unconditional) == 1 else [f"{len(unconditional)} prompts"]
    more += sorted(key for _, values in unconditional for key in values.keys() - PLAIN)
    if more:
        raise ValueError(NOT_PLAIN.format(what=", ".join(more)))
    trajectory.check_model(model_fingerprint(model))
    sigmas = (1 / trajectory.abar - 1).sqrt().float()
    timesteps = model.get_model_object("model_sampling").timestep(sigmas[:-1]).tolist()
    starts = stage_starts(timesteps)  # before the work, in case it refuses

    sampler = _NullTextSampler(trajectory, settings, comfy.utils.ProgressBar(trajectory.steps))
    with differentiable_model(model) as whole, torch.inference_mode():
        guider = InversionGuider(whole, positive=conditioning, negative=unconditional)
        empty = torch.zeros_like(trajectory.latents[0])
        guider.sample(empty, empty, sampler, sigmas, disable_pbar=True)

    layers = cross_attention_layers(model)
    contexts = tuple(TextContext.plain(phi, layers) for phi in reversed(sampler.result.contexts))
    values = unconditional[0][1]
    [[context, carried]] = concept_conditioning(StagedContext(starts, contexts, {}), layers, values.get(WORDS, ()))
    made_for = OptimisedFor(settings.w, trajectory_fingerprint(trajectory))
    return [[context, {**carried, **values, NULL_TEXT: made_for}]], sampler.result


def check_invertible(model: ModelPatcher, conditioning: Conditioning, name: str = "conditioning") -> None:
    """Raise ValueError unless the MODEL can be inverted and the conditioning is for it."""
    model_family(model)
    functions = [function for function in (POST_CFG, *REPLACE_CFG) if model.model_options.get(function)]
    if functions or {LAYOUT, GCFG} & model.wrappers.get(WrappersMP.OUTER_SAMPLE, {}).keys():
        raise ValueError(OTHER_GUIDANCE)
    for context, _ in conditioning:
        if context.shape[-1] != context_width(model):
            raise ValueError(
                f"The {name} is {context.shape[-1]} wide and the MODEL reads contexts {context_width(model)} wide: "
                "encode the prompt with the CLIP of the same checkpoint."
            )


def abar_of(sigmas: Tensor) -> Tensor:
    """abar (float64, on the CPU) of ComfyUI's noise levels."""
    return 1 / (1 + sigmas.cpu().double() ** 2)


def model_fingerprint(model: ModelPatcher) -> str:
    """A hash of the U-Net's own weights and of the patches (LoRAs) on them, wherever they are loaded."""
    patches = model.get_key_patches("diffusion_model.")
    return tensors_fingerprint(
        (key, value) for key, (own, *added) in sorted(patches.items()) for value in _tensors([own[0], added])
    )


def trajectory_fingerprint(trajectory: Trajectory) -> str:
    """A hash of the picture and of the noise levels that it was inverted through."""
    return tensors_fingerprint([("abar", trajectory.abar), ("latents", trajectory.latents)])


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors and numbers in a weight with its patches, which are nested lists and weight adapters."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (int, float)):
        yield torch.tensor([float(value)])
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)
    elif hasattr(value, "weights"):
        yield from _tensors(value.weights)


class InversionGuider(comfy.samplers.CFGGuider):
    """ComfyUI's guider at cfg 1, with the prompts by their names."""

    def __init__(self, model: ModelPatcher, **conditionings: Conditioning) -> None:
        super().__init__(model)
        self.inner_set_conds(conditionings)


def predictions(denoise: Callable[[Tensor, Tensor], Tensor], sigmas: Tensor) -> PredictNoise:
    """eps of VP latents out of clean latents denoise(x, sigma (B,)) of ComfyUI's."""

    def predict(x: Tensor, i: int) -> Tensor:
        comfy.model_management.throw_exception_if_processing_interrupted()
        x = x * (1 + sigmas[i] ** 2).sqrt()
        return (x - denoise(x, sigmas[i].expand(len(x)))) / sigmas[i]

    return predict


class _InversionSampler(comfy.samplers.Sampler):
    """Inverts `latent_image` and keeps the path, and where sampling leads from its end."""

    def __init__(self, iterations: int, bar: comfy.utils.ProgressBar) -> None:
        self.iterations, self.bar = iterations, bar

    def sample(
        self, model_wrap: Any, sigmas: Tensor, extra_args: dict, callback: Any, noise: Tensor,
        latent_image: Tensor, *_: Any,
    ) -> Tensor:  # fmt: skip
        predict = predictions(lambda x, sigma: model_wrap(x, sigma, **extra_args), sigmas)
        abar, steps = abar_of(sigmas), len(sigmas) - 1
        self.latents = invert(predict, abar, latent_image, self.iterations, self.bar.update_absolute)
        x_0 = reconstruct(predict, abar, self.latents[0], lambda step: self.bar.update_absolute(steps + step))
        self.reconstruction = model_wrap.inner_model.process_latent_out(x_0)
        return self.latents[0] * (1 + sigmas[0] ** 2).sqrt()


class _NullTextSampler(comfy.samplers.Sampler):
    """Optimises the negative prompt along a trajectory. To be run inside `differentiable_model`."""

    def __init__(self, trajectory: Trajectory, settings: PivotalSettings, bar: comfy.utils.ProgressBar) -> None:
        self.trajectory, self.settings, self.bar = trajectory, settings, bar

    def sample(
        self, model_wrap: Any, sigmas: Tensor, extra_args: dict, callback: Any, noise: Tensor, *_: Any
    ) -> Tensor:
        base, options = model_wrap.inner_model, extra_args["model_options"]
        # Several where the positive one has areas: ComfyUI then copies the unconditional prompt to each.
        positive, negatives = model_wrap.conds["positive"], model_wrap.conds["negative"]
        if any("control" in cond for cond in negatives):
            raise ValueError(SHARED_CONTROL)

        def clean(conds: list[dict], x: Tensor, sigma: Tensor) -> Tensor:
            transformer = dict(options["transformer_options"])
            if torch.is_grad_enabled():
                transformer["optimized_attention_override"] = attention_with_backward(transformer)
            every = {**options, "transformer_options": transformer}
            with saved_for_backward(transformer):
                return comfy.samplers.calc_cond_batch(base, [conds], x, sigma, every)[0]

        def unconditional(x: Tensor, i: int, phi: Tensor) -> Tensor:
            own = {"c_crossattn": comfy.conds.CONDCrossAttn(phi)}
            conds = [
                {**cond, "model_conds": {**cond["model_conds"], **own}, "uuid": uuid.uuid4()} for cond in negatives
            ]
            return predictions(lambda x, sigma: clean(conds, x, sigma), levels)(x, i)

        with torch.inference_mode(False):
            leave_inference(base)  # ComfyUI may have loaded something else meanwhile, and moved it
            levels = sigmas.clone()
            self.result = optimise_null_text(
                predictions(lambda x, sigma: clean(positive, x, sigma), levels),
                unconditional,
                replace(self.trajectory, latents=self.trajectory.latents.clone()),
                negatives[0]["model_conds"]["c_crossattn"].cond.to(levels.device, torch.float32, copy=True),
                self.settings,
                HALF_PRECISION_SCALE if base.get_dtype_inference() == torch.float16 else 1.0,
                self.bar.update_absolute,
            )
        return noise
