"""Sampling over a Backbone: live samples while training, pictures for scripts.

Inside ComfyUI pictures come from ComfyUI's own samplers; this is for what happens inside one node or without it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from .backbone import Backbone, TextContext
from .conditioning import StagedContext, encode_prompt
from .layouts import BoundLayout
from .prompts import Prompt
from .schedule import NoiseSchedule

BeforeStep = Callable[[Tensor, int, int], Tensor]  # (x_t, t, step) -> x_t


def ddim_sample(
    schedule: NoiseSchedule,
    predict_noise: Callable[[Tensor, int], Tensor],
    draw_noise: Callable[[], Tensor],
    steps: int,
    eta: float = 0.0,
    callback: Callable[[int], None] = lambda step: None,
    before_step: BeforeStep = lambda x_t, t, step: x_t,
) -> Tensor:
    """DDIM (Song et al. 2021).

    predict_noise: (x_t (B, C, h, w), t) -> eps with whatever guidance. draw_noise: gives noise (B, C, h, w), to start
    from and, with eta > 0, to add at each step. eta: 0 is deterministic, 1 is DDPM. callback: called with the number
    of finished steps, may raise to cancel. before_step: changes x_t before step number `step` predicts. Returns clean
    latents (B, C, h, w).
    """
    timesteps = schedule.sampling_timesteps(steps)
    x_t = draw_noise()
    with torch.no_grad():
        for i, t in enumerate(timesteps):
            x_t = before_step(x_t, t, i)
            eps = predict_noise(x_t, t)
            t_next = timesteps[i + 1] if i + 1 < steps else -1
            x_t = schedule.ddim_step(x_t, eps, t, t_next, eta, draw_noise() if eta else None)
            callback(i + 1)
    return x_t


def classifier_free(
    backbone: Backbone, context: StagedContext, unconditional: TextContext, cfg: float
) -> Callable[[Tensor, int], Tensor]:
    """eps_0 + cfg (eps - eps_0) (Ho & Salimans 2022) of a batch, for `ddim_sample`; at cfg 1 eps alone is computed.

    context, unconditional: of that batch.
    """

    def predict_noise(x_t: Tensor, t: int) -> Tensor:
        t_batch = torch.full((x_t.shape[0],), t, device=x_t.device)
        eps = backbone.predict_noise(x_t, t_batch, context.at(t))
        if cfg == 1:
            return eps
        eps_0 = backbone.predict_noise(x_t, t_batch, unconditional)
        return eps_0 + cfg * (eps - eps_0)

    return predict_noise


def noise_source(backbone: Backbone, seeds: Sequence[int], size: tuple[int, int]) -> Callable[[], Tensor]:
    """Gives, each time it is called, Gaussian noise (len(seeds), C, h, w) for pictures of size (H, W) in pixels.

    Every seed has its own random numbers, drawn on the CPU, so that a picture does not depend on its batch or device.
    seeds: any integers; those that are the same modulo 2^64 are one.
    """
    shape = (backbone.latent_channels, *(side // backbone.latent_scale for side in size))
    generators = [torch.Generator().manual_seed(seed % 2**64) for seed in seeds]
    return lambda: torch.stack([torch.randn(shape, generator=g) for g in generators]).to(backbone.device)


def paint(
    backbone: Backbone,
    prompts: Sequence[Prompt],
    vectors: Mapping[str, Mapping[str, Tensor]],
    layouts: Mapping[str, BoundLayout],
    seeds: Sequence[int],
    size: tuple[int, int],
    steps: int,
    cfg: float,
    eta: float = 0.0,
    callback: Callable[[int], None] = lambda step: None,
    guide: Callable[[StagedContext], BeforeStep] | None = None,
) -> Tensor:
    """One picture for each prompt, with its seed, in one batch: (len(prompts), H, W, 3) in 0..1.

    prompts: all with the same concepts. vectors, layouts: as for `encode_prompt`. size: (H, W) in pixels. steps, eta,
    callback: as for `ddim_sample`. cfg: as for `classifier_free`. guide: from the contexts of the batch to the
    `before_step` of `ddim_sample` (layout_guidance.guide_layout).
    """
    with torch.no_grad():
        context = StagedContext.cat(
            [
                encode_prompt(backbone.encode_text, backbone.layers, prompt, vectors, layouts, len(backbone.schedule))
                for prompt in prompts
            ]
        )
        empty = backbone.encode_text(Prompt(()), {})
        unconditional = TextContext.plain(empty.hidden, backbone.layers, empty.pooled).repeat(len(prompts))
        draw_noise = noise_source(backbone, seeds, size)
        predict_noise = classifier_free(backbone, context, unconditional, cfg)
        hooks = {} if guide is None else {"before_step": guide(context)}
        x_0 = ddim_sample(backbone.schedule, predict_noise, draw_noise, steps, eta, callback, **hooks)
        return backbone.decode_latent(x_0)
