"""Weights that a concept brings along, as patches of a MODEL."""

from __future__ import annotations

import comfy.lora
from comfy.model_patcher import ModelPatcher

from ...kernels.concept import Concept
from .model_kind import cross_attention_layers, model_family


def apply_weights(model: ModelPatcher, concept: Concept, strength: float) -> ModelPatcher:
    """A clone of MODEL with the weights that `concept` brings along, as ComfyUI's own LoRA loader would put them.

    strength: factor of the changes. Raises ValueError for a MODEL of another kind than the concept was learned on.
    """
    widths = {tower: v.shape[-1] for tower, v in concept.vectors.items()}
    concept.check_fits(model_family(model), widths, cross_attention_layers(model))
    names = comfy.lora.model_lora_keys_unet(model.model, {})
    patches = comfy.lora.load_lora(dict(concept.weights), names)
    made = model.clone()
    made.add_patches(patches, strength)
    return made
