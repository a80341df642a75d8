"""HiFi Tuner's reference guidance as a SAMPLER, for any guider with an unconditional prompt.

The guider itself combines the predictions, with whatever rides on MODEL: a wrapper around ComfyUI's predictions
gives it the unconditional one anew for each context tried, and the others from memory.
"""

from __future__ import annotations

import copy
import inspect
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import comfy.conds
import comfy.samplers
import torch
from comfy.k_diffusion.sampling import sample_euler
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...kernels.backbone import HALF_PRECISION_SCALE
from ...kernels.reference import NO_GRADIENT, GuidedNoise, ReferenceSettings, ending, follow_reference
from ...kernels.trajectory import Trajectory
from .gradients import attention_with_backward, differentiable_model, saved_for_backward
from .guiders import UNCONDITIONAL, GCFGGuider
from .inversion import PLAIN, abar_of, model_fingerprint, predictions
from .layout_guidance import KEY as LAYOUT
from .model_groups import with_wrappers
from .model_kind import model_family
from .payload import KEY as CONCEPTS

KEY = "concept_atelier_reference"
CONTEXT = "c_crossattn"
# What guiders and ComfyUI add to a plain prompt; hooks are the LoRAs of its MODEL in a GCFG.
PREPARED = {"cross_attn", "model_conds", "uuid", "prompt_type", "additional_models", "hooks"}

NOT_PLAIN = (
    "The unconditional (negative) conditioning of the guider carries more than one plain prompt ({what}), which "
    "reference guidance cannot vary: connect an empty prompt from CLIP Text Encode. Areas and concepts belong on the "
    "positive one, as does a ControlNet: use only the positive output of Apply ControlNet."
)
STARTS_TOO_LATE = (
    "The sampling starts {left} steps before its end, and the guidance {first} (t_s): give the sampler the sigmas from "
    "there on or from before, or lower t_s."
)
LAYOUT_MOVES = (
    "Layout Guidance still moves the latents at step {step}, where reference guidance starts: set its steps to {start} "
    "or fewer, lower t_s, or connect the MODEL from before it."
)
MOMENTUM = (
    "Reference guidance asks the guider several times a step, and APG with momentum counts each: set apg_momentum of "
    "GCFG, or momentum of core's APG node, to 0."
)


def reference_sampler(
    trajectory: Trajectory, mask: Tensor, settings: ReferenceSettings, report: Callable[[str], None]
) -> comfy.samplers.Sampler:
    """The SAMPLER. mask: (1, 1, h, w) of booleans over the latents; with an empty one it is euler.

    report: told at the end how near the guided steps came. Raises ValueError for what cannot be followed.
    """
    settings.check()
    if (count := trajectory.latents.shape[1]) != 1:
        raise ValueError(
            f"The trajectory holds {count} pictures, and reference guidance follows one: pick it with 'Latent From "
            "Batch' before 'DDIM Inversion'."
        )
    if not mask.any():
        return comfy.samplers.ksampler("euler")
    return comfy.samplers.KSAMPLER(ReferenceGuidance(trajectory, mask, settings, report))


class ReferenceGuidance:
    """A sampler function: euler, which is DDIM, with the steps of Algorithm 2 from t_s to t_e."""

    def __init__(
        self, trajectory: Trajectory, mask: Tensor, settings: ReferenceSettings, report: Callable[[str], None]
    ) -> None:
        self.trajectory, self.mask, self.settings, self.report = trajectory, mask, settings, report

    def __call__(
        self,
        model: comfy.samplers.KSamplerX0Inpaint,
        x: Tensor,
        sigmas: Tensor,
        extra_args: dict,
        callback: Callable[[dict], None],
        disable: bool,
    ) -> Tensor:
        """Samples x (B, C, h, w) along sigmas: those of the trajectory, or their end from t_s or earlier on."""
        guider = model.inner_model
        self._check_sampling(guider, x, sigmas)
        role = self._unconditional(guider)
        levels = self.settings.levels(self.trajectory.steps)
        offset = self.trajectory.steps - (len(sigmas) - 1)

        def euler(x: Tensor, start: int, stop: int) -> Tensor:
            def tell(step: dict) -> None:
                callback({**step, "i": start + step["i"]})

            return sample_euler(model, x, sigmas[start : stop + 1], extra_args, tell, disable)

        x = euler(x, 0, levels.start - offset)
        x = self._follow(model, x, sigmas, extra_args, callback, role, offset)
        return euler(x, levels.stop - offset, len(sigmas) - 1)

    def _check_sampling(self, guider: Any, x: Tensor, sigmas: Tensor) -> None:
        """Raise ValueError unless the guider's sampling can follow the trajectory."""
        gcfg, model = isinstance(guider, GCFGGuider), guider.model_patcher
        model_family(model)
        # The MODEL that a GCFG samples may lack the LoRAs of the one it was given.
        self.trajectory.check_model(model_fingerprint(guider.source[UNCONDITIONAL].model if gcfg else model))
        abar = abar_of(sigmas)
        ending(self.trajectory, abar).check_sampling(abar, x.shape[1:])
        left, first = len(abar) - 1, self.trajectory.steps - self.settings.levels(self.trajectory.steps).start
        if left < first:
            raise ValueError(STARTS_TOO_LATE.format(left=left, first=first))
        for wrapper in model.wrappers.get(WrappersMP.PREDICT_NOISE, {}).get(LAYOUT, ()):
            if left - first < wrapper.__self__.settings.steps:
                raise ValueError(LAYOUT_MOVES.format(step=left - first + 1, start=left - first))
        # Core's APG keeps its numbers in a closure.
        functions = filter(inspect.isfunction, model.model_options.get("sampler_pre_cfg_function", ()))
        momenta = [inspect.getclosurevars(function).nonlocals.get("momentum") for function in functions]
        if any(momenta) or (gcfg and guider.correction.projection.momentum):
            raise ValueError(MOMENTUM)

    @staticmethod
    def _unconditional(guider: Any) -> str:
        """Under which name the guider keeps its unconditional prompt. Raises ValueError where there is none to vary."""
        role = next((role for role in (UNCONDITIONAL, "negative") if guider.conds.get(role)), None)
        if role is None or (type(guider) is comfy.samplers.CFGGuider and guider.cfg == 1):
            raise ValueError(NO_GRADIENT)
        given = guider.original_conds[role]
        more = [] if len(given) == 1 else [f"{len(given)} prompts"]
        more += sorted({key for cond in given for key in cond.keys() - PLAIN - PREPARED})
        if any(CONCEPTS in cond["model_conds"] for cond in given):
            more.append("concepts")
        varied = guider.own_conds(role) if isinstance(guider, GCFGGuider) else guider.conds[role]
        if not more and any("control" in cond for cond in varied):
            more.append("control")
        if not more and len({cond.get("hooks") for cond in varied}) > 1:
            more.append("the hooks of an area")  # weights would be exchanged inside of what has a gradient
        if more:
            raise ValueError(NOT_PLAIN.format(what=", ".join(more)))
        return role

    def _follow(
        self,
        model: comfy.samplers.KSamplerX0Inpaint,
        x: Tensor,
        sigmas: Tensor,
        extra_args: dict,
        callback: Callable[[dict], None],
        role: str,
        offset: int,
    ) -> Tensor:
        """The guided steps, from x at t_s."""
        guider = model.inner_model
        beside = [loaded for loaded in guider.loaded_models if not loaded.is_dynamic()]
        with differentiable_model(guider.model_patcher, beside) as whole, _at_work(whole, guider.model_patcher):
            # Tensors made in inference mode have no gradients: all that takes part is copied.
            levels, model, extra_args = sigmas.clone(), copy.copy(model), dict(extra_args)
            model.latent_image, model.noise = model.latent_image.clone(), model.noise.clone()
            if extra_args["denoise_mask"] is not None:
                extra_args["denoise_mask"] = extra_args["denoise_mask"].clone()
            options = extra_args["model_options"]
            groups = guider.groups if isinstance(guider, GCFGGuider) else []
            clones = [group.options for group in groups]
            for group in groups:
                group.deltas = {
                    name: {key: dW.clone() for key, dW in own.items()} for name, own in group.deltas.items()
                }
            hooked = any("hooks" in cond for conds in guider.conds.values() for cond in conds or ())
            phi = guider.conds[role][0]["model_conds"][CONTEXT].cond[:1].to(x.device, torch.float32, copy=True)

            def predict(x: Tensor, i: int) -> GuidedNoise:
                prompts = StepPrompts(guider.conds[role], whole.model)
                given = {**extra_args, "model_options": prompts.around(options)}
                for group, own in zip(groups, clones):
                    group.options = {clone: prompts.around(its) for clone, its in own.items()}
                noise = predictions(lambda x, sigma: model(x, sigma, **given), levels)

                def guided(phi: Tensor) -> Tensor:
                    prompts.begin(phi)
                    return noise(x, i - offset)

                if hooked:  # Hooks exchange weights, which must not happen between a prediction and its gradient.
                    with torch.no_grad():
                        guided(phi)  # from here on all but the unconditional comes from memory
                return guided

            def tell(i: int, x_0: Tensor) -> None:
                callback({"i": i - offset, "x": x_0, "denoised": x_0, "sigma": levels[i - offset]})

            start = self.settings.levels(self.trajectory.steps).start - offset
            half = whole.model.get_dtype_inference() == torch.float16
            followed = follow_reference(
                predict,
                replace(self.trajectory, latents=self.trajectory.latents.clone()),
                self.mask.clone(),
                phi,
                x.clone() / (1 + levels[start] ** 2).sqrt(),
                self.settings,
                HALF_PRECISION_SCALE if half else 1.0,
                tell,
            )
            for group, own in zip(groups, clones):
                group.options = own
            stop = start + len(followed.after)
            before, after = (sum(values) / len(values) for values in (followed.before, followed.after))
            self.report(
                f"{len(followed.after)} guided steps; mean distance to the reference {before:.2e} before, {after:.2e} "
                "after optimisation"
            )
            return followed.x * (1 + levels[stop] ** 2).sqrt()


@contextmanager
def _at_work(whole: ModelPatcher, sampled: ModelPatcher) -> Iterator[None]:
    """Prepare `whole` for predictions where it is not the MODEL that is being sampled, and so prepared already."""
    if whole is sampled:
        yield
        return
    whole.pre_run()
    try:
        yield
    finally:
        whole.cleanup()


class StepPrompts:
    """The CALC_COND_BATCH wrapper of one step: predicts anew what the unconditional prompt says; keeps all the rest."""

    def __init__(self, conds: list[dict], model: Any) -> None:
        """conds: the unconditional ones. model: the one with gradients."""
        self.own = {id(cond) for cond in conds}
        self.model = model
        self.kept: list[list[Tensor]] = []

    def around(self, options: dict) -> dict:
        """A copy of model_options with this as the outermost wrapper: payloads of concepts are taken out inside."""
        return with_wrappers(options, WrappersMP.CALC_COND_BATCH, {KEY: [self]})

    def begin(self, phi: Tensor) -> None:
        """From here on the unconditional prompt is phi (1 or B, T, d), and the guider asks from the beginning again."""
        self.phi, self.asked = phi, 0

    def __call__(
        self, executor: Callable, model: Any, conds: list, x: Tensor, sigma: Tensor, options: dict
    ) -> list[Tensor]:
        varied = [bool(group) and id(group[0]) in self.own for group in conds]
        if self.asked == len(self.kept):
            others = [None if ours else group for ours, group in zip(varied, conds)]  # their numbers stay theirs
            with torch.inference_mode():
                out = executor(model, others, x, sigma, options)
            self.kept.append([value.clone() for value in out])
        kept = self.kept[self.asked]
        self.asked += 1
        if not any(varied):
            return kept
        if torch.is_grad_enabled():
            transformer = options["transformer_options"]
            override = {"optimized_attention_override": attention_with_backward(transformer)}
            options = {**options, "transformer_options": {**transformer, **override}}
        ours = [
            group and [self._with_phi(cond) for cond in group] if own else None for own, group in zip(varied, conds)
        ]
        with saved_for_backward(options["transformer_options"]):
            out = executor(self.model, ours, x, sigma, options)
        return [new if own else old for own, new, old in zip(varied, out, kept)]

    def _with_phi(self, cond: dict) -> dict:
        model_conds = {**cond["model_conds"], CONTEXT: comfy.conds.CONDCrossAttn(self.phi)}
        return {**cond, "model_conds": model_conds, "uuid": uuid.uuid4()}
