"""What an open `Backbone.attention` keeps of each layer, from the layer's own queries and keys."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .backbone import AttentionMaps, Layer, TextContext


@dataclass(frozen=True)
class Recording:
    """One open `Backbone.attention`: what it wants to see, and where that goes. The fields are its arguments."""

    maps: AttentionMaps
    tokens: tuple[int, ...]
    reference: TextContext | None
    detach_query: bool
    at_most: int | None

    @classmethod
    def start(
        cls,
        layers: Sequence[Layer],
        tokens: Sequence[int],
        reference: TextContext | None,
        detach_query: bool,
        at_most: int | None,
    ) -> Recording:
        """Nothing recorded yet."""
        maps = AttentionMaps({layer: [] for layer in layers})
        if reference is not None:
            maps.reference = {layer: [] for layer in layers}
        return cls(maps, tuple(tokens), reference, detach_query, at_most)

    def see(self, layer: Layer, index: int, q: Tensor, k: Tensor, keys_of: Callable[[Tensor], Tensor]) -> None:
        """Keep what is wanted of one layer in one forward pass.

        index: of the layer in execution order. q: (B, heads, h * w, d); k: (B, heads, T, d). keys_of: the layer's
        own W^k, from contexts (B, T, c) to keys like k.
        """
        if layer not in self.maps.maps or (self.at_most is not None and q.shape[2] > self.at_most):
            return
        q = q.detach() if self.detach_query else q
        self.maps.maps[layer].append(self._map(q, k))
        if self.reference is not None:
            with torch.no_grad():
                reference_k = keys_of(self.reference.sources(index)[0].to(q))
            self.maps.reference[layer].append(self._map(q, reference_k))

    def _map(self, q: Tensor, k: Tensor) -> Tensor:
        scores = q.float() @ k.float().transpose(-1, -2) * q.shape[-1] ** -0.5
        return scores.softmax(dim=-1)[..., self.tokens]
