"""The pictures a concept is learned from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from comfy_api.latest import io, ui
from torch import Tensor

from ..kernels.exemplars import Exemplar
from ..kernels.prompts import BLANK
from .native.pictures import cover, cover_mask, opaque
from .types import Exemplars

CATEGORY = "Concept Atelier/Data"
LATENT_SCALE = 8  # pixels a latent, of all models we train on


def captions_of(texts: Sequence[str], count: int) -> list[str]:
    """One caption for each of `count` pictures, out of one text with a caption a line or a list with one a picture.

    Raises ValueError when their number does not fit, and for a caption without its blank.
    """
    if len(texts) == 1:
        texts = [line for line in texts[0].splitlines() if line.strip()]
    captions = [" ".join(text.split()) for text in texts]
    if len(captions) == 1:
        captions = captions * count
    if len(captions) != count:
        raise ValueError(
            f'There are {count} pictures on "images" but {len(captions)} captions on "captions": write one caption '
            f"a line for each picture, or a single one for all."
        )
    for number, caption in enumerate(captions, start=1):
        if caption.count(BLANK) != 1:
            raise ValueError(
                f'Caption {number} on "captions", "{caption}", has {caption.count(BLANK)} blanks: put exactly one '
                f'{BLANK} where the word for the concept would be, for example "a man {BLANK} on grass".'
            )
    return captions


def masks_of(batches: Sequence[Tensor], count: int) -> list[Tensor]:
    """One mask (h, w) for each of `count` pictures. Raises ValueError when their number differs or one is empty."""
    masks = [mask for batch in batches for mask in batch.reshape(-1, *batch.shape[-2:])]
    if len(masks) != count:
        raise ValueError(
            f'There are {count} pictures on "images" but {len(masks)} masks on "masks": connect one mask for each '
            "picture, or none at all."
        )
    for number, mask in enumerate(masks, start=1):
        if not mask.any():
            raise ValueError(
                f'Mask {number} on "masks" is empty, so nothing of picture {number} would be learned: mark where the '
                "concept is, or disconnect the masks."
            )
    return masks


def target_size(first: Tensor, size: int) -> tuple[int, int]:
    """Height and width of all exemplars: of the `first` picture (H, W, 3) or `size` squared, in whole latents."""
    height, width = (size, size) if size else first.shape[:2]
    return max(1, height // LATENT_SCALE) * LATENT_SCALE, max(1, width // LATENT_SCALE) * LATENT_SCALE


def size_note(pictures: Sequence[Tensor], height: int, width: int, masks: Sequence[Tensor]) -> str:
    """What the node says: how many pictures there are, which had to be changed, and which masks do nothing."""
    exemplars = "1 exemplar" if len(pictures) == 1 else f"{len(pictures)} exemplars"
    lines = [f"{exemplars} of {width} x {height}{', with masks' if masks else ''}."]
    sizes = Counter(tuple(picture.shape[:2]) for picture in pictures)
    for (h, w), count in sizes.items():
        if (h, w) != (height, width):
            lines.append(f"{count} of {w} x {h} resized to cover {width} x {height}, the middle kept.")
    if any(side % LATENT_SCALE for side in pictures[0].shape[:2]):
        lines.append(f"Width and height have to be multiples of {LATENT_SCALE}.")
    if other := sum(mask.shape != picture.shape[:2] for mask, picture in zip(masks, pictures)):
        lines.append(f"{other} of the masks resized to their pictures.")
    if full := [str(i) for i, mask in enumerate(masks, start=1) if mask.min() == 1]:
        lines.append(f"The whole picture is inside of mask {', '.join(full)}, which therefore masks nothing.")
    return "\n".join(lines)


class AtelierExemplars(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AtelierExemplars",
            display_name="Exemplars",
            category=CATEGORY,
            description="Puts the pictures of a concept together with their captions, in which a blank {} stands where "
            "the word for the concept would be. Takes a batch, a list, or the output of the dataset loaders.",
            search_aliases=["training images", "dataset", "captions", "training data"],
            is_input_list=True,
            has_intermediate_output=True,
            inputs=[
                io.Image.Input("images", tooltip="Pictures of the concept: a batch, or a list of any sizes."),
                io.String.Input(
                    "captions",
                    default="a photo of a person {}",
                    multiline=True,
                    tooltip="One caption a line for each picture, or one for all. Describe person and place, leave out "
                    "the concept, and put a blank {} in its place: 'a man {} on grass' (ADI section 3).",
                ),
                io.Mask.Input(
                    "masks", optional=True, tooltip="Where the concept is, one mask a picture; learn from inside only."
                ),
                io.Int.Input(
                    "size",
                    default=0,
                    min=0,
                    max=4096,
                    step=8,
                    tooltip="Width and height in pixels to which all pictures are resized and cropped: best what the "
                    "model was made for (512 for SD1, 1024 for SDXL). 0: the size of the first picture.",
                ),
            ],
            outputs=[
                Exemplars.Output(display_name="exemplars", tooltip="For Train Concept, or for Triples before it.")
            ],
        )

    @classmethod
    def execute(
        cls, images: list[Tensor], captions: list[str], size: list[int], masks: list[Tensor] | None = None
    ) -> io.NodeOutput:
        pictures = [picture for batch in images for picture in opaque(batch)]
        if not pictures:
            raise ValueError('There is no picture on "images": connect at least one, best ten.')
        texts = captions_of(captions, len(pictures))
        height, width = target_size(pictures[0], size[0])
        given, marks = [], [None] * len(pictures)
        if masks:
            given = masks_of(masks, len(pictures))
            marks = [
                cover_mask(mask, tuple(picture.shape[:2]), height, width) for mask, picture in zip(given, pictures)
            ]
        exemplars = tuple(
            Exemplar(cover(picture[None], height, width)[0], text, mark)
            for picture, text, mark in zip(pictures, texts, marks)
        )
        return io.NodeOutput(exemplars, ui=ui.PreviewText(size_note(pictures, height, width, given)))


NODES = [AtelierExemplars]
