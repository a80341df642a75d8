"""Other actions painted by one-exemplar context models in ComfyUI: progress, cancel, and nothing made twice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import comfy.sd
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...kernels.context_model import ContextSettings, paint_other_actions
from ...kernels.exemplars import Exemplar
from ...kernels.files import read_safetensors, write_safetensors
from ...kernels.run_state import run_fingerprint
from .backbone import native_session
from .output_files import runs_folder
from .pictures import contact_sheet, to_pil

# Beside the runs, which these pictures name: painted again on a GPU they would differ, and name another run.
FOLDER = "triples"
PREVIEW_SIZE = 512  # pixels
PREVIEW_ROWS = 4


def paint_contexts(
    model: ModelPatcher,
    clip: comfy.sd.CLIP,
    vae: comfy.sd.VAE,
    exemplars: Sequence[Exemplar],
    actions: Sequence[Sequence[str]],
    settings: ContextSettings,
) -> list[tuple[Tensor, ...]]:
    """For each exemplar its pictures (H, W, 3) of other actions; MODEL, CLIP and VAE are left as they are.

    actions: for each exemplar the words for its pictures. Pictures that an earlier run had finished are taken from
    its files. A cancel ends it within a step: ComfyUI's layers raise its InterruptProcessingException.
    """
    with native_session(model, clip, vae) as backbone:
        weights = backbone.fingerprint()
        bar = comfy.utils.ProgressBar(sum(settings.total_steps(len(words)) for words in actions))
        painted: list[tuple[Tensor, ...]] = []
        done = 0
        for exemplar, words in zip(exemplars, actions):
            file = _file(weights, exemplar, words, settings)
            if not file.is_file():
                pictures = paint_other_actions(
                    backbone, exemplar, words, settings, lambda step, done=done: bar.update_absolute(done + step)
                )
                write_safetensors(file, {"pictures": torch.stack(pictures)}, {})
            kept, _ = read_safetensors(file, "delete it, and it will be painted again")
            painted.append(tuple(kept["pictures"]))
            done += settings.total_steps(len(words))
            rows = [[[e.image], pictures] for e, pictures in zip(exemplars, painted)]
            sheet = contact_sheet(rows[-PREVIEW_ROWS:], ["exemplar", "same context"])
            bar.update_absolute(done, preview=("JPEG", to_pil(sheet[0]), PREVIEW_SIZE))
    return painted


def _file(weights: str, exemplar: Exemplar, words: Sequence[str], settings: ContextSettings) -> Path:
    """Where the pictures of one exemplar are kept: a name made of everything that decides them."""
    decisions = {"weights": weights, "caption": exemplar.caption, "actions": "\n".join(words), **asdict(settings)}
    name = run_fingerprint(decisions, {"image": exemplar.image})
    return runs_folder() / FOLDER / f"{name}.safetensors"
