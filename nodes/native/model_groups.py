"""Several conditionings on one base model in as few forwards as their models and patches allow.

Clones of a base share its weights in memory, so that of two with different LoRAs the one loaded last would speak for
both. Here one bare clone is loaded. What the others patch rides on their conditioning as a weight hook: ComfyUI then
exchanges the weights between their forwards; K and V of the cross-attention need not even that (kv_deltas.py). Clones
that differ in patches of the attention, or in wrappers, run with their own options one after the other. Everything else
runs as one batch.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import comfy.hooks
import comfy.model_patcher
import comfy.sampler_helpers
import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from .kv_deltas import carried, only_key_and_value, weight_deltas
from .payload import ConceptReader, Conditioning

KEY = "concept_atelier_gcfg"

UNALIKE = (
    "{one} and {other} use the same base model, but their MODELs differ in more than LoRAs, merged weights and "
    "attention patches (model sampling, bypass LoRA or another node that replaces modules): put that node on both, "
    "or load {other} from a copy of the checkpoint file."
)
RANGE = ("timestep_start", "timestep_end")
EXTENT = ("area", "strength", "mask", "mask_strength")
ASK_THEMSELVES = ("model_function_wrapper", "sampler_post_cfg_function")


@dataclass(frozen=True)
class Part:
    """One prediction of a guidance: what is asked of which MODEL. role: "positive" or "negative", for the model."""

    name: str
    model: ModelPatcher
    conditioning: Conditioning
    role: str = "positive"


def same(one: Any, other: Any) -> bool:
    """Whether nested dicts, lists and tuples hold the same objects; numbers, texts and readers need only be equal.

    An empty dict or list says no more than a missing one: what ComfyUI takes out leaves them behind.
    """
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        one, other = ({k: v for k, v in d.items() if v or not isinstance(v, (dict, list))} for d in (one, other))
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return isinstance(one, (int, float, str, ConceptReader)) and one == other


def same_weights(one: ModelPatcher, other: ModelPatcher) -> bool:
    """Whether two clones of a base patch its weights alike."""
    return same(one.patches, other.patches)


def same_options(one: ModelPatcher, other: ModelPatcher) -> bool:
    """Whether two clones of a base patch its forward alike."""
    return all(same(getattr(one, what), getattr(other, what)) for what in ("model_options", "wrappers", "callbacks"))


def check_clones(parts: Sequence[Part]) -> None:
    """Raise ValueError when clones of one base differ in what neither weight hooks nor options can carry."""
    for part in parts[1:]:
        for what in ("object_patches", "injections", "weight_wrapper_patches", "hook_patches"):
            if not same(getattr(part.model, what), getattr(parts[0].model, what)):
                raise ValueError(UNALIKE.format(one=parts[0].name, other=part.name))


def by_base(parts: Iterable[Part]) -> list[list[Part]]:
    """The parts of each base model, in the order in which the bases appear."""
    bases: dict[int, list[Part]] = {}
    for part in parts:
        bases.setdefault(id(part.model.model), []).append(part)
    return list(bases.values())


class PatchHook(comfy.hooks.WeightHook):
    """All weight patches of a MODEL, {weight name: patches}, as a hook that a conditioning carries."""

    def __init__(self, patches: dict[str, list] | None = None) -> None:
        super().__init__()
        self.patches = patches

    def clone(self) -> PatchHook:
        copy = super().clone()
        copy.patches = self.patches
        return copy

    def add_hook_patches(
        self, model: ModelPatcher, model_options: dict, target_dict: dict, registered: comfy.hooks.HookGroup
    ) -> bool:
        """Let `model` know the patches. A stock weight hook holds one file's; these may be of several, in order."""
        if not self.should_register(model, model_options, target_dict, registered):
            return False
        model.hook_patches[self.hook_ref] = {name: list(patches) for name, patches in self.patches.items()}
        model.patches_uuid = uuid.uuid4()
        registered.add(self)
        return True


def hooked(parts: Sequence[Part]) -> list[Part]:
    """The same parts, each conditioning with the weight patches of its MODEL as a hook.

    Parts whose patches are the same share the hook, and with it their forward.
    """
    known: list[tuple[ModelPatcher, comfy.hooks.HookGroup]] = []
    combined: dict[tuple, comfy.hooks.HookGroup] = {}
    moved = []
    for part in parts:
        if not part.model.patches:
            moved.append(part)
            continue
        hooks = next((group for model, group in known if same_weights(model, part.model)), None)
        if hooks is None:
            hooks = comfy.hooks.HookGroup()
            hooks.add(PatchHook(part.model.patches))
            known.append((part.model, hooks))
        conditioning = [
            [context, {**values, "hooks": _after(hooks, values.get("hooks"), combined)}]
            for context, values in part.conditioning
        ]
        moved.append(replace(part, conditioning=conditioning))
    return moved


def on_bare_base(parts: Sequence[Part]) -> list[Part]:
    """The same parts, each on a clone of its MODEL without weight patches."""
    bare, moved = uuid.uuid4(), []
    for part in parts:
        model = part.model.clone()
        model.patches, model.patches_uuid = {}, bare
        moved.append(replace(part, model=model))
    return moved


def _after(hooks: comfy.hooks.HookGroup, own: comfy.hooks.HookGroup | None, combined: dict) -> comfy.hooks.HookGroup:
    """`hooks` followed by the conditioning's own; always one object for one pair, by which ComfyUI batches."""
    if own is None:
        return hooks
    return combined.setdefault((hooks, own), hooks.clone_and_combine(own))


class ModelGroup(comfy.samplers.CFGGuider):
    """The parts that share a base model: ComfyUI loads and prepares it as for any guider; `denoise` asks it."""

    def __init__(self, parts: Sequence[Part]) -> None:
        """parts: at least one; the MODEL of the last is the one that ComfyUI prepares."""
        check_clones(parts)
        self.names = [part.name for part in parts]
        self.source = {part.name: part for part in parts}
        self.carries_deltas = False
        if not all(same_weights(part.model, parts[-1].model) for part in parts):
            # Nodes that stack tiles into the batch, or predict again after CFG, know of no rows to add to.
            self.carries_deltas = only_key_and_value(part.model for part in parts) and not any(
                part.model.model_options.get(function) for part in parts for function in ASK_THEMSELVES
            )
            parts = on_bare_base(parts if self.carries_deltas else hooked(parts))
        super().__init__(parts[-1].model)
        self.inner_set_conds(
            {
                part.name: [[context, {"prompt_type": part.role, **values}] for context, values in part.conditioning]
                for part in parts
            }
        )
        self.calls: list[tuple[ModelPatcher | None, list[str]]] = [(None, [])]  # None: the prepared MODEL's options
        for part in parts:
            known = (names for model, names in self.calls if same_options(part.model, model or parts[-1].model))
            if (names := next(known, None)) is None:
                self.calls.append((part.model, names := []))
            names.append(part.name)
        self.uuids = {name: {cond["uuid"] for cond in conds} for name, conds in self.original_conds.items()}
        self.options: dict[int, dict] = {}
        self.prepared: dict | None = None  # the model_options of a group that is held ready inside another's sampling
        self.deltas: dict[str, dict[str, Tensor]] = {}

    def load_with(self, others: Collection[ModelPatcher]) -> None:
        """Have ComfyUI load `others` in the same breath: one after the other, each might push out the last."""
        for conds in self.original_conds.values():
            for cond in conds:
                cond["additional_models"] = [*cond.get("additional_models", []), *others]

    def outer_sample(self, noise: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Sample, with the options of the clones that are not loaded themselves made ready."""
        self.options = {}
        device, dtype = self.model_patcher.load_device, self.model_patcher.model_dtype()
        for model, _ in self.calls[1:]:
            model.model_patches_to(device)
            model.model_patches_to(dtype)
            options = comfy.model_patcher.create_model_options_clone(model.model_options)
            comfy.sampler_helpers.prepare_model_patcher(model, {}, options)
            comfy.samplers.cast_to_load_options(options, device=device, dtype=dtype)
            self.options[id(model)] = options
        if self.carries_deltas:
            self.deltas = {name: weight_deltas(part.model, device) for name, part in self.source.items()}
        try:
            return super().outer_sample(noise, *args, **kwargs)
        finally:
            self.options, self.deltas, self.prepared = {}, {}, None

    def at_work(self, name: str, sigma: Tensor) -> bool:
        """Whether part `name` predicts at noise level sigma: some of its conditioning is in its timestep range."""
        return any(self._in_range(cond, sigma) for cond in self.own_conds(name))

    def own_conds(self, name: str) -> list[dict]:
        """The prepared conds of part `name`, while sampling.

        For every area in one part ComfyUI gives all others a copy, ControlNet and hooks included: those are left out.
        """
        return [cond for cond in self.conds[name] if cond["uuid"] in self.uuids[name]]

    @staticmethod
    def _in_range(cond: dict, sigma: Tensor) -> bool:
        start, end = (cond.get(edge) for edge in RANGE)
        return not ((start is not None and sigma[0] > start) or (end is not None and sigma[0] < end))

    def covered(self, name: str, x: Tensor, sigma: Tensor) -> Tensor | None:
        """Where part `name` predicts: (B, C, h, w) of booleans, or None for everywhere. x: the noisy latents."""
        conds = [cond for cond in self.own_conds(name) if self._in_range(cond, sigma)]
        if any("default" in cond or not {"area", "mask"} & cond.keys() for cond in conds):
            return None
        where = torch.zeros_like(x, dtype=torch.bool)
        for cond in conds:
            extent = {key: cond[key] for key in EXTENT if key in cond} | {"model_conds": {}, "uuid": cond["uuid"]}
            piece = comfy.samplers.get_area_and_mult(extent, x, sigma)
            view = where
            dims = x.ndim - 2
            for dim in range(dims if piece.area is not None else 0):
                view = view.narrow(dim + 2, piece.area[dims + dim], piece.area[dim])
            view |= piece.mult != 0
        return None if where.all() else where

    def denoise(self, names: Collection[str], x: Tensor, sigma: Tensor, options: dict) -> dict[str, Tensor]:
        """The clean latents (B, C, h, w) that each of the parts `names` predicts of x at noise level sigma (B,).

        options: the model_options with which the group's MODEL is prepared.
        """
        clean: dict[str, Tensor] = {}
        for model, call in self.calls:
            asked = [name for name in call if name in names]
            if not asked:
                continue
            chosen = options
            if model is not None:
                chosen = self.options[id(model)]
                chosen["transformer_options"]["sample_sigmas"] = options["transformer_options"]["sample_sigmas"]
            roles = [self.source[name].role for name in asked]
            conds = [self.own_conds(name) for name in asked]
            deltas = [self.deltas.get(name, {}) for name in asked]
            chosen = with_own(chosen, roles, deltas)
            out = comfy.samplers.calc_cond_batch(self.inner_model, conds, x, sigma, chosen)
            clean.update(zip(asked, out, strict=True))
        return clean


def with_own(options: dict, roles: Sequence[str], deltas: Sequence[Mapping[str, Tensor]]) -> dict:
    """A copy of model_options that gives each cond of a batch, by its number, what is its own.

    deltas: of the K and V weights. roles: patches are told 0 for a positive and 1 for a negative; ComfyUI tells them
    the cond's number instead, which only means that while there are two.
    """

    def apply_model(executor: Any, *args: Any, **kwargs: Any) -> Tensor:
        told = args[5]  # transformer_options; nodes that run tile after tile hand in the same ones for each
        numbers = told["cond_or_uncond"]
        told = {**told, "cond_or_uncond": [int(roles[number] == "negative") for number in numbers]}
        with carried(executor.class_obj, [deltas[number] for number in numbers]):
            return executor(*args[:5], told, *args[6:], **kwargs)

    return with_wrappers(options, WrappersMP.APPLY_MODEL, {KEY: [apply_model]})


def with_wrappers(options: dict, kind: str, first: dict[str, list]) -> dict:
    """A copy of model_options with more wrappers of one kind, {key: wrappers}, around those that are there."""
    transformer = options["transformer_options"]
    wrappers = transformer.get("wrappers", {})
    wrappers = {**wrappers, kind: {**first, **wrappers.get(kind, {})}}
    return {**options, "transformer_options": {**transformer, "wrappers": wrappers}}
