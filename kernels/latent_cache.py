"""Pictures from a folder or from .tar shards, through the VAE once and then on disk.

A picture is resized and cropped to its training size, and encoded as it is and mirrored; training draws one of the two.
"""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .files import read_safetensors, write_safetensors

PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
SHARD = ".tar"


class UnreadablePicture(ValueError):
    """A picture that cannot be decoded."""


@dataclass(frozen=True)
class Picture:
    """A picture that can be looked at when it is needed.

    name: for people. key: names its content and where it comes from. load: gives (H, W, 3) in 0..1; raises
    UnreadablePicture.
    """

    name: str
    key: str
    load: Callable[[], Tensor]


def find_pictures(place: Path, size: int) -> list[Picture]:
    """The pictures below a folder in the order of their names, those inside .tar shards (webdataset) too; or a shard's.

    place: a folder, or one uncompressed .tar file. size: width and height in pixels they are resized and cropped to.
    Raises ValueError when there are none, and naming a shard that is damaged.
    """
    files = sorted(place.rglob("*")) if place.is_dir() else [place]
    pictures = []
    for file in files:
        if file.suffix.lower() in PICTURES and file.is_file():
            pictures.append(_picture(file, str(file), 0, file.stat().st_size, size))
        elif file.suffix.lower() == SHARD and file.is_file():
            pictures += _shard_pictures(file, size)
    if not pictures:
        kinds = ", ".join(sorted(suffix[1:] for suffix in PICTURES))
        raise ValueError(
            f"There are no pictures in {place}: name a folder that holds pictures ({kinds}) or uncompressed .tar "
            "shards of them."
        )
    return pictures


def _shard_pictures(shard: Path, size: int) -> list[Picture]:
    try:
        with tarfile.open(shard, "r:") as archive:
            members = [m for m in archive if m.isfile() and Path(m.name).suffix.lower() in PICTURES]
    except (tarfile.TarError, OSError) as error:
        raise ValueError(
            f"The shard {shard} is damaged or compressed ({error}): pack it again as a plain .tar file."
        ) from error
    return [_picture(shard, f"{shard}:{m.name}", m.offset_data, m.size, size) for m in members]


def _picture(file: Path, name: str, offset: int, length: int, size: int) -> Picture:
    """A picture of `length` bytes at `offset` of `file`."""
    identity = f"{file.resolve()} {file.stat().st_mtime_ns} {offset} {length} {size}"

    def load() -> Tensor:
        with file.open("rb") as stream:
            stream.seek(offset)
            content = stream.read(length)
        return decode(content, size, name)

    return Picture(name, hashlib.sha256(identity.encode()).hexdigest(), load)


def decode(content: bytes, size: int, name: str) -> Tensor:
    """(size, size, 3) in 0..1 of an encoded picture: turned upright, its middle cut out, transparency made white.

    Raises UnreadablePicture with the picture's name.
    """
    try:
        with Image.open(BytesIO(content)) as encoded:
            picture = ImageOps.exif_transpose(encoded).convert("RGBA")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UnreadablePicture(f"{name} ({error})") from error
    paper = Image.new("RGBA", picture.size, "white")
    fitted = ImageOps.fit(Image.alpha_composite(paper, picture).convert("RGB"), (size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(fitted, np.float32) / 255)


def tensor_pictures(images: Tensor) -> list[Picture]:
    """Pictures (B, H, W, 3) that are already in memory and of their training size."""

    def content(image: Tensor) -> str:
        return hashlib.sha256(f"{tuple(image.shape)}".encode() + image.cpu().numpy().tobytes()).hexdigest()

    return [
        Picture(f"picture {number}", content(image), lambda image=image: image)
        for number, image in enumerate(images, start=1)
    ]


@dataclass(frozen=True)
class LatentCache:
    """Encoded pictures on disk: `files[i]` holds one as it is and mirrored."""

    files: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int, mirrored: bool) -> Tensor:
        """Clean latents x_0 (C, h, w) of picture `index`, float32 on the CPU. Raises ValueError naming a lost file."""
        tensors, _ = read_safetensors(self.files[index], "delete it, and it will be encoded again")
        return tensors["latents"][int(mirrored)].float()


def cached(pictures: Sequence[Picture], folder: Path) -> LatentCache:
    """What `folder` holds of `pictures`, in their order. Raises ValueError when that is nothing."""
    files = tuple(file for picture in pictures if (file := _file(picture, folder)).is_file())
    if not files:
        raise ValueError(
            f"None of the {len(pictures)} pictures can be read, the first is {pictures[0].name}: check that they open "
            "in a picture viewer."
        )
    return LatentCache(files)


def cache_latents(
    pictures: Sequence[Picture],
    encode: Callable[[Tensor], Tensor],
    folder: Path,
    after_picture: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """Encode those of `pictures` that `folder` does not hold yet; returns the names of those that cannot be read.

    encode: (B, H, W, 3) in 0..1 -> clean latents (B, C, h, w). folder: of one VAE; float16 latents are written as
    they come, so that nothing is encoded twice after an interruption. after_picture: called with the number of
    pictures looked at; may raise to cancel. Raises ValueError naming the folder when it cannot be written.
    """
    unreadable = []
    for done, picture in enumerate(pictures, start=1):
        file = _file(picture, folder)
        if not file.is_file():
            try:
                image = picture.load()
            except UnreadablePicture as error:
                unreadable.append(str(error))
                continue
            latents = encode(torch.stack([image, image.flip(1)]))
            write_safetensors(file, {"latents": latents.half().cpu().contiguous()}, {"picture": picture.name})
        after_picture(done)
    return unreadable


def _file(picture: Picture, folder: Path) -> Path:
    """Folders of at most some thousand files each stay quick to list."""
    return folder / picture.key[:2] / f"{picture.key[2:34]}.safetensors"
