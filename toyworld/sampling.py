"""Pictures from the toy model: a plain DDIM loop with classifier-free guidance."""

import numpy as np
import torch
from diffusers import DDIMScheduler

from .dataset import to_pictures
from .model import LATENT_SIZE, SCHEDULER, ToyModel
from .tokenizer import TOKENS

STEPS = 25
GUIDANCE = 3.0
# With eta 1, DDIM puts fresh noise in at each step, like ComfyUI's "euler_ancestral". Deterministic samplers keep the
# errors of the first steps, and there the network, whose normalisation spans only 2 channels of 8x8, cannot see
# how strong the noise is: their pictures stay grainy.
ETA = 1.0


def token_ids(tokenizer, captions: list[str]) -> torch.Tensor:
    """Token numbers (N, 24), padded with the end token as in training."""
    encoded = tokenizer(captions, padding="max_length", truncation=True, max_length=TOKENS)
    return torch.tensor(encoded["input_ids"])


@torch.no_grad()
def sample(
    toy: ToyModel,
    captions: list[str],
    seed: int,
    guidance: float = GUIDANCE,
    steps: int = STEPS,
    eta: float = ETA,
    batch: int = 32,
) -> np.ndarray:
    """One uint8 picture for each caption: (N, 64, 64, 3)."""
    device = next(toy.unet.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    unconditional = toy.text_encoder(input_ids=token_ids(toy.tokenizer, [""]).to(device)).last_hidden_state
    pictures = []
    for first in range(0, len(captions), batch):
        ids = token_ids(toy.tokenizer, captions[first : first + batch]).to(device)
        conditional = toy.text_encoder(input_ids=ids).last_hidden_state
        context = torch.cat([unconditional.expand_as(conditional), conditional])
        shape = (len(ids), toy.unet.config.in_channels, LATENT_SIZE, LATENT_SIZE)
        latents = torch.randn(shape, generator=generator).to(device)
        scheduler = DDIMScheduler(**SCHEDULER)
        scheduler.set_timesteps(steps)
        for timestep in scheduler.timesteps:
            noise = toy.unet(torch.cat([latents, latents]), timestep, context).sample
            without, with_text = noise.chunk(2)
            guided = without + guidance * (with_text - without)
            # The fresh noise is drawn here, and not on the device, so that every device gives the same pictures.
            fresh = torch.randn(shape, generator=generator).to(device) if eta else None
            latents = scheduler.step(guided, timestep, latents, eta=eta, variance_noise=fresh).prev_sample
        pictures.append(to_pictures(toy.autoencoder.decode(latents).clamp(-1, 1)))
    return np.concatenate(pictures)
