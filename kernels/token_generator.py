"""All vectors of a concept out of one small network: ProSpect's parametrisation, which SeFi-IDE's figure shows.

A fixed word embedding passes a transformer block whose output is cut into the vectors of all slots; the block learns,
the vectors do not (ProSpect, arXiv 2305.16225, released code; METHODS 3.3). With one token its attention looks at
itself alone, so that the block is an over-parametrised map of a constant: vectors of different slots move together,
and further in a step. ProSpect trains it with AdamW at 1e-4, where free vectors take 5e-3.

Two deviations. The last layer starts with weights of zero and the word as bias, not at random: every vector starts as
the word, as free vectors do. No dropout (0.1 in ProSpect): a resumed run shall equal one never interrupted.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .run_state import RunState

HEADS, HEAD_WIDTH = 8, 64
EXPANSION = 4  # of the feed-forward layer


class FreeVectors:
    """The vectors of a run learn by themselves: nothing stands between them and the optimiser."""

    def attach(self, state: RunState) -> None:
        """Before the first step."""

    def pull_back(self, state: RunState) -> None:
        """Between the vectors' gradients and the optimiser's step."""

    def put(self, state: RunState) -> None:
        """After the optimiser's step."""


FREE = FreeVectors()


class TokenGenerator(nn.Module):
    """The vectors of `slots` slots as a function of weights that learn: one block a text tower.

    words: {tower: (n, width)} of the word(s) that the concept starts from; copied, never trained. seed: of the initial
    weights. SD1.x with ten slots: 31 million weights.
    """

    def __init__(self, words: Mapping[str, Tensor], slots: int, seed: int) -> None:
        super().__init__()
        device = next(iter(words.values())).device
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.blocks = nn.ModuleDict({tower: _Block(v, slots).to(device) for tower, v in words.items()})

    def vectors(self) -> dict[str, Tensor]:
        """{tower: (S, n, width)} with their graph. At the start every slot holds the word(s)."""
        return {tower: block() for tower, block in self.blocks.items()}

    def attach(self, state: RunState) -> None:
        """Make the weights those of a state, or a new state's these."""
        weights = dict(self.named_parameters())
        with torch.no_grad():
            for name, saved in state.generator.items():
                weights[name].copy_(saved)
        state.generator = weights

    def pull_back(self, state: RunState) -> None:
        """Turn the gradients of a state's vectors into those of the weights; the vectors themselves do not learn."""
        self.zero_grad()
        vectors = self.vectors()
        torch.autograd.backward(list(vectors.values()), [state.vectors[tower].grad for tower in vectors])
        for v in state.vectors.values():
            v.grad = None

    @torch.no_grad()
    def put(self, state: RunState) -> None:
        """The vectors that the weights now make."""
        for tower, made in self.vectors().items():
            state.vectors[tower].copy_(made)


class _Block(nn.Module):
    """Two self-attentions with residuals, then a gated feed-forward layer without one, S times as wide at its end."""

    def __init__(self, words: Tensor, slots: int) -> None:
        super().__init__()
        width = words.shape[1]
        self.register_buffer("words", words.detach().float().clone())
        self.attentions = nn.ModuleList(_SelfAttention(width) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.gate = nn.Linear(width, 2 * EXPANSION * width)
        self.out = nn.Linear(EXPANSION * width, slots * width, bias=False)
        self.bias = nn.Parameter(self.words.repeat(slots, 1, 1))
        nn.init.zeros_(self.out.weight)

    def forward(self) -> Tensor:
        x = self.words
        for attention, norm in zip(self.attentions, self.norms):
            x = x + attention(norm(x))
        value, gate = self.gate(self.norms[2](x)).chunk(2, dim=-1)
        slots, n, width = self.bias.shape
        return self.out(value * F.gelu(gate)).view(n, slots, width).transpose(0, 1) + self.bias


class _SelfAttention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * HEADS * HEAD_WIDTH, bias=False)
        self.out = nn.Linear(HEADS * HEAD_WIDTH, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(len(x), 3, HEADS, HEAD_WIDTH).permute(1, 2, 0, 3)
        out = F.scaled_dot_product_attention(q[None], k[None], v[None])[0]
        return self.out(out.transpose(0, 1).flatten(1))
