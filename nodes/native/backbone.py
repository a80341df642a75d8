"""The Backbone on ComfyUI's MODEL, CLIP and VAE.

ComfyUI speaks k-diffusion (x = x_0 + sigma eps, a denoised picture comes back), the kernels speak VP (x_t, t, eps): the
conversion happens here and nowhere else. Every prediction goes through `calc_cond_batch`, so whatever other nodes put
on the MODEL (LoRA, patches, wrappers) stays in effect.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import comfy.model_patcher
import comfy.patcher_extension
import comfy.samplers
import comfy.sd
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

from ...kernels.attention_recording import Recording
from ...kernels.backbone import HALF_PRECISION_SCALE, AttentionMaps, Layer, TextContext, TextEncoding
from ...kernels.ldm_names import has_weights
from ...kernels.prompts import Prompt
from ...kernels.run_state import run_fingerprint, weights_fingerprint
from ...kernels.schedule import NoiseSchedule
from .gradients import attention_with_backward, differentiable, load_for_gradients, saved_for_backward
from .model_kind import attention_modules, context_width, cross_attention_layers, model_family
from .patches import by_head, check_watched, layer_of_call, watch_cross_attention, with_patch
from .text import describe_clip, encode_text_loaded, token_vectors_loaded, word_table_loaded

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")


@contextmanager
def native_session(model: ModelPatcher, clip: comfy.sd.CLIP, vae: comfy.sd.VAE) -> Iterator[NativeBackbone]:
    """Open MODEL, CLIP and VAE for training, inversion or guided sampling: yields a backbone that has gradients.

    Use it for one piece of work and leave it: while it is open both networks stay on the device. Tensors from node
    inputs may be inference tensors; clone what is to be multiplied with something that requires a gradient. Raises
    ValueError, before anything is loaded, for models that cannot be used; see `model_family`, `describe_clip`,
    `differentiable`.
    """
    family, kind = model_family(model), describe_clip(clip)
    if family != kind.family or sum(kind.towers.values()) != context_width(model):
        raise ValueError(
            f"The CLIP ({kind.family}, width {sum(kind.towers.values())}) does not belong to the MODEL ({family}, "
            f"width {context_width(model)}): connect both from the same checkpoint."
        )
    if vae.latent_channels != model.model.latent_format.latent_channels:
        raise ValueError(
            f"The VAE makes latents of {vae.latent_channels} channels, the MODEL needs "
            f"{model.model.latent_format.latent_channels}: connect the VAE of the same checkpoint."
        )
    if model.injections or clip.patcher.injections:
        raise ValueError(
            "MODEL or CLIP come from a node like Load LoRA (Bypass), by which runs are not told apart: use Load LoRA."
        )
    with differentiable(model, clip) as (whole_model, whole_clip):
        yield NativeBackbone(whole_model, whole_clip, vae)


class NativeBackbone:
    """`kernels.backbone.Backbone` on ComfyUI's objects. Made by `native_session`, valid while that is open."""

    def __init__(self, model: ModelPatcher, clip: comfy.sd.CLIP, vae: comfy.sd.VAE) -> None:
        self.model, self.clip, self.vae = model, clip, vae
        self.family = model_family(model)
        self.towers = describe_clip(clip).towers
        self.context_width = context_width(model)
        self.layers = cross_attention_layers(model)
        self.latent_channels = model.model.latent_format.latent_channels
        self.latent_scale = vae.spacial_compression_encode()
        self.device = model.load_device
        sigmas = model.get_model_object("model_sampling").sigmas.clone()
        self._sigmas = sigmas.to(self.device)
        self.schedule = NoiseSchedule(1 / (1 + sigmas.cpu().double() ** 2))  # not every device has float64
        self.gradient_scale = HALF_PRECISION_SCALE if model.model.get_dtype_inference() == torch.float16 else 1.0
        self._recorders: list[_AttentionRecorder] = []
        self._uuid = uuid.uuid4()  # one for all predictions: EasyCache keeps a tensor with its graph for each it meets

    def token_vectors(self, text: str) -> dict[str, Tensor]:
        """See `Backbone.token_vectors`."""
        return {tower: v.to(self.device) for tower, v in token_vectors_loaded(self.clip, text).items()}

    def word_table(self, tower: str) -> tuple[tuple[str, ...], Tensor]:
        """See `Backbone.word_table`."""
        words, table = word_table_loaded(self.clip, tower)
        return words, table.to(self.device)

    def encode_text(self, prompt: Prompt, vectors: Mapping[str, Mapping[str, Tensor]]) -> TextEncoding:
        """See `Backbone.encode_text`. Raises ValueError for vectors that do not fit the text towers."""
        encoding = encode_text_loaded(self.clip, prompt, vectors)
        pooled = encoding.pooled.to(self.device) if self.family == "sdxl" else None
        return TextEncoding(encoding.hidden.to(self.device), pooled, encoding.positions, encoding.words)

    def encode_image(self, images: Tensor) -> Tensor:
        """See `Backbone.encode_image`."""
        latents = self._through_vae(self.vae.encode, images)
        return self.model.model.process_latent_in(latents).to(self.device, torch.float32)

    def decode_latent(self, latents: Tensor) -> Tensor:
        """See `Backbone.decode_latent`."""
        images = self._through_vae(self.vae.decode, self.model.model.process_latent_out(latents.detach()))
        return images.to(self.device, torch.float32)

    def _through_vae(self, step: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Run the VAE as nodes do, in inference mode; loading it may have pushed the other networks out."""
        with torch.inference_mode():
            out = step(x)
        load_for_gradients([self.model, self.clip.patcher])
        return out.clone()

    def predict_noise(self, x_t: Tensor, t: Tensor, context: TextContext) -> Tensor:
        """See `Backbone.predict_noise`."""
        sigma = self._sigmas[t.to(self.device)]
        s = sigma.view(-1, 1, 1, 1)
        x = x_t * (1 + s**2).sqrt()
        options, conds = self._model_options(context), [[self._cond(x, context)]]
        with saved_for_backward(options["transformer_options"]):
            denoised = comfy.samplers.calc_cond_batch(self.model.model, conds, x, sigma, options)[0]
        for recorder in self._recorders:
            recorder.check()
        return (x - denoised) / s

    def _cond(self, x: Tensor, context: TextContext) -> dict[str, Any]:
        """What ComfyUI's samplers make of a CONDITIONING entry; SDXL's sizes are those of the picture itself."""
        cond = {
            "cross_attn": context.sources(0)[0],
            "width": x.shape[3] * self.latent_scale,
            "height": x.shape[2] * self.latent_scale,
        }
        if context.pooled is not None:
            cond["pooled_output"] = context.pooled
        model_conds = self.model.model.extra_conds(**cond, device=self.device, noise=x, prompt_type="positive")
        return {**cond, "model_conds": model_conds, "uuid": self._uuid}

    def _model_options(self, context: TextContext) -> dict[str, Any]:
        """The MODEL's own options, and for this call our patches."""
        model_options = comfy.model_patcher.create_model_options_clone(self.model.model_options)
        options = model_options["transformer_options"]
        for kind, others in (("wrappers", self.model.wrappers), ("callbacks", self.model.callbacks)):
            options[kind] = comfy.patcher_extension.merge_nested_dicts(options.get(kind, {}), others)
        if len({*context.key, *context.value}) > 1:
            patch = self._context_patch(context)
            options = with_patch(options, "attn2_patch", patch, first=True)  # others see the layer's own contexts
        if torch.is_grad_enabled():
            options["optimized_attention_override"] = attention_with_backward(options)
        for recorder in self._recorders:
            options = recorder.install(options)
        return {**model_options, "transformer_options": options}

    def _context_patch(self, context: TextContext) -> Callable:
        """An attn2_patch that hands every layer its own contexts for K and V."""
        rows = context.rows.to(self.device, self.model.model.get_dtype_inference()).unbind()
        table = {layer: (rows[k], rows[v]) for layer, k, v in zip(self.layers, context.key, context.value)}

        def patch(n: Tensor, _key: Tensor, _value: Tensor, extra_options: Mapping[str, Any]) -> tuple[Tensor, ...]:
            return n, *table[layer_of_call(extra_options)]

        return patch

    @contextmanager
    def attention(
        self,
        layers: Sequence[Layer],
        tokens: Sequence[int],
        reference: TextContext | None = None,
        detach_query: bool = False,
        at_most: int | None = None,
    ) -> Iterator[AttentionMaps]:
        """See `Backbone.attention`. predict_noise raises ValueError where another node replaced a layer's attention.

        Other nodes' patches of contexts (attn2_patch) do not see the reference; their weights do.
        """
        recording = Recording.start(layers, tokens, reference, detach_query, at_most)
        recorder = _AttentionRecorder(recording, attention_modules(self.model))
        self._recorders.append(recorder)
        try:
            yield recording.maps
        finally:
            self._recorders.remove(recorder)

    def fingerprint(self) -> str:
        """See `Backbone.fingerprint`. What other nodes patched into the MODEL's computation takes no part."""
        text_encoders, autoencoder = self.clip.cond_stage_model, self.vae.first_stage_model
        sampling = self.model.get_model_object("model_sampling")
        decisions = {
            "weights": weights_fingerprint(self.model.model.diffusion_model, text_encoders, autoencoder),
            "text_layer": str(self.clip.layer_idx),
            # ComfyUI makes the class where it is needed: what it predicts is in the classes it is made of.
            "sampling": " ".join(kind.__name__ for kind in type(sampling).__mro__),
        }
        return run_fingerprint(decisions, {"sigmas": sampling.sigmas})

    def linears(self) -> dict[str, nn.Linear]:
        """See `Backbone.linears`. Names are those of the diffusion_model's modules."""
        return {
            name: module
            for name, module in self.model.model.diffusion_model.named_modules()
            if name.endswith(tuple(f".{attention}.{p}" for attention in ("attn1", "attn2") for p in PROJECTIONS))
        }

    def modules(self) -> dict[str, nn.Module]:
        """See `Backbone.modules`."""
        network = self.model.model.diffusion_model
        return {name: module for name, module in network.named_modules() if has_weights(module)}


class _AttentionRecorder:
    """Reads attention from q and k on the side of the attention function, whose result it leaves alone."""

    def __init__(self, recording: Recording, modules: Mapping[Layer, nn.Module]) -> None:
        """modules: the cross-attention of the MODEL in execution order."""
        self.recording, self.modules = recording, modules
        self.indices = {layer: index for index, layer in enumerate(modules)}
        self._missing: set[Layer] = set()
        self._options: Mapping[str, Any] = {}

    def install(self, options: dict[str, Any]) -> dict[str, Any]:
        """A copy of transformer_options that makes the next forward pass record."""
        self._missing = set(self.recording.maps.maps)
        self._options = options
        return watch_cross_attention(options, self._look)

    def _look(self, extra_options: Mapping[str, Any], q: Tensor, k: Tensor, heads: int) -> None:
        layer = layer_of_call(extra_options)
        if layer not in self._missing:
            return
        self._missing.discard(layer)
        to_k = self.modules[layer].to_k
        q, k = by_head(q, heads), by_head(k, heads)
        self.recording.see(layer, self.indices[layer], q, k, lambda context: by_head(to_k(context), heads))

    def check(self) -> None:
        """Raise ValueError when a layer that was asked for did not compute attention."""
        check_watched(self._missing, self._options)
