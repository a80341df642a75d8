"""How tests compare results: pictures up to rounding, weights to the bit."""

import hashlib

import comfy.model_management
from torch import Tensor


def relative(ours: Tensor, reference: Tensor) -> float:
    """Largest difference over largest value; both of the same shape."""
    assert ours.shape == reference.shape
    return ((ours - reference).abs().max() / reference.abs().max()).item()


def digest(parts) -> str:
    """A hash of every weight of MODEL, CLIP and VAE, without their patches."""
    comfy.model_management.unload_all_models()  # a clone of another test may have left its patches in the weights
    hashes = hashlib.sha256()
    for part in (parts.model.model, parts.clip.cond_stage_model, parts.vae.first_stage_model):
        for weight in part.state_dict().values():
            hashes.update(weight.numpy().tobytes())
    return hashes.hexdigest()
