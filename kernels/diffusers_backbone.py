"""The Backbone on diffusers and transformers models: SD1.x, SD2.x, SDXL and the toy model, outside ComfyUI."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from .attention_recording import Recording
from .backbone import HALF_PRECISION_SCALE, AttentionMaps, Layer, TextContext, TextEncoding
from .clip_text import Tower, learned_rows, pieces, tokenise, whole_words
from .diffusers_attention import LayerAttention, ldm_name, transformer_blocks
from .ldm_names import ldm_modules
from .prompts import Prompt
from .run_state import run_fingerprint, weights_fingerprint
from .schedule import NoiseSchedule

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel

    from ..toyworld.model import ToyModel


class Autoencoder(Protocol):
    """Pictures (B, 3, H, W) in -1..1 <-> scaled latents (B, C, h, w)."""

    def encode(self, pixels: Tensor) -> Tensor: ...

    def decode(self, latents: Tensor) -> Tensor: ...


class KLAutoencoder(nn.Module):
    """Stable Diffusion's VAE as an Autoencoder: the mode of its posterior, times its scaling factor."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        # SDXL's VAE overflows in half precision; its configuration says so.
        in_half = vae.dtype == torch.float16 and vae.config.force_upcast
        self.vae = (copy.deepcopy(vae).float() if in_half else vae).eval().requires_grad_(False)

    def encode(self, pixels: Tensor) -> Tensor:
        return self.vae.encode(pixels.to(self.vae.dtype)).latent_dist.mode() * self.vae.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        return self.vae.decode((latents / self.vae.config.scaling_factor).to(self.vae.dtype)).sample


class DiffusersBackbone:
    """See kernels.backbone.Backbone. All weights are frozen; the U-Net keeps our attention processors until `close`."""

    def __init__(
        self,
        family: str,
        unet: UNet2DConditionModel,
        towers: Sequence[Tower],
        autoencoder: Autoencoder,
        latent_scale: int,
        alphas_cumprod: Tensor,
        prediction_type: str = "epsilon",
    ) -> None:
        """family: "sd1", "sd2", "sdxl" or "toy". towers: one, or SDXL's two ("l", then "g").

        latent_scale: H / h of the autoencoder. alphas_cumprod: (T,), abar_t. prediction_type: "epsilon" or
        "v_prediction".
        Raises ValueError for a U-Net that wants more than latents (inpainting), and for another prediction type.
        """
        if prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(f'The model predicts "{prediction_type}"; only epsilon and v_prediction are supported.')
        if unet.config.in_channels != unet.config.out_channels:
            raise ValueError(
                f"The U-Net takes {unet.config.in_channels} channels, but latents have {unet.config.out_channels} "
                "(an inpainting model?): use the base model it was made from."
            )
        self.family = family
        self.unet = unet.eval().requires_grad_(False)
        self.text_towers = tuple(towers)
        for tower in self.text_towers:
            tower.encoder.eval().requires_grad_(False)
        self.autoencoder = autoencoder
        self.prediction_type = prediction_type
        self.schedule = NoiseSchedule(alphas_cumprod)
        self.gradient_scale = HALF_PRECISION_SCALE if unet.dtype == torch.float16 else 1.0
        self.towers = {tower.name: tower.encoder.config.hidden_size for tower in self.text_towers}
        self.context_width = sum(self.towers.values())
        self.latent_channels = unet.config.out_channels
        self.latent_scale = latent_scale
        blocks = list(transformer_blocks(unet))
        self.layers = tuple(layer for layer, _ in blocks)
        self._recordings: list[Recording] = []
        self._stock_processors = [(block.attn2, block.attn2.processor) for _, block in blocks]
        for index, (layer, block) in enumerate(blocks):
            block.attn2.processor = LayerAttention(layer, index, self._recordings)

    @classmethod
    def from_pipeline(cls, pipeline: StableDiffusionPipeline | StableDiffusionXLPipeline) -> DiffusersBackbone:
        """The parts of an SD1.x, SD2.x or SDXL pipeline, shared with it.

        Raises ValueError for the SDXL refiner, which has no first text encoder.
        """
        if pipeline.text_encoder is None:
            raise ValueError("The pipeline has no first text encoder (an SDXL refiner?): use the base pipeline.")
        if hasattr(pipeline, "text_encoder_2"):
            family = "sdxl"
            towers = [
                Tower("l", pipeline.tokenizer, pipeline.text_encoder),
                Tower("g", pipeline.tokenizer_2, pipeline.text_encoder_2),
            ]
        else:
            # OpenAI's CLIP (SD1.x) approximates the GELU, OpenCLIP (SD2.x) does not.
            is_openai = pipeline.text_encoder.config.hidden_act == "quick_gelu"
            family = "sd1" if is_openai else "sd2"
            towers = [Tower("l" if is_openai else "h", pipeline.tokenizer, pipeline.text_encoder)]
        return cls(
            family,
            pipeline.unet,
            towers,
            KLAutoencoder(pipeline.vae),
            2 ** (len(pipeline.vae.config.block_out_channels) - 1),
            pipeline.scheduler.alphas_cumprod,
            pipeline.scheduler.config.prediction_type,
        )

    @classmethod
    def from_toy(cls, toy: ToyModel) -> DiffusersBackbone:
        """The parts of the bundled toy model (toyworld.model.load_toy)."""
        from ..toyworld.autoencoder import PATCH

        tower = Tower("l", toy.tokenizer, toy.text_encoder)
        schedule = NoiseSchedule.scaled_linear()
        return cls("toy", toy.unet, [tower], toy.autoencoder, PATCH, schedule.alphas_cumprod)

    def close(self) -> None:
        """Give the U-Net its own attention processors back."""
        for attention, processor in self._stock_processors:
            attention.processor = processor

    @property
    def device(self) -> torch.device:
        return self.unet.device

    def fingerprint(self) -> str:
        """See Backbone."""
        weights = weights_fingerprint(self.unet, *(tower.encoder for tower in self.text_towers), self.autoencoder)
        decisions = {"weights": weights, "prediction_type": self.prediction_type}
        return run_fingerprint(decisions, {"alphas_cumprod": self.schedule.alphas_cumprod})

    def token_vectors(self, text: str) -> dict[str, Tensor]:
        vectors = {}
        for tower in self.text_towers:
            weight = tower.encoder.get_input_embeddings().weight
            ids = torch.tensor(pieces(tower.tokenizer, text), dtype=torch.long, device=weight.device)
            vectors[tower.name] = weight.detach()[ids].float()
        return vectors

    def word_table(self, tower: str) -> tuple[tuple[str, ...], Tensor]:
        (text_tower,) = (t for t in self.text_towers if t.name == tower)
        words = whole_words(text_tower.tokenizer.get_vocab())
        weight = text_tower.encoder.get_input_embeddings().weight
        return tuple(words), weight.detach()[list(words.values())].float()

    def encode_text(self, prompt: Prompt, vectors: Mapping[str, Mapping[str, Tensor]]) -> TextEncoding:
        """See Backbone. Raises ValueError for a prompt longer than the text encoder's context.

        SD1.x and SD2.x read the last hidden state after its norm, as their pipelines do (SD2.x text encoders are
        published without their last layer); SDXL the last but one of both towers.
        """
        hidden, pooled, positions, words = [], None, {}, ()
        names = prompt.names
        for tower in self.text_towers:
            rows = {name: vectors[name][tower.name] for name in names}
            ids, positions, words = tokenise(tower, prompt, {name: rows[name].shape[1] for name in names})
            variants = next(iter(rows.values())).shape[0] if rows else 1
            with learned_rows(tower.encoder.get_input_embeddings(), rows, positions):
                output = tower.encoder(
                    torch.tensor([ids] * variants, device=tower.encoder.device), output_hidden_states=True
                )
            if self.family == "sdxl":
                hidden.append(output.hidden_states[-2].float())
                if tower.name == "g":
                    pooled = output.text_embeds.float()
            else:
                hidden.append(output.last_hidden_state.float())
        return TextEncoding(torch.cat(hidden, dim=-1), pooled, positions, words)

    @torch.no_grad()
    def encode_image(self, images: Tensor) -> Tensor:
        pixels = images.to(self.device, torch.float32).movedim(-1, 1) * 2 - 1
        return self.autoencoder.encode(pixels).float()

    @torch.no_grad()
    def decode_latent(self, latents: Tensor) -> Tensor:
        pixels = self.autoencoder.decode(latents.to(self.device, torch.float32)).float()
        return (pixels / 2 + 0.5).clamp(0, 1).movedim(1, -1)

    def predict_noise(self, x_t: Tensor, t: Tensor, context: TextContext) -> Tensor:
        """See Backbone. Raises ValueError when the context is of another batch, or lacks the pooled text of SDXL."""
        batch, _, h, w = x_t.shape
        if context.rows.shape[1] != batch:
            raise ValueError(f"The context is of {context.rows.shape[1]} prompts, the latents are {batch} pictures.")
        dtype = self.unet.dtype
        conditions = None
        if self.unet.config.addition_embed_type == "text_time":
            if context.pooled is None:
                raise ValueError("SDXL needs the pooled text embedding beside the context.")
            height, width = h * self.latent_scale, w * self.latent_scale
            # Original size, top left corner of the crop, target size: an uncropped picture of its own size.
            time_ids = torch.tensor([[height, width, 0, 0, height, width]] * batch, device=x_t.device)
            conditions = {"text_embeds": context.pooled.to(dtype), "time_ids": time_ids}
        # The U-Net hands this argument to our processors untouched: no state to set, none to forget.
        hidden = replace(context, rows=context.rows.to(dtype))
        (out,) = self.unet(x_t.to(dtype), t, hidden, added_cond_kwargs=conditions, return_dict=False)
        if self.prediction_type == "v_prediction":
            return self.schedule.eps_from_v(x_t, t, out.float())
        return out.float()

    @contextmanager
    def attention(
        self,
        layers: Sequence[Layer],
        tokens: Sequence[int],
        reference: TextContext | None = None,
        detach_query: bool = False,
        at_most: int | None = None,
    ) -> Iterator[AttentionMaps]:
        """See Backbone. Raises ValueError for a layer the model does not have."""
        for layer in layers:
            if layer not in self.layers:
                raise ValueError(f"This model has no cross-attention layer {layer}.")
        recording = Recording.start(layers, tokens, reference, detach_query, at_most)
        self._recordings.append(recording)
        try:
            yield recording.maps
        finally:
            self._recordings.remove(recording)

    def linears(self) -> Mapping[str, nn.Linear]:
        """See Backbone. Names are LDM's: "input_blocks.1.1.transformer_blocks.0.attn1.to_q", and so on."""
        return {
            f"{ldm_name(layer)}.{attention}.{projection}": getattr(block, attention).get_submodule(projection)
            for layer, block in transformer_blocks(self.unet)
            for attention in ("attn1", "attn2")
            for projection in ("to_q", "to_k", "to_v", "to_out.0")
        }

    def modules(self) -> Mapping[str, nn.Module]:
        """See Backbone."""
        return dict(ldm_modules(self.unet))
