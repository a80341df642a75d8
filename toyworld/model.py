"""The tiny SD-like model in diffusers' and transformers' own classes, loadable by ComfyUI's classes as well."""

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .autoencoder import LATENT_CHANNELS, PATCH, PatchAutoencoder
from .render import SIZE
from .tokenizer import TOKENS, load_tokenizer
from .weights import AUTOENCODER, TEXT_ENCODER, UNET, WEIGHTS, read_weights

LATENT_SIZE = SIZE // PATCH
UNET_CHANNELS = (64, 128)
TEXT_WIDTH = 128
TEXT_LAYERS = 2
HEADS = 4
# Stable Diffusion's schedule, which is also ComfyUI's default.
TRAIN_STEPS = 1000
BETA_START, BETA_END, BETA_SCHEDULE = 0.00085, 0.012, "scaled_linear"
SCHEDULER = {
    "num_train_timesteps": TRAIN_STEPS,
    "beta_start": BETA_START,
    "beta_end": BETA_END,
    "beta_schedule": BETA_SCHEDULE,
    "prediction_type": "epsilon",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
TOKENIZER_FOLDER = "tokenizer"
_TEXT_PREFIX = "text_model."


@dataclass
class ToyModel:
    """The four parts of the toy model."""

    unet: UNet2DConditionModel
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    autoencoder: PatchAutoencoder


def build_unet() -> UNet2DConditionModel:
    """The U-Net with random weights: 7 cross-attention layers, at 8x8 and 4x4."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=UNET_CHANNELS,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        # diffusers' historical misnomer: this is the number of heads.
        attention_head_dim=HEADS,
        norm_num_groups=32,
        norm_eps=1e-5,
    )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """The text encoder with random weights."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            num_hidden_layers=TEXT_LAYERS,
            num_attention_heads=HEADS,
            max_position_embeddings=TOKENS,
            hidden_act="quick_gelu",
            projection_dim=TEXT_WIDTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def text_encoder_state(text_encoder: CLIPTextModel) -> dict[str, torch.Tensor]:
    """The text encoder's state with the keys of transformers 4 and ComfyUI; transformers 5 has no prefix."""
    return {_TEXT_PREFIX + name.removeprefix(_TEXT_PREFIX): value for name, value in text_encoder.state_dict().items()}


def load_text_encoder_state(text_encoder: CLIPTextModel, state: dict[str, torch.Tensor]) -> None:
    """Load `text_encoder_state`'s keys under either version of transformers."""
    prefixed = any(name.startswith(_TEXT_PREFIX) for name in text_encoder.state_dict())
    if not prefixed:
        state = {name.removeprefix(_TEXT_PREFIX): value for name, value in state.items()}
    result = text_encoder.load_state_dict(state, strict=False)
    # The position ids are a constant buffer that only some versions keep in the state.
    missing = [name for name in result.missing_keys if not name.endswith("position_ids")]
    if missing or result.unexpected_keys:
        raise ValueError(f"The text encoder's weights do not fit: {missing} {result.unexpected_keys}")


def load_toy(weights_dir: Path = WEIGHTS, random_weights: bool = False) -> ToyModel:
    """The toy model in single precision, frozen. `random_weights` builds the same random one each time, for tests."""
    tokenizer = load_tokenizer(Path(weights_dir) / TOKENIZER_FOLDER)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        toy = ToyModel(build_unet(), build_text_encoder(tokenizer), tokenizer, PatchAutoencoder())
    if not random_weights:
        toy.unet.load_state_dict(read_weights(Path(weights_dir) / UNET))
        load_text_encoder_state(toy.text_encoder, read_weights(Path(weights_dir) / TEXT_ENCODER))
        toy.autoencoder.load_state_dict(read_weights(Path(weights_dir) / AUTOENCODER))
    for part in (toy.unet, toy.text_encoder, toy.autoencoder):
        part.eval().requires_grad_(False)
    return toy
