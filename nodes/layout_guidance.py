"""Words kept to their places in the picture, and places for words (Compositional Inversion, spatial part)."""

from __future__ import annotations

from comfy_api.latest import io

from ..kernels.layout_guidance import TWO_OBJECTS, Box, LayoutGuidance
from .native.boxes import boxes_by_picture
from .native.layout_guidance import guide_model
from .native.layout_predictor import (
    keep_predictor,
    learn_predictor,
    open_predictor,
    phrase_embedding,
    plain_noun,
    predictor_names,
    predictor_path,
)
from .native.live import show_text
from .native.output_files import file_status
from .types import Concept

CATEGORY = "Concept Atelier/Layout"
POWERS = {"1 (paper)": 1, "2 (released code)": 2}


def size_inputs(of: str) -> list[io.Input]:
    """Width and height of a picture in pixels. of: which picture, for the tooltip."""
    return [
        io.Int.Input(side, default=512, min=8, max=16384, tooltip=f"Its {side} in pixels: {of}")
        for side in ("width", "height")
    ]


def split_phrases(words: str) -> list[str]:
    """The things that `words` names, parted by commas."""
    return [phrase.strip() for phrase in words.split(",") if phrase.strip()]


def read_layout(words: str, bboxes, width: int, height: int) -> dict[str, tuple[Box, ...]]:
    """{phrase: its boxes} of a picture. bboxes: core's boxes in pixels, or None for the constant two-object layout.

    Words that are labels, whatever their article and capitals, take the boxes of these labels; where boxes have no
    labels, words take them in their order. Without words, every label is a phrase. Raises ValueError when words and
    boxes do not match.
    """
    phrases = split_phrases(words)
    if bboxes is None:
        if len(phrases) != 2 or phrases[0] == phrases[1]:
            raise ValueError(
                f'Without boxes the layout has two places, left and right, and words says "{words}": name two '
                "different things, parted by a comma, or connect bboxes."
            )
        return {phrase: (box,) for phrase, box in zip(phrases, TWO_OBJECTS)}
    drawn = boxes_by_picture(bboxes, 1)[0]
    labels = [box.get("label", "").strip() for box in drawn]
    if not phrases:
        if "" in labels:
            raise ValueError("A box on bboxes has no label: name the things in words, in the order of the boxes.")
        phrases = labels
    elif any(labels):
        phrases, drawn = chosen_by_label(phrases, labels, drawn)
    if len(drawn) != len(phrases) or not drawn:
        raise ValueError(
            f"bboxes has {len(drawn)} boxes and words names {len(phrases)} things: draw one box for each thing, in the "
            "same order."
        )
    layout: dict[str, tuple[Box, ...]] = {}
    for phrase, box in zip(phrases, drawn):
        x, y = box["x"] / width, box["y"] / height
        found = Box(x, y, x + box["width"] / width, y + box["height"] / height)
        layout[phrase] = (*layout.get(phrase, ()), found)
    return layout


def chosen_by_label(phrases: list[str], labels: list[str], drawn: list[dict]) -> tuple[list[str], list[dict]]:
    """The phrase and the box of every label that is one of `phrases`. Raises ValueError for a phrase without a box."""
    by_name = {plain_noun(phrase): phrase for phrase in phrases}
    named = [(by_name[plain_noun(label)], box) for label, box in zip(labels, drawn) if plain_noun(label) in by_name]
    if missing := [phrase for phrase in phrases if phrase not in {found for found, _ in named}]:
        raise ValueError(
            f'No box on bboxes is labelled "{missing[0]}", only {", ".join(sorted(set(labels) - {""}))}: name labels '
            "in words, or connect boxes without labels, which are taken in their order."
        )
    return [phrase for phrase, _ in named], [box for _, box in named]


class AtelierLayoutGuidance(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        default = LayoutGuidance()
        return io.Schema(
            node_id="AtelierLayoutGuidance",
            display_name="Layout Guidance",
            category=CATEGORY,
            description="Keeps words of the prompt to their boxes: in the first steps, whichever sampler paints, the "
            "picture is moved so that each word looks inside its box. Two things then get in each other's way less.",
            search_aliases=["regional prompt", "bounding box", "compositional inversion", "spatial", "layout control"],
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Model.Input("model", tooltip="The MODEL to paint with, after LoRAs and Apply Concepts."),
                io.Conditioning.Input(
                    "positive",
                    tooltip="The prompt from Text Encode with Concepts, which knows its words. Connect the same one to "
                    "the sampler; a ControlNet may be put on it there.",
                ),
                io.String.Input(
                    "words",
                    default="",
                    tooltip="What goes into the boxes, parted by commas: 'red ball, <cat>'. Where boxes have labels, "
                    "each takes the boxes of its label; others are taken in their order. Empty: all labels.",
                ),
                *size_inputs("that of the picture the boxes were drawn on. Only proportions count."),
                io.Float.Input(
                    "strength",
                    default=default.strength,
                    min=0.0,
                    max=1000.0,
                    step=1.0,
                    tooltip="How far each move goes (released code: 30). 0: the sampler paints as without this node.",
                ),
                io.Int.Input(
                    "steps",
                    default=default.steps,
                    min=0,
                    max=1000,
                    tooltip="How many of the first sampling steps are guided (paper: 10 of 50). They decide where "
                    "things stand. They are counted anew in every sampler: a second one that goes on from the first "
                    "gets the MODEL from before this node. 0: none.",
                ),
                io.Int.Input(
                    "iterations",
                    default=default.iterations,
                    min=0,
                    max=100,
                    tooltip="Moves in each guided step, at most (released code: 5). Each costs about one forward.",
                ),
                io.Float.Input(
                    "threshold",
                    default=default.threshold,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Good enough: the share of their attention that words may pay outside of their boxes "
                    "(released code: 0.2), squared with power 2. It is measured anew at every step.",
                ),
                io.Combo.Input(
                    "power",
                    options=list(POWERS),
                    advanced=True,
                    tooltip="Of that share in the loss. 1 is Eq. 9; 2 cares most for words that are far off.",
                ),
                io.Float.Input(
                    "largest_move",
                    default=default.largest_move,
                    min=0.0,
                    max=10.0,
                    step=0.05,
                    advanced=True,
                    tooltip="Shortens moves that are larger than this, where the noisy latents have about 1. 0: no "
                    "limit, as published. Try 0.2 when pictures burn.",
                ),
                io.BoundingBox.Input(
                    "bboxes",
                    optional=True,
                    force_input=True,
                    tooltip="The boxes, from Create Bounding Boxes, Layout Predictor or a detector. Without them: two "
                    "things, the first on the left, the second on the right.",
                ),
            ],
            outputs=[io.Model.Output(display_name="MODEL", tooltip="The MODEL for any sampler.")],
        )

    @classmethod
    def execute(
        cls, model, positive, words, width, height, strength, steps, iterations, threshold, power, largest_move,
        bboxes=None,
    ) -> io.NodeOutput:  # fmt: skip
        layout = read_layout(words, bboxes, width, height)
        settings = LayoutGuidance(strength, threshold, iterations, steps, POWERS[power], largest_move)
        guided = guide_model(model, positive, layout, settings)
        show_text("\n".join(describe(phrase, box) for phrase, boxes in layout.items() for box in boxes), cls)
        return io.NodeOutput(guided)


def describe(phrase: str, box: Box) -> str:
    """A box in words."""
    x0, y0, x1, y1 = (f"{value:.0%}" for value in box)
    return f"{phrase}: {x0} to {x1} from the left, {y0} to {y1} from the top"


class AtelierLayoutPredictor(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        concept = Concept.Input("concept", tooltip="A concept from Train Concept or Load Concept.")
        return io.Schema(
            node_id="AtelierLayoutPredictor",
            display_name="Layout Predictor",
            category=CATEGORY,
            description="Says where two things usually stand in a picture, from their words. Learns it from pictures "
            "with detected boxes when you connect some, and keeps what it learned as a file.",
            search_aliases=["predict boxes", "layout mlp", "compositional inversion", "box from words"],
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Clip.Input("clip", tooltip="The CLIP whose words it reads."),
                io.String.Input(
                    "words",
                    default="",
                    tooltip="Two things, parted by a comma, the one on the left first: '<cat>, ball'. What it never "
                    "saw stands where the most similar word would.",
                ),
                io.Combo.Input(
                    "predictor",
                    options=predictor_names(),
                    tooltip="What was learned earlier: for the toy checkpoint, or a file in output/ or models/"
                    "concept_atelier_layouts. With images connected, a new one is trained instead.",
                ),
                *size_inputs("that of the picture that you want to paint."),
                io.Autogrow.Input(
                    "concepts",
                    template=io.Autogrow.TemplatePrefix(concept, prefix="concept", min=0, max=20),
                    tooltip="The concepts that words names as <name>.",
                ),
                io.Image.Input(
                    "images", optional=True, tooltip="To train: pictures of two or more things each. A hundred help."
                ),
                io.BoundingBox.Input(
                    "bboxes",
                    optional=True,
                    force_input=True,
                    tooltip="To train: what stands where in these images, from Detect by Text.",
                ),
                io.Int.Input("train_steps", default=1000, min=1, max=100000, tooltip="Training steps. They are quick."),
                io.Int.Input(
                    "seed", default=0, min=0, max=2**31 - 1, tooltip="Of the training: another one, another network."
                ),
                io.String.Input(
                    "file_name",
                    default="layout",
                    tooltip="Name of the trained file, without ending. One of this name is never overwritten.",
                ),
            ],
            outputs=[
                io.BoundingBox.Output(
                    display_name="bboxes", tooltip="Two boxes, each labelled with its words, for Layout Guidance."
                )
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, predictor: str, **_) -> tuple[int, int]:
        return file_status(predictor and predictor_path(predictor))

    @classmethod
    def execute(
        cls, clip, words, predictor, width, height, concepts, train_steps, seed, file_name, images=None, bboxes=None
    ) -> io.NodeOutput:
        phrases = split_phrases(words)
        if len(phrases) != 2:
            raise ValueError(f"words names {len(phrases)} things: name two, parted by a comma, such as 'cat, ball'.")
        if (images is None) != (bboxes is None):
            raise ValueError("Training needs both images and their bboxes: connect both, or neither to use a file.")
        notes = []
        if images is None:
            found = open_predictor(predictor, clip)
        else:
            frames = boxes_by_picture(bboxes, len(images))
            found, distance, pairs = learn_predictor(clip, frames, *images.shape[1:3], train_steps, seed)
            path = keep_predictor(found, file_name.strip())
            notes.append(f"Learned {pairs} pairs, edges {distance:.1%} of the picture off; saved to {path}")
        named = {concept.name: concept for concept in concepts.values()}
        embeddings = [phrase_embedding(clip, phrase, named) for phrase in phrases]
        boxes = found.predict(*embeddings)
        for phrase, embedding, box in zip(phrases, embeddings, boxes):
            notes.append(f"{describe(phrase, box)} (as {found.nearest(embedding)})")
        show_text("\n".join(notes), cls)
        return io.NodeOutput([[in_pixels(*pair, width, height) for pair in zip(phrases, boxes)]])


def in_pixels(label: str, box: Box, width: int, height: int) -> dict:
    """A box as core's BOUNDING_BOX, inside the picture."""
    x0, y0, x1, y1 = round(box.x0 * width), round(box.y0 * height), round(box.x1 * width), round(box.y1 * height)
    return {"x": x0, "y": y0, "width": max(1, x1 - x0), "height": max(1, y1 - y0), "label": label}


NODES = [AtelierLayoutGuidance, AtelierLayoutPredictor]
