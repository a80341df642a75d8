"""GCFG as a patch that makes KSampler use it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.samplers
from comfy.model_patcher import ModelPatcher, create_hook_patches_clone
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...kernels.guidance import GuidanceWeight, check_weights
from .guiders import BRANCHES_INSIDE, Branch, Correction, GCFGGuider
from .model_groups import KEY
from .payload import Conditioning

POSITIVE = "KSampler's positive"

OTHER_GUIDER = (
    "A MODEL from 'GCFG (for KSampler)' works with KSampler, KSampler (Advanced), SamplerCustom and CFG Guider, not "
    "with {guider}: use 'GCFG Guider' there, with the MODEL from before 'GCFG (for KSampler)'."
)


class BranchesForKSampler:
    """The OUTER_SAMPLE wrapper: hands the sampling over to GCFG.

    KSampler's negative is the unconditional, its positive a branch with weight cfg, after which the others come.
    """

    def __init__(self, branches: dict[str, Branch], correction: Correction) -> None:
        """Raises ValueError unless some branch has a weight."""
        check_weights([branch.weight for branch in branches.values()])
        self.branches, self.correction = branches, correction

    def __call__(
        self, executor: Any, noise: Tensor, latent_image: Tensor, sampler: comfy.samplers.Sampler, sigmas: Tensor,
        denoise_mask: Tensor | None = None, callback: Callable | None = None, disable_pbar: bool = False,
        seed: int | None = None, **_: Any,
    ) -> Tensor:  # fmt: skip
        guider = executor.class_obj
        if type(guider) is not comfy.samplers.CFGGuider:
            raise ValueError(OTHER_GUIDER.format(guider=type(guider).__name__))
        ours = self.guider(
            guider.model_patcher,
            *([[None, cond] for cond in guider.original_conds[side]] for side in ("positive", "negative")),
            guider.cfg,
        )
        # ComfyUI has given the mask (B, C, h, w) all channels by now, and would take them for pictures.
        mask = None if denoise_mask is None else denoise_mask[:, :1]
        return ours.sample(noise, latent_image, sampler, sigmas, mask, callback, disable_pbar, seed)

    def guider(self, model: ModelPatcher, positive: Conditioning, negative: Conditioning, cfg: float) -> GCFGGuider:
        """The guider that a KSampler with these inputs is given."""
        # KSampler has registered the hooks of its own prompts by now, which the guider does itself.
        kept = model.hook_patches if model.hook_patches_backup is None else model.hook_patches_backup
        model = model.clone()
        model.hook_patches, model.hook_patches_backup = create_hook_patches_clone(kept), None
        model.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, KEY)
        first = {POSITIVE: Branch(model, positive, GuidanceWeight(cfg))}
        return GCFGGuider(model, negative, first | self.branches, self.correction)

    def patch(self, model: ModelPatcher) -> ModelPatcher:
        """A clone of MODEL that KSampler samples with the branches.

        Ours is the first wrapper: those of other nodes run inside the guider, once.
        """
        if KEY in model.wrappers.get(WrappersMP.OUTER_SAMPLE, {}):
            raise ValueError(BRANCHES_INSIDE.format(name="GCFG (for KSampler)"))
        patched = model.clone()
        patched.wrappers[WrappersMP.OUTER_SAMPLE] = {KEY: [self], **patched.wrappers.get(WrappersMP.OUTER_SAMPLE, {})}
        return patched
