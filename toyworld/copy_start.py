"""A starting point from which the narrow network learns much sooner."""

import torch
from diffusers import UNet2DConditionModel


@torch.no_grad()
def start_as_copy(unet: UNet2DConditionModel) -> None:
    """Let the untrained network answer with its input, which at high noise is the right answer.

    From random weights, copying many latent channels through a narrow network takes most of the training. The
    first convolution writes each latent channel and its negative side by side, so that they share a group of the
    last normalisation; the outermost skip connection carries them there; and silu(x) - silu(-x) = x.
    """
    channels = unet.config.in_channels
    last = unet.up_blocks[-1].resnets[-1]
    carried = unet.conv_in.out_channels
    index = torch.arange(channels)
    unet.conv_in.weight[: 2 * channels] = 0
    unet.conv_in.weight[2 * index, index, 1, 1] = 1
    unet.conv_in.weight[2 * index + 1, index, 1, 1] = -1
    unet.conv_in.bias[: 2 * channels] = 0
    both = torch.arange(2 * channels)
    last.conv_shortcut.weight[: 2 * channels] = 0
    # The skip comes after the features from below in the concatenation.
    last.conv_shortcut.weight[both, last.conv_shortcut.in_channels - carried + both] = 1
    last.conv_shortcut.bias[: 2 * channels] = 0
    for layer in (last.conv2, unet.up_blocks[-1].attentions[-1].proj_out, unet.conv_out):
        layer.weight.zero_()
        layer.bias.zero_()
    unet.conv_out.weight[index, 2 * index, 1, 1] = 1
    unet.conv_out.weight[index, 2 * index + 1, 1, 1] = -1
