"""The toy world's autoencoder: principal components of 8x8 patches, refined by small learned branches.

It needs nothing but torch, so that ComfyUI can use it as a first-stage model.
"""

import torch
from torch import nn

PATCH = 8
LATENT_CHANNELS = 24
_PATCH_VALUES = 3 * PATCH * PATCH


class PatchAutoencoder(nn.Module):
    """Pictures (B, 3, H, W) in [-1, 1] to latents (B, 24, H/8, W/8) and back; H and W are multiples of 8."""

    def __init__(self, latent_channels: int = LATENT_CHANNELS, width: int = 96):
        super().__init__()
        self.latent_channels = latent_channels
        self.project = nn.Conv2d(3, latent_channels, PATCH, PATCH)
        self.unproject = nn.ConvTranspose2d(latent_channels, 3, PATCH, PATCH)
        self.project_more = nn.Sequential(
            nn.PixelUnshuffle(PATCH),
            nn.Conv2d(_PATCH_VALUES, width, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(width, latent_channels, 1),
        )
        self.unproject_more = nn.Sequential(
            nn.Conv2d(latent_channels, width, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(width, _PATCH_VALUES, 1),
            nn.PixelShuffle(PATCH),
        )
        self.refine = nn.Sequential(
            nn.PixelUnshuffle(2),
            nn.Conv2d(12, 48, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(48, 48, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(48, 12, 3, padding=1),
            nn.PixelShuffle(2),
        )
        # The branches start at zero: before training the module is the linear projection alone.
        for layer in (self.project_more[-1], self.unproject_more[-2], self.refine[-2]):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Latents of zero mean and overall RMS 1 (over the toy world's pictures)."""
        return self.project(images) + self.project_more(images)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Pictures; values may leave [-1, 1] a little."""
        coarse = self.unproject(latents) + self.unproject_more(latents)
        return coarse + self.refine(coarse)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Reconstructions."""
        return self.decode(self.encode(images))

    @torch.no_grad()
    def start_from_principal_components(self, images: torch.Tensor) -> None:
        """Set the linear projection to the principal components of the images' patches.

        All components share one scale, so that coarse structure keeps its natural weight. Unit variance for each
        would drown it: a diffusion model's error at high noise is about the same for every channel, and coarse
        structure must stand out of it to be drawn first.
        """
        patches = nn.functional.unfold(images, PATCH, stride=PATCH).transpose(1, 2).reshape(-1, _PATCH_VALUES)
        mean = patches.mean(0)
        variances, directions = torch.linalg.eigh(torch.cov((patches - mean).T))
        directions = directions.flip(1)[:, : self.latent_channels]
        natural = variances.flip(0)[: self.latent_channels].clamp_min(1e-8).sqrt()
        gain = 1 / natural.square().mean().sqrt()
        forward = directions * gain
        shape = (self.latent_channels, 3, PATCH, PATCH)
        self.project.weight.copy_(forward.T.reshape(shape))
        self.project.bias.copy_(-(mean @ forward))
        self.unproject.weight.copy_((directions / gain).T.reshape(shape))
        self.unproject.bias.zero_()
        # The mean patch differs from pixel to pixel: it goes into the bias in front of the pixel shuffle.
        self.unproject_more[-2].bias.copy_(mean)
