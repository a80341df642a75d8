"""SeFi-IDE's subject-wise attention loss: a learned word may not look where its class would not.

Li et al., "Beyond Inserting: Subject Embedding for Semantic-Fidelity" (arXiv 2402.00631). Under the queries Q of the
same forward pass, the attention A_t = softmax(Q K_t^T / sqrt d) of the learned prompt is pulled to the attention
A_r = softmax(Q K_r^T / sqrt d) of a reference prompt, which says a class phrase ("person") where the training prompt
has the placeholder. No code is published; the reading is that of METHODS.md 3.4 and 3.7.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from .backbone import AttentionMaps, TextContext
from .losses import Learning, PictureTerm, Prediction


def attention_loss(learned: Sequence[Tensor], reference: Sequence[Tensor], counted: Tensor) -> Tensor:
    """L_attn of each sample: the sum over places and tokens, the mean over heads and layers, of (A_t - A_r)^2.

    learned, reference: A_t and A_r of each layer, (B, heads, h * w, n). counted: (B, n) booleans, the tokens that
    count. Returns (B,), at most 2 h w. The sum, because a mean over entries near 1/77 would be too small for the
    published lambdas 1e-4 to 5e-2 to matter (METHODS 3.4).
    """
    columns = counted[:, None, None].to(learned[0])
    layers = [((a_t - a_r) * columns).square().sum(dim=(2, 3)).mean(dim=1) for a_t, a_r in zip(learned, reference)]
    return torch.stack(layers).mean(dim=0)


@dataclass(frozen=True)
class SubjectAttentionLoss:
    """lambda * L_attn, beside the denoising loss.

    weight: lambda; 0.003 was the best of 1e-4 to 5e-2 (project page): less overfits the picture, more loses the
    subject. class_phrase: as many tokens as the layout has; "" for the run's init word. detach_query: the loss acts on
    the contexts of K alone; without it Q has a gradient too, so vectors of V and earlier layers do.
    detach_reference: without it (and without detach_query) also through the Q in A_r; K_r never has a gradient.
    with_padding: all T columns, else the prompt's own words: start, end and padding hold most of the attention and
    would outweigh the words in a sum (METHODS 3.7). largest_map: layers whose map has more than largest_map^2 places
    are left out.
    """

    weight: float = 0.003
    class_phrase: str = ""
    detach_query: bool = True
    detach_reference: bool = True
    with_padding: bool = False
    largest_map: int = 32
    denoising_weight = 1.0

    def bind(self, learning: Learning) -> PictureTerm:
        """Encode the reference prompts, once for each distinct training prompt.

        Raises ValueError when class phrase and placeholder have different numbers of tokens, and for a layout whose
        vectors are no words of the prompt.
        """
        if learning.layout.layout.place != "word":
            raise ValueError(
                "The attention loss compares the words of two prompts, and the vectors of tail rows are no words: "
                "choose another layout in Token Layout, or disconnect the loss."
            )
        phrase = self.class_phrase.strip() or learning.init_word
        vectors = learning.backbone.token_vectors(phrase)
        tokens = learning.layout.layout.tokens
        for tower, rows in vectors.items():
            if len(rows) != tokens:
                raise ValueError(
                    f'The class phrase "{phrase}" has {len(rows)} tokens (text encoder {tower}), the placeholder '
                    f"<{learning.name}> has {tokens}: choose a class phrase of {tokens} tokens, or a layout of "
                    f"{len(rows)}."
                )
        return _BoundAttentionLoss(self, learning, {tower: rows[None] for tower, rows in vectors.items()})


class _BoundAttentionLoss(PictureTerm):
    """lambda is inside the value, so that what is shown is lambda L_attn / L_diff."""

    label = "attention : denoising"

    def __init__(self, loss: SubjectAttentionLoss, learning: Learning, class_vectors: dict[str, Tensor]) -> None:
        """class_vectors: {tower: (1, n, width)} of the class phrase."""
        self.loss, self.backbone, self.prompts = loss, learning.backbone, learning.prompts
        self.weight = float(loss.weight != 0)
        # The phrase's own word embeddings in the placeholder's slots: both prompts have the same spans of tokens.
        with torch.no_grad():
            encodings = {
                prompt: self.backbone.encode_text(prompt, {learning.name: class_vectors})
                for prompt in dict.fromkeys(learning.prompts)
            }
        self.references = {p: TextContext.plain(e.hidden, self.backbone.layers) for p, e in encodings.items()}
        self.columns = {p: range(e.hidden.shape[1]) if loss.with_padding else e.words for p, e in encodings.items()}

    @contextmanager
    def watch(self, anchors: Sequence[int], roles: int) -> Iterator[Callable[[Prediction], Tensor]]:
        """See `PictureTerm`. What it yields raises ValueError when every map is too large to be counted."""
        prompts = [self.prompts[i] for i in anchors]
        reference = TextContext.cat([self.references[prompt] for prompt in prompts]).repeat(roles)
        tokens = sorted({token for prompt in prompts for token in self.columns[prompt]})
        counted = torch.tensor([[token in self.columns[prompt] for token in tokens] for prompt in prompts])
        with self.backbone.attention(
            self.backbone.layers, tokens, reference, self.loss.detach_query, self.loss.largest_map**2
        ) as recorded:
            yield lambda _: self._value(recorded, counted.repeat(roles, 1))

    def _value(self, recorded: AttentionMaps, counted: Tensor) -> Tensor:
        learned, reference = ([a for maps in by.values() for a in maps] for by in (recorded.maps, recorded.reference))
        if not learned:
            raise ValueError(
                f"No attention map of pictures of this size has at most {self.loss.largest_map} x "
                f"{self.loss.largest_map} places: raise largest_map of the attention loss."
            )
        if self.loss.detach_reference:
            reference = [a_r.detach() for a_r in reference]
        return self.loss.weight * attention_loss(learned, reference, counted.to(learned[0].device))
