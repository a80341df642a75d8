"""The attention of a learned word, held near that of its class (SeFi-IDE)."""

from __future__ import annotations

from comfy_api.latest import io

from ..kernels.attention_loss import SubjectAttentionLoss
from .types import LossTerm


class AtelierSubjectAttentionLoss(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AtelierSubjectAttentionLoss",
            display_name="Subject Attention Loss (SeFi-IDE)",
            category="Concept Atelier/Train",
            description="Keeps a learned word from taking over the picture: all words of the training prompt have to "
            "look where they look when the class word stands in its place. SeFi-IDE learns with it from one picture, "
            "with five stages and keys and values apart.",
            search_aliases=["SeFi-IDE", "attention regularization", "semantic fidelity", "beyond inserting"],
            inputs=[
                io.Float.Input(
                    "weight",
                    default=0.003,
                    min=0.0,
                    max=1.0,
                    step=0.0001,
                    round=False,
                    tooltip="Lambda. SeFi-IDE's project page tries 0.0001 to 0.05 and takes 0.003: less overfits the "
                    "pictures, more loses the subject. Train Concept shows lambda L_attn / L_diff as 'attention : "
                    "denoising'. 0: off.",
                ),
                io.String.Input(
                    "class_phrase",
                    default="",
                    tooltip="What the subject is, such as person, in as many tokens as the layout has. Empty: the "
                    "init_word of Train Concept.",
                ),
                io.Int.Input(
                    "largest_map",
                    default=32,
                    min=1,
                    max=256,
                    advanced=True,
                    tooltip="Side of the largest attention maps to compare; 32: up to 32 x 32 places. That leaves out "
                    "the finest layers of SD1 and SD2 at 512 and of SDXL at 1024 pixels. The paper does not say.",
                ),
                io.Boolean.Input(
                    "with_padding",
                    default=False,
                    advanced=True,
                    tooltip="Also compare the start, end and padding tokens, which hold most of the attention and "
                    "outweigh the words. Off: every word of the prompt.",
                ),
                io.Boolean.Input(
                    "detach_query",
                    default=True,
                    advanced=True,
                    tooltip="On: the loss teaches the keys alone. Off: it also changes, through the picture's own "
                    "features, the values and earlier layers. The paper implies on.",
                ),
                io.Boolean.Input(
                    "detach_reference",
                    default=True,
                    advanced=True,
                    tooltip="On: the reference's attention is a fixed goal. Off, with detach_query off: it may come "
                    "towards the learned one. The paper implies on.",
                ),
            ],
            outputs=[LossTerm.Output(display_name="loss_term", tooltip="For loss_terms of Train Concept.")],
        )

    @classmethod
    def execute(
        cls, weight: float, class_phrase: str, largest_map: int, with_padding: bool, detach_query: bool,
        detach_reference: bool,
    ) -> io.NodeOutput:  # fmt: skip
        return io.NodeOutput(
            SubjectAttentionLoss(
                weight=weight,
                class_phrase=class_phrase,
                detach_query=detach_query,
                detach_reference=detach_reference,
                with_padding=with_padding,
                largest_map=largest_map,
            )
        )


NODES = [AtelierSubjectAttentionLoss]
