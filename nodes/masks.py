"""Masks of subjects: by points and boxes (Segment Anything), and boxes by text (GroundingDINO)."""

from __future__ import annotations

from pathlib import Path

import comfy.utils
import torch
from comfy_api.latest import io, ui

from ..kernels.grounding_dino import ENGINES
from ..kernels.segmentation import make_prompts, segment
from .native.boxes import boxes_by_picture, check_points, corners, read_points, to_bounding_box
from .native.live import show_text
from .native.pictures import opaque
from .native.segmenters import (
    DINO_FILES,
    SAM_FILES,
    SamPictures,
    detect_in,
    embed_picture,
    load,
    load_detector,
    load_sam,
    register_folders,
)
from .types import Detector, SamEmbedding, SamModel

CATEGORY = "Concept Atelier/Masks"
EVERYTHING = 0.995  # of a picture: a mask that large leaves nothing out

register_folders()


def file_status(path: Path) -> tuple[int, int]:
    """What changes when a file does."""
    status = path.stat()
    return status.st_mtime_ns, status.st_size


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
    def fingerprint_inputs(cls, checkpoint: str, encoder_precision: str) -> tuple[int, int]:
        return file_status(SAM_FILES.path(checkpoint))

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


class AtelierGroundingDINOLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AtelierGroundingDINOLoader",
            display_name="Load GroundingDINO",
            category=CATEGORY,
            description="Loads GroundingDINO, SwinT or SwinB, from models/grounding-dino or models/groundingdino. "
            "Nothing is downloaded: the vocabulary of its text encoder (vocab.txt) is looked for in "
            "models/bert-base-uncased. ComfyUI moves the model out of memory when it needs the place.",
            search_aliases=["grounding dino", "text detection model", "open vocabulary detector"],
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Combo.Input(
                    "checkpoint",
                    options=DINO_FILES.names(),
                    tooltip="A file in one of these folders. Which of the two models it holds is told from the file "
                    f"itself; no configuration file is needed. Published at {DINO_FILES.published}.",
                ),
                io.Combo.Input(
                    "engine",
                    options=list(ENGINES),
                    tooltip="What runs it. transformers is always there. groundingdino-py is the authors' code, for "
                    "those who installed it. Both give the same boxes.",
                ),
            ],
            outputs=[Detector.Output(display_name="detector", tooltip="For Detect by Text.")],
        )

    @classmethod
    def validate_inputs(cls, checkpoint: str) -> bool | str:
        return DINO_FILES.check(checkpoint)

    @classmethod
    def fingerprint_inputs(cls, checkpoint: str, engine: str) -> tuple[int, int]:
        return file_status(DINO_FILES.path(checkpoint))

    @classmethod
    def execute(cls, checkpoint: str, engine: str) -> io.NodeOutput:
        detector, name = load_detector(checkpoint, engine)
        show_text(name, cls)
        return io.NodeOutput(detector, ui=ui.PreviewText(name))


def texts_for(text: str, count: int) -> list[str]:
    """What to look for in each of `count` pictures: one line for all, or one for each. Raises ValueError otherwise."""
    lines = [line for line in text.splitlines() if line.strip()]
    if len(lines) not in (1, count):
        raise ValueError(
            f"text has {len(lines)} lines and there are {count} pictures: write one line for all, or one for each."
        )
    return lines * count if len(lines) == 1 else lines


class AtelierDetect(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AtelierDetect",
            display_name="Detect by Text",
            category=CATEGORY,
            description="Finds what a text names and draws a box around each. Connect the boxes to SAM Mask, to core's "
            "Draw BBoxes, or to any node that takes bounding boxes.",
            search_aliases=["grounding dino", "text to box", "open vocabulary detection", "grounded sam", "bbox"],
            hidden=[io.Hidden.unique_id],
            inputs=[
                Detector.Input("detector", tooltip="From Load GroundingDINO."),
                io.Image.Input("images", tooltip="The pictures to look into, of any size."),
                io.String.Input(
                    "text",
                    default="a person",
                    multiline=True,
                    tooltip="What to look for, several things parted by full stops: 'a dog. a red ball'. One line for "
                    "all pictures, or one for each.",
                ),
                io.Float.Input(
                    "threshold",
                    default=0.35,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="How sure it has to be. Lower finds more, and more that is not there. The authors' code "
                    "takes 0.35.",
                ),
                io.Int.Input(
                    "max_detections",
                    default=100,
                    min=1,
                    max=900,
                    tooltip="The surest so many of each picture. 1 for the mask of a single subject.",
                ),
                io.Int.Input(
                    "resolution",
                    default=800,
                    min=64,
                    max=2048,
                    step=8,
                    advanced=True,
                    tooltip="The short side in pixels of what the network sees. 800 is what it was made for; 400 is "
                    "several times faster and misses small things.",
                ),
            ],
            outputs=[
                io.BoundingBox.Output(
                    display_name="bboxes",
                    tooltip="A list of boxes for each picture, the surest first, each with its phrase and score.",
                )
            ],
        )

    @classmethod
    def execute(cls, detector, images, text, threshold, max_detections, resolution) -> io.NodeOutput:
        texts = texts_for(text, len(images))
        bar = comfy.utils.ProgressBar(len(images))  # raises when Cancel is pressed
        frames, notes = [], []
        for number, (picture, line) in enumerate(zip(opaque(images), texts), start=1):
            found = detect_in(detector, picture, line, threshold, resolution)[:max_detections]
            frames.append([to_bounding_box(one) for one in found])
            names = ", ".join(f"{one.phrase} {one.score:.2f}" for one in found)
            notes.append(
                f"Picture {number}: " + (names or f'no "{line}" found. Lower the threshold, or say it simpler.')
            )
            bar.update_absolute(number)
        report = "\n".join(notes)
        show_text(report, cls)
        return io.NodeOutput(frames, ui=ui.PreviewText(report))


NODES = [AtelierSAMLoader, AtelierSAMEncode, AtelierSAMMask, AtelierGroundingDINOLoader, AtelierDetect]
