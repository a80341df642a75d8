"""Safetensors files, written whole or not at all, read without trust."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

NEWER = "The file {path} was written by a newer Concept Atelier: update the pack to load it."


def check_version(path: Path, version: str, known: int) -> None:
    """Raise ValueError naming the file when its format version is no number, or above the one we know."""
    if not version.isdecimal():
        raise ValueError(f'The header of the file {path} is damaged (its version is "{version}"): save it again.')
    if int(version) > known:
        raise ValueError(NEWER.format(path=path))


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write through a temporary file: neither a full disk nor a power cut leaves half a file under the real name.

    Raises ValueError naming the folder when it cannot be written.
    """
    with _partial_file(path) as partial:
        save_file(dict(tensors), str(partial), metadata=dict(metadata))
        with partial.open("rb+") as written:
            os.fsync(written.fileno())
        partial.replace(path)


def check_writable(path: Path) -> None:
    """Raise the ValueError of `write_safetensors` where it could not write; what `path` holds is left alone."""
    with _partial_file(path) as partial:
        partial.write_bytes(b"0")  # not empty: a full disk still takes empty files
        partial.unlink()


@contextmanager
def _partial_file(path: Path) -> Iterator[Path]:
    """The temporary file's name, in a folder that is there; what goes wrong is told in a sentence."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield path.with_name(path.name + ".partial")
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"Cannot write {path.name} into the folder {path.parent} ({error}): free some space there or make the "
            "folder writable, then queue again; nothing that was there is lost."
        ) from error


def read_safetensors(path: Path, advice: str = "save it again") -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file. Raises ValueError naming the file when it is damaged or missing.

    advice: what to do about a damaged one.
    """
    if not path.is_file():
        raise ValueError(f"There is no file {path}.")
    try:
        with safe_open(str(path), framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"The file {path} is damaged or no safetensors file ({error}): {advice}.") from error
