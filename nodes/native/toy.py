"""The bundled toy model as ComfyUI's own MODEL, CLIP and VAE, so that stock nodes run it like any checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import comfy.clip_model
import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import comfy.utils
import folder_paths
import torch
from torch import Tensor

from ...toyworld.autoencoder import LATENT_CHANNELS, PATCH, PatchAutoencoder
from ...toyworld.weights import AUTOENCODER, TEXT_ENCODER, UNET, WEIGHTS, read_weights

# What the weights do not tell: heads of the U-Net and of the text encoder, and the text encoder's activation.
HEADS = 4
ACTIVATION = "quick_gelu"
UNET_LEVELS = {
    "num_res_blocks": [1, 1],
    "channel_mult": [1, 2],
    "transformer_depth": [1, 1],
    "transformer_depth_middle": 1,
    "transformer_depth_output": [1, 1, 1, 1],
}
FAMILY = "toy"  # what the backbone asks the classes of MODEL and CLIP for
TOWER = "l"
TOKENIZER = WEIGHTS / "tokenizer"


class ToyParts(NamedTuple):
    """What the toy checkpoint gives to stock nodes."""

    model: comfy.model_patcher.ModelPatcher
    clip: comfy.sd.CLIP
    vae: comfy.sd.VAE


class ToyLatent(comfy.latent_formats.LatentFormat):
    """Latents of the patch autoencoder, which are of order one by themselves."""

    latent_channels = LATENT_CHANNELS


class ToyConfig(comfy.supported_models_base.BASE):
    """The toy U-Net."""

    atelier_family = FAMILY
    unet_extra_config = {"num_heads": HEADS, "num_head_channels": -1}
    latent_format = ToyLatent
    supported_inference_dtypes = [torch.float32]

    def inpaint_model(self) -> bool:
        """No: stock ComfyUI takes every U-Net with more than four input channels for an inpainting model."""
        return False


class ToyTextModel(comfy.clip_model.CLIPTextModel):
    """CLIP's text model with a vocabulary of its own size; stock ComfyUI's has 49408 pieces."""

    def __init__(self, config: dict[str, Any], dtype: torch.dtype, device: torch.device, operations: Any) -> None:
        super().__init__(config, dtype, device, operations)
        embedding = operations.Embedding(config["vocab_size"], config["hidden_size"], dtype=dtype, device=device)
        self.set_input_embeddings(embedding)


class ToyClipModel(comfy.sd1_clip.SD1ClipModel):
    """One CLIP tower, as in SD1.x, under a name of its own."""

    atelier_family = FAMILY


class ToyTokenizerLoader:
    """Gives the toy tokenizer where ComfyUI asks a tokenizer class of transformers."""

    @staticmethod
    def from_pretrained(folder: Path) -> Any:
        """The tokenizer of the two files in `folder`."""
        from ...toyworld.tokenizer import load_tokenizer

        return load_tokenizer(folder)


@cache
def toy_checkpoint() -> ToyParts:
    """MODEL, CLIP and VAE with the bundled weights, loaded once."""
    return build_toy(*(read_weights(WEIGHTS / name) for name in (UNET, TEXT_ENCODER, AUTOENCODER)))


def build_toy(
    unet: Mapping[str, Tensor], text_encoder: Mapping[str, Tensor], autoencoder: Mapping[str, Tensor]
) -> ToyParts:
    """MODEL, CLIP and VAE in float32 out of state dicts with the keys of diffusers, transformers and the toy world."""
    vae = build_vae(autoencoder)
    model = build_model(unet)
    latent_format = model.model.latent_format
    latent_format.latent_rgb_factors, latent_format.latent_rgb_factors_bias = preview_colors(vae.first_stage_model)
    return ToyParts(model, build_clip(text_encoder), vae)


def build_model(unet: Mapping[str, Tensor], disable_dynamic: bool = True) -> comfy.model_patcher.ModelPatcher:
    """The U-Net from diffusers' keys.

    disable_dynamic: ComfyUI passes it when it wants a second copy; a model this small never streams its weights.
    """
    config = ToyConfig(
        UNET_LEVELS
        | {
            "image_size": 32,
            "in_channels": LATENT_CHANNELS,
            "out_channels": LATENT_CHANNELS,
            "model_channels": unet["conv_in.weight"].shape[0],
            "context_dim": unet["mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"].shape[1],
            "use_spatial_transformer": True,
            "use_linear_in_transformer": False,
            "adm_in_channels": None,
            "legacy": False,
        }
    )
    config.set_inference_dtype(torch.float32, None)
    load_device = comfy.model_management.get_torch_device()
    offload_device = comfy.model_management.unet_offload_device()
    model = comfy.model_base.BaseModel(config, device=offload_device)
    names = comfy.utils.unet_to_diffusers(config.unet_config)
    model.diffusion_model.load_state_dict({names[key]: weight for key, weight in unet.items()})
    patcher = comfy.model_patcher.ModelPatcher(model, load_device, offload_device)
    # Core's LoRA trainer and multi-GPU nodes ask for an untouched second copy through this.
    patcher.cached_patcher_init = (build_model, (unet,))
    return patcher


def build_clip(text_encoder: Mapping[str, Tensor]) -> comfy.sd.CLIP:
    """The text encoder from transformers' keys (with their prefix "text_model."), as tower "l"."""
    pieces, width = text_encoder["text_model.embeddings.token_embedding.weight"].shape
    positions = text_encoder["text_model.embeddings.position_embedding.weight"].shape[0]
    tokenizer = ToyTokenizerLoader.from_pretrained(TOKENIZER)
    config = {
        "vocab_size": pieces,
        "hidden_size": width,
        "intermediate_size": text_encoder["text_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": sum(key.endswith("mlp.fc1.weight") for key in text_encoder),
        "num_attention_heads": HEADS,
        "max_position_embeddings": positions,
        "hidden_act": ACTIVATION,
        "eos_token_id": tokenizer.eos_token_id,
    }
    special_tokens = {
        "start": tokenizer.bos_token_id,
        "end": tokenizer.eos_token_id,
        "pad": tokenizer.pad_token_id,
    }
    encoder_class = partial(
        comfy.sd1_clip.SDClipModel,
        max_length=positions,
        textmodel_json_config=config,
        model_class=ToyTextModel,
        special_tokens=special_tokens,
        return_projected_pooled=False,
    )
    tokenizer_class = partial(
        comfy.sd1_clip.SDTokenizer,
        TOKENIZER,
        max_length=positions,
        embedding_size=width,
        embedding_key=f"clip_{TOWER}",
        tokenizer_class=ToyTokenizerLoader,
    )
    target = comfy.supported_models_base.ClipTarget(
        partial(comfy.sd1_clip.SD1Tokenizer, clip_name=TOWER, tokenizer=tokenizer_class),
        partial(ToyClipModel, clip_name=TOWER, clip_model=encoder_class),
    )
    clip = comfy.sd.CLIP(
        target,
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        model_options={"dtype": torch.float32},
        disable_dynamic=True,
    )
    # The model was trained without a projection; ComfyUI's class has one, which must not be left uninitialised.
    projection = {"text_projection.weight": torch.eye(width)}
    clip.cond_stage_model.clip_l.transformer.load_state_dict({**text_encoder, **projection})
    return clip


def build_vae(autoencoder: Mapping[str, Tensor]) -> comfy.sd.VAE:
    """The patch autoencoder as a VAE.

    ComfyUI's smallest own kind of VAE is built first, so that whatever a VAE has to have is there; then what is
    particular to the autoencoder is put in its place.
    """
    vae = comfy.sd.VAE(sd={"pixel_space_vae": torch.ones(())}, dtype=torch.float32)
    module = PatchAutoencoder()
    module.load_state_dict(autoencoder)
    module.eval().requires_grad_(False)
    vae.first_stage_model = module
    vae.patcher = comfy.model_patcher.ModelPatcher(module, vae.device, comfy.model_management.vae_offload_device())
    vae.size = comfy.model_management.module_size(module)
    vae.latent_channels = LATENT_CHANNELS
    vae.downscale_ratio = vae.upscale_ratio = PATCH
    # Generous: the widest activations hold 3 values a pixel while encoding and 768 a latent while decoding.
    vae.memory_used_encode = lambda shape, dtype: 16 * shape[2] * shape[3] * dtype.itemsize
    vae.memory_used_decode = lambda shape, dtype: 4096 * shape[2] * shape[3] * dtype.itemsize
    vae.process_input = lambda image: image * 2 - 1
    # ComfyUI uses the tensor it passes in, not what is returned: this has to work in place.
    vae.process_output = lambda image: image.add_(1).div_(2).clamp_(0, 1)
    return vae


def preview_colors(autoencoder: PatchAutoencoder) -> tuple[list[list[float]], list[float]]:
    """What one latent adds to the mean colour of its patch: (channels, 3) factors and the colour without it.

    Exact for the linear part of the decoder, which carries nearly all of a picture.
    """
    factors = autoencoder.unproject.weight.mean(dim=(2, 3))
    bias = autoencoder.unproject.bias + autoencoder.unproject_more[-2].bias.view(3, PATCH * PATCH).mean(dim=1)
    return factors.tolist(), bias.tolist()
