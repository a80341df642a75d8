"""GCFG in tests: branches, guiders and their sampling, and the Euler steps written out that it must agree with."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import comfy.sample
import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from comfy_extras import nodes_custom_sampler as custom
from concept_atelier.nodes.guidance import AtelierGCFGGuider, AtelierGuidanceBranch
from prompting import SEED, STEPS

OFF = {"rescale": 0.0, "apg_eta": 1.0, "apg_norm_threshold": 0.0, "apg_momentum": 0.0}


def branch(model, conditioning, weight, start=0.0, end=1.0, curve=None):
    return AtelierGuidanceBranch.execute(model, conditioning, weight, start, end, curve)[0]


def gcfg(model, unconditional, *branches, **options):
    """The output of the GCFG Guider: its guider, and what it costs in words."""
    named = {f"branch{i}": b for i, b in enumerate(branches)}
    return AtelierGCFGGuider.execute(model, unconditional, named, **OFF | options)


def empty_latent(size=8):
    """LATENT of zeros (1, 4, size, size)."""
    return {"samples": torch.zeros(1, 4, size, size)}


def advanced(guider, steps=STEPS, sampler="euler", latent=None):
    """SamplerCustomAdvanced with the normal scheduler."""
    sampling = guider.model_patcher.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "normal", steps)
    noise, sampler = custom.RandomNoise.execute(SEED)[0], custom.KSamplerSelect.execute(sampler)[0]
    return custom.SamplerCustomAdvanced.execute(noise, guider, sampler, sigmas, latent or empty_latent())[0]["samples"]


@contextmanager
def counting(*models: ModelPatcher) -> Iterator[list[int]]:
    """The batch sizes of every forward of the models' U-Nets, in order."""
    seen = []
    hooks = [
        model.model.diffusion_model.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
        for model in models
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def by_hand(clean: Callable[..., torch.Tensor], unconditional, branches, size=8):
    """Euler written out; every prediction is a clean(MODEL, conditioning, x, sigma) of its own.

    unconditional: (MODEL, conditioning). branches: [(MODEL, conditioning, weight)]. x: (1, 4, size, size). sigma: (1,).
    """
    sampling, latent = unconditional[0].model.model_sampling, empty_latent(size)["samples"]
    sigmas = comfy.samplers.calculate_sigmas(sampling, "normal", STEPS)
    x = sampling.noise_scaling(sigmas[0], comfy.sample.prepare_noise(latent, SEED), latent, True)
    for sigma, following in zip(sigmas[:-1, None], sigmas[1:, None]):
        D_0 = clean(*unconditional, x, sigma)
        D = D_0 + sum(w * (clean(model, conditioning, x, sigma) - D_0) for model, conditioning, w in branches)
        x = x + (x - D) / sigma * (following - sigma)
    return unconditional[0].model.process_latent_out(x)
