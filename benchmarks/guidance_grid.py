"""Concept-centric guidance in the toy world: a model of one subject alone, told by the base model what to do.

`python -m concept_atelier.benchmarks.guidance_grid [--quick]` trains a null-text concept model on pictures of a
held-out subject, without captions, and paints it over a grid of the two weights of GCFG (arXiv 2312.08195, section
4.2). Beside it the same base fine-tuned on the same pictures under one prompt, with plain CFG. The judge reads every
picture.
"""

from __future__ import annotations

import argparse
import copy
import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..kernels.backbone import TextContext
from ..kernels.diffusers_backbone import DiffusersBackbone
from ..kernels.guidance import combine, unconditional_coefficient
from ..kernels.latent_cache import cache_latents, cached, tensor_pictures
from ..kernels.nulltext import calibrated_features, null_context, null_text_errors
from ..kernels.nulltext_training import ModelState, NullTextSettings, PredictNoise, train_null_text
from ..kernels.nulltext_unet import remove_cross_attention, watch_unet
from ..kernels.prompts import Prompt
from ..kernels.sampling import ddim_sample, noise_source
from ..toyworld.exemplars import subject_scenes
from ..toyworld.intervals import wilson
from ..toyworld.judge import load_judge
from ..toyworld.model import load_toy
from ..toyworld.render import SIZE, render
from .comfyui import PACK
from .methods.pictures import contact_sheet, to_image

SUBJECT = "wizard"
PICTURES = 400
ACTIONS = ("raises both arms", "kicks", "sits", "squats", "does a handstand", "flexes")
PLACES = ("on grass", "at night", "in a room", "on pink")
CONCEPT_WEIGHTS = (1.0, 2.0, 3.0)
CONTROL_WEIGHTS = (1.0, 2.5, 5.0)
CFG_SCALES = (1.5, 3.0, 5.0)
# The paper's 1e-5 is for a large model and days; the toy model was trained with 1e-3.
SETTINGS = NullTextSettings(steps=600, learning_rate=3e-4, batch_size=16, ema_decay=0.99)
SAMPLER_STEPS = 25
BATCH = 24
SHOWN = 6


def questions() -> list[tuple[str, str]]:
    """What the base model is asked for: (action, place). It is never told who does it."""
    return [(action, place) for action in ACTIONS for place in PLACES]


def subject_pictures(count: int) -> Tensor:
    """(count, H, W, 3): the subject doing what the base model knows, everywhere. No captions go with them."""
    return torch.stack([to_image(render(scene)) for scene in subject_scenes(SUBJECT, count)])


def trained(backbone: DiffusersBackbone, predict: PredictNoise, settings: NullTextSettings, title: str) -> None:
    """Train every weight of the backbone's U-Net on the subject's pictures, and leave the moving average in it."""
    backbone.unet.requires_grad_(True)
    weights = dict(backbone.unet.named_parameters())
    state = ModelState.start(weights)

    def after_step(state: ModelState) -> bool:
        if state.step % 100 == 0:
            print(f"{title}: step {state.step}, loss {np.mean(state.losses[-100:]):.4f}", flush=True)
        return False

    with tempfile.TemporaryDirectory() as folder:
        pictures = tensor_pictures(subject_pictures(PICTURES))
        cache_latents(pictures, backbone.encode_image, Path(folder))
        latents = cached(pictures, Path(folder))
        train_null_text(predict, backbone.schedule, latents, settings, state, after_step)
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(state.averages[name])
    backbone.unet.requires_grad_(False)


def own_backbone() -> DiffusersBackbone:
    """The toy model with a U-Net that may be changed."""
    toy = load_toy()
    return DiffusersBackbone.from_toy(replace(toy, unet=copy.deepcopy(toy.unet)))


def concept_model(base: DiffusersBackbone, settings: NullTextSettings) -> DiffusersBackbone:
    """The null-text form of the base, trained on the subject's pictures."""
    backbone = own_backbone()
    x_0 = backbone.encode_image(subject_pictures(32))
    features = calibrated_features(backbone, partial(watch_unet, backbone.unet), x_0)
    remove_cross_attention(backbone.unet, features)
    errors = null_text_errors(base, backbone, x_0)
    print(f"null-text surgery: relative error {np.mean(list(errors.values())):.3f} (mean over timesteps)")
    null = null_context(base)
    trained(backbone, lambda x, t: backbone.predict_noise(x, t, null.repeat(len(t))), settings, "concept model")
    return backbone


def fine_tune(settings: NullTextSettings) -> DiffusersBackbone:
    """The base with its text, trained on the same pictures under the subject's name alone."""
    backbone = own_backbone()
    words = context(backbone, [f"a {SUBJECT}"])
    trained(backbone, lambda x, t: backbone.predict_noise(x, t, words.repeat(len(t))), settings, "fine-tune")
    return backbone


def context(backbone: DiffusersBackbone, prompts: Sequence[str]) -> TextContext:
    """One batch of plain prompts."""
    with torch.no_grad():
        hidden = torch.cat([backbone.encode_text(Prompt((prompt,)), {}).hidden for prompt in prompts])
    return TextContext.plain(hidden, backbone.layers)


def gcfg(
    base: DiffusersBackbone, concept: DiffusersBackbone, prompts: Sequence[str], w1: float, w2: float
) -> Callable[[Tensor, int], Tensor]:
    """(1 - w1 - w2) eps_0 + w1 eps_concept + w2 eps_control (section 4.2), eps_0 and eps_control of the base."""
    null, control = null_context(base).repeat(len(prompts)), context(base, prompts)

    def predict(x_t: Tensor, t: int) -> Tensor:
        steps = torch.full((len(x_t),), t)
        eps_0 = base.predict_noise(x_t, steps, null) if unconditional_coefficient((w1, w2)) else None
        eps = [concept.predict_noise(x_t, steps, null), base.predict_noise(x_t, steps, control)]
        return combine(eps, (w1, w2), eps_0)

    return predict


def cfg(model: DiffusersBackbone, prompts: Sequence[str], scale: float) -> Callable[[Tensor, int], Tensor]:
    """Plain classifier-free guidance of one model."""
    null, words = null_context(model).repeat(len(prompts)), context(model, prompts)

    def predict(x_t: Tensor, t: int) -> Tensor:
        steps = torch.full((len(x_t),), t)
        return combine([model.predict_noise(x_t, steps, words)], (scale,), model.predict_noise(x_t, steps, null))

    return predict


def paint(base: DiffusersBackbone, guidance: Callable[[Sequence[str]], Callable], prompts: Sequence[str]) -> Tensor:
    """A picture (H, W, 3) of each prompt, always from the same noise."""
    painted = []
    for first in range(0, len(prompts), BATCH):
        part = prompts[first : first + BATCH]
        draw_noise = noise_source(base, range(first, first + len(part)), (SIZE, SIZE))
        with torch.no_grad():
            latents = ddim_sample(base.schedule, guidance(part), draw_noise, SAMPLER_STEPS, eta=1.0)
        painted.append(base.decode_latent(latents))
    return torch.cat(painted).clamp(0, 1)


def report(title: str, pictures: Tensor, asked: Sequence[tuple[str, str]]) -> None:
    """One line of the table: who is in the pictures, and whether that one does what was asked, where it was."""
    read = load_judge().read(pictures.movedim(-1, 1))
    subject = [name == SUBJECT for name in read["subject"]]
    aligned = [(a, b) == pair for a, b, pair in zip(read["action"], read["background"], asked)]
    both = [a and b for a, b in zip(subject, aligned)]
    print(f"| {title} | {wilson(subject)} | {wilson(aligned)} | {wilson(both)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a look at whether it runs; its figures mean nothing")
    parser.add_argument("--output", type=Path, default=PACK / "benchmarks" / "runs" / "guidance_grid.png")
    arguments = parser.parse_args()
    settings = replace(SETTINGS, steps=2) if arguments.quick else SETTINGS
    repeats = 1 if arguments.quick else 4
    asked = questions()[:2] if arguments.quick else questions() * repeats
    random.Random(0).shuffle(asked)
    torch.manual_seed(0)

    base = own_backbone()
    concept, tuned = concept_model(base, settings), fine_tune(settings)
    print(f"\n{len(asked)} pictures a row\n\n| guidance | subject | action and place | all |\n|---|---|---|---|")
    controls = [f"{action} {place}" for action, place in asked]
    named = [f"a {SUBJECT} {control}" for control in controls]
    strips = []

    def row(title: str, guidance: Callable[[Sequence[str]], Callable], prompts: Sequence[str]) -> None:
        pictures = paint(base, guidance, prompts)
        report(title, pictures, asked)
        strips.append((title, (pictures[:SHOWN] * 255).round().to(torch.uint8).numpy()))

    for w1 in CONCEPT_WEIGHTS:
        for w2 in CONTROL_WEIGHTS:
            row(f"GCFG, w1 = {w1:g}, w2 = {w2:g}", partial(gcfg, base, concept, w1=w1, w2=w2), controls)
    for scale in CFG_SCALES:
        row(f"fine-tune, CFG {scale:g}", partial(cfg, tuned, scale=scale), named)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(strips).save(arguments.output)
    print(f"\nWrote {arguments.output}")


if __name__ == "__main__":
    main()
