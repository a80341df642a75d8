"""What kind of U-Net a MODEL is: its family, its contexts, its cross-attention."""

from __future__ import annotations

import comfy.model_base
import comfy.model_sampling
import comfy.supported_models
from comfy.model_patcher import ModelPatcher
from torch import nn

from ...kernels.backbone import Layer

BLOCKS = {"input_blocks": "input", "middle_block": "middle", "output_blocks": "output"}


def model_family(model: ModelPatcher) -> str:
    """The family of a MODEL: "sd1", "sd2", "sdxl", or what its configuration class names in `atelier_family` ("toy").

    Raises ValueError for other architectures (also for relatives that read more than text, such as InstructPix2Pix,
    unCLIP and Lotus), for inpainting models, and for sampling other than eps or v.
    """
    base, config = model.model, model.model.model_config
    named = getattr(type(config), "atelier_family", None)
    if named is not None:
        family = named
    elif type(base) is comfy.model_base.SDXL:
        family = "sdxl"
    elif type(base) is comfy.model_base.BaseModel and isinstance(config, comfy.supported_models.SD20):
        family = "sd2"
    elif type(base) is comfy.model_base.BaseModel and isinstance(config, comfy.supported_models.SD15):
        family = "sd1"
    else:
        raise ValueError(
            f"The MODEL is a {type(config).__name__}; Concept Atelier works with SD1.x, SD2.x and SDXL: "
            "load such a checkpoint."
        )
    if base.concat_keys:
        raise ValueError("The MODEL is made for inpainting, with a mask beside its latents: load the plain checkpoint.")
    sampling = model.get_model_object("model_sampling")
    discrete = isinstance(sampling, comfy.model_sampling.ModelSamplingDiscrete)
    if not (discrete and isinstance(sampling, comfy.model_sampling.EPS) and sampling.sigma_data == 1):
        raise ValueError(
            "The MODEL's sampling is neither eps- nor v-prediction on a table of timesteps (it may be EDM or flow): "
            "remove the ModelSampling node before it, or load another checkpoint."
        )
    return family


def context_width(model: ModelPatcher) -> int:
    """d of the contexts that the cross-attention of a MODEL reads."""
    return model.model.model_config.unet_config["context_dim"]


def cross_attention_layers(model: ModelPatcher) -> tuple[Layer, ...]:
    """The cross-attention layers of a MODEL in execution order (16 in SD1.x and SD2.x, 70 in SDXL)."""
    return tuple(attention_modules(model))


def attention_modules(model: ModelPatcher) -> dict[Layer, nn.Module]:
    """The attn2 modules of a MODEL in execution order."""
    modules = model.model.diffusion_model.named_modules()
    return {_layer_of_module(name): module for name, module in modules if name.endswith(".attn2")}


def _layer_of_module(name: str) -> Layer:
    """input_blocks.4.1.transformer_blocks.0.attn2 -> Layer("input", 4, 0)."""
    parts = name.split(".")
    block = BLOCKS[parts[0]]
    number = 0 if block == "middle" else int(parts[1])
    return Layer(block, number, int(parts[parts.index("transformer_blocks") + 1]))
