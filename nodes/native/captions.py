"""Captions by BLIP-2 (arXiv 2301.12597) from the artist's folder, as a model that ComfyUI loads and evicts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import comfy.model_management
import folder_paths
import torch
from torch import Tensor, nn

from .pictures import to_pil
from .segmenters import evictable, load

if TYPE_CHECKING:
    from transformers import Blip2ForConditionalGeneration, Blip2Processor

FOLDER = "blip2"  # its key in ComfyUI's model folders
NO_CAPTION = "none"
PUBLISHED = "https://huggingface.co/Salesforce/blip2-opt-2.7b"
EXAMPLE = "blip2-opt-2.7b"
CONFIG, KIND = "config.json", "blip-2"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")  # the index where they are in several files
VOCABULARIES = ("tokenizer.json", "vocab.json", "spiece.model")
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
LONGEST = 30  # tokens: a caption leaves room for more words in a prompt of 77
ACTIVATION_BYTES = 500e6  # 257 patches through 39 layers, then a language model of 62 tokens; estimated, not measured


class Captioner(nn.Module):
    """A picture (H, W, 3) in 0..1 to one line of text: the likeliest token each time, at most `LONGEST`."""

    def __init__(self, network: Blip2ForConditionalGeneration, processor: Blip2Processor) -> None:
        super().__init__()
        self.network, self.processor = network, processor

    def forward(self, picture: Tensor) -> str:
        pixels = self.processor(images=to_pil(picture), return_tensors="pt")["pixel_values"].to(self.network.device)
        tokens = self.network.generate(pixel_values=pixels, do_sample=False, num_beams=1, max_new_tokens=LONGEST)
        return " ".join(self.processor.batch_decode(tokens, skip_special_tokens=True)[0].split())


def register_folder() -> None:
    """Let ComfyUI look into models/blip2, and let it see configurations where another pack limited its files."""
    folder_paths.add_model_folder_path(FOLDER, str(Path(folder_paths.models_dir) / FOLDER))
    endings = folder_paths.folder_names_and_paths[FOLDER][1]
    if endings:  # empty: all files
        endings.add(".json")


def caption_models() -> list[str]:
    """The folders in models/blip2 that hold a model in the layout of transformers; "." is models/blip2 itself."""
    files = map(Path, folder_paths.get_filename_list(FOLDER))
    return sorted(file.parent.as_posix() for file in files if file.name == CONFIG)


def caption_folder(name: str) -> Path | None:
    """The folder of that name in models/blip2; None where it holds no model."""
    config = folder_paths.get_full_path(FOLDER, f"{name}/{CONFIG}")
    return Path(config).parent if config else None


def check_caption_model(name: str | None) -> bool | str:
    """True, or the sentence that says what is wrong with a folder in models/blip2: for a node's validate_inputs.

    name: None where it comes through a link, and is not known before the node runs.
    """
    if name in (None, NO_CAPTION):
        return True
    folder = caption_folder(name)
    if folder is None:
        home = Path(folder_paths.get_folder_paths(FOLDER)[0])
        return (
            f"There is no folder {name} with a {CONFIG} in models/{FOLDER}: download the .json, .txt and .safetensors "
            f"files of {PUBLISHED} into {home / EXAMPLE} and press R, or set caption_model to {NO_CAPTION}."
        )
    if kind_of(folder) != KIND:
        return (
            f"{folder} holds no BLIP-2 model, or its {CONFIG} is damaged: choose another caption_model, such as the "
            f"files of {PUBLISHED}."
        )
    if not any((folder / file).is_file() for file in WEIGHTS):
        if any(file.suffix in PICKLED for file in folder.iterdir()):
            return (
                f"The weights in {folder} are pickled and could contain program code, so they are never opened: put "
                f"the .safetensors files of the same model beside them, for example from {PUBLISHED}."
            )
        return f"There are no weights in {folder}: put the .safetensors files of its model there, as in {PUBLISHED}."
    if not any((folder / file).is_file() for file in VOCABULARIES):
        # Without it, transformers would make up a tokenizer that knows no words.
        return f"There is no vocabulary in {folder}: put the tokenizer.json of its model there, as in {PUBLISHED}."
    return True


def kind_of(folder: Path) -> str | None:
    """The kind of model that a folder's configuration names; None where it is damaged."""
    try:
        return json.loads((folder / CONFIG).read_text(encoding="utf-8"))["model_type"]
    except (ValueError, KeyError, TypeError):
        return None


def load_captioner(name: str) -> Captioner:
    """The BLIP-2 of a folder in models/blip2, in half precision where ComfyUI computes in it, on the CPU.

    Only files of that folder are read, and programs in them are never run. Raises ValueError naming the folder when it
    is missing, incomplete, damaged or pickled.
    """
    found = check_caption_model(name)
    if found is not True:
        raise ValueError(found)
    folder = caption_folder(name)
    from transformers import Blip2ForConditionalGeneration, Blip2Processor

    half = comfy.model_management.should_use_fp16(comfy.model_management.get_torch_device())
    try:
        processor = Blip2Processor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        network, report = Blip2ForConditionalGeneration.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            torch_dtype=torch.float16 if half else torch.float32,  # its name in transformers 4 that 5 still knows
            output_loading_info=True,
        )
    except Exception as error:
        raise ValueError(
            f"{folder} could not be read as a BLIP-2 model ({type(error).__name__}): a file in it is missing or "
            "damaged, so download the whole folder again."
        ) from error
    if report["missing_keys"]:
        raise ValueError(
            f"{folder} is incomplete, it lacks the tensor {min(report['missing_keys'])}: download it again."
        )
    return Captioner(network, processor)


def caption_picture(name: str, picture: Tensor) -> str:
    """What a picture (H, W, 3) in 0..1 shows, in one line, by the BLIP-2 of a folder in models/blip2.

    Raises ValueError for folders that hold none, see `load_captioner`.
    """
    return load(evictable(load_captioner(name)), int(ACTIVATION_BYTES))(picture)
