"""Guidance from any number of prompts and models (GCFG)."""

from __future__ import annotations

from comfy_api.latest import io

from ..kernels.guidance import AdaptiveProjection, GuidanceWeight
from .native.guidance_cost import cost_report
from .native.guiders import Branch, Correction, GCFGGuider
from .native.ksampler_branches import BranchesForKSampler
from .native.live import show_text
from .types import GuidanceBranch

CATEGORY = "Concept Atelier/Guidance"
COST_TOOLTIP = (
    "How many forwards of the U-Net a step costs, and why. Connect it to Preview as Text to keep it in sight. Where "
    "memory does not hold a batch, ComfyUI splits it."
)


def branch_inputs(tooltip: str) -> list[io.Input]:
    """The branches, and what may be done to the combined guidance."""
    branch = GuidanceBranch.Input("branch", tooltip="From Guidance Branch.")
    return [
        io.Autogrow.Input(
            "branches",
            template=io.Autogrow.TemplatePrefix(branch, prefix="branch", min=0, max=20),
            tooltip=tooltip,
        ),
        io.Float.Input(
            "rescale",
            default=0.0,
            min=0.0,
            max=1.0,
            step=0.05,
            tooltip="Guidance rescale (Lin et al. 2023): how far to bring the contrast of the guided picture back to "
            "that of the branches. 0: off. Raise it when large weights burn the picture; Rescale CFG takes 0.7.",
        ),
        io.Float.Input(
            "apg_eta",
            default=1.0,
            min=-10.0,
            max=10.0,
            step=0.05,
            advanced=True,
            tooltip="Adaptive projected guidance (Sadat et al. 2024): how much of the guidance along the picture "
            "itself stays, the part that saturates. 1: off. The paper takes 0. It acts where the weights sum to more "
            "than 1.",
        ),
        io.Float.Input(
            "apg_norm_threshold",
            default=0.0,
            min=0.0,
            max=1000.0,
            step=0.5,
            advanced=True,
            tooltip="Adaptive projected guidance: the largest norm of the guidance in latents. 0: off. The paper "
            "takes 2.5 (EDM2) to 15 (SDXL at 1024 pixels); norms grow with the side of the picture, so halve it at "
            "half the side.",
        ),
        io.Float.Input(
            "apg_momentum",
            default=0.0,
            min=-1.0,
            max=1.0,
            step=0.05,
            advanced=True,
            tooltip="Adaptive projected guidance: the share of the earlier steps' guidance added to this step's. 0: "
            "off. The paper takes negative ones, -0.5 for SDXL.",
        ),
    ]


def cost_output() -> io.Output:
    return io.String.Output(display_name="cost", tooltip=COST_TOOLTIP)


class AtelierGuidanceBranch(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AtelierGuidanceBranch",
            display_name="Guidance Branch",
            category=CATEGORY,
            description="One of the things that guide the picture: a prompt, the MODEL that reads it and how much it "
            "counts. Connect any number of them to GCFG Guider or GCFG (for KSampler).",
            search_aliases=["gcfg", "cfg", "negative prompt", "composable"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The MODEL that reads the conditioning: the same as the others', a fine-tune, one with "
                    "LoRAs. All need the same VAE; noise and velocity predictions mix. Other checkpoints stay in "
                    "memory together.",
                ),
                io.Conditioning.Input(
                    "conditioning",
                    tooltip="The prompt, with its own concepts, ControlNet, area, mask and timestep range. Outside "
                    "its area the branch does nothing.",
                ),
                io.Float.Input(
                    "weight",
                    default=2.5,
                    min=-100.0,
                    max=100.0,
                    step=0.05,
                    tooltip="What CFG calls cfg: the only branch at 7.5 is CFG at 7.5. Below 0 it guides away. 0 "
                    "costs nothing. The paper's code takes 2.5 for each of two branches.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="When the branch begins to count, as a share of the sampling. Before, it costs nothing.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="When it ceases to count. After that it costs nothing.",
                ),
                io.Custom("CURVE").Input(
                    "weight_curve",
                    optional=True,
                    extra_dict={"forceInput": True},
                    tooltip="From Curve Editor: what the weight is multiplied by, from start_percent at the left to "
                    "end_percent at the right. Without it, 1 all the way.",
                ),
            ],
            outputs=[GuidanceBranch.Output(display_name="branch", tooltip="For GCFG Guider or GCFG (for KSampler).")],
        )

    @classmethod
    def execute(cls, model, conditioning, weight, start_percent, end_percent, weight_curve=None) -> io.NodeOutput:
        curve = None if weight_curve is None else weight_curve.interp
        return io.NodeOutput(Branch(model, conditioning, GuidanceWeight(weight, start_percent, end_percent, curve)))


class AtelierGCFGGuider(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AtelierGCFGGuider",
            display_name="GCFG Guider",
            category=CATEGORY,
            description="Guides one picture by any number of prompts and models: the unconditional prediction, plus "
            "weight times the difference of each branch to it. For SamplerCustomAdvanced.",
            search_aliases=["gcfg", "multi model", "composable diffusion", "cfg guider", "negative prompt"],
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The MODEL of the unconditional prediction, usually the base model.",
                ),
                io.Conditioning.Input(
                    "unconditional",
                    tooltip="What branches are compared with: an empty prompt, or a negative prompt. It is left out "
                    "where the weights sum to 1.",
                ),
                *branch_inputs("From Guidance Branch, in any order; another socket appears as you connect one."),
            ],
            outputs=[
                io.Guider.Output(display_name="GUIDER", tooltip="For SamplerCustomAdvanced."),
                cost_output(),
            ],
        )

    @classmethod
    def execute(
        cls, model, unconditional, branches, rescale, apg_eta, apg_norm_threshold, apg_momentum
    ) -> io.NodeOutput:
        projection = AdaptiveProjection(apg_eta, apg_norm_threshold, apg_momentum)
        guider = GCFGGuider(model, unconditional, branches, Correction(rescale, projection))
        text = cost_report(guider)
        show_text(text, cls)
        return io.NodeOutput(guider, text)


class AtelierGCFG(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AtelierGCFG",
            display_name="GCFG (for KSampler)",
            category=CATEGORY,
            description="Adds branches to the guidance of a plain KSampler. Its negative is the unconditional "
            "prompt, its positive a branch with weight cfg, and these branches come on top.",
            search_aliases=["gcfg", "multi model", "composable diffusion", "cfg", "negative prompt"],
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Model.Input(
                    "model", tooltip="The MODEL for KSampler's own positive and negative. Add LoRAs before or after."
                ),
                *branch_inputs(
                    "From Guidance Branch, in any order, with the MODEL from before this node; another socket "
                    "appears as you connect one."
                ),
            ],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="For KSampler or CFG Guider."),
                cost_output(),
            ],
        )

    @classmethod
    def execute(cls, model, branches, rescale, apg_eta, apg_norm_threshold, apg_momentum) -> io.NodeOutput:
        projection = AdaptiveProjection(apg_eta, apg_norm_threshold, apg_momentum)
        added = BranchesForKSampler(branches, Correction(rescale, projection))
        patched = added.patch(model)
        # What it costs with plain prompts in KSampler and any cfg that keeps the negative; MODELs are checked by it.
        text = cost_report(added.guider(model, [[None, {}]], [[None, {}]], cfg=7.5))
        show_text(text, cls)
        return io.NodeOutput(patched, text)


NODES = [AtelierGuidanceBranch, AtelierGCFGGuider, AtelierGCFG]
