"""Train the judge on renders and on the autoencoder's reconstructions of them."""

import math
import random
import time

import numpy as np
import torch
from torch.nn import functional as F

from .autoencoder import PatchAutoencoder
from .dataset import RUNS, draw_all, to_pictures, to_tensor
from .judge import NAMES, Judge, truth
from .vocabulary import (
    ACTIONS,
    HELD_OUT_ACTIONS,
    HELD_OUT_OBJECTS,
    HELD_OUT_SUBJECTS,
    NONE,
    OBJECTS,
    RANDOM_ACTION,
    SUBJECTS,
    Scene,
    draw_scene,
)
from .weights import AUTOENCODER, JUDGE, WEIGHTS, read_weights, save_weights

SCENES = 30_000
SCENE_SEED = 2
TEST_SCENES = 1000
BATCH = 64
LEARNING_RATE = 2e-3
# The judge must read what the model was not trained on, too; half of the pictures come back from noised latents.
LATENT_NOISE = 0.25
CHECKPOINT_SECONDS = 120


def judge_scene(rng: random.Random) -> Scene:
    """A scene of the whole world: every action, subject and object, the held-out ones as well."""
    objects = (*OBJECTS, *HELD_OUT_OBJECTS, NONE, NONE, NONE)
    actions = (*ACTIONS, *HELD_OUT_ACTIONS, *(RANDOM_ACTION,) * 4)
    return draw_scene(
        rng,
        subject=rng.choice((*SUBJECTS, *HELD_OUT_SUBJECTS)),
        action=rng.choice(actions),
        object=rng.choice(objects),
    )


def labels(scenes: list[Scene]) -> dict[str, torch.Tensor]:
    """Class numbers by head."""
    truths = [truth(scene) for scene in scenes]
    return {head: torch.tensor([names.index(t[head]) for t in truths]) for head, names in NAMES.items()}


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


def train_judge(minutes: float, seed: int, device: str) -> None:
    """Train for `minutes` and write the weights; goes on from the checkpoint in runs/ when there is one."""
    torch.manual_seed(seed)
    random.seed(seed)
    torch.set_num_threads(1)
    rng = np.random.default_rng(seed)
    scene_rng = random.Random(SCENE_SEED)
    scenes = [judge_scene(scene_rng) for _ in range(SCENES)]
    pictures = draw_all(scenes)[0]
    autoencoder = PatchAutoencoder()
    autoencoder.load_state_dict(read_weights(WEIGHTS / AUTOENCODER))
    # By quarters: renders, plain reconstructions, reconstructions of disturbed latents. The last are tests.
    pictures[SCENES // 4 : SCENES // 2] = reconstructions(autoencoder, pictures[SCENES // 4 : SCENES // 2], 0.0)
    pictures[SCENES // 2 :] = reconstructions(autoencoder, pictures[SCENES // 2 :], LATENT_NOISE)
    wanted = labels(scenes)
    judge = Judge().to(device, memory_format=torch.channels_last)
    checkpoint = RUNS / "judge.pt"
    if checkpoint.exists():
        judge.load_state_dict(torch.load(checkpoint, map_location=device))
    optimizer = torch.optim.AdamW(judge.parameters(), LEARNING_RATE, weight_decay=0.02)
    start = saved = time.time()
    step = 0
    while (done := (time.time() - start) / (minutes * 60)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * (0.5 * (1 + math.cos(math.pi * done)) + 0.01)
        chosen = np.sort(rng.integers(0, SCENES - TEST_SCENES, BATCH))
        images = (augment(to_tensor(pictures[chosen])).to(device) + 1) / 2
        logits = judge(images.contiguous(memory_format=torch.channels_last))
        losses = {head: F.cross_entropy(values, wanted[head][chosen].to(device)) for head, values in logits.items()}
        loss = sum(losses.values()) + losses["action"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        if step % 100 == 0:
            speed = step * BATCH / (time.time() - start)
            print(f"{step * BATCH} pictures, {speed:.0f}/s, loss {loss.item():.3f}", flush=True)
        if time.time() - saved > CHECKPOINT_SECONDS:
            torch.save(judge.state_dict(), checkpoint)
            saved = time.time()
    judge.eval()
    torch.save(judge.state_dict(), checkpoint)
    save_weights(judge.state_dict(), WEIGHTS / JUDGE)
    test = slice(SCENES - TEST_SCENES, SCENES)
    with torch.no_grad():
        logits = judge(((to_tensor(pictures[test]) + 1) / 2).to(device))
    right = {head: (v.argmax(1).cpu() == wanted[head][test]).float().mean().item() for head, v in logits.items()}
    print("on reconstructions of disturbed latents:", {head: f"{value:.1%}" for head, value in right.items()})
