"""Concepts of random vectors, prompts with them, and a few sampling steps, on tiny models."""

import torch
from concept_atelier.kernels.concept import Concept
from concept_atelier.nodes.apply import AtelierApplyConcepts, AtelierTextEncode
from concept_atelier.nodes.native.model_kind import cross_attention_layers
from concept_atelier.nodes.native.text import describe_clip

import nodes as comfy_nodes

STEPS, CFG, SEED = 3, 5.0, 3


def make_concept(tiny, name, layout, seed=0, **metadata):
    """A concept of random vectors on a tiny model."""
    kind, layers = describe_clip(tiny.clip), cross_attention_layers(tiny.model)
    slots = layout.bind(layers, metadata.get("init_word", "")).slots
    generator = torch.Generator().manual_seed(seed)
    vectors = {t: torch.randn(slots, layout.tokens, width, generator=generator) for t, width in kind.towers.items()}
    return Concept(name, vectors, layout, kind.family, layers, metadata)


def encode(clip, text, *concepts):
    return AtelierTextEncode.execute(clip, text, {f"concept{i}": c for i, c in enumerate(concepts)})[0]


def stock_encode(clip, text):
    return comfy_nodes.CLIPTextEncode().encode(clip, text)[0]


def route(model):
    return AtelierApplyConcepts.execute(model)[0]


def ksampler(model, positive, negative, latent=None, cfg=CFG, steps=STEPS):
    latent = {"samples": torch.zeros(1, 4, 8, 8)} if latent is None else latent
    return comfy_nodes.KSampler().sample(model, SEED, steps, cfg, "euler", "normal", positive, negative, latent)[0][
        "samples"
    ]
