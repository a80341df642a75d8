"""The null-text concept model: training on pictures without captions."""

from __future__ import annotations

from pathlib import Path

import comfy.utils
import folder_paths
import torch
from comfy_api.latest import io, ui
from comfy_execution.graph_utils import ExecutionBlocker
from torch import Tensor

from ..kernels.latent_cache import LatentCache, Picture, cache_latents, cached, find_pictures, tensor_pictures
from ..kernels.nulltext import ConceptModel, concept_model_header, save_concept_model
from ..kernels.nulltext_run import DomainSamples, NullTextRun
from ..kernels.nulltext_training import NullTextSettings
from ..kernels.run_state import weights_fingerprint
from .native.live import LiveReport
from .native.nulltext import add_learned, null_text_form, training_session
from .native.output_files import CONCEPT_MODELS, check_file_name, output_file, runs_folder
from .native.pictures import cover, opaque, to_tensor

LATENTS = "concept_atelier_latents"  # inside the output folder
NO_FOLDER = "(images)"


def save_trained(name: str, model: ConceptModel) -> Path:
    """Write a trained concept model over its own earlier file, or under the next free name; nothing if unchanged."""
    number, file = 1, output_file(CONCEPT_MODELS, name)
    while file.exists():
        header = concept_model_header(file)
        if header.get("run") == model.metadata["run"]:
            if header["steps"] == model.metadata["steps"]:
                return file
            break
        number += 1
        file = output_file(CONCEPT_MODELS, f"{name}_{number}")
    save_concept_model(file, model)
    return file


def chosen_pictures(folder: str, images: list[Tensor] | None, size: int) -> list[Picture]:
    """The pictures to learn from: those connected, of any sizes, else those of a folder inside ComfyUI's input folder.

    Raises ValueError when there are none.
    """
    if images:
        return tensor_pictures(torch.cat([cover(opaque(batch), size, size) for batch in images]))
    if folder == NO_FOLDER:
        raise ValueError('There are no pictures: connect some to "images", or choose a folder on "folder".')
    return find_pictures(Path(folder_paths.get_input_directory()) / folder, size)


def encode_once(model, vae, pictures: list[Picture], node_id: str) -> tuple[LatentCache, list[str]]:
    """The pictures' latents on disk, encoded where they are not yet, and the names of those that cannot be read.

    Before the U-Net is loaded for training, so that the VAE stays where it is.
    """
    # One VAE may serve models that scale its latents differently (SD1.x, SDXL).
    name = f"{weights_fingerprint(vae.first_stage_model)[:16]}_{model.model.latent_format.scale_factor}"
    folder = Path(folder_paths.get_output_directory()) / LATENTS / name
    bar = comfy.utils.ProgressBar(len(pictures), node_id=node_id)  # raises when Cancel is pressed

    def encode(images: Tensor) -> Tensor:
        return model.model.process_latent_in(vae.encode(images))

    unreadable = cache_latents(pictures, encode, folder, bar.update_absolute)
    return cached(pictures, folder), unreadable


class AtelierTrainNullText(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AtelierTrainNullText",
            display_name="Train Null-Text Model",
            category="Concept Atelier/Concept Model",
            description="Trains a concept model on pictures of one domain, without captions: faces, a style, one "
            "subject. All weights of the U-Net learn; the checkpoint stays as it is. Shows its loss and samples; "
            "Cancel and 'Stop and keep' lose nothing: the same settings queued again go on where they were left.",
            search_aliases=["null text", "concept model", "fine-tune", "dreambooth", "unconditional", "GCFG"],
            is_input_list=True,
            has_intermediate_output=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Model.Input(
                    "model", tooltip="From Null-Text Surgery, or from Load Concept Model to train it further."
                ),
                io.Clip.Input("clip", tooltip="Of the same checkpoint: it encodes the empty prompt, once."),
                io.Vae.Input("vae", tooltip="Of the same checkpoint; it stays as it is."),
                io.Image.Input(
                    "images",
                    optional=True,
                    tooltip="The pictures, instead of a folder: a batch, a list, or the output of the dataset loaders; "
                    "resized and cropped to the size below.",
                ),
                io.Combo.Input(
                    "folder",
                    options=[NO_FOLDER, *folder_paths.get_input_subfolders()],
                    tooltip="A folder inside ComfyUI's input folder that holds the pictures, or .tar shards of them "
                    "(webdataset). Each is encoded once and kept on disk.",
                ),
                io.String.Input(
                    "name", default="concept_model", tooltip="Of the file, without ending; folders with /."
                ),
                io.Int.Input(
                    "steps",
                    default=10_000,
                    min=1,
                    max=10_000_000,
                    tooltip="Steps in all (paper, appendix D: until it converges, days on 8 GPUs). Raise it to go on "
                    "with a finished run.",
                ),
                io.Float.Input(
                    "learning_rate",
                    default=1e-5,
                    min=0.0,
                    max=1.0,
                    step=1e-7,
                    round=False,
                    tooltip="Of AdamW (paper, appendix D: 0.00001).",
                ),
                io.Int.Input(
                    "batch_size", default=32, min=1, max=4096, tooltip="Pictures a step (paper, appendix D: 32)."
                ),
                io.Int.Input(
                    "accumulation",
                    default=1,
                    min=1,
                    max=4096,
                    tooltip="Parts that a batch is computed in, one after the other: more need less memory and give "
                    "the same result. The batch size must be a multiple of it.",
                ),
                io.Int.Input(
                    "size",
                    default=512,
                    min=64,
                    max=4096,
                    step=8,
                    tooltip="Width and height in pixels the pictures are resized and cropped to: best what the model "
                    "was made for (512 for SD1, 1024 for SDXL).",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=io.ControlAfterGenerate.fixed,
                    tooltip="Decides pictures, timesteps and noise of every step.",
                ),
                io.Int.Input("sample_count", default=4, min=0, max=64, tooltip="Pictures painted while it learns."),
                io.Int.Input(
                    "sample_every",
                    default=500,
                    min=0,
                    max=1_000_000,
                    tooltip="Steps between samples. 0: only at the end.",
                ),
                io.Boolean.Input(
                    "mirror",
                    default=True,
                    advanced=True,
                    tooltip="Show every other picture mirrored (released configuration). Off for text and other "
                    "things that have a left and a right.",
                ),
                io.Float.Input(
                    "ema_decay",
                    default=0.9999,
                    min=0.0,
                    max=1.0,
                    step=0.0001,
                    round=False,
                    advanced=True,
                    tooltip="Of the moving average of the weights, which is the result. The paper does not say; 0.9999 "
                    "is usual, and short runs average over fewer steps.",
                ),
                io.Float.Input(
                    "weight_decay",
                    default=0.01,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    advanced=True,
                    tooltip="Of AdamW, whose default it is.",
                ),
                io.Float.Input(
                    "clip_norm",
                    default=1.0,
                    min=0.001,
                    max=1000.0,
                    step=0.001,
                    advanced=True,
                    tooltip="Longer gradients are shortened to this (released configuration: 1.0).",
                ),
                io.Int.Input(
                    "sample_steps", default=25, min=1, max=1000, advanced=True, tooltip="DDIM steps of the samples."
                ),
                io.Float.Input(
                    "sample_eta",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.1,
                    advanced=True,
                    tooltip="Fresh noise at each DDIM step of the samples: 0 none, 1 as much as DDPM. The toy model "
                    "paints clean pictures with 1 only.",
                ),
                io.Boolean.Input(
                    "start_fresh",
                    default=False,
                    advanced=True,
                    tooltip="Forget what an earlier run with the same settings learned and start at step 0.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    display_name="MODEL",
                    tooltip="The concept model: for a sampler, or as a branch of GCFG beside the checkpoint itself.",
                ),
                io.Image.Output(display_name="samples", tooltip="The last samples."),
                io.LossMap.Output(display_name="loss_map", tooltip="The loss of every step, for Plot Loss Graph."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, folder: list[str], size: list[int], **_other) -> tuple[str, ...]:
        """So that new pictures in the folder are noticed."""
        if folder[0] == NO_FOLDER:
            return ()
        return tuple(picture.key for picture in chosen_pictures(folder[0], None, size[0]))

    @classmethod
    def execute(cls, images: list[Tensor] | None = None, **inputs: list) -> io.NodeOutput:
        """All inputs come as lists, of which only `images` may be longer than one."""
        return cls.train(images, **{name: values[0] for name, values in inputs.items()})

    @classmethod
    def train(
        cls, images: list[Tensor] | None, model, clip, vae, folder: str, name: str, steps: int,
        learning_rate: float, batch_size: int, accumulation: int, size: int, seed: int, sample_count: int,
        sample_every: int, mirror: bool, ema_decay: float, weight_decay: float, clip_norm: float,
        sample_steps: int, sample_eta: float, start_fresh: bool,
    ) -> io.NodeOutput:  # fmt: skip
        check_file_name(name)
        base = null_text_form(model)
        if base is None:
            raise ValueError("The MODEL still has its text: connect it through 'Null-Text Surgery' first.")
        settings = NullTextSettings(
            steps, learning_rate, weight_decay, batch_size, accumulation, clip_norm, ema_decay, mirror, seed
        )
        latents, unreadable = encode_once(model, vae, chosen_pictures(folder, images, size), cls.hidden.unique_id)
        samples = DomainSamples(sample_count, sample_every, seed, sample_steps, sample_eta, size)
        run = NullTextRun(name.replace("/", "_"), base, latents, settings, samples)
        report = LiveReport(cls.hidden.unique_id, steps)
        with training_session(model, clip, vae) as (backbone, weights):
            learned, state, painted = run.learn(backbone, weights, runs_folder(), report, start_fresh=start_fresh)
        file = save_trained(name, learned)
        if painted is None:
            painted = ExecutionBlocker("Train Null-Text Model paints no samples: raise sample_count.")
        lines = [f"Saved to {file}", *(f"Skipped, cannot be read: {picture}" for picture in unreadable)]
        shown = {
            **ui.PreviewImage(to_tensor(report.picture(state.losses)), cls=cls).as_dict(),
            **ui.PreviewText("\n".join(lines)).as_dict(),
        }
        return io.NodeOutput(add_learned(model, learned), painted, {"loss": state.losses}, ui=shown)


NODES = [AtelierTrainNullText]
