"""Train the autoencoder: principal components first, then the learned branches."""

import math
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from .autoencoder import PatchAutoencoder
from .dataset import PICTURES, RUNS, draw_all, held_out_scenes, to_pictures, to_tensor, training_pictures
from .render import picture_grid
from .train_checkpoint import Checkpoint
from .weights import AUTOENCODER, WEIGHTS, read_weights, save_weights

PRINCIPAL_PICTURES = 3000
BATCH = 32
LEARNING_RATE = 1.5e-3
MAX_LATENT_NOISE = 0.3


@torch.no_grad()
def psnr(autoencoder: PatchAutoencoder, images: torch.Tensor) -> float:
    """Mean peak signal-to-noise ratio of the reconstructions in dB, for pictures in [-1, 1]."""
    error = (autoencoder(images).clamp(-1, 1) - images) / 2
    return (-10 * torch.log10(error.square().mean((1, 2, 3)))).mean().item()


def train_autoencoder(minutes: float, seed: int, device: str, start_from: Path | None) -> None:
    """Train encoder and decoder for `minutes`, from principal components or from the weights in `start_from`."""
    model = PatchAutoencoder()
    if start_from:
        model.load_state_dict(read_weights(start_from / AUTOENCODER))
    else:
        images = to_tensor(training_pictures(PICTURES).pictures[:PRINCIPAL_PICTURES])
        model.start_from_principal_components(images)
    _train(model.to(device), RUNS / "autoencoder.pt", minutes, seed, device, decoder_only=False)


def train_decoder(minutes: float, seed: int, device: str, _start_from: Path | None) -> None:
    """Train the bundled decoder on, half of the time on disturbed latents, so that it forgives the model's grain.

    Latents stay as they are: this may go on after the model's training has begun.
    """
    model = PatchAutoencoder()
    model.load_state_dict(read_weights(WEIGHTS / AUTOENCODER))
    for layer in (model.project, model.project_more):
        layer.requires_grad_(False)
    _train(model.to(device), RUNS / "decoder.pt", minutes, seed, device, decoder_only=True)


def _train(
    model: PatchAutoencoder, checkpoint_file: Path, minutes: float, seed: int, device: str, decoder_only: bool
) -> None:
    data = training_pictures(PICTURES)
    held_out = to_tensor(draw_all(held_out_scenes(256))[0]).to(device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], LEARNING_RATE, betas=(0.9, 0.99))
    checkpoint = Checkpoint(checkpoint_file, minutes, {"model": model, "optimizer": optimizer})
    torch.manual_seed(hash((seed, checkpoint.step)))
    rng = np.random.default_rng((seed, checkpoint.step))
    print(f"start at step {checkpoint.step}: {psnr(model, held_out):.2f} dB", flush=True)
    while (done := checkpoint.done) < 1:
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * (0.5 * (1 + math.cos(math.pi * done)) + 0.01)
        images = to_tensor(data.pictures[np.sort(rng.integers(0, PICTURES, BATCH))]).to(device)
        latents = model.encode(images)
        output = model.decode(_disturbed(latents) if decoder_only else latents)
        # The last term keeps the latents at zero mean and overall RMS 1, as the diffusion model wants them.
        scale = latents.mean((0, 2, 3)).square().mean() + (latents.square().mean().sqrt() - 1).square()
        loss = 4 * F.mse_loss(output, images) + 0.1 * F.l1_loss(output, images) + 0.01 * scale
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        checkpoint.step += 1
        if checkpoint.step % 400 == 0:
            print(
                f"{checkpoint.step * BATCH} pictures, {done:.1%} done, loss {loss.item():.4f}, "
                f"{psnr(model, held_out):.2f} dB",
                flush=True,
            )
        checkpoint.save_when_due()
    checkpoint.save()
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
