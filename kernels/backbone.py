"""The door between the mathematics and a latent diffusion model: what a method may ask of it, and nothing else.

Two implementations: `nodes/native/backbone.py` (ComfyUI's MODEL, CLIP, VAE) and `kernels/diffusers_backbone.py`.
The same weights give the same numbers through both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from .prompts import Prompt
from .schedule import NoiseSchedule

# A context is the channels of tower l (or h), then those of tower g (SDXL).
TOWER_ORDER = "lhg"
POOLED_TOWER = "g"  # whose pooled embedding the U-Net reads beside the context (SDXL)
# Gradients of a mean over a latent's 16384 elements start near 1e-8, below what fp16 can hold.
HALF_PRECISION_SCALE = 1024.0


class Layer(NamedTuple):
    """The name of one cross-attention layer (attn2), the same for every implementation of an architecture.

    It follows the LDM numbering of U-Net blocks: `block` is "input", "middle" or "output", `number` the index of the
    block in that list (0 for the middle block), `depth` the index of the transformer block inside it.
    """

    block: str
    number: int
    depth: int


@dataclass(frozen=True)
class TextContext:
    """What the cross-attention layers read. Layer l computes K from rows[key[l]] and V from rows[value[l]].

    rows: (G, B, T, d), G distinct contexts of B prompts with T tokens each.
    key, value: L indices into the first axis of rows, one a layer in execution order.
    pooled: (B, p) pooled text embedding, where the architecture has one (SDXL).
    """

    rows: Tensor
    key: tuple[int, ...]
    value: tuple[int, ...]
    pooled: Tensor | None = None

    @classmethod
    def plain(cls, hidden: Tensor, layers: Sequence[Layer], pooled: Tensor | None = None) -> TextContext:
        """The stock case: every layer reads the same context `hidden` (B, T, d)."""
        return cls(hidden[None], (0,) * len(layers), (0,) * len(layers), pooled)

    def sources(self, layer: int) -> tuple[Tensor, Tensor]:
        """The two (B, T, d) contexts from which layer number `layer` computes K and V."""
        return self.rows[self.key[layer]], self.rows[self.value[layer]]

    def repeat(self, times: int) -> TextContext:
        """The same contexts for `times` copies of the batch: (G, times * B, T, d), copy after copy."""
        pooled = None if self.pooled is None else self.pooled.repeat(times, 1)
        return TextContext(self.rows.repeat(1, times, 1, 1), self.key, self.value, pooled)

    @staticmethod
    def cat(contexts: Sequence[TextContext]) -> TextContext:
        """One batch out of several contexts of equal layer tables and token counts.

        Raises ValueError where either differs.
        """
        first = contexts[0]
        if any((c.key, c.value) != (first.key, first.value) for c in contexts):
            raise ValueError("Contexts with different layer tables cannot share a batch.")
        if len({c.rows.shape[2] for c in contexts}) > 1:
            raise ValueError(
                "Captions of more than 75 tokens cannot share a batch with shorter ones: shorten them, or set "
                "batch_size to 1."
            )
        pooled = None if first.pooled is None else torch.cat([c.pooled for c in contexts])
        return TextContext(torch.cat([c.rows for c in contexts], dim=1), first.key, first.value, pooled)


@dataclass(frozen=True)
class TextEncoding:
    """One prompt through the text encoder(s), in N variants that differ in the vectors of its placeholders.

    hidden: (N, T, d). pooled: (N, p) or None. positions: for each placeholder the token positions (0..T-1) of its
    vectors, all occurrences after one another. words: those of the prompt's own tokens, without start, end and padding
    (of every chunk, where the prompt is longer than the text encoder's context).
    """

    hidden: Tensor
    pooled: Tensor | None
    positions: Mapping[str, tuple[int, ...]]
    words: tuple[int, ...]

    @property
    def length(self) -> int:
        """Tokens before the padding, start and end of text included."""
        return self.words[-1] + 2 if self.words else 2


@dataclass
class AttentionMaps:
    """Softmax(Q K^T / sqrt(d)) of chosen tokens, filled while the context manager that made it is open.

    maps: for each layer a list with one (B, heads, h * w, tokens) float32 tensor a forward pass, with its graph
    when gradients are on. reference: the same for K of the reference context, where one was given; else empty.
    """

    maps: dict[Layer, list[Tensor]] = field(default_factory=dict)
    reference: dict[Layer, list[Tensor]] = field(default_factory=dict)


class Backbone(Protocol):
    """A latent diffusion model with text conditioning, in the units of the papers: VP latents x_t, timesteps t, abar.

    family: "sd1", "sd2", "sdxl" or "toy". A concept trained on one family is refused by the others.
    towers: width of the token embeddings of each text tower, e.g. {"l": 768}, {"h": 1024}, {"l": 768, "g": 1280}.
    context_width: d of the contexts that cross-attention reads.
    schedule: the noise schedule; layers: the cross-attention layers in execution order.
    latent_channels, latent_scale: shape of latents: (B, latent_channels, H / latent_scale, W / latent_scale).
    device: where tensors that go in must be. All numbers that come out are float32.
    gradient_scale: multiply a loss by it before backward and divide the gradients by it after, so that half
    precision does not underflow: 1.0 where the U-Net computes in fp32 or bf16.
    """

    family: str
    towers: Mapping[str, int]
    context_width: int
    schedule: NoiseSchedule
    layers: tuple[Layer, ...]
    latent_channels: int
    latent_scale: int
    device: torch.device
    gradient_scale: float

    def token_vectors(self, text: str) -> dict[str, Tensor]:
        """Word embeddings of `text` in every tower: {tower: (n, width)}, n = number of its pieces, no BOS or EOS."""
        ...

    def word_table(self, tower: str) -> tuple[tuple[str, ...], Tensor]:
        """The V words that are one piece for a tower, of letters a to z alone, and their embeddings (V, width)."""
        ...

    def encode_text(self, prompt: Prompt, vectors: Mapping[str, Mapping[str, Tensor]]) -> TextEncoding:
        """Encode one prompt with N variants of its placeholders' vectors in one batch.

        vectors: {placeholder: {tower: (N, n, width)}}; empty for a prompt without placeholders (then N = 1).
        Differentiable in the vectors.
        """
        ...

    def encode_image(self, images: Tensor) -> Tensor:
        """(B, H, W, 3) in 0..1 -> scaled latents x_0 (B, C, h, w), the mode of the posterior. No gradient."""
        ...

    def decode_latent(self, latents: Tensor) -> Tensor:
        """Scaled latents x_0 (B, C, h, w) -> images (B, H, W, 3) in 0..1. No gradient."""
        ...

    def predict_noise(self, x_t: Tensor, t: Tensor, context: TextContext) -> Tensor:
        """eps_theta(x_t, t, context), for eps- and v-models alike.

        x_t: (B, C, h, w) VP latents; t: (B,) integer timesteps; context: of the same batch B. Returns (B, C, h, w).
        Differentiable in x_t, in context.rows and in the weights of modules adapted from the outside (`modules`).
        Equals the stock model bit for bit when every layer reads the same row.
        """
        ...

    def attention(
        self,
        layers: Sequence[Layer],
        tokens: Sequence[int],
        reference: TextContext | None = None,
        detach_query: bool = False,
        at_most: int | None = None,
    ) -> AbstractContextManager[AttentionMaps]:
        """While open, record the attention of `layers` to token positions `tokens`; outputs stay bit-identical.

        reference: contexts of the same batch and number of tokens; `AttentionMaps.reference` gets the maps that the
        queries of the same forward pass would have with them (SeFi-IDE's A_r). No gradient reaches these contexts.
        detach_query: no gradient reaches the queries, so that only contexts of K have one. at_most: layers whose map
        has more than so many places (h * w) are left out.
        """
        ...

    def linears(self) -> Mapping[str, nn.Linear]:
        """The attention projections of the U-Net by name, in a fixed order."""
        ...

    def modules(self) -> Mapping[str, nn.Module]:
        """All modules of the U-Net that have weights, by LDM's names: where learned changes of weights hook in."""
        ...

    def fingerprint(self) -> str:
        """A hash of the weights of U-Net, text encoders and VAE and of how they are read, cheap to compute.

        It names training runs. How they are read: the schedule, what is predicted, the text encoder's layer.
        """
        ...
