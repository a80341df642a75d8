"""The null-text concept model on ComfyUI's U-Net: a light patch and weight patches on a clone, the base untouched.

The patch keeps the attention modules where they are and makes them cost nothing: they are asked about one position and
one token, and their answer is replaced by the constant feature.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import comfy.model_sampling
import comfy.sd
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...kernels.backbone import Layer
from ...kernels.diffusers_attention import ldm_name
from ...kernels.nulltext import (
    ConceptModel,
    Look,
    calibrated_features,
    null_context,
    null_text_errors,
    start_latents,
    uniform_features,
)
from ...kernels.nulltext_unet import is_text_weight
from .backbone import NativeBackbone, native_session
from .model_kind import cross_attention_layers, model_family
from .patches import layer_of_call

KEY = "concept_atelier.null_text"  # of the attachment that says what was done to a MODEL
UNET = "diffusion_model."


def trainable_weights(model: ModelPatcher) -> dict[str, str]:
    """{diffusers name: ComfyUI's key} of the U-Net's weights that a null-text model keeps."""
    names = comfy.utils.unet_to_diffusers(model.model.model_config.unet_config)
    keys = {UNET + key for key, _ in model.model.diffusion_model.named_parameters()}
    # The table also has what the same weights are called in class-conditional U-Nets.
    return {
        name: UNET + key
        for name, key in names.items()
        if UNET + key in keys and not is_text_weight(name) and not name.startswith("class_embedding.")
    }


def null_text_form(model: ModelPatcher) -> ConceptModel | None:
    """What a MODEL in null-text form was made with; None for any other MODEL."""
    return model.get_attachment(KEY)


def prediction_type(model: ModelPatcher) -> str:
    """What the U-Net of a MODEL predicts, in the words of diffusers: "epsilon" or "v_prediction"."""
    velocity = isinstance(model.get_model_object("model_sampling"), comfy.model_sampling.V_PREDICTION)
    return "v_prediction" if velocity else "epsilon"


def apply_concept_model(model: ModelPatcher, concept_model: ConceptModel) -> ModelPatcher:
    """A clone of `model` in null-text form, with the concept model's weights as patches.

    Raises ValueError when the concept model was made of another architecture or of one that predicts something else,
    and when `model` is one already.
    """
    if null_text_form(model) is not None:
        raise ValueError("The MODEL is a concept model already: connect the checkpoint's own MODEL.")
    keys = trainable_weights(model)
    network = model.model.diffusion_model
    widths = {
        layer: network.get_submodule(f"{ldm_name(layer)}.attn2.to_out.0").out_features
        for layer in cross_attention_layers(model)
    }
    shapes = {name: tuple(comfy.utils.get_attr(model.model, key).shape) for name, key in keys.items()}
    concept_model.check_fits(model_family(model), widths, shapes)
    mine = prediction_type(model)
    made_of = concept_model.metadata.get("prediction", mine)  # older files do not say
    if made_of != mine:
        raise ValueError(
            f'The concept model was made of a MODEL of "{made_of}" prediction, and this one is of "{mine}": load the '
            "kind of checkpoint that it was made of, or put the ModelSamplingDiscrete node that the checkpoint needs "
            "before this node."
        )

    made = model.clone()
    made.set_model_attn2_patch(_look_at_nothing)
    made.set_model_attn2_output_patch(_constant(concept_model.features))
    if concept_model.pooled is not None:
        made.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, _null_vector(concept_model.pooled))
    made.set_attachments(KEY, replace(concept_model, deltas={}))
    return add_learned(made, concept_model)


def add_learned(model: ModelPatcher, learned: ConceptModel) -> ModelPatcher:
    """A clone of a MODEL in null-text form with the weights of `learned`, which was trained from it."""
    keys, before = trainable_weights(model), null_text_form(model).deltas
    patches = {
        keys[name]: ("diff", (delta - before[name] if name in before else delta,))
        for name, delta in learned.deltas.items()
    }
    made = model.clone()
    made.add_patches(patches)
    made.set_attachments(KEY, learned)
    return made


def _look_at_nothing(n: Tensor, key: Tensor, value: Tensor, _options: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """An attn2_patch: one position asks, one token answers."""
    return n[:, :1], key[:, :1], value[:, :1]


def _constant(features: Mapping[Layer, Tensor]) -> Callable[[Tensor, Mapping[str, Any]], Tensor]:
    """An attn2_output_patch: F_null, which ComfyUI's residual addition spreads over all positions."""

    def patch(n: Tensor, extra_options: Mapping[str, Any]) -> Tensor:
        return features[layer_of_call(extra_options)].to(n).expand(n.shape[0], 1, -1)

    return patch


def _null_vector(pooled: Tensor) -> Callable:
    """An APPLY_MODEL wrapper for SDXL: its vector says nothing of a prompt, and names the picture's own size."""

    def apply_model(executor: Any, x: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        model = executor.class_obj
        scale = model.latent_format.spacial_downscale_ratio
        height, width = (side * scale for side in x.shape[2:])
        y = model.encode_adm(pooled_output=pooled[None], height=height, width=width, device=x.device)
        return executor(x, t, *args, **{**kwargs, "y": y.to(x.device).expand(x.shape[0], -1)})

    return apply_model


@contextmanager
def watch_native(backbone: NativeBackbone, look: Look) -> Iterator[None]:
    """See `kernels.nulltext.Watch`. The session's MODEL must be a clone of its own."""

    def patch(n: Tensor, extra_options: Mapping[str, Any]) -> Tensor:
        look(layer_of_call(extra_options), n)
        return n

    backbone.model.set_model_attn2_output_patch(patch)
    try:
        yield
    finally:
        backbone.model.model_options["transformer_options"]["patches"]["attn2_output_patch"].remove(patch)


def operate(
    model: ModelPatcher,
    clip: comfy.sd.CLIP,
    vae: comfy.sd.VAE,
    images: Tensor | None,
    form: str,
    timesteps: int,
    seed: int,
    size: int,
) -> tuple[ModelPatcher, dict[int, float]]:
    """Null-text surgery: the MODEL in null-text form, and its error against the null prompt by timestep.

    images: (B, H, W, 3) to calibrate on, or None for noise of size x size pixels. form: "calibrated" or "uniform".
    Raises ValueError for a MODEL that is a concept model already.
    """
    if null_text_form(model) is not None:
        raise ValueError("The MODEL is a concept model already: connect the checkpoint's own MODEL.")
    with native_session(model.clone(), clip, vae) as backbone:
        x_0 = start_latents(backbone, images, (size, size), seed)
        if form == "uniform":
            features = uniform_features(backbone)
        else:
            features = calibrated_features(backbone, partial(watch_native, backbone), x_0, timesteps, seed)
        pooled = null_context(backbone).pooled
        made = ConceptModel(
            backbone.family,
            features,
            None if pooled is None else pooled[0].float().cpu(),
            metadata={"form": form, "prediction": prediction_type(model)},
        )
        after = NativeBackbone(apply_concept_model(backbone.model, made), clip, vae)
        errors = null_text_errors(backbone, after, x_0, timesteps, seed)
    return apply_concept_model(model, made), errors


class MasterWeight:
    """A weight wrapper that puts a float32 leaf tensor in the place of one stored weight, in any precision.

    Without a tensor the stored weight stays: layers keep their wrappers until ComfyUI loads the model again.
    """

    def __init__(self) -> None:
        self.weight: Tensor | None = None

    def __call__(self, stored: Tensor) -> Tensor:
        return stored if self.weight is None else self.weight.to(stored.dtype)


@contextmanager
def training_session(
    model: ModelPatcher, clip: comfy.sd.CLIP, vae: comfy.sd.VAE
) -> Iterator[tuple[NativeBackbone, dict[str, Tensor]]]:
    """Open a MODEL in null-text form for training: yields a backbone and the weights it computes with.

    The weights are float32 leaf tensors by diffusers' names, at the values of the MODEL with all its patches (LoRA);
    the MODEL's own weights are not touched. Afterwards only the caller holds the leaf tensors.
    """
    keys = trainable_weights(model)
    masters = {name: MasterWeight() for name in keys}
    wrapped = model.clone()
    for name, key in keys.items():
        wrapped.add_weight_wrapper(key, masters[name])
    with native_session(wrapped, clip, vae) as backbone:
        try:
            for name, key in keys.items():
                stored = comfy.utils.get_attr(backbone.model.model, key)
                masters[name].weight = stored.detach().to(backbone.device, torch.float32, copy=True).requires_grad_()
            yield backbone, {name: master.weight for name, master in masters.items()}
        finally:
            for master in masters.values():
                master.weight = None
