"""Boxes of what a text names (GroundingDINO)."""

from __future__ import annotations

import comfy.utils
from comfy_api.latest import io, ui

from ..kernels.grounding_dino import ENGINES
from .native.boxes import to_bounding_box
from .native.live import show_text
from .native.output_files import file_status
from .native.pictures import opaque
from .native.segmenters import DINO_FILES, detect_in, load_detector, register_detector_folders
from .types import Detector

CATEGORY = "Concept Atelier/Masks"

register_detector_folders()


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
    def fingerprint_inputs(cls, checkpoint: str | None, engine: str) -> tuple[int, int]:
        return file_status(checkpoint and DINO_FILES.path(checkpoint))

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


NODES = [AtelierGroundingDINOLoader, AtelierDetect]
