"""What the model is trained on: cached latents, loss weights and token numbers of the training pictures."""

from dataclasses import dataclass

import numpy as np
import torch

from .autoencoder import PATCH, PatchAutoencoder
from .dataset import PICTURES, RUNS, encode_all, patch_weights, training_pictures
from .model import TOKENIZER_FOLDER
from .sampling import token_ids
from .tokenizer import load_tokenizer
from .vocabulary import caption
from .weights import AUTOENCODER, WEIGHTS, read_weights


@dataclass
class TrainingSet:
    """What a step needs, in memory; token ids are (with background, without background) x pictures x tokens."""

    latents: torch.Tensor
    weights: torch.Tensor
    ids: torch.Tensor
    empty: torch.Tensor


def prepare_training_set() -> TrainingSet:
    """Encode the cached pictures and captions; written to runs/ on the first call."""
    cache = RUNS / "latents.pt"
    if cache.exists():
        return TrainingSet(**torch.load(cache, mmap=True))
    data = training_pictures(PICTURES)
    autoencoder = PatchAutoencoder()
    autoencoder.load_state_dict(read_weights(WEIGHTS / AUTOENCODER))
    tokenizer = load_tokenizer(WEIGHTS / TOKENIZER_FOLDER)
    with_background = [caption(scene) for scene in data.scenes]
    without = [caption(scene, drop_background=True) for scene in data.scenes]
    parts = {
        "latents": encode_all(autoencoder, data.pictures).half(),
        "weights": torch.cat([patch_weights(part, PATCH) for part in np.array_split(data.masks, 50)]).half(),
        "ids": torch.stack([token_ids(tokenizer, with_background), token_ids(tokenizer, without)]).short(),
        "empty": token_ids(tokenizer, [""]).short(),
    }
    torch.save(parts, cache)
    return TrainingSet(**parts)
