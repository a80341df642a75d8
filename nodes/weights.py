"""Weights of the model that learn along with a concept: Custom Diffusion, DreamBooth, LoRA."""

from __future__ import annotations

from comfy_api.latest import io

from ..kernels.weight_plan import PARTS, WeightPlan
from .types import Weights


class AtelierTrainWeights(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AtelierTrainWeights",
            display_name="Train Weights (Custom Diffusion, DreamBooth)",
            category="Concept Atelier/Train",
            description="Lets weights of the model learn along with the word, for a closer likeness. For Train "
            "Concept, with any layout, masks and loss terms. What is learned is kept with the concept as a change of "
            "the weights; the checkpoint stays as it is.",
            search_aliases=["custom diffusion", "dreambooth", "lora training", "fine-tune", "cross attention"],
            inputs=[
                io.Combo.Input(
                    "part",
                    options=list(PARTS),
                    tooltip="cross-attention K and V: Custom Diffusion; 19 million weights in SD1. attention: "
                    "all its matrices, usual for LoRA. whole U-Net: DreamBooth; in whole matrices SD1 needs 14 GB "
                    "beside the model, SDXL 41 GB.",
                ),
                io.Int.Input(
                    "rank",
                    default=0,
                    min=0,
                    max=1024,
                    tooltip="0: whole matrices, as in the papers. Above 0: low-rank changes (LoRA) of the part's "
                    "linear layers, a few MB; 4 to 32 are usual.",
                ),
                io.Float.Input(
                    "learning_rate",
                    default=1e-5,
                    min=0.0,
                    max=1.0,
                    step=1e-7,
                    round=False,
                    tooltip="Of these weights, beside that of the word on Train Concept (Compositional Inversion, "
                    "appendix: 0.00001 for Custom Diffusion with 500 steps and for DreamBooth with 800). With a rank, "
                    "0.0001 is usual.",
                ),
            ],
            outputs=[Weights.Output(display_name="weights", tooltip="For Train Concept.")],
        )

    @classmethod
    def execute(cls, part: str, rank: int, learning_rate: float) -> io.NodeOutput:
        return io.NodeOutput(WeightPlan(part, rank, learning_rate))


NODES = [AtelierTrainWeights]
