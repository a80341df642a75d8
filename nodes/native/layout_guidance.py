"""Layout guidance inside ComfyUI's own sampling, whichever sampler drives it.

A sampler hands its x to the model at every step. The wrapper that it meets first moves this x in place, so that what
the sampler goes on with has moved too; the prediction itself is left to whoever comes next. UniPC alone hands over a
copy, from which it then subtracts the prediction: there the copy is put back, and the prediction carries the move. The
guidance's own forward pass ends with an exception right after the last attention map it needs: in SD1.x, nearly half of
a forward is saved.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import comfy.model_management
import comfy.samplers
import torch
from comfy.extra_samplers import uni_pc
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...kernels.attention_recording import Recording
from ...kernels.backbone import HALF_PRECISION_SCALE, Layer
from ...kernels.layout_guidance import Box, LayoutGuidance, Placement, guidance_layers, layout_loss, move_latents
from .attention_maps import find_words, fold
from .gradients import attention_with_backward, differentiable_model, leave_inference, saved_for_backward
from .kv_deltas import carried
from .model_groups import ModelGroup
from .model_kind import cross_attention_layers, model_family
from .patches import ATTENTION, by_head, check_watched, check_whole, layer_of_call, sampling_step, watch_cross_attention
from .payload import WORDS, Conditioning

KEY = "concept_atelier_layout"
# As CLIP cuts words.
PHRASE_WORD = re.compile(r"<[^<>]+>|'(?:s|t|re|ve|m|ll|d)|[^\W\d_]+|\d|[^\s\w]+|_+", re.IGNORECASE)
HAND_OVER_A_COPY = (uni_pc.sample_unipc, uni_pc.sample_unipc_bh2)

AREA = (
    "The positive conditioning is limited to an area, and its attention does not cover the picture: limit it with "
    "'Conditioning (Set Mask)' with set_cond_area 'default' instead, or leave it to the boxes of Layout Guidance."
)
GUIDED_ALREADY = (
    "This MODEL comes from another 'Layout Guidance', which would be lost: name all things and their boxes in one node."
)
HOOKS = (
    "The positive conditioning carries a LoRA or model hook, through which Layout Guidance has no gradients: put the "
    "LoRA on the MODEL instead. In GCFG, put the same LoRAs on the MODELs of all branches."
)
MASKED_LATENT = (
    "The latent has a noise mask (inpainting), and Layout Guidance moves the whole picture: use it without a mask, or "
    "inpaint with the MODEL from before Layout Guidance."
)
OTHER_PROMPT = (
    "No conditioning of this sampler is the prompt that was connected to 'Layout Guidance': connect the same positive "
    "to both, in GCFG to a branch on the same checkpoint as the unconditional."
)


def phrase_tokens(words: Sequence[str], phrase: str) -> tuple[int, ...]:
    """The positions of every place where `phrase` stands in a prompt, all pieces of it; none where it does not.

    words: for each token of the prompt the word it belongs to, as `payload.WORDS`.
    """
    runs: list[tuple[str, list[int]]] = []  # a word and its pieces
    for at, word in enumerate(words):
        if at and word == words[at - 1]:
            runs[-1][1].append(at)
        else:
            runs.append((word, [at]))
    said = [fold(word) for word in PHRASE_WORD.findall(phrase)]
    wanted = [word for i, word in enumerate(said) if i == 0 or word != said[i - 1]]
    starts = range(len(runs) - len(wanted) + 1)
    found = [runs[i : i + len(wanted)] for i in starts if [fold(run[0]) for run in runs[i : i + len(wanted)]] == wanted]
    return tuple(at for run in found for _, pieces in run for at in pieces)


def place_words(
    positive: Conditioning, layout: Mapping[str, tuple[Box, ...]]
) -> dict[tuple[str, ...], list[Placement]]:
    """For each prompt of `positive` that says all phrases of `layout`, by its words, where its tokens go.

    Raises ValueError for a phrase that no prompt says, a box that cannot be used, and a conditioning without words or
    with an area.
    """
    placed = {}
    for phrase, boxes in layout.items():
        find_words(positive, " ".join(PHRASE_WORD.findall(phrase)))
        for box in boxes:
            box.check(phrase)
    for _, values in positive:
        words = values.get(WORDS, ())
        objects = [Placement(phrase_tokens(words, phrase), boxes) for phrase, boxes in layout.items()]
        if all(placement.tokens for placement in objects):
            _check_cond(values)
            placed[words] = objects
    if not placed:
        said = ", ".join(f'"{phrase}"' for phrase in layout)
        raise ValueError(f"No prompt says all of {said}, each word for word: name what stands in one prompt.")
    return placed


def _check_cond(values: Mapping[str, Any]) -> None:
    """Raise ValueError for what cannot be guided by."""
    if "area" in values:
        raise ValueError(AREA)
    if "hooks" in values:
        raise ValueError(HOOKS)


class GuidedPrompt(NamedTuple):
    """A prepared cond, and what its MODEL adds to the weights of K and V where a guidance has several."""

    cond: dict
    deltas: Mapping[str, Tensor]


class _MapsComplete(Exception):
    """Ends a forward pass."""


class LayoutGuide:
    """The wrappers that guide one sampling: OUTER_SAMPLE makes MODEL differentiable, PREDICT_NOISE moves x."""

    def __init__(
        self,
        placed: Mapping[tuple[str, ...], Sequence[Placement]],
        settings: LayoutGuidance,
        layers: Sequence[Layer],
        truncated: bool = True,
    ) -> None:
        """placed: from `place_words`. layers: those whose maps count.

        truncated: False runs the forwards to their end, to compare.
        """
        self.placed, self.settings, self.layers, self.truncated = dict(placed), settings, tuple(layers), truncated
        self.copy_handed_over = False

    def patch(self, model: ModelPatcher) -> ModelPatcher:
        """A clone of MODEL that is guided when it is sampled. Raises ValueError when it is already."""
        if KEY in model.wrappers.get(WrappersMP.PREDICT_NOISE, {}):
            raise ValueError(GUIDED_ALREADY)
        guided = model.clone()
        guided.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, self.sample)
        # The first of its kind, so that whatever others do starts from the moved x.
        others = guided.wrappers.get(WrappersMP.PREDICT_NOISE, {})
        guided.wrappers[WrappersMP.PREDICT_NOISE] = {KEY: [self.predict_noise], **others}
        return guided

    def sample(
        self, executor: Any, noise: Tensor, latent_image: Tensor, sampler: Any, sigmas: Tensor,
        denoise_mask: Tensor | None = None, *args: Any, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        """The OUTER_SAMPLE wrapper."""
        if denoise_mask is not None:
            raise ValueError(MASKED_LATENT)
        guider, inference = executor.class_obj, torch.is_inference_mode_enabled()
        own = guider.model_patcher
        self.copy_handed_over = getattr(sampler, "sampler_function", None) in HAND_OVER_A_COPY
        with differentiable_model(own) as whole:
            guider.model_patcher = whole
            try:
                with torch.inference_mode(inference):
                    return executor(noise, latent_image, sampler, sigmas, denoise_mask, *args, **kwargs)
            finally:
                guider.model_patcher = own

    def predict_noise(
        self, executor: Any, x: Tensor, timestep: Tensor, model_options: dict, seed: int | None = None
    ) -> Tensor:
        """The PREDICT_NOISE wrapper. x, which is moved: (B, C, h, w) in ComfyUI's units at sigma `timestep` (B,)."""
        unmoved = x.clone() if self.copy_handed_over else None
        if sampling_step(model_options["transformer_options"], timestep) < self.settings.steps:
            guider, sigma = executor.class_obj, float(timestep[0])
            active = [prompt for prompt in self.prompts(guider) if _in_range(prompt.cond, sigma)]
            if active:
                x.copy_(self.move(guider.inner_model, active, x, sigma, model_options))
        predicted = executor(x, timestep, model_options, seed)
        if unmoved is not None:
            x.copy_(unmoved)
        return predicted

    def prompts(self, guider: Any) -> list[GuidedPrompt]:
        """What is guided by. Raises ValueError when that is nothing, and for conds without a gradient."""
        deltas = guider.deltas if isinstance(guider, ModelGroup) else {}
        found = [
            GuidedPrompt(cond, deltas.get(name, {}))
            for name, conds in guider.conds.items()
            for cond in conds or ()
            # A prompt that Conditioning Zero Out has silenced still knows its words, and looks nowhere.
            if cond.get(WORDS) in self.placed and cond["model_conds"]["c_crossattn"].cond.any()
        ]
        if not found:
            raise ValueError(OTHER_PROMPT)
        for prompt in found:
            _check_cond(prompt.cond)
        return found

    def move(self, base: Any, prompts: Sequence[GuidedPrompt], x: Tensor, sigma: float, model_options: dict) -> Tensor:
        """x (B, C, h, w) at noise level sigma, moved by the mean loss of `prompts`."""
        scale = (1 + sigma**2) ** 0.5
        gradient_scale = HALF_PRECISION_SCALE if base.get_dtype_inference() == torch.float16 else 1.0
        with torch.inference_mode(False):
            leave_inference(base)  # ComfyUI may have loaded something else meanwhile, and moved it

            def loss_of(x_t: Tensor) -> Tensor:
                comfy.model_management.throw_exception_if_processing_interrupted()
                losses = [self.loss(base, prompt, x_t * scale, sigma, model_options) for prompt in prompts]
                return torch.stack(losses).mean(dim=0)

            x_t = x.clone() / scale
            moved = move_latents(x_t, 1 / scale**2, loss_of, self.settings, gradient_scale)
            # Bit for bit the same x where nothing was moved.
            return torch.where(moved == x_t, x.clone(), moved * scale)

    def loss(self, base: Any, prompt: GuidedPrompt, x: Tensor, sigma: float, model_options: dict) -> Tensor:
        """L_loc (B,) of x at noise level sigma under one prompt; a ControlNet on it is left out.

        Raises ValueError where another node replaces the attention that is to be read, or shows it tiles.
        """
        placements = self.placed[prompt.cond[WORDS]]
        tokens = sorted({token for placement in placements for token in placement.tokens})
        recording = Recording.start(self.layers, tokens, None, False, None)
        missing = set(self.layers)

        def look(extra_options: Mapping[str, Any], q: Tensor, k: Tensor, heads: int) -> None:
            layer = layer_of_call(extra_options)
            if layer not in missing:
                return
            check_whole(extra_options, x)
            missing.discard(layer)
            q, k = by_head(q, heads), by_head(k, heads)
            recording.see(layer, self.layers.index(layer), q, k, lambda context: context)
            if self.truncated and not missing:
                raise _MapsComplete

        transformer = dict(model_options["transformer_options"])
        transformer[ATTENTION] = attention_with_backward(transformer)
        options = {**model_options, "transformer_options": watch_cross_attention(transformer, look)}
        plain = {key: value for key, value in prompt.cond.items() if key != "control"}
        with suppress(_MapsComplete), saved_for_backward(transformer), carried(base, [prompt.deltas]):
            comfy.samplers.calc_cond_batch(base, [[plain]], x, torch.full((len(x),), sigma).to(x), options)
        check_watched(missing, model_options["transformer_options"])
        maps = [attention for by_layer in recording.maps.maps.values() for attention in by_layer]
        return layout_loss(maps, tokens, placements, (x.shape[2], x.shape[3]), self.settings.power)


def _in_range(cond: Mapping[str, Any], sigma: float) -> bool:
    """Whether a cond counts at noise level sigma."""
    return cond.get("timestep_end", -1.0) <= sigma <= cond.get("timestep_start", float("inf"))


def guide_model(
    model: ModelPatcher, positive: Conditioning, layout: Mapping[str, tuple[Box, ...]], settings: LayoutGuidance
) -> ModelPatcher:
    """A clone of MODEL that keeps the phrases of `positive` to their boxes; untouched where the settings say nothing.

    layout: {phrase: its boxes}. Raises ValueError for a MODEL, words, boxes or settings that cannot be used.
    """
    settings.check()
    model_family(model)
    placed = place_words(positive, layout)
    if settings.idle:
        return model.clone()
    return LayoutGuide(placed, settings, guidance_layers(cross_attention_layers(model))).patch(model)
