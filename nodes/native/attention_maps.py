"""Where words look while a picture is sampled: cross-attention recorded on the side, the sampling itself untouched."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...kernels.heatmaps import map_level, map_shape, resize
from .patches import by_head, check_whole, sampling_step, watch_cross_attention
from .payload import WORDS, Conditioning

KEY = "concept_atelier_attention"

AREA = (
    "The positive conditioning is limited to an area, and the map of an area does not cover the picture: limit it with "
    "'Conditioning (Set Mask)' with set_cond_area 'default' instead."
)


class Place(NamedTuple):
    """Where a map was seen. step: of the sampler, from 0. block: "input", "middle" or "output". level: latents are
    2 ** level times as wide as the map."""

    step: int
    block: str
    level: int


def find_words(positive: Conditioning, wanted: str) -> set[str]:
    """The words asked for, as they stand in the prompts of `positive`.

    wanted: words and <names>, separated by spaces or commas. Raises ValueError for a word that no prompt has, and for
    conditioning that does not know its words.
    """
    words = {fold(word) for word in wanted.replace(",", " ").split()}
    known = {fold(word) for _, values in positive for word in values.get(WORDS, ())} - {""}
    if not known:
        raise ValueError(
            "The positive conditioning does not tell which token is which word: encode the prompt with 'Text Encode "
            "with Concepts'."
        )
    if missing := words - known:
        raise ValueError(
            f"The prompt does not have {', '.join(sorted(missing))}: choose among its words {', '.join(sorted(known))}."
        )
    if not words:
        raise ValueError(f"The input words is empty: choose among the words {', '.join(sorted(known))}.")
    return words


def fold(word: str) -> str:
    """How words are compared: CLIP knows no capitals, names of concepts do."""
    return word if word.startswith("<") else word.lower()


class AttentionRecorder:
    """Records, during sampling, the share of attention that every place of the picture pays to `words`.

    It watches only the positive conditioning. Attention is softmax(Q K^T / sqrt(d)), the mean of the heads, summed
    over the tokens of the words.
    """

    def __init__(self, words: Collection[str], blocks: Collection[str], levels: Collection[int]) -> None:
        """blocks, levels: the layers to watch, as in `Place`."""
        self.words, self.blocks, self.levels = set(words), blocks, levels
        self.sums: dict[Place, Tensor] = {}  # (B, h, w), the sum of all layers there
        self.counts: Counter[Place] = Counter()
        self.left_out: set[Place] = set()
        self.expecting = False

    def watch(self, model: ModelPatcher) -> ModelPatcher:
        """A clone of MODEL that is recorded when it is sampled."""
        watched = model.clone()
        watched.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, KEY, self.predict_noise)
        watched.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, self)
        return watched

    def predict_noise(self, executor: Callable, *given: Any) -> Tensor:
        """The PREDICT_NOISE wrapper."""
        self.expecting = True
        return executor(*given)

    def __call__(
        self, executor: Callable, model: Any, conds: list, x_in: Tensor, timestep: Tensor, model_options: dict
    ) -> list[Tensor]:
        # A prediction begins with the sampling's own call. What is called before is Layout Guidance, later ones are
        # other guidances (SAG, PAG), on other latents or with changed attention.
        if not self.expecting:
            return executor(model, conds, x_in, timestep, model_options)
        self.expecting = False
        options = model_options["transformer_options"]
        call = CallRecorder(self, max(sampling_step(options, timestep), 0), x_in)
        for cond in conds[0]:
            if cond.get("prompt_type") == "negative":  # GCFG asks for it alone where the positive does not count
                continue
            positions = [at for at, word in enumerate(cond.get(WORDS, ())) if fold(word) in self.words]
            if positions and "area" in cond:
                raise ValueError(AREA)
            call.prompts[cond["uuid"]] = (positions, cond["model_conds"]["c_crossattn"].cond.shape[1])
        watched = watch_cross_attention(options, call.record)
        out = executor(model, conds, x_in, timestep, {**model_options, "transformer_options": watched})
        if self.left_out and not self.sums:
            has = sorted({f"{place.block} 1/{2**place.level}" for place in self.left_out})
            raise ValueError(f"This MODEL has no cross-attention in the layers asked for, only in {', '.join(has)}.")
        return out

    def wants(self, place: Place) -> bool:
        """Whether the layers at `place` are to be watched."""
        if place.block in self.blocks and place.level in self.levels:
            return True
        self.left_out.add(place)
        return False

    def add(self, place: Place, maps: Tensor) -> None:
        """Take in one layer's maps (B, h, w)."""
        self.sums[place] = self.sums.get(place, 0) + maps
        self.counts[place] += 1

    def maps(self, steps: Collection[int], height: int, width: int) -> Tensor:
        """(S, B, height, width): for each of `steps` that was recorded, the mean of the places in it.

        Raises ValueError when none of the steps was recorded.
        """
        by_step = {
            step: [resize(self.sums[p] / self.counts[p], height, width) for p in self.sums if p.step == step]
            for step in sorted({p.step for p in self.sums} & set(steps))
        }
        if not by_step:
            raise ValueError(
                f"No attention to {', '.join(sorted(self.words))} was seen in steps {min(steps)} to {max(steps)}: show "
                "other steps. (A node such as IPAdapter may also have replaced the MODEL's attention.)"
            )
        return torch.stack([torch.stack(maps).mean(0) for maps in by_step.values()])


class CallRecorder:
    """What one call of the U-Net on `latents` shows. prompts: of each positive cond its token positions and its length.

    Raises ValueError where another node shows it tiles.
    """

    def __init__(self, recorder: AttentionRecorder, step: int, latents: Tensor) -> None:
        self.recorder, self.step, self.latents = recorder, step, latents
        self.prompts: dict[Any, tuple[Sequence[int], int]] = {}

    def record(self, extra: dict, q: Tensor, k: Tensor, heads: int) -> None:
        """Take the maps of the positive chunks out of q and k (B, tokens, heads * d)."""
        chunks = len(extra["uuids"])
        size = extra["original_shape"][-2:]
        place = Place(self.step, extra["block"][0], map_level(q.shape[-2], *size))
        for uuid, q_chunk, k_chunk in zip(extra["uuids"], q.chunk(chunks), k.chunk(chunks)):
            positions, length = self.prompts.get(uuid, ((), 0))  # a negative is not among them
            if positions and self.recorder.wants(place):
                check_whole(extra, self.latents)
                maps = word_attention(q_chunk, k_chunk, heads, positions, length)
                self.recorder.add(place, maps.unflatten(-1, map_shape(place.level, *size)))


def word_attention(q: Tensor, k: Tensor, heads: int, positions: Sequence[int], length: int) -> Tensor:
    """The attention (B, h * w) to `positions` of a prompt of `length` tokens, which k may hold more than once.

    q: (B, h * w, heads * d). k: (B, tokens, heads * d).
    """
    q, k = by_head(q, heads), by_head(k, heads)
    p = (q.float() @ k.float().transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
    copies = k.shape[-2] // length
    p = p[..., : copies * length].unflatten(-1, (copies, length)).sum(-2)
    return p[..., list(positions)].sum(-1).mean(1)
