"""Tiny native models with fixed random weights in the topologies of SD1.x, SD2.x (eps and v) and SDXL.

Same number and order of cross-attention layers as the real ones (16, 16, 70), float32, on the CPU, built in about a
second. `import tiny_models` in tests (tests/conftest.py makes it importable), or load this file by its path after
ComfyUI is on sys.path.

Take latents of 16 x 16 or more for finite differences: at 8 x 8 the innermost group norms of the SD topologies see two
numbers each and become step functions.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import comfy.cldm.cldm
import comfy.controlnet
import comfy.model_base
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.supported_models
import torch
from comfy.taesd.taesd import TAESD
from torch import nn

TOPOLOGIES = ("sd1", "sd2", "sd2_v", "sdxl")
HEADS = 4

SD_LEVELS = {
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 2, 2],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_middle": 1,
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "adm_in_channels": None,
}
SDXL_LEVELS = {
    "num_res_blocks": [2, 2, 2],
    "channel_mult": [1, 1, 2],
    "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_middle": 10,
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "num_classes": "sequential",
}
# Width, layers and feed-forward width of each text tower; SDXL's context is the two towers side by side.
TOWERS = {
    "sd1": {"l": (64, 2)},
    "sd2": {"h": (64, 3)},
    "sdxl": {"l": (24, 3), "g": (40, 3)},
}
CONTEXT_WIDTH = 64
TIME_IDS_WIDTH = 6 * 256  # six sizes and crops, each as a 256-wide sinusoidal embedding


class TinyModel(NamedTuple):
    """What CheckpointLoaderSimple gives: MODEL, CLIP, VAE."""

    model: comfy.model_patcher.ModelPatcher
    clip: comfy.sd.CLIP
    vae: comfy.sd.VAE


def fill(module: nn.Module, seed: int) -> None:
    """Random weights that keep activations of order one, in the order of named_parameters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if weight.ndim == 0:
                continue
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim == 1:
                weight.copy_(1 + 0.05 * noise if name.endswith("weight") else 0.02 * noise)
            elif "embedding" in name:
                weight.copy_(noise)
            else:
                weight.copy_(noise * weight[0].numel() ** -0.5)


def unet_config(family: str) -> dict[str, Any]:
    """ComfyUI's U-Net configuration of one family ("sd1", "sd2", "sdxl"); GroupNorm(32) makes 32 channels the floor."""
    levels = (
        SDXL_LEVELS | {"adm_in_channels": TOWERS["sdxl"]["g"][0] + TIME_IDS_WIDTH} if family == "sdxl" else SD_LEVELS
    )
    return levels | {
        "image_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 32,
        "use_spatial_transformer": True,
        "use_linear_in_transformer": family != "sd1",
        "context_dim": CONTEXT_WIDTH,
        "legacy": False,
        "use_checkpoint": False,
        "use_temporal_resblock": False,
        "use_temporal_attention": False,
    }


def build_unet(topology: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> comfy.model_patcher.ModelPatcher:
    """A MODEL of one topology ("sd2_v" is SD2.x with v-prediction), weights stored in `dtype`, computed in float32."""
    family = topology.removesuffix("_v")
    config = {
        "sd1": comfy.supported_models.SD15,
        "sd2": comfy.supported_models.SD20,
        "sdxl": comfy.supported_models.SDXL,
    }[family](unet_config(family))
    if family == "sd1":
        config.unet_config["num_heads"] = HEADS
    else:
        config.unet_config["num_head_channels"] = 16
    config.set_inference_dtype(dtype, None if dtype == torch.float32 else torch.float32)
    if family == "sdxl":
        model = comfy.model_base.SDXL(config, device="cpu")
    else:
        kind = comfy.model_base.ModelType.V_PREDICTION if topology == "sd2_v" else comfy.model_base.ModelType.EPS
        model = comfy.model_base.BaseModel(config, model_type=kind, device="cpu")
    fill(model.diffusion_model, seed)
    cpu = torch.device("cpu")
    return comfy.model_patcher.CoreModelPatcher(model, load_device=cpu, offload_device=cpu)


def build_clip(topology: str, seed: int = 1, embedding_directory: str | None = None) -> comfy.sd.CLIP:
    """A CLIP of one topology with its real vocabulary and its real activations, but narrow and shallow towers."""
    family = topology.removesuffix("_v")
    towers = TOWERS[family]
    options = {
        f"clip_{tower}_model_config": {
            "hidden_size": width,
            "num_hidden_layers": layers,
            "num_attention_heads": HEADS,
            "intermediate_size": 2 * width,
            "projection_dim": width,
        }
        for tower, (width, layers) in towers.items()
    }
    target = {
        "sd1": comfy.supported_models.SD15,
        "sd2": comfy.supported_models.SD20,
        "sdxl": comfy.supported_models.SDXL,
    }[family]({}).clip_target()
    clip = comfy.sd.CLIP(target, embedding_directory=embedding_directory, model_options=options)
    fill(clip.cond_stage_model, seed)
    for tower, (width, _) in towers.items():
        getattr(clip.tokenizer, f"clip_{tower}").embedding_size = width
    return clip


def build_vae(seed: int = 2) -> comfy.sd.VAE:
    """A VAE in the layout of TAESD (4 channels, one latent for 8 x 8 pixels)."""
    autoencoder = TAESD(latent_channels=4)
    fill(autoencoder, seed)
    return comfy.sd.VAE(sd=autoencoder.state_dict())


def build_controlnet(model: comfy.model_patcher.ModelPatcher) -> comfy.controlnet.ControlNet:
    """A ControlNet for that MODEL."""
    config = dict(model.model.model_config.unet_config)
    for key in ("out_channels", "disable_unet_model_creation", "transformer_depth_output"):
        config.pop(key, None)
    net = comfy.cldm.cldm.ControlNet(**config, hint_channels=3, operations=comfy.ops.disable_weight_init, device="cpu")
    fill(net, 11)
    return comfy.controlnet.ControlNet(net, load_device=torch.device("cpu"))


def build(topology: str, seed: int = 0, embedding_directory: str | None = None) -> TinyModel:
    """MODEL, CLIP and VAE of one topology; weights from `seed`, `seed + 1` and `seed + 2`."""
    return TinyModel(
        build_unet(topology, seed), build_clip(topology, seed + 1, embedding_directory), build_vae(seed + 2)
    )
