"""Train the judge on renders, on the autoencoder's reconstructions of them, and on pictures that show nothing."""

import math
import random
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from .autoencoder import PatchAutoencoder
from .dataset import RUNS, draw_all, to_pictures, to_tensor
from .judge import NAMES, NOTHING, Judge, truth
from .junk import decoded_noise, junk_pictures
from .render import render_empty
from .train_checkpoint import Checkpoint
from .vocabulary import (
    ACTIONS,
    HELD_OUT_ACTIONS,
    HELD_OUT_OBJECTS,
    HELD_OUT_SUBJECTS,
    NONE,
    OBJECTS,
    PAIR_ACTIONS,
    PAIR_SHARE,
    RANDOM_ACTION,
    SUBJECTS,
    Scene,
    draw_pair_scene,
    draw_scene,
)
from .weights import AUTOENCODER, JUDGE, WEIGHTS, read_weights, save_weights

SCENES = 40_000
EMPTY_SCENES = 1500
JUNK = 3000
DECODED_NOISE = 500
SCENE_SEED = 2
BATCH = 64
LEARNING_RATE = 2e-3
# The model's pictures are not quite like the world's: half of the pictures come back from disturbed latents.
LATENT_NOISE = 0.25


def judge_scene(rng: random.Random) -> Scene:
    """A scene of the whole world: every action, subject and object, the held-out ones as well."""
    subjects = (*SUBJECTS, *HELD_OUT_SUBJECTS)
    if rng.random() < PAIR_SHARE:
        return draw_pair_scene(rng, tuple(rng.sample(subjects, 2)), rng.choice(PAIR_ACTIONS))
    objects = (*OBJECTS, *HELD_OUT_OBJECTS, NONE, NONE, NONE)
    actions = (*ACTIONS, *HELD_OUT_ACTIONS, *(RANDOM_ACTION,) * 5)
    return draw_scene(rng, rng.choice(subjects), rng.choice(actions), object=rng.choice(objects))


def numbered(readings: list[dict[str, str]]) -> dict[str, torch.Tensor]:
    """Class numbers by head."""
    return {head: torch.tensor([names.index(r[head]) for r in readings]) for head, names in NAMES.items()}


@torch.no_grad()
def reconstructions(autoencoder: PatchAutoencoder, pictures: np.ndarray, noise: float) -> np.ndarray:
    """The pictures through the autoencoder, their latents disturbed by up to `noise`."""
    output = np.empty_like(pictures)
    for first in range(0, len(pictures), 256):
        latents = autoencoder.encode(to_tensor(pictures[first : first + 256]))
        latents += noise * torch.rand(len(latents), 1, 1, 1) * torch.randn_like(latents)
        output[first : first + 256] = to_pictures(autoencoder.decode(latents).clamp(-1, 1))
    return output


def augment(images: torch.Tensor) -> torch.Tensor:
    """Colour, blur, noise and shift, for pictures in [-1, 1]."""
    count = len(images)
    images = images * (1 + 0.1 * torch.randn(count, 3, 1, 1)) + 0.06 * torch.randn(count, 3, 1, 1)
    if torch.rand(1) < 0.4:
        factor = random.choice((0.5, 0.625, 0.75))
        small = F.interpolate(images, scale_factor=factor, mode="area")
        images = F.interpolate(small, size=images.shape[-2:], mode="bilinear")
    images = images + 0.1 * torch.rand(count, 1, 1, 1) * torch.randn_like(images)
    return torch.roll(images, (random.randint(-2, 2), random.randint(-3, 3)), (2, 3))


def judge_pictures() -> tuple[np.ndarray, dict[str, torch.Tensor]]:
    """What the judge is trained on: pictures uint8 (N, 64, 64, 3) and their class numbers by head."""
    scene_rng, rng = random.Random(SCENE_SEED), np.random.default_rng(SCENE_SEED)
    scenes = [judge_scene(scene_rng) for _ in range(SCENES)]
    pictures = draw_all(scenes)[0]
    autoencoder = PatchAutoencoder()
    autoencoder.load_state_dict(read_weights(WEIGHTS / AUTOENCODER))
    junk = junk_pictures(JUNK, pictures[: SCENES // 4], rng)
    # A quarter renders, a quarter plain reconstructions, the rest reconstructions of disturbed latents.
    quarter = SCENES // 4
    pictures[quarter : 2 * quarter] = reconstructions(autoencoder, pictures[quarter : 2 * quarter], 0.0)
    pictures[2 * quarter :] = reconstructions(autoencoder, pictures[2 * quarter :], LATENT_NOISE)
    empty_scenes = [draw_scene(scene_rng) for _ in range(EMPTY_SCENES)]
    empty = np.stack([render_empty(scene) for scene in empty_scenes])
    random_latents = decoded_noise(DECODED_NOISE, autoencoder, torch.Generator().manual_seed(SCENE_SEED))
    no_figure = dict.fromkeys(("action", "subject", "second", "color"), NONE)
    readings = [truth(scene) for scene in scenes] + [truth(scene) | no_figure for scene in empty_scenes]
    readings += [NOTHING] * (JUNK + DECODED_NOISE)
    return np.concatenate([pictures, empty, junk, random_latents]), numbered(readings)


def train_judge(minutes: float, seed: int, device: str, _start_from: Path | None) -> None:
    """Train for `minutes` and write the weights; goes on from the checkpoint in runs/ when there is one."""
    torch.set_num_threads(1)
    pictures, wanted = judge_pictures()
    judge = Judge().to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(judge.parameters(), LEARNING_RATE, weight_decay=0.02)
    checkpoint = Checkpoint(RUNS / "judge.pt", minutes, {"judge": judge, "optimizer": optimizer})
    torch.manual_seed(hash((seed, checkpoint.step)))
    random.seed(hash((seed, checkpoint.step)))
    rng = np.random.default_rng((seed, checkpoint.step))
    while (done := checkpoint.done) < 1:
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * (0.5 * (1 + math.cos(math.pi * done)) + 0.01)
        chosen = np.sort(rng.integers(0, len(pictures), BATCH))
        images = (augment(to_tensor(pictures[chosen])).to(device) + 1) / 2
        logits = judge(images.contiguous(memory_format=torch.channels_last))
        losses = {head: F.cross_entropy(values, wanted[head][chosen].to(device)) for head, values in logits.items()}
        loss = sum(losses.values()) + losses["action"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        checkpoint.step += 1
        if checkpoint.step % 200 == 0:
            print(f"{checkpoint.step * BATCH} pictures, {done:.1%} done, loss {loss.item():.3f}", flush=True)
        checkpoint.save_when_due()
    checkpoint.save()
    save_weights(judge.state_dict(), WEIGHTS / JUDGE)
