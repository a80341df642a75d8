"""Train the autoencoder: principal components first, then the learned branches."""

import math
import time

import numpy as np
import torch
from torch.nn import functional as F

from .autoencoder import PatchAutoencoder
from .dataset import PICTURES, RUNS, draw_all, held_out_scenes, to_pictures, to_tensor, training_pictures
from .render import picture_grid
from .weights import AUTOENCODER, WEIGHTS, save_weights

PRINCIPAL_PICTURES = 3000
BATCH = 64
LEARNING_RATE = 1.5e-3
MAX_LATENT_NOISE = 0.3


@torch.no_grad()
def psnr(autoencoder: PatchAutoencoder, images: torch.Tensor) -> float:
    """Mean peak signal-to-noise ratio of the reconstructions in dB, for pictures in [-1, 1]."""
    error = (autoencoder(images).clamp(-1, 1) - images) / 2
    return (-10 * torch.log10(error.square().mean((1, 2, 3)))).mean().item()


def train_decoder(minutes: float, seed: int, device: str) -> None:
    """Train the decoder alone, half of the time on disturbed latents, so that it forgives the model's grain.

    Latents stay as they are: this may go on after the model's training has begun.
    """
    train_autoencoder(minutes, seed, device, decoder_only=True)


def train_autoencoder(minutes: float, seed: int, device: str, decoder_only: bool = False) -> None:
    """Train for `minutes` and write the weights; resumes from the checkpoint in runs/ when there is one."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    data = training_pictures(PICTURES)
    held_out = to_tensor(draw_all(held_out_scenes(256))[0]).to(device)
    model = PatchAutoencoder().to(device)
    checkpoint = RUNS / "autoencoder.pt"
    if checkpoint.exists():
        model.load_state_dict(torch.load(checkpoint, map_location=device))
    else:
        model.start_from_principal_components(to_tensor(data.pictures[:PRINCIPAL_PICTURES]).to(device))
    for layer in (model.project, model.project_more):
        layer.requires_grad_(not decoder_only)
    print(f"start: {psnr(model, held_out):.2f} dB", flush=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], LEARNING_RATE, betas=(0.9, 0.99))
    start, step = time.time(), 0
    while (done := (time.time() - start) / (minutes * 60)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * (0.5 * (1 + math.cos(math.pi * done)) + 0.01)
        images = to_tensor(data.pictures[np.sort(rng.integers(0, PICTURES, BATCH))]).to(device)
        latents = model.encode(images)
        output = model.decode(_disturbed(latents) if decoder_only else latents)
        # The last term keeps the latents at zero mean and overall RMS 1, as the diffusion model wants them.
        scale = latents.mean((0, 2, 3)).square().mean() + (latents.square().mean().sqrt() - 1).square()
        loss = 4 * F.mse_loss(output, images) + 0.3 * F.l1_loss(output, images) + 0.01 * scale
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 200 == 0:
            seen, speed = step * BATCH, step * BATCH / (time.time() - start)
            print(f"{seen} pictures, {speed:.0f}/s, loss {loss.item():.4f}, {psnr(model, held_out):.2f} dB", flush=True)
            torch.save(model.state_dict(), checkpoint)
    torch.save(model.state_dict(), checkpoint)
    save_weights(model.state_dict(), WEIGHTS / AUTOENCODER)
    with torch.no_grad():
        latents = model.encode(held_out)
        output = to_pictures(model.decode(latents[:16]))
    channel_rms = " ".join(f"{v:.2f}" for v in latents.square().mean((0, 2, 3)).sqrt().tolist())
    print(f"end: {psnr(model, held_out):.2f} dB, RMS {latents.square().mean().sqrt():.3f}, by channel {channel_rms}")
    picture_grid([*to_pictures(held_out[:16]), *output], 16).save(RUNS / "autoencoder.png")


def _disturbed(latents: torch.Tensor) -> torch.Tensor:
    strength = (torch.rand(len(latents), 1, 1, 1, device=latents.device) * 2 - 1).clamp(min=0) * MAX_LATENT_NOISE
    return latents + strength * torch.randn_like(latents)
