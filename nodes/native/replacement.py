"""Subject replacement inside ComfyUI's sampling: the source prompt's attention seen in a run of its own, then imposed.

Each step runs the source prompt on the inverted picture's own latents and keeps its cross-attention maps, then the
target prompt with those maps in its fixed columns. Two calls, however ComfyUI splits its batches: only one step's maps
are ever needed, and they do not depend on the target, so that another replacement in the same picture can reuse them.
"""

from __future__ import annotations

import weakref
from itertools import accumulate
from typing import Any, NamedTuple

import comfy.model_management
import comfy.samplers
import comfy.utils
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import Downsample, Upsample
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

from ...kernels.backbone import Layer
from ...kernels.heatmaps import map_shape
from ...kernels.inversion import reconstruct
from ...kernels.replacement import MAPS_DTYPE, Columns, match_columns
from ...kernels.trajectory import Trajectory
from .attention_maps import fold
from .fixed_attention import Maps, seen_in, with_fixed_columns
from .inversion import (
    NULL_TEXT,
    InversionGuider,
    check_invertible,
    model_fingerprint,
    predictions,
    trajectory_fingerprint,
)
from .model_kind import attention_modules, cross_attention_layers
from .patches import check_watched
from .payload import WORDS, Conditioning, route_concepts

LIMITED = {"area", "start_percent", "end_percent"}  # the marks of a conditioning that does not always count


class Replacement(NamedTuple):
    """latent: (1, C, h, w) as VAE Decode wants it. tokens: of the prompts. maps_bytes: of the maps of one step."""

    latent: Tensor
    columns: Columns
    tokens: int
    maps_bytes: int


def replace_subject(
    model: ModelPatcher,
    trajectory: Trajectory,
    source: Conditioning,
    target: Conditioning,
    negative: Conditioning,
    cfg: float,
    subject: str,
    store: bool,
    renormalise: bool,
) -> Replacement:
    """Paint the picture of a trajectory again with another subject (HiFi Tuner, Algorithm 3).

    source, target: c^r and c^g. negative: phi_t*. subject: its words, separated by spaces or commas; empty: all words
    of `target` that `source` does not have. store: keep the maps of all steps in main memory for the next time.
    Raises ValueError for inputs that do not belong together, and for maps that memory has no room for.
    """
    for name, given in (("source", source), ("target", target), ("negative", negative)):
        check_invertible(model, given, name)
    if trajectory.latents.shape[1] != 1:
        raise ValueError(
            f"The trajectory holds {trajectory.latents.shape[1]} pictures, and subject replacement works on one: pick "
            "it with 'Latent From Batch' before 'DDIM Inversion'."
        )
    trajectory.check_model(model_fingerprint(model))
    sigmas = (1 / trajectory.abar - 1).sqrt().float()
    _check_null_text(negative, trajectory, cfg)
    words = {fold(word) for word in subject.replace(",", " ").split()}
    columns = match_columns(labels(source, "source"), labels(target, "target"), words)
    size = maps_bytes(model, trajectory.latents.shape[-2:], (tokens := source[0][0].shape[1]))
    if store:
        stored = STORE.of(trajectory, model, source)
        check_memory(size * (trajectory.steps - len(stored)), "set maps to recompute")
    else:
        STORE.clear()
        stored = None
        check_memory(size, "invert a smaller picture")

    sampler = _ReplacementSampler(trajectory, columns, cfg, renormalise, size, stored)
    guider = InversionGuider(route_concepts(model), source=source, positive=target, negative=negative)
    empty = torch.zeros_like(trajectory.latents[0])
    latent = guider.sample(empty, empty, sampler, sigmas, disable_pbar=True)
    return Replacement(latent.to(comfy.model_management.intermediate_device()), columns, tokens, size)


def _check_null_text(negative: Conditioning, trajectory: Trajectory, cfg: float) -> None:
    """Raise ValueError where an unconditional prompt of 'Null-Text Optimize' is for another sampling than this."""
    for made_for in (values[NULL_TEXT] for _, values in negative if NULL_TEXT in values):
        if made_for.trajectory != trajectory_fingerprint(trajectory):
            raise ValueError(
                "The negative conditioning was optimised along another trajectory (of another picture, or inverted in "
                "another way): connect this trajectory to 'Null-Text Optimize' as well."
            )
        if made_for.cfg != cfg:
            raise ValueError(
                f"The negative conditioning was optimised for cfg {made_for.cfg:g}, and cfg is {cfg:g} here: set both "
                "nodes to the same."
            )


def labels(conditioning: Conditioning, name: str) -> list[str]:
    """For each token of a prompt its word, for the rows of a concept its <name>; "" for all others.

    Raises ValueError for conditioning that does not know its words, or is not one prompt for the whole picture and all
    steps.
    """
    if len(conditioning) != 1 or LIMITED & conditioning[0][1].keys():
        raise ValueError(
            f"The {name} conditioning is not one prompt for the whole picture and all steps (combined, or limited to "
            "an area or a range of steps), and its tokens cannot be matched: connect it from 'Text Encode with "
            "Concepts'."
        )
    [[context, values]] = conditioning
    if WORDS not in values:
        raise ValueError(
            f"The {name} conditioning does not tell which token is which word: encode the prompt with 'Text Encode "
            "with Concepts'."
        )
    words = [fold(word) for word in values[WORDS]]
    return words + [""] * (context.shape[1] - len(words))


def maps_bytes(model: ModelPatcher, size: tuple[int, int], tokens: int) -> int:
    """Memory of one step's maps for latents of size (h, w) and a prompt of so many tokens."""
    unet = model.model.diffusion_model
    down = list(accumulate(_has(block, Downsample) for block in unet.input_blocks))
    up = list(accumulate((_has(block, Upsample) for block in unet.output_blocks), initial=0))
    numbers = 0
    for layer, module in attention_modules(model).items():
        level = {"input": down, "middle": down[-1:], "output": [down[-1] - u for u in up]}[layer.block][layer.number]
        height, width = map_shape(level, *size)
        numbers += module.heads * height * width * tokens
    return numbers * MAPS_DTYPE.itemsize


def _has(block: nn.Module, kind: type[nn.Module]) -> bool:
    return any(isinstance(part, kind) for part in block)


def check_memory(needed: int, remedy: str) -> None:
    """Raise ValueError unless main memory has room for the attention maps."""
    free = comfy.model_management.get_free_memory(torch.device("cpu"))
    if needed > free:
        raise ValueError(
            f"The attention maps need {gigabytes(needed)} of main memory and {gigabytes(free)} are free: {remedy}."
        )


def gigabytes(size: int) -> str:
    """As 1.66 GB or, where that is little, as 33.2 MB."""
    return f"{size / 1e9:.3g} GB" if size >= 1e9 else f"{size / 1e6:.3g} MB"


class MapStore:
    """The maps of one picture's steps, kept in main memory for as long as its trajectory is."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Free the memory."""
        self._of: tuple[weakref.ref, weakref.ref, Conditioning] | None = None
        self._steps: dict[int, Maps] = {}

    def of(self, trajectory: Trajectory, model: ModelPatcher, source: Conditioning) -> dict[int, Maps]:
        """The maps by step that were stored for these very objects, to be added to; those of any others are dropped."""
        if (
            self._of is None
            or self._of[0]() is not trajectory
            or self._of[1]() is not model
            or self._of[2] is not source
        ):
            self._of = (weakref.ref(trajectory, lambda _: self.clear()), weakref.ref(model), source)
            self._steps = {}
        return self._steps


STORE = MapStore()


class _ReplacementSampler(comfy.samplers.Sampler):
    """Algorithm 3 from the noise of a trajectory, along it.

    size: of one step's maps in bytes. stored: maps by step to use and to add to, or None.
    """

    def __init__(
        self,
        trajectory: Trajectory,
        columns: Columns,
        cfg: float,
        renormalise: bool,
        size: int,
        stored: dict[int, Maps] | None,
    ) -> None:
        self.trajectory, self.columns, self.cfg = trajectory, columns, cfg
        self.renormalise, self.size, self.stored = renormalise, size, stored

    def sample(
        self, model_wrap: Any, sigmas: Tensor, extra_args: dict, callback: Any, noise: Tensor, *_: Any
    ) -> Tensor:
        base, conds, options = model_wrap.inner_model, model_wrap.conds, extra_args["model_options"]
        path, layers = self.trajectory.latents, cross_attention_layers(model_wrap.model_patcher)
        # One step's maps stay on the device where twice their size is free: the U-Net needs room beside them.
        room = self.stored is None and comfy.model_management.get_free_memory(noise.device) > 2 * self.size
        home = noise.device if room else torch.device("cpu")

        def with_attention(transformer: dict[str, Any]) -> dict[str, Any]:
            return {**options, "transformer_options": transformer}

        def source_maps(i: int) -> Maps:
            if self.stored is not None and i in self.stored:
                return self.stored[i]
            maps: dict[Layer, Tensor] = {}
            watched = with_attention(seen_in(options["transformer_options"], maps, home, path[i]))
            predictions(
                lambda x, sigma: comfy.samplers.calc_cond_batch(base, [conds["source"]], x, sigma, watched)[0], sigmas
            )(path[i].to(noise), i)
            check_watched([layer for layer in layers if layer not in maps], options["transformer_options"])
            if self.stored is not None:
                self.stored[i] = maps
            return maps

        def predict(x: Tensor, i: int) -> Tensor:
            edited = with_attention(
                with_fixed_columns(options["transformer_options"], source_maps(i), self.columns, self.renormalise)
            )
            of_step = predictions(
                lambda x, sigma: comfy.samplers.sampling_function(
                    base, x, sigma, conds["negative"], conds["positive"], self.cfg, edited
                ),
                sigmas,
            )
            return of_step(x, i)

        bar = comfy.utils.ProgressBar(self.trajectory.steps)
        return reconstruct(predict, self.trajectory.abar, path[0].to(noise), bar.update_absolute)
