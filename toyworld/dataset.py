"""The cached training set: scenes, their captions, pictures, figure masks and latents, rendered once into runs/."""

import multiprocessing
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from .autoencoder import PatchAutoencoder
from .render import SIZE, render_with_mask
from .vocabulary import Scene, draw_training_scene

RUNS = Path(__file__).parent / "runs"
TRAINING_SEED = 1
PICTURES = 100_000
RENDER_CHUNK = 2500
# Everything that is measured is drawn from seeds from here on; nothing is trained on them.
HELD_OUT_SEED = 1_000_000


@dataclass(frozen=True)
class Pictures:
    """Scenes with their pictures and masks as uint8 arrays (N, 64, 64, 3) and (N, 64, 64)."""

    scenes: list[Scene]
    pictures: np.ndarray
    masks: np.ndarray


def training_scenes(count: int) -> list[Scene]:
    """The first `count` training scenes, always the same."""
    rng = random.Random(TRAINING_SEED)
    return [draw_training_scene(rng) for _ in range(count)]


def held_out_scenes(count: int, seed: int = HELD_OUT_SEED) -> list[Scene]:
    """Scenes of the training vocabulary from a seed that training never draws from."""
    rng = random.Random(seed)
    return [draw_training_scene(rng) for _ in range(count)]


def training_pictures(count: int) -> Pictures:
    """The first `count` training scenes with pictures and masks, rendered on the first call."""
    scenes = training_scenes(count)
    picture_file, mask_file = RUNS / f"pictures_{count}.npy", RUNS / f"masks_{count}.npy"
    if not mask_file.exists():
        RUNS.mkdir(exist_ok=True)
        parts = [scenes[first : first + RENDER_CHUNK] for first in range(0, count, RENDER_CHUNK)]
        with multiprocessing.get_context("spawn").Pool() as pool:
            pictures, masks = (np.concatenate(drawn) for drawn in zip(*pool.map(draw_all, parts)))
        np.save(picture_file, pictures)
        np.save(mask_file, masks)
    return Pictures(scenes, np.load(picture_file, mmap_mode="r"), np.load(mask_file, mmap_mode="r"))


def draw_all(scenes: list[Scene]) -> tuple[np.ndarray, np.ndarray]:
    """Pictures and masks of the scenes."""
    pictures = np.empty((len(scenes), SIZE, SIZE, 3), np.uint8)
    masks = np.empty((len(scenes), SIZE, SIZE), np.uint8)
    for index, scene in enumerate(scenes):
        pictures[index], masks[index] = render_with_mask(scene)
    return pictures, masks


def to_tensor(pictures: np.ndarray) -> torch.Tensor:
    """uint8 (N, H, W, 3) to floats (N, 3, H, W) in [-1, 1]."""
    return torch.tensor(np.asarray(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_pictures(images: torch.Tensor) -> np.ndarray:
    """Floats (N, 3, H, W) in [-1, 1] to uint8 (N, H, W, 3)."""
    return ((images.permute(0, 2, 3, 1).float().cpu().numpy() + 1) * 127.5).round().clip(0, 255).astype(np.uint8)


@torch.no_grad()
def encode_all(autoencoder: PatchAutoencoder, pictures: np.ndarray, batch: int = 256) -> torch.Tensor:
    """Latents of all pictures."""
    parts = [autoencoder.encode(to_tensor(pictures[i : i + batch])) for i in range(0, len(pictures), batch)]
    return torch.cat(parts)


def patch_weights(masks: np.ndarray, patch: int) -> torch.Tensor:
    """Loss weight of each latent cell (N, 1, H/8, W/8): cells that the figure touches count up to about four times."""
    covered = torch.from_numpy(np.ascontiguousarray(masks)).float()[:, None] / 255
    share = torch.nn.functional.avg_pool2d(covered, patch)
    return share.mul(4).clamp(max=1) * 2.0 + 0.6
