"""GCFG as a GUIDER."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import comfy.model_sampling
import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...kernels.guidance import (
    AdaptiveProjection,
    GuidanceWeight,
    check_weights,
    combine,
    rescale,
    unconditional_coefficient,
)
from .model_groups import KEY, ModelGroup, Part, by_base, same, with_wrappers
from .payload import Conditioning

UNCONDITIONAL = "unconditional"
POST_CFG = "sampler_post_cfg_function"
REPLACE_CFG = ("sampler_cfg_function", "sampler_pre_cfg_function", "sampler_calc_cond_batch_function")

BRANCHES_INSIDE = (
    "The MODEL of {name} comes from 'GCFG (for KSampler)' and brings its own branches: connect the MODEL from before "
    "that node."
)
NOT_ON_ALL = (
    "The MODEL of {name} comes from a node that acts on the whole sampling (such as Layout Guidance), and the MODEL of "
    "{unconditional} from none or another, so that it would do nothing: put one such node before both."
)
NOTHING_UNCONDITIONAL = (
    "The unconditional (negative) conditioning says nothing at a step that needs it, because of its timestep range: "
    "let it cover the whole sampling."
)


@dataclass(frozen=True)
class Branch:
    """One condition eps_i(z, c_i) of a GCFG and its weight w_i."""

    model: ModelPatcher
    conditioning: Conditioning
    weight: GuidanceWeight


@dataclass(frozen=True)
class Correction:
    """What is done to the combined guidance. rescale: phi of Lin et al. 2023, 0 for nothing. projection: APG."""

    rescale: float = 0.0
    projection: AdaptiveProjection = field(default_factory=AdaptiveProjection)


class GCFGGuider(ModelGroup):
    """eps_0 + sum_i w_i (eps_i - eps_0) (arXiv 2312.08195, Eq. 3), on clean latents, where models predicting noise and
    velocities meet.

    It is the guider of the parts on the unconditional's base model; one more for each other base is nested around it.
    """

    def __init__(
        self,
        model: ModelPatcher,
        unconditional: Conditioning,
        branches: dict[str, Branch],
        correction: Correction | None = None,
    ) -> None:
        """model, unconditional: of eps_0. branches: by the names that messages call them.

        Raises ValueError when there is nothing to guide with, and for MODELs that cannot be combined.
        """
        check_weights([branch.weight for branch in branches.values()])
        self.correction = correction or Correction()
        self.weights = {name: branch.weight for name, branch in branches.items() if branch.weight.w}
        self.idle = [name for name in branches if name not in self.weights]
        parts = [Part(name, branches[name].model, branches[name].conditioning) for name in self.weights]
        parts.append(Part(UNCONDITIONAL, model, unconditional, role="negative"))
        for part in parts:
            check_model(part, parts[-1])
        bases = by_base(parts)
        super().__init__(next(base for base in bases if base[-1] is parts[-1]))
        self.others = [ModelGroup(base) for base in bases if base[-1] is not parts[-1]]
        self.groups: list[ModelGroup] = [self, *self.others]
        for group in self.groups:
            group.load_with([other.model_patcher for other in self.groups if other is not group])

    def sample(
        self, noise: Tensor, latent_image: Tensor, sampler: comfy.samplers.Sampler, sigmas: Tensor,
        denoise_mask: Tensor | None = None, callback: Callable | None = None, disable_pbar: bool = False,
        seed: int | None = None,
    ) -> Tensor:  # fmt: skip
        """As any guider. The other base models are loaded and prepared first, each around the next."""
        self.projection = replace(self.correction.projection, running=None)
        run = partial(super().sample, noise, latent_image, sampler, sigmas, denoise_mask, callback, disable_pbar, seed)
        if len(sigmas) == 0:
            return run()
        for group in self.others:
            run = partial(_inside, group, run, noise, latent_image, sigmas, denoise_mask, seed)
        return run()

    def predict_noise(
        self, x: Tensor, timestep: Tensor, model_options: dict | None = None, seed: int | None = None
    ) -> Tensor:
        """The guided clean latents (B, C, h, w) of x at noise level `timestep` (B,), which is ComfyUI's sigma."""
        options = model_options or {}
        w = self._weights_at(timestep)
        partial_cover = {
            name: where for name in w if (where := self._group(name).covered(name, x, timestep)) is not None
        }
        needed = bool(unconditional_coefficient(list(w.values())) or partial_cover)
        needed = needed or options.get("disable_cfg1_optimization", False)
        # Nodes that act after CFG get the unconditional for a condition where the running MODEL predicts no branch.
        needed = needed or (bool(options.get(POST_CFG)) and not w.keys() & self.calls[0][1])
        if needed and not self.at_work(UNCONDITIONAL, timestep):
            raise ValueError(NOTHING_UNCONDITIONAL)
        names = [*w, UNCONDITIONAL] if needed else list(w)
        clean = self.denoise(names, x, timestep, options)
        for group in self.others:
            own = with_wrappers(group.prepared, WrappersMP.CALC_COND_BATCH, self._added(options))
            clean |= group.denoise(names, x, timestep, own)
        D_0 = clean.pop(UNCONDITIONAL, None)
        for name, where in partial_cover.items():
            clean[name] = torch.where(where, clean[name], D_0)
        return self._guide(w, clean, D_0, x, timestep, options)

    def _guide(
        self, w: dict[str, float], clean: dict[str, Tensor], D_0: Tensor | None, x: Tensor, sigma: Tensor, options: dict
    ) -> Tensor:
        values, D = list(w.values()), [clean[name] for name in w]
        guided = combine(D, values, D_0 if unconditional_coefficient(values) else None)
        guided = self.projection.guide(guided, D_0, values)
        if self.correction.rescale and D:
            guided = rescale(guided, D, values, x, sigma, self.correction.rescale)
        if functions := options.get(POST_CFG, ()):
            conds, condition = self._condition(w, {**clean, UNCONDITIONAL: D_0}, x, sigma)
        for function in functions:
            guided = function(
                {
                    "denoised": guided,
                    "cond": conds,
                    "uncond": self.own_conds(UNCONDITIONAL),
                    "cond_scale": sum(values),
                    "model": self.inner_model,
                    "uncond_denoised": torch.zeros_like(x) if D_0 is None else D_0,
                    "cond_denoised": condition,
                    "sigma": sigma,
                    "model_options": options,
                    "input": x,
                }
            )
        return guided

    def _condition(
        self, w: dict[str, float], clean: dict[str, Tensor], x: Tensor, sigma: Tensor
    ) -> tuple[list[dict], Tensor]:
        """The one condition that nodes acting after CFG know of: conds to ask again, and what they predicted.

        The branches' weighted mean where ComfyUI, which weighs conds by their strength, can tell it; else a branch
        alone. Only those count that the running MODEL's options predict, over the whole picture.
        """
        whole = [name for name in w if name in self.calls[0][1] and self.covered(name, x, sigma) is None]
        conds = {name: [cond for cond in self.own_conds(name) if self._in_range(cond, sigma)] for name in whole}
        plain = [name for name in whole if all(map(_is_plain, conds[name]))]
        total = math.fsum(w[name] for name in plain)
        if abs(total) < 1e-6:
            name = max(whole, key=w.__getitem__, default=UNCONDITIONAL)
            return self.own_conds(name), clean[name]
        shares = {name: w[name] / total for name in plain}
        mean = []
        for name, share in shares.items():
            strengths = [cond.get("strength", 1.0) for cond in conds[name]]
            mean += [
                {**cond, "strength": share * strength / sum(strengths)}
                for cond, strength in zip(conds[name], strengths, strict=True)
            ]
        return mean, combine([clean[name] for name in plain], list(shares.values()), None)

    def _added(self, options: dict) -> dict[str, list]:
        """The wrappers of predictions that the running sampler has added to those of this MODEL."""
        own, running = (
            given["transformer_options"].get("wrappers", {}).get(WrappersMP.CALC_COND_BATCH, {})
            for given in (self.model_options, options)
        )
        return {key: wrappers for key, wrappers in running.items() if key not in own}

    def _group(self, name: str) -> ModelGroup:
        return next(group for group in self.groups if name in group.names)

    def _weights_at(self, sigma: Tensor) -> dict[str, float]:
        """The branches that count at noise level sigma, with their weights."""
        progress = 0.0
        if not all(weight.constant for weight in self.weights.values()):
            progress = progress_at(self.inner_model.model_sampling, float(sigma[0]))
        weights = {name: weight.at(progress) for name, weight in self.weights.items()}
        return {name: w for name, w in weights.items() if w and self._group(name).at_work(name, sigma)}


def _is_plain(cond: dict) -> bool:
    """Whether a cond counts alike in the whole picture."""
    return cond.get("strength", 1.0) > 0 and not {"area", "mask", "default"} & cond.keys()


class _Inside(comfy.samplers.Sampler):
    """In place of a sampler: runs `run` while ComfyUI holds one more model ready, and keeps what it returns."""

    def __init__(self, run: Callable[[], Tensor]) -> None:
        self.run = run

    def sample(
        self, model_wrap: Any, sigmas: Tensor, extra_args: dict, callback: Any, noise: Tensor, *_: Any
    ) -> Tensor:
        model_wrap.prepared = extra_args["model_options"]
        self.samples = self.run()
        return noise


def _inside(
    group: ModelGroup, run: Callable[[], Tensor], noise: Tensor, latent_image: Tensor, sigmas: Tensor,
    denoise_mask: Tensor | None, seed: int | None,
) -> Tensor:  # fmt: skip
    inside = _Inside(run)
    group.sample(noise, latent_image, inside, sigmas, denoise_mask, None, True, seed)
    return inside.samples


def progress_at(model_sampling: Any, sigma: float) -> float:
    """The progress within 0..1 (ComfyUI's percent) at which sampling reaches noise level sigma, to six digits."""
    early, late = 0.0, 1.0
    for _ in range(24):
        middle = (early + late) / 2
        if model_sampling.percent_to_sigma(middle) >= sigma:
            early = middle
        else:
            late = middle
    return round(early, 6)


def check_model(part: Part, unconditional: Part) -> None:
    """Raise ValueError unless part's MODEL can be combined with the unconditional's."""
    sampling = part.model.get_model_object("model_sampling")
    kind = type(part.model.model).__name__
    if not isinstance(sampling, comfy.model_sampling.EPS) or isinstance(sampling, comfy.model_sampling.IMG_TO_IMG):
        raise ValueError(
            f"The MODEL of {part.name} ({kind}) predicts neither noise nor velocities of a diffusion (it is a flow "
            "model, for example): GCFG combines models such as SD1.x, SD2.x and SDXL."
        )
    own, other = (p.model.get_model_object("latent_format") for p in (part, unconditional))
    if type(own) is not type(other) or own.scale_factor != other.scale_factor:
        raise ValueError(
            f"The MODEL of {part.name} ({kind}) works in latents of {type(own).__name__}, that of "
            f"{unconditional.name} in {type(other).__name__}: combine models with the same VAE, SDXL only with SDXL."
        )
    if KEY in part.model.wrappers.get(WrappersMP.OUTER_SAMPLE, {}):
        raise ValueError(BRANCHES_INSIDE.format(name=part.name))
    if any(part.model.model_options.get(function) for function in REPLACE_CFG):
        raise ValueError(
            f"The MODEL of {part.name} carries a node that combines prompts in its own way (such as Rescale CFG or "
            "APG): remove that node; rescale and APG are options of GCFG."
        )
    on_part, on_all = (p.model.wrappers.get(WrappersMP.PREDICT_NOISE, {}) for p in (part, unconditional))
    if not all(same(wrappers, on_all.get(key, [])) for key, wrappers in on_part.items()):
        raise ValueError(NOT_ON_ALL.format(name=part.name, unconditional=unconditional.name))
    if not same(*(p.model.model_options.get(POST_CFG, []) for p in (part, unconditional))):
        raise ValueError(
            f"The MODELs of {part.name} and {unconditional.name} carry different nodes that change the guided "
            "picture (such as PAG): put one such node before both, or none on either."
        )
