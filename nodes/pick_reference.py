"""Which of several pictures of a subject is the reference, and what it shows in words."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from comfy_api.latest import io, ui
from torch import Tensor

from .native.captions import (
    NO_CAPTION,
    PUBLISHED,
    caption_folder,
    caption_models,
    caption_picture,
    check_caption_model,
    register_folder,
)
from .native.features import DINO_FILES, by_clip, by_dino
from .native.live import show_text
from .native.output_files import file_status
from .native.pictures import opaque

BY_DINO, BY_CLIP, BY_INDEX = "DINO", "CLIP Vision", "index"

DINO_FILES.register()
register_folder()


class AtelierPickReference(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AtelierPickReference",
            display_name="Pick Reference",
            category="Concept Atelier/Reference",
            description="Of several pictures of a subject, chooses the one that is nearest to the generated picture. "
            "It becomes the reference for Align Reference. BLIP-2 can write a caption of it.",
            search_aliases=["dino similarity", "nearest picture", "choose reference", "caption", "blip2", "hifi tuner"],
            is_input_list=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Image.Input("pictures", tooltip="The pictures of the subject: a batch, or a list of any sizes."),
                io.Combo.Input(
                    "by",
                    options=[BY_DINO, BY_CLIP, BY_INDEX],
                    tooltip="What tells how near pictures are: DINO (the paper), the CLIP Vision model connected here, "
                    "or nothing: the index below is taken.",
                ),
                io.Combo.Input(
                    "dino",
                    options=DINO_FILES.names(),
                    tooltip=f"A file in models/dino; the paper takes ViT-S/16. Published at {DINO_FILES.published}.",
                ),
                io.Int.Input("index", default=0, min=0, max=4095, tooltip="Which picture to take, counted from 0."),
                io.Image.Input(
                    "generated", optional=True, tooltip="The generated picture to be near to. Not needed for index."
                ),
                io.Mask.Input("masks", optional=True, tooltip="Where the subject is, one mask for each picture."),
                io.ClipVision.Input("clip_vision", optional=True, tooltip="From Load CLIP Vision, for CLIP Vision."),
                io.Combo.Input(
                    "caption_model",
                    options=[NO_CAPTION, *caption_models()],
                    optional=True,
                    tooltip="Who writes a caption of the chosen picture: a BLIP-2 from a folder in models/blip2, such "
                    f"as {PUBLISHED}, or none. It is read again for each caption, which takes a while.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="reference", tooltip="The chosen picture."),
                io.Mask.Output(display_name="mask", tooltip="Its mask; without masks all of it."),
                io.Int.Output(display_name="index", tooltip="Its number, counted from 0."),
                io.String.Output(
                    display_name="caption",
                    tooltip="What it shows, in one line: for Text Encode with Concepts, whose conditioning goes to "
                    "DDIM Inversion. Empty without a caption_model.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(
        cls, by: list[str], dino: list[str], caption_model: Sequence[str | None] = (NO_CAPTION,)
    ) -> bool | str:
        files = DINO_FILES.check(dino[0]) if by[0] == BY_DINO else True
        return check_caption_model(caption_model[0]) if files is True else files

    @classmethod
    def fingerprint_inputs(
        cls, by: list[str], dino: list[str], caption_model: Sequence[str | None] = (NO_CAPTION,), **_other
    ) -> list[tuple[int, int]]:
        files = [DINO_FILES.path(dino[0])] if by[0] == BY_DINO else []
        if caption_model[0] not in (None, NO_CAPTION):
            files += sorted(file for file in caption_folder(caption_model[0]).iterdir() if file.is_file())
        return [file_status(file) for file in files]

    @classmethod
    def execute(
        cls, pictures: list[Tensor], masks: list[Tensor] | None = None, generated: list[Tensor] | None = None,
        **inputs: list,
    ) -> io.NodeOutput:  # fmt: skip
        """All inputs come as lists, of which only these three may be longer than one."""
        given = {name: values[0] for name, values in inputs.items()}
        return cls.pick(*(each(batches) for batches in (pictures, masks, generated)), **given)

    @classmethod
    def pick(
        cls, pictures: list[Tensor], masks: list[Tensor], generated: list[Tensor], by: str, dino: str, index: int,
        clip_vision=None, caption_model: str = NO_CAPTION,
    ) -> io.NodeOutput:  # fmt: skip
        if masks and len(masks) != len(pictures):
            raise ValueError(
                f'There are {len(pictures)} pictures but {len(masks)} masks on "masks": connect one for each picture.'
            )
        seen, near = ([opaque(picture) for picture in some] for some in (pictures, generated))
        text, chosen = choose(seen, by, dino, index, near, clip_vision)
        picture = pictures[chosen]
        mask = masks[chosen] if masks else torch.ones(picture.shape[:2])
        caption = "" if caption_model == NO_CAPTION else caption_picture(caption_model, seen[chosen])
        if caption:
            text += f"\nCaption: {caption}"
        show_text(text, cls)
        return io.NodeOutput(picture[None], mask[None], chosen, caption, ui=ui.PreviewText(text))


def each(batches: Sequence[Tensor] | None) -> list[Tensor]:
    """The pictures or masks of several batches, or of none, one by one."""
    return [one for batch in batches or () for one in batch]


def choose(
    pictures: Sequence[Tensor], by: str, dino: str, index: int, generated: Sequence[Tensor], clip_vision
) -> tuple[str, int]:
    """A sentence about the choice and the number of the chosen picture. Raises ValueError for what is missing."""
    if not pictures:
        raise ValueError('There is no picture on "pictures": connect those of the subject, at least one.')
    if by == BY_INDEX:
        if index >= len(pictures):
            raise ValueError(f"index is {index}, and there are {len(pictures)} pictures, counted from 0: lower it.")
        return f"Picture {index}, by hand.", index
    if not generated:
        raise ValueError(f'To choose by {by}, connect the generated picture to "generated", or choose by index.')
    if by == BY_CLIP and clip_vision is None:
        raise ValueError('To choose by CLIP Vision, connect Load CLIP Vision to "clip_vision", or choose by index.')
    near = by_dino(dino, pictures, generated) if by == BY_DINO else by_clip(clip_vision, pictures, generated)
    chosen = max(range(len(near)), key=near.__getitem__)
    return f"Picture {chosen} by {by}; similarity of all: {', '.join(f'{value:.3f}' for value in near)}", chosen


NODES = [AtelierPickReference]
