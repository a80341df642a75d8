"""SAM and GroundingDINO from the folders where artists keep them, as models that ComfyUI loads and evicts."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import comfy.model_management
import comfy.utils
import folder_paths
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

from ...kernels.detection import Detection, detect, input_size
from ...kernels.grounding_dino import ENGINES, read_shape
from ...kernels.published_weights import PublishedWeights
from ...kernels.segmentation import Features, build_sam

ENDINGS = (".pth", ".safetensors")
VOCABULARY_FOLDER = "bert-base-uncased"
VOCABULARY_REPOSITORIES = ("bert-base-uncased", "google-bert/bert-base-uncased")
VOCABULARY = "vocab.txt"
DETECTOR_BYTES_PER_PIXEL = 1500  # of the network's picture: about 1.6 GB at 800 x 1333 pixels; estimated, not measured


@dataclass(frozen=True)
class ModelFiles:
    """Where one kind of model lies: its keys in ComfyUI's model folders, the first for newcomers, and its source."""

    folders: tuple[str, ...]
    example: str
    published: str

    def register(self) -> None:
        """Let ComfyUI look into models/<key>, and let it see both kinds of files where another pack limited them."""
        for key in self.folders:
            folder_paths.add_model_folder_path(key, str(Path(folder_paths.models_dir) / key))
            endings = folder_paths.folder_names_and_paths[key][1]
            if endings:  # empty: all files
                endings.update(ENDINGS)

    def names(self) -> list[str]:
        """What can be chosen; without a file the name of the one to get, which `check` explains."""
        found = {name for key in self.folders for name in folder_paths.get_filename_list(key)}
        return sorted(name for name in found if name.lower().endswith(ENDINGS)) or [self.example]

    def path(self, name: str) -> Path | None:
        """The file of that name in the first folder that has it."""
        paths = (folder_paths.get_full_path(key, name) for key in self.folders)
        return next((Path(path) for path in paths if path), None)

    def check(self, name: str | None) -> bool | str:
        """True, or the sentence that says what is missing and where to get it: for a node's validate_inputs.

        name: None where it comes through a link, and is not known before the node runs.
        """
        if name is None or self.path(name):
            return True
        folder = folder_paths.get_folder_paths(self.folders[0])[0]
        return (
            f"There is no file {name} in {' or '.join('models/' + key for key in self.folders)}: download "
            f"{self.example} from {self.published}, put it into {folder} and press R."
        )

    def read(self, name: str) -> PublishedWeights:
        """The tensors of a checkpoint, wherever its authors wrapped them. Programs inside a file are never run.

        Raises ValueError for missing and damaged files and for files that hold more than tensors.
        """
        path = self.path(name)
        if path is None:
            raise ValueError(self.check(name))
        try:
            weights = comfy.utils.load_torch_file(str(path), safe_load=True)
            weights = weights.get("model", weights)
        except Exception as error:
            raise ValueError(
                f"{path} could not be read as plain weights ({type(error).__name__}): it is damaged, or it contains "
                f"program code, which is never run. Download {self.example} from {self.published}."
            ) from error
        tensors = {key.removeprefix("module."): value for key, value in weights.items() if isinstance(value, Tensor)}
        return PublishedWeights(name, tensors)


SAM_FILES = ModelFiles(
    ("sams",), "sam_vit_b_01ec64.pth", "https://github.com/facebookresearch/segment-anything#model-checkpoints"
)
DINO_FILES = ModelFiles(
    ("grounding-dino", "groundingdino"),
    "groundingdino_swint_ogc.pth",
    "https://github.com/IDEA-Research/GroundingDINO/releases",
)


def register_detector_folders() -> None:
    """Let ComfyUI look where GroundingDINO and the vocabulary of its text encoder are kept."""
    DINO_FILES.register()
    folder_paths.add_model_folder_path(VOCABULARY_FOLDER, str(Path(folder_paths.models_dir) / VOCABULARY_FOLDER))


@dataclass(frozen=True)
class SamModel:
    """What ATELIER_SAM carries: SAM in two parts that are loaded and evicted each on its own."""

    encoder: ModelPatcher
    decoder: ModelPatcher
    name: str


@dataclass(frozen=True)
class SamPictures:
    """What ATELIER_SAM_EMBEDDING carries: pictures as the decoder sees them, and that decoder."""

    pictures: list[Features]
    decoder: ModelPatcher


def require(module: str, package: str, version: str) -> None:
    """Raise ValueError saying how to install a package that is not there."""
    if find_spec(module) is None:
        raise ValueError(
            f'The Python package {package} is missing: run "pip install {package}=={version}" with ComfyUI\'s Python '
            f"(published on https://pypi.org/project/{package}) and restart ComfyUI."
        )


def evictable(module: nn.Module) -> ModelPatcher:
    """`module` as a model that ComfyUI moves to the GPU and away again."""
    management = comfy.model_management
    return ModelPatcher(module, management.get_torch_device(), management.unet_offload_device())


def load(model: ModelPatcher, activation_bytes: int = 0) -> nn.Module:
    """The module, where ComfyUI wants it to run."""
    comfy.model_management.load_models_gpu([model], memory_required=activation_bytes, force_full_load=True)
    return model.model


def load_sam(name: str, precision: str) -> SamModel:
    """The SAM of a file in models/sams.

    precision: of the image encoder, "full", "half" or "auto", which is half where ComfyUI computes in half precision.
    Raises ValueError for a missing package and for files that hold no SAM.
    """
    require("segment_anything", "segment-anything", "1.0")
    encoder, decoder, found = build_sam(SAM_FILES.read(name))
    if precision == "half" or (precision == "auto" and comfy.model_management.should_use_fp16(
        comfy.model_management.get_torch_device()
    )):  # fmt: skip
        encoder.half()
    return SamModel(evictable(encoder), evictable(decoder), found)


def embed_picture(model: SamModel, picture: Tensor) -> Features:
    """A picture (H, W, 3) in 0..1 as the decoder needs it, on the device where ComfyUI keeps results."""
    seen = load(model.encoder, model.encoder.model.activation_bytes)(picture)
    return Features(seen.features.to(comfy.model_management.intermediate_device()), seen.picture_size, seen.input_size)


def load_detector(name: str, engine: str) -> tuple[ModelPatcher, str]:
    """The GroundingDINO of a file in models/grounding-dino or models/groundingdino, and its name.

    Raises ValueError for a missing package or vocabulary and for files that hold no GroundingDINO.
    """
    if engine == "groundingdino-py":
        require("groundingdino", "groundingdino-py", "0.4.0")
    weights = DINO_FILES.read(name)
    found = read_shape(weights).name  # before the vocabulary is looked for, so that a wrong file is named first
    return evictable(ENGINES[engine](weights, find_vocabulary())), found


def find_vocabulary() -> Path:
    """BERT's vocab.txt: in models/bert-base-uncased, else where the Hugging Face tools keep their downloads.

    Raises ValueError when it is in neither.
    """
    from huggingface_hub import try_to_load_from_cache

    folders = folder_paths.get_folder_paths(VOCABULARY_FOLDER)
    for folder in folders:
        for path in sorted(Path(folder).rglob(VOCABULARY)):
            return path
    for repository in VOCABULARY_REPOSITORIES:
        cached = try_to_load_from_cache(repository, VOCABULARY)
        if isinstance(cached, str):
            return Path(cached)
    raise ValueError(
        f"GroundingDINO needs the vocabulary of its text encoder: download {VOCABULARY} (232 kB) from "
        f"https://huggingface.co/google-bert/bert-base-uncased and put it into {folders[0]}. Its weights "
        "are in the checkpoint."
    )


def detect_in(model: ModelPatcher, picture: Tensor, text: str, threshold: float, short_side: int) -> list[Detection]:
    """What `text` names in a picture (H, W, 3) in 0..1, the surest first."""
    height, width = input_size(*picture.shape[:2], short_side)
    engine = load(model, height * width * DETECTOR_BYTES_PER_PIXEL)
    return detect(engine, picture, text, threshold, short_side)
