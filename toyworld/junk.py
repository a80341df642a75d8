"""Pictures that show nothing of the toy world, which the judge must not read anything from."""

import numpy as np
import torch
from torch.nn import functional as F

from .autoencoder import LATENT_CHANNELS, PATCH, PatchAutoencoder
from .dataset import to_pictures
from .render import SIZE


def noise(rng: np.random.Generator, _pictures: np.ndarray) -> np.ndarray:
    """Random values, from single pixels to coarse clouds."""
    cells = rng.choice((4, 8, 16, 32, SIZE))
    values = torch.from_numpy(rng.normal(rng.uniform(-0.5, 0.5), rng.uniform(0.2, 1.0), (1, 3, cells, cells))).float()
    return to_pictures(F.interpolate(values, size=(SIZE, SIZE), mode="bilinear").clamp(-1, 1))[0]


def blank(rng: np.random.Generator, _pictures: np.ndarray) -> np.ndarray:
    """One colour, or one colour running into another."""
    top, bottom = rng.integers(0, 256, (2, 3))
    share = np.linspace(0, 1, SIZE)[:, None, None] if rng.random() < 0.5 else np.zeros((SIZE, 1, 1))
    return np.broadcast_to(top * (1 - share) + bottom * share, (SIZE, SIZE, 3)).astype(np.uint8)


def shuffled(rng: np.random.Generator, pictures: np.ndarray) -> np.ndarray:
    """The patches of one picture in another order."""
    patch = int(rng.choice((8, 16)))
    count = SIZE // patch
    tiles = pictures[rng.integers(len(pictures))].reshape(count, patch, count, patch, 3).swapaxes(1, 2)
    tiles = rng.permutation(tiles.reshape(-1, patch, patch, 3)).reshape(count, count, patch, patch, 3)
    return tiles.swapaxes(1, 2).reshape(SIZE, SIZE, 3)


def patched_together(rng: np.random.Generator, pictures: np.ndarray) -> np.ndarray:
    """Patches of many pictures, each in its own place."""
    chosen = pictures[rng.integers(0, len(pictures), (SIZE // PATCH) ** 2)]
    picture = np.empty((SIZE, SIZE, 3), np.uint8)
    for index, other in enumerate(chosen):
        y, x = (PATCH * part for part in divmod(index, SIZE // PATCH))
        picture[y : y + PATCH, x : x + PATCH] = other[y : y + PATCH, x : x + PATCH]
    return picture


KINDS = {"noise": noise, "blank": blank, "shuffled": shuffled, "patched together": patched_together}


def junk_pictures(count: int, pictures: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """`count` pictures of all kinds in turn, uint8 (count, 64, 64, 3), partly cut out of `pictures`."""
    makers = list(KINDS.values())
    return np.stack([makers[index % len(makers)](rng, pictures) for index in range(count)])


@torch.no_grad()
def decoded_noise(count: int, autoencoder: PatchAutoencoder, generator: torch.Generator) -> np.ndarray:
    """What a model that learned nothing would sample: random latents through the decoder."""
    cells = SIZE // PATCH
    latents = torch.randn(count, LATENT_CHANNELS, cells, cells, generator=generator)
    return to_pictures(autoencoder.decode(latents).clamp(-1, 1))
