"""Masks of subjects by points and boxes (Segment Anything)."""

from __future__ import annotations

import comfy.utils
import torch
from comfy_api.latest import io, ui

from ..kernels.segmentation import make_prompts, segment
from .native.boxes import boxes_by_picture, check_points, corners, read_points
from .native.live import show_text
from .native.output_files import file_status
from .native.pictures import opaque
from .native.segmenters import SAM_FILES, SamPictures, embed_picture, load, load_sam
from .types import SamEmbedding, SamModel

CATEGORY = "Concept Atelier/Masks"
EVERYTHING = 0.995  # of a picture: a mask that large leaves nothing out

SAM_FILES.register()


class AtelierSAMLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AtelierSAMLoader",
            display_name="Load SAM",
            category=CATEGORY,
            description="Loads Segment Anything from models/sams: ViT-B, ViT-L or ViT-H, as .pth or .safetensors. "
            "ComfyUI moves it out of memory when it needs the place.",
            search_aliases=["segment anything", "sam model loader", "mask model"],
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Combo.Input(
                    "checkpoint",
                    options=SAM_FILES.names(),
                    tooltip="A file in models/sams. Which of the three models it holds is told from the file itself. "
                    f"Published at {SAM_FILES.published}.",
                ),
                io.Combo.Input(
                    "encoder_precision",
                    options=["auto", "full", "half"],
                    tooltip="Of the image encoder, the large part. Half takes half the memory and is faster on most "
                    "GPUs; auto takes it where ComfyUI does. The rest always computes in full precision.",
                ),
            ],
            outputs=[SamModel.Output(display_name="sam", tooltip="For SAM Encode.")],
        )

    @classmethod
    def validate_inputs(cls, checkpoint: str) -> bool | str:
        return SAM_FILES.check(checkpoint)

    @classmethod
    def fingerprint_inputs(cls, checkpoint: str | None, encoder_precision: str) -> tuple[int, int]:
        return file_status(checkpoint and SAM_FILES.path(checkpoint))

    @classmethod
    def execute(cls, checkpoint: str, encoder_precision: str) -> io.NodeOutput:
        sam = load_sam(checkpoint, encoder_precision)
        show_text(sam.name, cls)
        return io.NodeOutput(sam, ui=ui.PreviewText(sam.name))


class AtelierSAMEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AtelierSAMEncode",
            display_name="SAM Encode",
            category=CATEGORY,
            description="Looks at pictures once, which is the slow part of Segment Anything. SAM Mask then answers "
            "points and boxes in milliseconds, and moving a point does not run this node again.",
            search_aliases=["segment anything", "sam embedding", "image embedding"],
            inputs=[
                SamModel.Input("sam", tooltip="From Load SAM."),
                io.Image.Input("images", tooltip="The pictures to mask, of any size. Each is scaled to 1024 pixels."),
            ],
            outputs=[SamEmbedding.Output(display_name="embedding", tooltip="For SAM Mask.")],
        )

    @classmethod
    def execute(cls, sam, images) -> io.NodeOutput:
        bar = comfy.utils.ProgressBar(len(images))  # raises when Cancel is pressed
        pictures = []
        for number, picture in enumerate(opaque(images), start=1):
            pictures.append(embed_picture(sam, picture))
            bar.update_absolute(number)
        return io.NodeOutput(SamPictures(pictures, sam.decoder))


def mask_note(number: int, mask: torch.Tensor, scores: list[float]) -> str:
    """One line about the mask of picture `number`: how large it is, how sure, and what to do when it is of no use."""
    share = float(mask.float().mean())
    if not scores:
        return f"Picture {number}: nothing to mask, no box and no point: its mask is empty."
    if not share:
        return f"Picture {number}: SAM found nothing there: its mask is empty. Move the points, or draw a larger box."
    line = f"Picture {number}: {share:.1%} of it, quality {', '.join(f'{score:.2f}' for score in scores)}"
    return line + (". The mask covers everything: add a negative point." if share > EVERYTHING else "")


class AtelierSAMMask(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        points = "one a line as x, y in pixels, or from a point editor (JSON with x and y). They hold for all pictures."
        return io.Schema(
            node_id="AtelierSAMMask",
            display_name="SAM Mask",
            category=CATEGORY,
            description="Masks what is at the points and in the boxes, in milliseconds. Connect Detect by Text to mask "
            "what a text names (Grounded SAM).",
            search_aliases=["segment anything", "sam segment", "points to mask", "boxes to mask", "grounded sam"],
            hidden=[io.Hidden.unique_id],
            inputs=[
                SamEmbedding.Input("embedding", tooltip="From SAM Encode."),
                io.BoundingBox.Input(
                    "bboxes",
                    optional=True,
                    force_input=True,
                    tooltip="What to mask, from Detect by Text, any other detector, or drawn by hand. Boxes of one "
                    "picture are taken for all. Each box has a mask of its own; they are united.",
                ),
                io.String.Input(
                    "positive_coords",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip=f"Points inside of what to mask, {points} In a box they help to mask what the box holds; "
                    "outside the boxes they ask for one mask more.",
                ),
                io.String.Input(
                    "negative_coords",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip=f"Points to leave out, {points}",
                ),
            ],
            outputs=[
                io.Mask.Output(
                    display_name="masks",
                    tooltip="1 inside, 0 outside; one for each picture, of its size; empty where nothing was found.",
                )
            ],
        )

    @classmethod
    def execute(cls, embedding, bboxes=None, positive_coords: str = "", negative_coords: str = "") -> io.NodeOutput:
        inside = read_points(positive_coords, "positive_coords")
        outside = read_points(negative_coords, "negative_coords")
        if bboxes is None and not len(inside):
            raise ValueError('Nothing says what to mask: connect "bboxes", or write a point into positive_coords.')
        decoder = load(embedding.decoder)
        masks, notes = [], []
        frames = boxes_by_picture(bboxes, len(embedding.pictures))
        for number, (features, boxes) in enumerate(zip(embedding.pictures, frames), start=1):
            check_points(inside, "positive_coords", *features.picture_size)
            check_points(outside, "negative_coords", *features.picture_size)
            prompts = make_prompts(corners(boxes, *features.picture_size), inside, outside)
            mask, scores = segment(decoder, features, prompts)
            masks.append(mask.float())
            notes.append(mask_note(number, mask, scores))
        text = "\n".join(notes)
        show_text(text, cls)
        return io.NodeOutput(torch.stack(masks), ui=ui.PreviewText(text))


NODES = [AtelierSAMLoader, AtelierSAMEncode, AtelierSAMMask]
