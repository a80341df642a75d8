"""Pictures painted along a picture of the subject: HiFi Tuner's Algorithm 2 where no SAM and no DINO is at hand.

Where the subject is in the first pass, its word's attention tells; as reference serves the exemplar whose mask, laid
over that place, covers it best.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...kernels.alignment import closed_form, fit_masks, moments, warp_mask, warp_picture
from ...kernels.backbone import TextContext
from ...kernels.conditioning import StagedContext, encode_prompt, spell_out
from ...kernels.diffusers_backbone import DiffusersBackbone
from ...kernels.exemplars import Exemplar
from ...kernels.heatmaps import resize, stretch
from ...kernels.inversion import invert, predict_along, reconstruct
from ...kernels.layout_guidance import phrase_positions
from ...kernels.layouts import BoundLayout
from ...kernels.prompts import BLANK, Prompt
from ...kernels.reference import ReferenceSettings, classifier_free, generate_with_reference, latent_mask
from ...kernels.sampling import noise_source
from ...kernels.trajectory import Trajectory
from ...toyworld.render import SIZE

IN_SUBJECT = 0.5  # of the stretched map of attention
# The toy model's contexts hardly move at the paper's learning rate of 0.01.
SETTINGS = ReferenceSettings(learning_rate=0.1)


class ReferencedPainter:
    """Paints prompts with one concept of tail rows, deterministically: the first pass alone, or along a reference."""

    def __init__(
        self, backbone: DiffusersBackbone, vectors: dict, layout: BoundLayout, name: str, steps: int, cfg: float
    ) -> None:
        """vectors, layout: of the concept `name`. steps: of DDIM, without fresh noise. cfg: guidance scale."""
        self.backbone, self.layout, self.name, self.cfg = backbone, layout, name, cfg
        self.vectors = {name: vectors}
        self.timesteps = backbone.schedule.sampling_timesteps(steps)
        self.abar = backbone.schedule.abar_along(self.timesteps)
        self.phi = self._encode(Prompt(())).contexts[0].rows[0]

    def _encode(self, prompt: Prompt) -> StagedContext:
        backbone = self.backbone
        layouts = {self.name: self.layout}
        with torch.no_grad():
            return encode_prompt(
                backbone.encode_text, backbone.layers, prompt, self.vectors, layouts, len(backbone.schedule)
            )

    def _along(self, context: StagedContext):
        return predict_along(self.backbone, context, self.timesteps)

    def paint(self, prompt: Prompt, seed: int, references: Sequence[Exemplar]) -> Tensor:
        """(1, H, W, 3) in 0..1. references: with masks; none for the first pass alone."""
        context = self._encode(prompt)
        conditional = self._along(context)
        layers = self.backbone.layers

        def unconditional(x: Tensor, i: int, phi: Tensor) -> Tensor:
            return self._along(StagedContext((0,), (TextContext.plain(phi, layers),), {}))(x, i)

        guided = classifier_free(conditional, unconditional, self.cfg)
        noise = noise_source(self.backbone, [seed], (SIZE, SIZE))()
        spelt = spell_out(prompt, {self.name: self.layout})
        word = phrase_positions(self.backbone, spelt, self.layout.words, {})
        with self.backbone.attention(layers, word) as seen:
            first = reconstruct(lambda x, i: guided(x, i)(self.phi), self.abar, noise)
        if not references:
            return self.backbone.decode_latent(first)
        target = subject_mask(seen.maps, first.shape[-2:])
        picture, mask = best_aligned(references, target)
        caption = Prompt((references[0].caption.replace(BLANK, self.layout.words),))
        x_0 = self.backbone.encode_image(picture[None].float())
        path = invert(self._along(self._encode(caption)), self.abar, x_0)
        inside = latent_mask(mask.float(), x_0.shape[-2:])
        x = generate_with_reference(guided, Trajectory(path, self.abar, ""), inside, self.phi, noise, SETTINGS)
        return self.backbone.decode_latent(x)


def subject_mask(maps: dict, size: tuple[int, int]) -> Tensor:
    """(SIZE, SIZE): where a word looked in the finest maps of a sampling, every other one of them the prompt's.

    maps: {layer: one (1, heads, h * w, tokens) a forward pass}, the prompt's own and the empty prompt's in turns.
    """
    places = max(seen[0].shape[2] for seen in maps.values())
    finest = [own for seen in maps.values() if seen[0].shape[2] == places for own in seen[::2]]
    mean = torch.stack([own.sum(dim=-1).mean(dim=1) for own in finest]).mean(dim=0)
    return (stretch(resize(mean.unflatten(-1, size), SIZE, SIZE))[0] >= IN_SUBJECT).float()


def best_aligned(references: Sequence[Exemplar], target: Tensor) -> tuple[Tensor, Tensor]:
    """The reference whose mask, upright, covers `target` (H, W) best: picture and mask as they lie there."""
    size, goal = tuple(target.shape), moments(target)

    def covers(reference: Exemplar) -> float:
        upright = closed_form(moments(reference.mask), goal, torch.tensor(0.0, dtype=torch.float64))
        mask = warp_mask(reference.mask.double(), upright, size)
        return (torch.minimum(mask, target).sum() / torch.maximum(mask, target).sum()).item()

    reference = max(references, key=covers)
    transform = fit_masks(reference.mask, target, turn=0.0)
    return warp_picture(reference.image, transform, size), warp_mask(reference.mask.double(), transform, size)
