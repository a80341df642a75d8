"""Where the bundled weights are and how they are written and read: safetensors in half precision."""

import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

WEIGHTS = Path(__file__).parent / "weights"
UNET = "unet.safetensors"
TEXT_ENCODER = "text_encoder.safetensors"
AUTOENCODER = "autoencoder.safetensors"
JUDGE = "judge.safetensors"
LAYOUT_PREDICTOR = "layout/predictor.safetensors"


def save_weights(state: dict[str, torch.Tensor], path: Path) -> None:
    """Write floating-point tensors in half precision; a reader never sees half a file."""
    halves = {
        name: tensor.detach().to("cpu", torch.float16).contiguous()
        for name, tensor in state.items()
        if tensor.is_floating_point()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    save_file(halves, str(temporary))
    os.replace(temporary, path)


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of the file in single precision."""
    return {name: tensor.float() for name, tensor in load_file(str(path)).items()}
