"""Finding and starting a ComfyUI inside this process, for what is run from the command line."""

from __future__ import annotations

import os
import sys
from pathlib import Path

PACK = Path(__file__).resolve().parents[1]


def is_comfyui(folder: Path) -> bool:
    """Whether `folder` is a checkout of ComfyUI."""
    return (folder / "main.py").is_file() and (folder / "comfy" / "sd.py").is_file()


def find_comfyui() -> Path | None:
    """The folder of ComfyUI: $COMFYUI_PATH alone when it is set, else one around this pack, else ~/comfy/ComfyUI."""
    if named := os.environ.get("COMFYUI_PATH"):
        return Path(named).expanduser().resolve() if is_comfyui(Path(named).expanduser()) else None
    places = [*PACK.parents, Path.home() / "comfy" / "ComfyUI"]
    return next((place for place in places if is_comfyui(place)), None)


def start_comfyui(folder: Path) -> None:
    """Make `import comfy` work, on the CPU, text encoders in float32 (they default to float16 even there)."""
    sys.path.insert(0, str(folder))
    from comfy.cli_args import args

    args.cpu = True
    args.fp32_text_enc = True
    import comfy.utils

    comfy.utils.PROGRESS_BAR_ENABLED = False
