"""Which channels of a concept's vectors may learn from a step."""

from __future__ import annotations

from comfy_api.latest import io

from ..kernels.gradient_mask import MERGES, STRATEGIES, TARGETS, GradientMask
from .types import GradientRule


class AtelierGradientMask(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AtelierGradientMask",
            display_name="Gradient Mask (ADI)",
            category="Concept Atelier/Train",
            description="Lets only those channels of the vectors learn that speak of the action: masks channels whose "
            "gradient changes with the context, and channels whose gradient does not change with the action. Needs "
            "exemplars from Triples.",
            search_aliases=["ADI", "action-disentangled identifier", "learn action", "gradient mask"],
            inputs=[
                io.Float.Input(
                    "beta",
                    default=0.6,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="Share of the channels that each of the two masks closes. 0 masks nothing (plain "
                    "per-layer Textual Inversion), 1 everything. ADI section 5.1: 0.6.",
                ),
                io.Combo.Input(
                    "merge",
                    options=list(MERGES),
                    default="intersection",
                    tooltip="Channels that stay open: in both masks (ADI Eq. 13), in either, or in one mask alone "
                    "(ablations of Fig. 7).",
                ),
                io.Combo.Input(
                    "strategy",
                    options=list(STRATEGIES),
                    default="adi",
                    advanced=True,
                    tooltip="adi: the masks of the paper. The others are its controls (section 5.5), with as many "
                    "open channels: evenly spaced, random, the smallest or the largest gradients, and the reverse "
                    "of adi.",
                ),
                io.Combo.Input(
                    "mask_what",
                    options=list(TARGETS),
                    default="gradient",
                    advanced=True,
                    tooltip="gradient: what the optimizer sees (ADI Eq. 14); its momentum still moves closed channels "
                    "a little. update: closed channels stay where they are.",
                ),
                io.Boolean.Input(
                    "share_noise",
                    default=True,
                    advanced=True,
                    tooltip="The three pictures of a triple get the same noise, so that their gradients differ by what "
                    "they show. The paper does not say.",
                ),
                io.Boolean.Input(
                    "share_timestep",
                    default=True,
                    advanced=True,
                    tooltip="The three pictures of a triple get the same timestep; without it their gradients differ "
                    "mostly by the amount of noise. The paper does not say.",
                ),
            ],
            outputs=[GradientRule.Output(display_name="gradient_rule", tooltip="For Train Concept.")],
        )

    @classmethod
    def execute(
        cls, beta: float, merge: str, strategy: str, mask_what: str, share_noise: bool, share_timestep: bool
    ) -> io.NodeOutput:
        return io.NodeOutput(
            GradientMask(
                beta=beta,
                merge=merge,
                strategy=strategy,
                target=mask_what,
                share_noise=share_noise,
                share_timestep=share_timestep,
            )
        )


NODES = [AtelierGradientMask]
