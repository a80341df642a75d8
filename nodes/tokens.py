"""Where a concept's vectors go."""

from __future__ import annotations

from comfy_api.latest import io

from ..kernels.layouts import Layout
from .types import Layout as LayoutType

GRANULARITIES = {"one token": "prompt", "per block": "block", "per layer": "layer"}


class AtelierTokenLayout(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AtelierTokenLayout",
            display_name="Token Layout",
            category="Concept Atelier/Train",
            description="Chooses how finely a concept is divided: one word for the whole picture, or a word of its own "
            "for each part of the U-Net.",
            search_aliases=["textual inversion", "P+", "extended textual inversion", "XTI", "per layer embedding"],
            inputs=[
                io.Combo.Input(
                    "granularity",
                    options=list(GRANULARITIES),
                    default="per block",
                    tooltip="one token: all layers share it (Textual Inversion); usable as a stock embedding. "
                    "per block: one for each block of cross-attention layers, 16 in SD1 and SD2 (as in P+ and ADI, "
                    "section 4.2), 11 in SDXL. per layer: one for each layer, which differs on SDXL alone: 70 there, "
                    "with 70 text encodings a step.",
                ),
                io.Int.Input(
                    "tokens",
                    default=1,
                    min=1,
                    max=16,
                    tooltip="Vectors in a row at the place of the identifier. ADI uses 1; more hold more detail and "
                    "overfit sooner.",
                ),
            ],
            outputs=[LayoutType.Output(display_name="layout", tooltip="For Train.")],
        )

    @classmethod
    def execute(cls, granularity: str, tokens: int) -> io.NodeOutput:
        return io.NodeOutput(Layout(granularity=GRANULARITIES[granularity], tokens=tokens))


NODES = [AtelierTokenLayout]
