"""The pictures a concept is learned from: exemplars, and what goes with them in a triple."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from comfy_api.latest import io, ui
from torch import Tensor

from ..kernels.context_model import ContextSettings, choose_actions
from ..kernels.exemplars import Exemplar
from ..kernels.prompts import BLANK
from .native.context_pictures import paint_contexts
from .native.pictures import contact_sheet, cover, cover_mask, opaque
from .types import Exemplars

CATEGORY = "Concept Atelier/Data"
LATENT_SCALE = 8  # pixels a latent, of all models we train on
SHEET_OTHERS = 4  # pictures of the same action shown in a row of the contact sheet
OTHER_ACTIONS = "stands\nsits\nsquats\nkicks\nlies down\nmeditates\nraises both arms\nprays"


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


def size_note(pictures: Sequence[Tensor], height: int, width: int, masked: bool) -> str:
    """What the node says about sizes: how many pictures there are, and which had to be changed."""
    exemplars = "1 exemplar" if len(pictures) == 1 else f"{len(pictures)} exemplars"
    lines = [f"{exemplars} of {width} x {height}{', with masks' if masked else ''}."]
    sizes = Counter(tuple(picture.shape[:2]) for picture in pictures)
    for (h, w), count in sizes.items():
        if (h, w) != (height, width):
            lines.append(f"{count} of {w} x {h} resized to cover {width} x {height}, the middle kept.")
    if any(side % LATENT_SCALE for side in pictures[0].shape[:2]):
        lines.append(f"Width and height have to be multiples of {LATENT_SCALE}.")
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
            outputs=[Exemplars.Output(display_name="exemplars", tooltip="For Train, or for Triples before it.")],
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
        marks = [None] * len(pictures)
        if masks:
            marks = [
                cover_mask(mask, tuple(picture.shape[:2]), height, width)
                for mask, picture in zip(masks_of(masks, len(pictures)), pictures)
            ]
        exemplars = tuple(
            Exemplar(cover(picture[None], height, width)[0], text, mark)
            for picture, text, mark in zip(pictures, texts, marks)
        )
        return io.NodeOutput(exemplars, ui=ui.PreviewText(size_note(pictures, height, width, bool(masks))))


def shared_out(pictures: Tensor, exemplars: Sequence[Exemplar]) -> list[tuple[Tensor, ...]]:
    """The artist's pictures of other actions, the same number for each exemplar in turn, at the exemplars' size.

    Raises ValueError when they cannot be divided evenly.
    """
    each, rest = divmod(len(pictures), len(exemplars))
    if rest or not each:
        raise ValueError(
            f'The {len(pictures)} pictures on "other_action_pictures" cannot be shared out among {len(exemplars)} '
            "exemplars: connect the same number for each exemplar, first those of the first exemplar."
        )
    height, width = exemplars[0].image.shape[:2]
    sized = cover(opaque(pictures), height, width)
    return [tuple(sized[i * each : (i + 1) * each]) for i in range(len(exemplars))]


def triple_sheet(exemplars: Sequence[Exemplar]) -> Tensor:
    """IMAGE (1, h, w, 3): for each exemplar a row of itself, others of the same action, its context's other actions."""
    count = len(exemplars)
    rows = [
        [
            [exemplar.image],
            [exemplars[(i + k) % count].image for k in range(1, min(count, SHEET_OTHERS + 1))],
            exemplar.other_actions,
        ]
        for i, exemplar in enumerate(exemplars)
    ]
    return contact_sheet(rows, ["exemplar", "same action", "same context"])


class AtelierTriples(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AtelierTriples",
            display_name="Triples",
            category=CATEGORY,
            description="Gives each exemplar what ADI compares it with: the other exemplars (same action, other "
            "context) and pictures of the same person and place doing something else. Connect your own pictures of "
            "those, or MODEL, CLIP and VAE to have them painted by a small model learned from each exemplar.",
            search_aliases=["ADI", "context model", "dreambooth one image", "triplets", "counterexamples"],
            has_intermediate_output=True,
            inputs=[
                Exemplars.Input("exemplars", tooltip="At least two, from Exemplars."),
                io.Image.Input(
                    "other_action_pictures",
                    optional=True,
                    tooltip="Your own pictures of the same person and place doing other things: the same number for "
                    "each exemplar, first those of the first exemplar. With them nothing is painted.",
                ),
                io.Model.Input("model", optional=True, tooltip="Paints the other actions; it is left as it is."),
                io.Clip.Input("clip", optional=True, tooltip="Of the same checkpoint as the MODEL."),
                io.Vae.Input("vae", optional=True, tooltip="Of the same checkpoint as the MODEL."),
                io.String.Input(
                    "other_actions",
                    default=OTHER_ACTIONS,
                    multiline=True,
                    tooltip="Actions to paint, one a line, in words that fit the blank of the captions. Not the one "
                    "you teach. They are used in turn.",
                ),
                io.Int.Input(
                    "pictures_per_exemplar",
                    default=4,
                    min=1,
                    max=64,
                    tooltip="Pictures to paint for each exemplar. ADI does not say how many.",
                ),
                io.Int.Input(
                    "context_steps",
                    default=300,
                    min=0,
                    max=10000,
                    advanced=True,
                    tooltip="Steps to learn one exemplar's person and place. More keeps more of them, and more of the "
                    "pose. ADI section 5.1: 2000 steps of the whole model at a hundredth of this learning rate.",
                ),
                io.Int.Input(
                    "context_rank",
                    default=4,
                    min=1,
                    max=128,
                    advanced=True,
                    tooltip="Rank of the small model (LoRA). ADI trains the whole model instead.",
                ),
                io.Float.Input(
                    "context_learning_rate",
                    default=1e-4,
                    min=0.0,
                    max=1.0,
                    step=1e-5,
                    round=False,
                    advanced=True,
                    tooltip="Of AdamW for the small model, with the usual value for LoRA. ADI: 1e-6 for the whole.",
                ),
                io.Int.Input(
                    "sampling_steps",
                    default=25,
                    min=1,
                    max=1000,
                    advanced=True,
                    tooltip="DDIM steps for each picture. ADI does not say.",
                ),
                io.Float.Input(
                    "cfg",
                    default=7.5,
                    min=0.0,
                    max=100.0,
                    step=0.5,
                    advanced=True,
                    tooltip="Guidance towards the words of the action. ADI section 5.1: 7.5.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**31 - 1,
                    control_after_generate=io.ControlAfterGenerate.fixed,
                    tooltip="Decides the small models and their pictures.",
                ),
                io.Float.Input(
                    "sampling_eta",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.1,
                    advanced=True,
                    tooltip="Fresh noise at each DDIM step: 0 none (ADI section 5.1), 1 as much as DDPM. The toy model "
                    "paints clean pictures with 1 only.",
                ),
            ],
            outputs=[
                Exemplars.Output(display_name="exemplars", tooltip="For Train with Gradient Mask (ADI)."),
                io.Image.Output(
                    display_name="contact_sheet",
                    tooltip="A row an exemplar: itself, others of the same action, its context with other actions.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        exemplars: tuple[Exemplar, ...],
        other_actions: str,
        pictures_per_exemplar: int,
        context_steps: int,
        context_rank: int,
        context_learning_rate: float,
        sampling_steps: int,
        cfg: float,
        seed: int,
        sampling_eta: float,
        other_action_pictures: Tensor | None = None,
        model=None,
        clip=None,
        vae=None,
    ) -> io.NodeOutput:
        if len(exemplars) < 2:
            raise ValueError(
                'There is one picture on "exemplars", but ADI compares each with others of the same action in another '
                "context: connect at least two, best ten."
            )
        if other_action_pictures is not None:
            others = shared_out(other_action_pictures, exemplars)
        else:
            actions = [line.strip() for line in other_actions.splitlines() if line.strip()]
            cls.check_can_paint({"model": model, "clip": clip, "vae": vae}, actions)
            others = paint_contexts(
                model,
                clip,
                vae,
                exemplars,
                choose_actions(actions, len(exemplars), pictures_per_exemplar),
                ContextSettings(
                    context_steps, context_rank, context_learning_rate, sampling_steps, cfg, seed, sampling_eta
                ),
            )
        triples = tuple(replace(e, other_actions=pictures) for e, pictures in zip(exemplars, others))
        sheet = triple_sheet(triples)
        return io.NodeOutput(triples, sheet, ui=ui.PreviewImage(sheet, cls=cls))

    @classmethod
    def check_can_paint(cls, parts: dict[str, object], actions: list[str]) -> None:
        """Raise ValueError when pictures of other actions are neither there nor can be made."""
        missing = [name for name, part in parts.items() if part is None]
        if missing:
            raise ValueError(
                'Connect your own pictures of other actions to "other_action_pictures", or model, clip and vae to '
                f"have them painted; not connected: {', '.join(missing)}."
            )
        if not actions:
            raise ValueError('"other_actions" is empty: write what the same person could do instead, one a line.')


NODES = [AtelierExemplars, AtelierTriples]
