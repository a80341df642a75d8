"""Train a concept model without ComfyUI, on one device or many: python -m concept_atelier.kernels.train_nulltext.

    python -m concept_atelier.kernels.train_nulltext --model sd15 --pictures faces/ --output faces.safetensors
    accelerate launch -m concept_atelier.kernels.train_nulltext ...     several GPUs or machines (torchrun -m, too)

Needs Hugging Face accelerate (pip install concept-atelier[train]). Everything that can be continued lies in the folder
--work: encoded pictures and the state of the run; the same command started again goes on from there, also with another
number of processes. Several machines need it on a disk that they share.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .diffusers_backbone import DiffusersBackbone
from .latent_cache import LatentCache, cache_latents, cached, find_pictures
from .nulltext import (
    FORMS,
    ConceptModel,
    calibrated_features,
    null_context,
    save_concept_model,
    uniform_features,
)
from .nulltext_run import NullTextRun
from .nulltext_training import NullTextSettings
from .nulltext_unet import remove_cross_attention, watch_unet
from .run_state import weights_fingerprint

if TYPE_CHECKING:
    from accelerate import Accelerator

CALIBRATION_PICTURES = 16
DEFAULTS = NullTextSettings()


class NoisePredictor(nn.Module):
    """A null-text backbone as a module of what varies, (x_t, t), for accelerate to wrap."""

    def __init__(self, backbone: DiffusersBackbone) -> None:
        super().__init__()
        self.unet = backbone.unet  # registered, so that its gradients are exchanged
        self.backbone = backbone
        self.null = null_context(backbone)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        return self.backbone.predict_noise(x_t, t, self.null.repeat(len(t)))


class AcceleratedWorkers:
    """`nulltext_training.Workers` on accelerate's processes."""

    def __init__(self, accelerator: Accelerator, predictor: nn.Module) -> None:
        """predictor: as accelerate prepared it."""
        self.accelerator, self.predictor = accelerator, predictor
        self.rank, self.count = accelerator.process_index, accelerator.num_processes

    def exchange(self, last: bool) -> AbstractContextManager:
        return nullcontext() if last else self.accelerator.no_sync(self.predictor)

    def mean(self, value: Tensor) -> Tensor:
        return self.accelerator.reduce(value, reduction="mean")


class Printed:
    """A `Report` on the terminal."""

    stop_requested = False

    def __init__(self, total: int, every: int, quiet: bool) -> None:
        self.total, self.every, self.quiet = total, every, quiet

    def step(self, step: int, loss_history: Sequence[float], stats: dict[str, float]) -> None:
        if not self.quiet and (step % self.every == 0 or step == self.total):
            recent = loss_history[-self.every :]
            print(f"step {step} of {self.total}: loss {sum(recent) / len(recent):.5f}", flush=True)

    def samples(self, image_grid: Tensor) -> None:
        """None are painted here: load the result in ComfyUI."""


def encode_pictures(args: argparse.Namespace, backbone: DiffusersBackbone, accelerator: Accelerator) -> LatentCache:
    """The pictures through the VAE, each process encoding its share."""
    pictures = find_pictures(args.pictures, args.size)
    folder = args.work / "latents" / weights_fingerprint(backbone.autoencoder)[:16]
    share = pictures[accelerator.process_index :: accelerator.num_processes]
    for name in cache_latents(share, backbone.encode_image, folder):
        print(f"skipped, cannot be read: {name}", flush=True)
    accelerator.wait_for_everyone()
    return cached(pictures, folder)


def untrained_form(
    form: str, backbone: DiffusersBackbone, latents: LatentCache, accelerator: Accelerator
) -> ConceptModel:
    """The null-text form of the backbone's U-Net, the same on every process to the last bit."""
    from accelerate.utils import broadcast

    if form == "uniform":
        features = uniform_features(backbone)
    else:
        x_0 = torch.stack([latents.read(i, mirrored=False) for i in range(min(len(latents), CALIBRATION_PICTURES))])
        features = calibrated_features(backbone, partial(watch_unet, backbone.unet), x_0.to(backbone.device))
    shared = broadcast({layer: feature.to(accelerator.device) for layer, feature in features.items()})
    pooled = null_context(backbone).pooled
    return ConceptModel(
        backbone.family,
        {layer: feature.cpu() for layer, feature in shared.items()},
        None if pooled is None else pooled[0].float().cpu(),
        metadata={"form": form, "prediction": backbone.prediction_type},
    )


def settings_of(args: argparse.Namespace) -> NullTextSettings:
    return NullTextSettings(
        args.steps,
        args.learning_rate,
        args.weight_decay,
        args.batch_size,
        args.accumulation,
        args.clip,
        args.ema_decay,
        not args.no_mirror,
        args.seed,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Train as the arguments say and write the concept model. Raises ValueError for arguments that cannot work."""
    args = parser().parse_args(arguments)
    args.work = args.work or args.output.with_suffix(".work")

    from accelerate import Accelerator
    from diffusers import DiffusionPipeline

    # Left to itself without a device, accelerate takes torchrun's processes for as many separate runs.
    accelerator = Accelerator(cpu=not torch.accelerator.is_available(), mixed_precision=args.mixed_precision)
    settings = settings_of(args)
    settings.check(accelerator.num_processes)
    pipeline = DiffusionPipeline.from_pretrained(args.model, local_files_only=True, use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    backbone = DiffusersBackbone.from_pipeline(pipeline.to(accelerator.device))

    latents = encode_pictures(args, backbone, accelerator)
    base = untrained_form(args.form, backbone, latents, accelerator)
    remove_cross_attention(backbone.unet, base.features)
    backbone.unet.requires_grad_(True)
    predictor = accelerator.prepare_model(NoisePredictor(backbone))

    report = Printed(args.steps, args.print_every, quiet=not accelerator.is_main_process)
    model, state, _ = NullTextRun(args.output.stem, base, latents, settings).learn(
        backbone,
        dict(backbone.unet.named_parameters()),
        args.work / "runs",
        report,
        predictor,
        AcceleratedWorkers(accelerator, predictor),
    )
    if accelerator.is_main_process:
        save_concept_model(args.output, model)
        print(f"{state.step} steps on {len(latents)} pictures: {args.output}", flush=True)
    accelerator.wait_for_everyone()
    accelerator.end_training()


def parser() -> argparse.ArgumentParser:
    """The command line; defaults are the paper's (appendix D)."""
    made = argparse.ArgumentParser(
        prog="python -m concept_atelier.kernels.train_nulltext",
        description="Trains a null-text concept model (arXiv 2312.08195) on pictures without captions; the result "
        "loads in ComfyUI's 'Load Concept Model'. Start it with accelerate launch or torchrun for several devices.",
    )
    add = made.add_argument
    add("--model", required=True, help="folder of a diffusers pipeline (SD1.x, SD2.x or SDXL) with safetensors weights")
    add("--pictures", required=True, type=Path, help="folder of pictures or .tar shards (webdataset), or one .tar")
    add("--output", required=True, type=Path, help="the file to write, .safetensors")
    add("--work", type=Path, help="folder for encoded pictures and the state of the run (default: OUTPUT.work)")
    add("--size", type=int, default=512, help="width and height of the pictures in pixels (512)")
    add("--form", choices=FORMS, default=FORMS[0], help="how F_null is made (calibrated)")
    add("--steps", type=int, default=DEFAULTS.steps, help="in all; raise it to go on with a finished run")
    add("--batch-size", type=int, default=DEFAULTS.batch_size, help="pictures a step over all processes (32)")
    add("--accumulation", type=int, default=DEFAULTS.accumulation, help="parts a process computes its share in (1)")
    add("--learning-rate", type=float, default=DEFAULTS.learning_rate, help="of AdamW (1e-5)")
    add("--weight-decay", type=float, default=DEFAULTS.weight_decay, help="of AdamW (0.01)")
    add("--clip", type=float, default=DEFAULTS.clip, help="largest norm of the gradient (1.0)")
    add("--ema-decay", type=float, default=DEFAULTS.ema_decay, help="of the averaged weights (0.9999)")
    add("--no-mirror", action="store_true", help="never show a picture mirrored")
    add("--mixed-precision", choices=("no", "bf16"), default="no", help="weights stay float32 in both")
    add("--seed", type=int, default=DEFAULTS.seed)
    add("--print-every", type=int, default=100, help="steps between lines of output")
    return made


if __name__ == "__main__":
    main()
