"""The null-text concept model: a U-Net that has lost its text and speaks of one domain only.

"Image is All You Need to Empower Large-scale Diffusion Models for In-Domain Generation" (arXiv 2312.08195), section
4.1: every cross-attention gives way to a constant feature F_null (Eq. 5, 6); all other weights are then trained on
pictures without captions. This file holds what F_null is, how far the result is from the model it was made of, and the
file both are kept in. `nulltext_unet.py` operates on a diffusers U-Net, `nodes/native/nulltext.py` on ComfyUI's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .backbone import Backbone, Layer, TextContext
from .diffusers_attention import ldm_name
from .files import check_version, read_safetensors, write_safetensors
from .prompts import Prompt
from .training import step_generator

FORMAT_VERSION = 1
FORMS = ("calibrated", "uniform")
BATCH = 8  # latents a forward pass of the calibration

Look = Callable[[Layer, Tensor], None]
"""Sees the output (B, h * w, C) of one cross-attention layer."""
Watch = Callable[[Look], AbstractContextManager[None]]
"""While the context manager is open, every forward pass of a backbone shows all its cross-attention outputs."""


@dataclass(frozen=True)
class ConceptModel:
    """What makes a concept model of a base model.

    family: "sd1", "sd2", "sdxl" or "toy". features: F_null of each cross-attention layer, (C,) float32. pooled: (p,)
    pooled embedding of the null prompt, where the architecture has one (SDXL), else None. deltas: trained minus base
    weights, under the names of diffusers; empty before training. metadata: strings (form, steps, ...).
    """

    family: str
    features: Mapping[Layer, Tensor]
    pooled: Tensor | None = None
    deltas: Mapping[str, Tensor] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)

    def check_fits(self, family: str, widths: Mapping[Layer, int], shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise ValueError with a sentence when this was made of another architecture.

        widths: C of each cross-attention layer of the model at hand. shapes: of its weights, by diffusers' names.
        """
        if self.family != family:
            raise ValueError(
                f"The concept model was made of {self.family} and cannot be used with this {family} model: load the "
                "kind of checkpoint that it was made of."
            )
        mine = {layer: len(feature) for layer, feature in self.features.items()}
        strange = [name for name, delta in self.deltas.items() if shapes.get(name) != tuple(delta.shape)]
        if mine != dict(widths) or strange:
            raise ValueError(
                f"The concept model was made of a {self.family} U-Net of another shape ({len(mine)} cross-attention "
                f"layers against {len(widths)} here, {len(strange)} weights that do not fit): load the kind of "
                "checkpoint that it was made of."
            )


def null_context(backbone: Backbone) -> TextContext:
    """The context of the null prompt, for a batch of one."""
    with torch.no_grad():
        encoding = backbone.encode_text(Prompt(()), {})
    return TextContext.plain(encoding.hidden, backbone.layers, encoding.pooled)


def noised(backbone: Backbone, x_0: Tensor, timesteps: int, seed: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(t, t (B,), x_t (B, C, h, w)) over a grid of `timesteps` timesteps, in batches of at most BATCH latents."""
    for t in backbone.schedule.sampling_timesteps(timesteps):
        eps = torch.randn(x_0.shape, generator=step_generator(seed, t, "calibration")).to(x_0)
        for clean, noise in zip(x_0.split(BATCH), eps.split(BATCH)):
            t_batch = torch.full((len(clean),), t, device=x_0.device)
            yield t, t_batch, backbone.schedule.add_noise(clean, t_batch, noise)


@torch.no_grad()
def calibrated_features(
    backbone: Backbone, watch: Watch, x_0: Tensor, timesteps: int = 10, seed: int = 0
) -> dict[Layer, Tensor]:
    """F_null as what cross-attention adds for the null prompt, averaged over latents, positions and timesteps.

    The paper's Eq. 5 normalises the values; its released code stores this mean of the real output instead (METHODS
    5.3), which starts closer to the model's own null prompt. x_0: (B, C, h, w) clean latents of the domain.
    timesteps: size of the grid. Returns (C,) float32 on the CPU for each layer.
    """
    total: dict[Layer, Tensor] = {}
    count = dict.fromkeys(backbone.layers, 0)

    def look(layer: Layer, output: Tensor) -> None:
        # Every position of every latent and timestep weighs the same.
        total[layer] = total.get(layer, 0) + output.float().sum(dim=(0, 1)).cpu().double()
        count[layer] += output.shape[0] * output.shape[1]

    null = null_context(backbone)
    with watch(look):
        for _, t, x_t in noised(backbone, x_0, timesteps, seed):
            backbone.predict_noise(x_t, t, null.repeat(len(t)))
    return {layer: (total[layer] / count[layer]).float() for layer in backbone.layers}


@torch.no_grad()
def uniform_features(backbone: Backbone) -> dict[Layer, Tensor]:
    """F_null = W(Norm(V_null)) (Eq. 5) with Norm the mean over tokens: cross-attention that looks everywhere alike.

    Returns (C,) float32 on the CPU for each layer.
    """
    rows, linears = null_context(backbone).rows[0], backbone.linears()
    features = {}
    for layer in backbone.layers:
        value, out = (linears[f"{ldm_name(layer)}.attn2.{name}"] for name in ("to_v", "to_out.0"))
        mean = value(rows.to(value.weight.dtype)).mean(dim=1)
        features[layer] = out(mean)[0].float().cpu()
    return features


@torch.no_grad()
def null_text_errors(
    model: Backbone, null_text: Backbone, x_0: Tensor, timesteps: int = 10, seed: int = 0
) -> dict[int, float]:
    """{t: ||eps_null(x_t, t) - eps(x_t, t, "")|| / ||eps(x_t, t, "")||}: how far the surgery moved the model.

    model, null_text: the same weights before and after surgery. x_0: (B, C, h, w).
    """
    null = null_context(model)
    squares: dict[int, list[float]] = {}
    for t, t_batch, x_t in noised(model, x_0, timesteps, seed):
        context = null.repeat(len(t_batch))
        eps = model.predict_noise(x_t, t_batch, context)
        difference = null_text.predict_noise(x_t, t_batch, context) - eps
        sums = squares.setdefault(t, [0.0, 0.0])
        sums[0] += difference.square().sum().item()
        sums[1] += eps.square().sum().item()
    return {t: (moved / size) ** 0.5 for t, (moved, size) in squares.items()}


def start_latents(backbone: Backbone, images: Tensor | None, size: Sequence[int], seed: int) -> Tensor:
    """Clean latents to calibrate on: of `images` (B, H, W, 3), or BATCH of Gaussian noise where there are none.

    Latents of pictures have about unit variance, so noise x_0 gives x_t of the right size at every timestep, and the
    right x_t where nearly all of it is noise; where little is, it stands for a picture without any structure.
    size: (H, W) in pixels of the noise.
    """
    if images is not None:
        return torch.cat([backbone.encode_image(part) for part in images.split(BATCH)])
    shape = (BATCH, backbone.latent_channels, *(side // backbone.latent_scale for side in size))
    return torch.randn(shape, generator=step_generator(seed, 0, "latents")).to(backbone.device)


def save_concept_model(path: Path, model: ConceptModel) -> None:
    """Write `model` to a safetensors file, at once or not at all; deltas as float16.

    Half precision keeps a delta to 1/2000 of itself, less than an fp16 checkpoint loses of the weight it is added to.
    Raises ValueError naming the folder when it cannot be written (full, read-only).
    """
    tensors = {f"feature.{ldm_name(layer)}": feature.contiguous() for layer, feature in model.features.items()}
    tensors |= {f"delta.{name}": delta.half().contiguous() for name, delta in model.deltas.items()}
    if model.pooled is not None:
        tensors["pooled"] = model.pooled.contiguous()
    header = {**model.metadata, "format_version": str(FORMAT_VERSION), "concept_model": model.family}
    write_safetensors(path, tensors, header)


def concept_model_header(path: Path) -> dict[str, str]:
    """The strings in a safetensors file, without its tensors; none for a file that is damaged."""
    try:
        with safe_open(str(path), framework="pt") as file:
            return file.metadata() or {}
    except SafetensorError:
        return {}


def load_concept_model(path: Path) -> ConceptModel:
    """Read what `save_concept_model` wrote.

    Raises ValueError naming the file when it is damaged, no concept model of ours, or of a newer format.
    """
    tensors, header = read_safetensors(path)
    if "concept_model" not in header:
        raise ValueError(
            f"The file {path} holds no concept model of Concept Atelier: save one with 'Null-Text Surgery' or 'Train "
            "Null-Text Model'; a learned word is loaded with 'Load Concept'."
        )
    check_version(path, header.pop("format_version", ""), FORMAT_VERSION)
    features, deltas = (
        {key.removeprefix(prefix): v for key, v in tensors.items() if key.startswith(prefix)}
        for prefix in ("feature.", "delta.")
    )
    family = header.pop("concept_model")
    return ConceptModel(
        family, {layer_of(name): f for name, f in features.items()}, tensors.get("pooled"), deltas, header
    )


def layer_of(name: str) -> Layer:
    """The inverse of `ldm_name`: "input_blocks.4.1.transformer_blocks.0" -> Layer("input", 4, 0)."""
    parts = name.split(".")
    number = 0 if parts[0] == "middle_block" else int(parts[1])
    return Layer(parts[0].split("_")[0], number, int(parts[-1]))
