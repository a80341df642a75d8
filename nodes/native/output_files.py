"""Files of the nodes: where runs are kept, files of our own that are offered in every workflow, and their changes."""

from __future__ import annotations

import re
from pathlib import Path

import folder_paths

SUFFIX = ".safetensors"
FILE_NAME = re.compile(r"[\w.\-]+(/[\w.\-]+)*", re.ASCII)
CONCEPT_MODELS = "concept_atelier_models"  # their key in ComfyUI's model folders
RUNS = "concept_atelier_runs"  # inside the output folder


def register_folder(key: str) -> None:
    """Let ComfyUI look for the files of model folder `key` in output/key, where nodes write them, and in models/key."""
    output = Path(folder_paths.get_output_directory())
    folder_paths.add_model_folder_path(key, str(Path(folder_paths.models_dir) / key))
    folder_paths.add_model_folder_path(key, str(output / key), is_default=True)
    folder_paths.folder_names_and_paths[key][1].add(SUFFIX)


def output_file(key: str, name: str) -> Path:
    """Where a file of model folder `key` is written."""
    return Path(folder_paths.get_output_directory()) / key / f"{name}{SUFFIX}"


def file_status(path: str | Path | None) -> tuple[int, int]:
    """What changes when a file does, for a node's fingerprint_inputs.

    path: None where the file's name comes through a link, and is not known before the node runs.
    """
    if path is None:
        return 0, 0
    status = Path(path).stat()
    return status.st_mtime_ns, status.st_size


def runs_folder() -> Path:
    """Where unfinished and finished training runs are kept."""
    return Path(folder_paths.get_output_directory()) / RUNS


def free_name(name: str, keys: list[str]) -> str:
    """`name`, or `name_2`, `name_3`, ... : the first that no folder of these model folder keys holds yet."""
    number, candidate = 1, name
    while any(folder_paths.get_full_path(key, candidate + SUFFIX) for key in keys):
        number += 1
        candidate = f"{name}_{number}"
    return candidate


def check_file_name(name: str) -> None:
    """Raise ValueError for a name that is empty, leaves the output folder or needs characters files may not have."""
    if not FILE_NAME.fullmatch(name) or ".." in name.split("/"):
        raise ValueError(
            f'The file_name "{name}" cannot be used: write letters, digits, dots, dashes and underscores, with / '
            "between folders, or leave it empty for the concept's own name."
        )
