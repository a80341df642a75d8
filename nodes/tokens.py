"""Where a concept's vectors go."""

from __future__ import annotations

from comfy_api.latest import io

from ..kernels.layouts import Layout
from .types import Layout as LayoutType

GRANULARITIES = {"one token": "prompt", "per block": "block", "per layer": "layer"}
PLACES = {"word": "word", "tail rows, added": "tail residual", "tail rows, replaced": "tail replace"}


class AtelierTokenLayout(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AtelierTokenLayout",
            display_name="Token Layout",
            category="Concept Atelier/Train",
            description="Chooses how finely a concept is divided: one word for the whole picture, or a word of its own "
            "for each part of the U-Net or stage of denoising; and where it goes, into the prompt or behind it.",
            search_aliases=[
                "textual inversion",
                "P+",
                "extended textual inversion",
                "XTI",
                "per layer embedding",
                "ProSpect",
                "SeFi-IDE",
                "HiFi Tuner",
            ],
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
                    tooltip="Vectors in a row at the place of the identifier. ADI uses 1, HiFi Tuner's tail rows 5; "
                    "more hold more detail and overfit sooner.",
                ),
                io.Int.Input(
                    "stages",
                    default=1,
                    min=1,
                    max=1000,
                    optional=True,
                    tooltip="Equal parts of the way from noise to picture, each with vectors of its own. 1: the same "
                    "all the way. SeFi-IDE: 5 with split_kv. ProSpect: 10. HiFi Tuner: 50, with steps_each_stage on "
                    "Train Concept.",
                ),
                io.Boolean.Input(
                    "split_kv",
                    default=False,
                    optional=True,
                    tooltip="Separate vectors for keys (where the word looks) and values (what it puts there): "
                    "SeFi-IDE's pairs.",
                ),
                io.Combo.Input(
                    "place",
                    options=list(PLACES),
                    default="word",
                    optional=True,
                    tooltip="word: at the identifier's place in the prompt. tail rows (HiFi Tuner 3.2): the "
                    "identifier reads as the init word, and the last rows of the encoded prompt carry the concept. "
                    "added: on top of the prompt's own rows, so that an unlearned concept is exactly the plain "
                    "prompt; replaced: in their place, as the paper has it.",
                ),
                io.Boolean.Input(
                    "generated",
                    default=False,
                    advanced=True,
                    optional=True,
                    tooltip="Let a small network make all vectors, and learn in their place (ProSpect's transformer "
                    "block, which SeFi-IDE's figure shows). It wants a learning rate of 0.0001 where free vectors take "
                    "0.005. On SD1 with ten vectors a saved run has 380 MB; the concept itself stays small.",
                ),
            ],
            outputs=[LayoutType.Output(display_name="layout", tooltip="For Train Concept.")],
        )

    @classmethod
    def execute(
        cls,
        granularity: str,
        tokens: int,
        stages: int = 1,
        split_kv: bool = False,
        place: str = "word",
        generated: bool = False,
    ) -> io.NodeOutput:
        return io.NodeOutput(Layout(GRANULARITIES[granularity], tokens, stages, split_kv, PLACES[place], generated))


NODES = [AtelierTokenLayout]
