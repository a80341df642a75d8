"""Holding a word near the words one knows while it is learned."""

from __future__ import annotations

from comfy_api.latest import io

from ..kernels.anchor_loss import AnchorLoss
from ..kernels.anchors import split_words
from .types import LossTerm

SOURCES = {
    "COCO names": "coco",
    "my words": "words",
    "nearest words": "nearest",
    "class word alone": "class word",
}
SCALES = {"class word's length": "class word", "as printed (1/n)": "paper", "released code (1/77d)": "code"}


class AtelierAnchorLoss(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AtelierAnchorLoss",
            display_name="Anchor Loss (Compositional Inversion)",
            category="Concept Atelier/Train",
            description="Holds a word near known words while it is learned, so that it composes with the rest of a "
            "prompt and does not swallow the picture. Train Concept shows which words it is near, and how much.",
            search_aliases=[
                "compositional inversion",
                "anchors",
                "semantic inversion",
                "regularisation",
                "overfitting",
            ],
            inputs=[
                io.Float.Input(
                    "weight",
                    default=0.95,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Lambda: the share of the anchor loss in what is minimised; the pictures have the rest. 0: "
                    "plain training. 1: the pictures have no say. Compositional Inversion, Eq. 10 and appendix: 0.95 "
                    "with Textual Inversion and Custom Diffusion, 0.6 with DreamBooth. Lower it where the subject is "
                    "not learned. Train Concept shows the anchor loss relative to the denoising loss.",
                ),
                io.Combo.Input(
                    "anchors",
                    options=list(SOURCES),
                    default="COCO names",
                    tooltip="Known words beside the class word. COCO names: those of COCO's 80 classes that are one "
                    "piece (the paper's example). my words: the list in words. nearest words: the class word's "
                    "neighbours in the text encoder's vocabulary. class word alone: no other, as in the released code.",
                ),
                io.String.Input(
                    "words",
                    default="",
                    multiline=True,
                    tooltip="For my words: common single words, separated by commas or lines. Those of several pieces "
                    "have no embedding of their own and are left out.",
                ),
                io.String.Input(
                    "class_word",
                    default="",
                    tooltip="What the concept is, in one word, always among the anchors. Empty: the init_word of Train "
                    "Concept. Best write it into the captions too, after the blank: 'a photo of a {} cat'.",
                ),
                io.Int.Input(
                    "most_anchors",
                    default=3,
                    min=1,
                    max=16,
                    tooltip="The most words that the concept may be made of at a time, c - 1 in Eq. 6. The paper does "
                    "not say how many.",
                ),
                io.Int.Input(
                    "neighbours",
                    default=80,
                    min=1,
                    max=1000,
                    advanced=True,
                    tooltip="For nearest words: how many of them, by angle to the class word.",
                ),
                io.Int.Input(
                    "refresh_every",
                    default=10,
                    min=1,
                    max=100_000,
                    advanced=True,
                    tooltip="Steps until it is worked out anew which words the concept is made of.",
                ),
                io.Combo.Input(
                    "scale",
                    options=list(SCALES),
                    default="class word's length",
                    advanced=True,
                    tooltip="What distances are measured in. class word's length: the weight means the same for any "
                    "anchors, text encoder and model. as printed: divided by the number of anchors (Eq. 6). released "
                    "code: a mean over the whole prompt, 739 times weaker than printed on SD1 with 80 anchors.",
                ),
            ],
            outputs=[LossTerm.Output(display_name="loss_term", tooltip="For loss_terms of Train Concept.")],
        )

    @classmethod
    def execute(
        cls, weight: float, anchors: str, words: str, class_word: str, most_anchors: int, neighbours: int,
        refresh_every: int, scale: str,
    ) -> io.NodeOutput:  # fmt: skip
        source = SOURCES[anchors]
        return io.NodeOutput(
            AnchorLoss(
                lam=weight,
                source=source,
                words=split_words(words) if source == "words" else (),
                neighbours=neighbours,
                class_word=class_word.strip().lower(),
                atoms=most_anchors,
                refresh=refresh_every,
                scale=SCALES[scale],
            )
        )


NODES = [AtelierAnchorLoss]
