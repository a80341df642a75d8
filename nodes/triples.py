"""What goes with an exemplar in a triple: the same action elsewhere, and other actions at the same place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from comfy_api.latest import io, ui
from torch import Tensor

from ..kernels.context_model import ContextSettings, choose_actions
from ..kernels.exemplars import Exemplar
from .native.context_pictures import paint_contexts
from .native.pictures import contact_sheet, cover, opaque
from .types import Exemplars

CATEGORY = "Concept Atelier/Data"
SHEET_OTHERS = 4  # pictures of the same action shown in a row of the contact sheet
OTHER_ACTIONS = "stands\nsits\nsquats\nkicks\nlies down\nmeditates\nraises both arms\nprays"


def shared_out(batches: Sequence[Tensor], exemplars: Sequence[Exemplar]) -> list[tuple[Tensor, ...]]:
    """The artist's pictures of other actions, the same number for each exemplar in turn, at the exemplars' size.

    Raises ValueError when they cannot be divided evenly.
    """
    height, width = exemplars[0].image.shape[:2]
    sized = [picture for batch in batches for picture in cover(opaque(batch), height, width)]
    each, rest = divmod(len(sized), len(exemplars))
    if rest or not each:
        raise ValueError(
            f'The {len(sized)} pictures on "other_action_pictures" cannot be shared out among {len(exemplars)} '
            "exemplars: connect the same number for each exemplar, first those of the first exemplar."
        )
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
            is_input_list=True,
            has_intermediate_output=True,
            inputs=[
                Exemplars.Input("exemplars", tooltip="At least two, from Exemplars."),
                io.Image.Input(
                    "other_action_pictures",
                    optional=True,
                    tooltip="Your own pictures of the same person and place doing other things, a batch or a list: the "
                    "same number for each exemplar, first those of the first exemplar. With them nothing is painted.",
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
                    step=1e-6,
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
                Exemplars.Output(display_name="exemplars", tooltip="For Train Concept with Gradient Mask (ADI)."),
                io.Image.Output(
                    display_name="contact_sheet",
                    tooltip="A row an exemplar: itself, others of the same action, its context with other actions.",
                ),
            ],
        )

    @classmethod
    def execute(cls, other_action_pictures: list[Tensor] | None = None, **inputs: list) -> io.NodeOutput:
        """All inputs come as lists, of which only `other_action_pictures` may be longer than one."""
        return cls.triples(other_action_pictures, **{name: values[0] for name, values in inputs.items()})

    @classmethod
    def triples(
        cls,
        other_action_pictures: list[Tensor] | None,
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


NODES = [AtelierTriples]
