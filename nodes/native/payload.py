"""Concepts that ride in CONDITIONING: what differs from layer to layer, between K and V, and over the timesteps.

Stock CONDITIONING holds one context for all readers. A `ConceptPayload` rides beside it under `model_conds`, which
every stock conditioning node passes on untouched; one CALC_COND_BATCH wrapper on MODEL (`route_concepts`) takes it out
before each call of the U-Net and puts its rows in place through an attn2_patch. Whatever reads the plain context, such
as a ControlNet, sees the mean of all rows.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.conds
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...kernels.backbone import Layer, TextContext
from ...kernels.conditioning import StagedContext
from .model_kind import context_width, cross_attention_layers
from .patches import layer_of_call, with_patch

KEY = "concept_atelier"
WORDS = "concept_atelier_words"
TIMESTEPS = 1000  # T of the schedules of SD1, SD2, SDXL and the toy model; the stages of a concept divide it

NOT_ROUTED = (
    "This conditioning carries concepts that the MODEL cannot read: route the MODEL through 'Apply Concepts' before "
    "the sampler."
)
CHANGED = (
    "A node between 'Text Encode with Concepts' and the sampler changed this conditioning's values, which would undo "
    "its concepts: use that node (average, for example) on conditionings without concepts."
)
NO_TIMESTEPS = (
    "This conditioning carries a concept that changes over the timesteps, which the sampling of this MODEL does not "
    "count: remove the node that changed its model sampling (continuous or EDM)."
)

Conditioning = list[list[Any]]


@dataclass(frozen=True)
class ConceptPayload:
    """staged: the contexts of all readers, one prompt each (B = 1), on the CPU. layers: the U-Net they were made for.

    plain: (1, T, d), the stock context beside which they ride.
    """

    staged: StagedContext
    layers: tuple[Layer, ...]
    plain: Tensor


class CarriedConcepts(comfy.conds.CONDConstant):
    """A payload under `model_conds`. When nobody has taken it out before the U-Net is called, it stops the run."""

    def process_cond(self, batch_size: int, **_: Any) -> None:
        raise ValueError(NOT_ROUTED)


def plain_conditioning(context: Tensor, pooled: Tensor | None, words: Sequence[str]) -> Conditioning:
    """Stock CONDITIONING of one prompt, context (1, T, d) and pooled (1, p).

    words: the word that each of the T tokens belongs to, kept for the nodes that ask where a word looks.
    """
    return [[context, {"pooled_output": pooled, WORDS: tuple(words)}]]


def concept_conditioning(staged: StagedContext, layers: Sequence[Layer], words: Sequence[str]) -> Conditioning:
    """CONDITIONING of one prompt with concepts: a stock one when all readers get the same context, else with payload.

    staged: contexts with B = 1. layers: the U-Net they are for. words: as in `plain_conditioning`.
    """
    rows = torch.cat([context.rows for context in staged.contexts])
    plain = rows.mean(dim=0).cpu()
    conditioning = plain_conditioning(plain, staged.contexts[0].pooled, words)
    if len(rows) > 1:
        contexts = tuple(TextContext(c.rows.cpu(), c.key, c.value) for c in staged.contexts)
        staged = StagedContext(staged.starts, contexts, staged.positions)
        conditioning[0][1]["model_conds"] = {KEY: CarriedConcepts(ConceptPayload(staged, tuple(layers), plain))}
    return conditioning


def route_concepts(model: ModelPatcher) -> ModelPatcher:
    """A clone of MODEL that reads the concepts in CONDITIONING; doing it twice changes nothing.

    Raises ValueError when MODEL is no U-Net with cross-attention.
    """
    if not isinstance(model.model.diffusion_model, UNetModel):
        raise ValueError(
            f"The MODEL ({type(model.model).__name__}) is no U-Net with cross-attention: concepts work with SD1.x, "
            "SD2.x and SDXL, load such a checkpoint."
        )
    reader = ConceptReader(cross_attention_layers(model), context_width(model))
    routed = model.clone()
    routed.remove_wrappers_with_key(WrappersMP.CALC_COND_BATCH, KEY)
    routed.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, reader)
    return routed


@dataclass(frozen=True)
class ConceptReader:
    """The CALC_COND_BATCH wrapper: takes payloads out of the conds and hands their rows to this call's attention.

    layers, width: of the U-Net's cross-attention and its contexts. Readers of one U-Net are equal, so that MODELs which
    differ in nothing else share a forward.
    """

    layers: tuple[Layer, ...]
    width: int

    def __call__(
        self, executor: Callable, model: Any, conds: list, x_in: Tensor, timestep: Tensor, model_options: dict
    ) -> list[Tensor]:
        patch = ContextPatch({layer: number for number, layer in enumerate(self.layers)}, len(x_in))
        conds = [
            group and [self._unload(cond, model, x_in.device, timestep, patch) for cond in group] for group in conds
        ]
        if patch.chunks:
            options = with_patch(model_options.get("transformer_options", {}), "attn2_patch", patch, first=True)
            model_options = {**model_options, "transformer_options": options}
        return executor(model, conds, x_in, timestep, model_options)

    def _unload(self, cond: dict, model: Any, device: torch.device, timestep: Tensor, patch: ContextPatch) -> dict:
        """`cond` without its payload, so that it batches with plain conds; the patch learns the rows of its chunk."""
        if KEY not in cond["model_conds"]:
            return cond
        model_conds = dict(cond["model_conds"])
        payload = model_conds.pop(KEY).cond
        cond = {**cond, "model_conds": model_conds}
        plain = model_conds["c_crossattn"].cond
        start = plain[:, : payload.plain.shape[1]]
        if not start.any():  # Conditioning Zero Out: no text at all is what was asked for
            return cond
        self._check(payload, start)
        contexts = contexts_at(payload.staged, model.model_sampling, timestep)
        # All rows move at once: layers that share a row do not copy it again.
        contexts = tuple(TextContext(c.rows.to(device, model.get_dtype_inference()), c.key, c.value) for c in contexts)
        # ComfyUI copies uuids along with areas: one of its own makes sure that no other chunk answers to it. It stays
        # the same from step to step, by which caches (EasyCache) know the cond again.
        own = uuid.uuid5(cond["uuid"], str(len(patch.chunks)))
        patch.chunks[own] = Chunk(contexts, plain.shape[1])
        return {**cond, "uuid": own}

    def _check(self, payload: ConceptPayload, start: Tensor) -> None:
        """Raise ValueError unless the payload fits this U-Net and `start`, the plain context of now, is its own."""
        width = payload.plain.shape[-1]
        if payload.layers != self.layers or width != self.width:
            raise ValueError(
                f"The concepts in this conditioning were encoded for a U-Net with {len(payload.layers)} "
                f"cross-attention layers and contexts {width} wide; this MODEL has {len(self.layers)} layers and "
                f"contexts {self.width} wide: encode the prompt with the CLIP of the same checkpoint as the MODEL."
            )
        if not torch.equal(start, payload.plain.to(start)):
            raise ValueError(CHANGED)


def contexts_at(staged: StagedContext, model_sampling: Any, sigma: Tensor) -> tuple[TextContext, ...]:
    """The contexts of noise levels sigma (B,): one when all samples share it, else one for each sample."""
    if len(staged.contexts) == 1:
        return staged.contexts
    timesteps = model_sampling.timestep(sigma)
    if timesteps.is_floating_point():
        raise ValueError(NO_TIMESTEPS)
    contexts = tuple(staged.at(int(t)) for t in timesteps)
    return contexts[:1] if all(context is contexts[0] for context in contexts) else contexts


@dataclass(frozen=True)
class Chunk:
    """One cond's share of the batch. contexts: one for all its samples, or one each. length: its tokens, unpadded."""

    contexts: tuple[TextContext, ...]
    length: int

    def sources(self, layer: int) -> tuple[Tensor, Tensor]:
        """The contexts (1 or B, T, d) from which layer number `layer` computes K and V."""
        keys, values = zip(*(context.sources(layer) for context in self.contexts))
        return torch.cat(keys), torch.cat(values)

    def write(self, context: Tensor, rows: Tensor) -> Tensor:
        """The context (B, L, d) with its first T tokens replaced by rows (1 or B, T, d).

        What follows T stays (Conditioning Concat). L is a multiple of `length` where ComfyUI repeated the context to
        match a longer one in the batch; the copies are replaced alike.
        """
        rows = rows.to(context).expand(len(context), -1, -1)
        once = torch.cat([rows, context[:, rows.shape[1] : self.length]], dim=1)
        return once.repeat(1, context.shape[1] // self.length, 1)


class ContextPatch:
    """The attn2_patch of one call of the U-Net(s): gives every chunk of the batch the contexts of its own cond."""

    def __init__(self, numbers: dict[Layer, int], batch: int) -> None:
        """numbers: of the layers. batch: samples of each cond."""
        self.numbers, self.batch = numbers, batch
        self.chunks: dict[uuid.UUID, Chunk] = {}

    def __call__(self, n: Tensor, context: Tensor, value: Tensor, extra: dict) -> tuple[Tensor, Tensor, Tensor]:
        chunks = [self.chunks.get(identifier) for identifier in extra["uuids"]]
        if not any(chunks):
            return n, context, value
        # A node that cuts the picture into tiles may run several at once, tile after tile with all conds in each; one
        # that runs a part of the batch at a time repeats nothing.
        chunks *= max(1, len(context) // (len(chunks) * self.batch))
        layer = self.numbers[layer_of_call(extra)]
        keys, values = [], []
        for chunk, key, val in zip(chunks, context.chunk(len(chunks)), value.chunk(len(chunks))):
            if chunk is not None:
                key_rows, value_rows = chunk.sources(layer)
                key, val = chunk.write(key, key_rows), chunk.write(val, value_rows)
            keys.append(key)
            values.append(val)
        return n, torch.cat(keys), torch.cat(values)
