"""Tiny random diffusers pipelines in the topologies of SD1.x, SD2.x (eps and v) and SDXL.

Same number and order of cross-attention layers as the real ones (16, 16, 70), float32, on the CPU, the toy world's
tokenizer with 24 positions. The U-Nets have the shape of those in tests/nodes/tiny_models.py.
"""

from __future__ import annotations

from pathlib import Path

import torch
from concept_atelier.toyworld.tokenizer import TOKENS, load_tokenizer
from concept_atelier.toyworld.weights import WEIGHTS
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

TOPOLOGIES = ("sd1", "sd2", "sd2_v", "sdxl")
CONTEXT_WIDTH = 64
LATENT = 8
TIME_IDS_WIDTH = 6 * 256  # six sizes and crops, each as a 256-wide sinusoidal embedding
# Width and layers of each text tower; SDXL's context is the two towers side by side.
TOWERS = {"sd1": {"l": (64, 2)}, "sd2": {"h": (64, 2)}, "sdxl": {"l": (24, 3), "g": (40, 3)}}
SD_LEVELS = {
    "block_out_channels": (32, 64, 64, 64),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}
SDXL_LEVELS = {
    "block_out_channels": (32, 32, 64),
    "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
    "up_block_types": ("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",),
    "transformer_layers_per_block": (1, 2, 10),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": TOWERS["sdxl"]["g"][0] + TIME_IDS_WIDTH,
}
# diffusers calls the number of heads attention_head_dim.
HEADS = {"sd1": 4, "sd2": (2, 4, 4, 4), "sdxl": (2, 2, 4)}
SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def fill(module: nn.Module, seed: int) -> nn.Module:
    """Random weights that keep activations of order one, so that every layer matters for the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim == 1:
                weight.copy_(1 + 0.05 * noise if name.endswith("weight") else 0.02 * noise)
            elif "embedding.weight" in name:
                weight.copy_(noise)
            else:
                weight.copy_(noise * weight[0].numel() ** -0.5)
    return module.eval()


def build_unet(family: str, seed: int = 0) -> UNet2DConditionModel:
    """The U-Net of one family ("sd1", "sd2", "sdxl")."""
    unet = UNet2DConditionModel(
        sample_size=LATENT,
        layers_per_block=2,
        cross_attention_dim=CONTEXT_WIDTH,
        attention_head_dim=HEADS[family],
        use_linear_projection=family != "sd1",
        **(SDXL_LEVELS if family == "sdxl" else SD_LEVELS),
    )
    return fill(unet, seed)


def build_tower(
    family: str, name: str, tokenizer: CLIPTokenizer, positions: int = TOKENS, seed: int = 1
) -> CLIPTextModel | CLIPTextModelWithProjection:
    """One text encoder; tower "g" has a projection for the pooled output, only tower "l" has OpenAI's activation."""
    width, layers = TOWERS[family][name]
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=positions,
        hidden_act="quick_gelu" if name == "l" else "gelu",
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return fill(CLIPTextModelWithProjection(config) if name == "g" else CLIPTextModel(config), seed)


def build_vae(seed: int = 2) -> AutoencoderKL:
    """A VAE with 4 latent channels, one latent for 8 x 8 pixels."""
    vae = AutoencoderKL(
        block_out_channels=(32,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
    )
    return fill(vae, seed)


def toy_tokenizer(pad_token: str | None = None) -> CLIPTokenizer:
    """The toy world's tokenizer; it pads with the end token unless told otherwise."""
    tokenizer = load_tokenizer(Path(WEIGHTS) / "tokenizer")
    if pad_token is not None:
        tokenizer.pad_token = pad_token
    return tokenizer


def build(topology: str, seed: int = 0) -> StableDiffusionPipeline | StableDiffusionXLPipeline:
    """The pipeline of one topology ("sd2_v" is SD2.x with v-prediction)."""
    family = topology.removesuffix("_v")
    unet, vae = build_unet(family, seed), build_vae(seed + 2)
    scheduler = DDIMScheduler(**SCHEDULE, prediction_type="v_prediction" if topology == "sd2_v" else "epsilon")
    if family == "sdxl":
        # As in SDXL, the second tokenizer pads with "!".
        tokenizers = {"l": toy_tokenizer(), "g": toy_tokenizer("!")}
        return StableDiffusionXLPipeline(
            vae=vae,
            unet=unet,
            scheduler=scheduler,
            tokenizer=tokenizers["l"],
            text_encoder=build_tower(family, "l", tokenizers["l"], seed=seed + 1),
            tokenizer_2=tokenizers["g"],
            text_encoder_2=build_tower(family, "g", tokenizers["g"], seed=seed + 3),
            add_watermarker=False,
        )
    tower = next(iter(TOWERS[family]))
    tokenizer = toy_tokenizer()
    return StableDiffusionPipeline(
        vae=vae,
        unet=unet,
        scheduler=scheduler,
        tokenizer=tokenizer,
        text_encoder=build_tower(family, tower, tokenizer, seed=seed + 1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
