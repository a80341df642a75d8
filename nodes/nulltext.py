"""The null-text concept model: surgery on a MODEL, and loading one from a file."""

from __future__ import annotations

from pathlib import Path

import folder_paths
import torch
from comfy_api.latest import io, ui
from torch import Tensor

from ..kernels.nulltext import FORMS, load_concept_model, save_concept_model
from .native.nulltext import apply_concept_model, null_text_form, operate
from .native.output_files import (
    CONCEPT_MODELS,
    SUFFIX,
    check_file_name,
    file_status,
    free_name,
    output_file,
    register_folder,
)
from .native.pictures import cover, opaque

CATEGORY = "Concept Atelier/Concept Model"

register_folder(CONCEPT_MODELS)


class AtelierNullTextSurgery(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AtelierNullTextSurgery",
            display_name="Null-Text Surgery",
            category=CATEGORY,
            description="Takes the text out of a MODEL: each cross-attention becomes a constant, what it adds for an "
            "empty prompt. The result paints without any prompt, and is what a concept model is trained from. The "
            "checkpoint itself stays as it is.",
            search_aliases=["null text", "unconditional model", "concept model", "GCFG", "remove cross attention"],
            is_input_list=True,
            has_intermediate_output=True,
            inputs=[
                io.Model.Input("model", tooltip="The MODEL of a checkpoint (SD1.x, SD2.x, SDXL, toy)."),
                io.Clip.Input("clip", tooltip="Of the same checkpoint: it encodes the empty prompt."),
                io.Vae.Input("vae", tooltip="Of the same checkpoint."),
                io.Image.Input(
                    "images",
                    optional=True,
                    tooltip="Some pictures of the domain, at the size to train at (16 are plenty): the constants are "
                    "means over them. A batch or a list; the first one's size counts. Without, over noise in their "
                    "place, which is right at high noise only.",
                ),
                io.Combo.Input(
                    "form",
                    options=list(FORMS),
                    tooltip="calibrated: the mean of what cross-attention really adds (the paper's code). uniform: "
                    "Eq. 5 of the paper read literally, as if attention looked at all tokens alike.",
                ),
                io.Int.Input(
                    "timesteps",
                    default=10,
                    min=1,
                    max=1000,
                    advanced=True,
                    tooltip="Noise levels over which the constants are averaged, and the error is measured.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**31 - 1,
                    control_after_generate=io.ControlAfterGenerate.fixed,
                    advanced=True,
                    tooltip="Of the noise.",
                ),
                io.Int.Input(
                    "size",
                    default=512,
                    min=64,
                    max=4096,
                    step=8,
                    advanced=True,
                    tooltip="Width and height in pixels of the noise that stands for pictures.",
                ),
                io.String.Input(
                    "file_name",
                    default="",
                    tooltip="Saves the result under this name for Load Concept Model, without ending. Empty: not.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    display_name="MODEL",
                    tooltip="The MODEL without text, for Train Null-Text Model or for a sampler; prompts are ignored.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls, model: list, clip: list, vae: list, form: list[str], timesteps: list[int], seed: list[int],
        size: list[int], file_name: list[str], images: list[Tensor] | None = None,
    ) -> io.NodeOutput:  # fmt: skip
        name = file_name[0].strip().removesuffix(SUFFIX)
        if name:
            check_file_name(name)
        pictures = None
        if images:
            height, width = images[0].shape[1:3]
            pictures = torch.cat([cover(opaque(batch), height, width) for batch in images])
        operated, errors = operate(model[0], clip[0], vae[0], pictures, form[0], timesteps[0], seed[0], size[0])
        lines = ["Error against the model's own empty prompt, by timestep:"]
        lines += [f"{t}: {100 * error:.1f} %" for t, error in errors.items()]
        if name:
            file = output_file(CONCEPT_MODELS, free_name(name, [CONCEPT_MODELS]))
            save_concept_model(file, null_text_form(operated))
            lines.append(f"Saved to {file}")
        return io.NodeOutput(operated, ui=ui.PreviewText("\n".join(lines)))


class AtelierLoadConceptModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AtelierLoadConceptModel",
            display_name="Load Concept Model",
            category=CATEGORY,
            description="Makes a concept model of a checkpoint's MODEL with a file saved by Null-Text Surgery, Train "
            "Null-Text Model or the training script. The checkpoint itself stays as it is.",
            search_aliases=["null text", "load domain", "GCFG", "unconditional model"],
            inputs=[
                io.Model.Input("model", tooltip="The MODEL of the checkpoint that the concept model was made of."),
                io.Combo.Input(
                    "file_name",
                    options=folder_paths.get_filename_list(CONCEPT_MODELS),
                    tooltip="A file in output/concept_atelier_models or models/concept_atelier_models.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    display_name="MODEL",
                    tooltip="The concept model: for a sampler, or as a branch of GCFG beside the checkpoint itself.",
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, file_name: str, **_other) -> tuple[int, int]:
        return file_status(file_name and folder_paths.get_full_path_or_raise(CONCEPT_MODELS, file_name))

    @classmethod
    def execute(cls, model, file_name: str) -> io.NodeOutput:
        file = Path(folder_paths.get_full_path_or_raise(CONCEPT_MODELS, file_name))
        return io.NodeOutput(apply_concept_model(model, load_concept_model(file)))


NODES = [AtelierNullTextSurgery, AtelierLoadConceptModel]
