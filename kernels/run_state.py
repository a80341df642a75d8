"""The state of a training run: enough to resume it bit for bit, as a safetensors file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from .files import read_safetensors, write_safetensors

FORMAT_VERSION = 1
# Not every file holds these; ComfyUI then leaves them at what the memory held before, another value at each loading.
UNLOADED = ("text_projection.weight", "logit_scale")

DAMAGED_RUN = "turn start_fresh on, or delete the folder"  # what to do


@dataclass
class RunState:
    """Vectors, weights, optimiser and history after `step` finished steps.

    vectors: {tower: (S, n, width)} leaf tensors. weights: leaf tensors of the U-Net that learn along, and generator:
    those that the vectors are made from; mostly none. moments: AdamW's state by tower or name of a weight, empty before
    the first step. memory: what loss terms keep.
    stopped_short_of: the number of steps the run was to have when the artist ended it early and kept it; 0 otherwise.
    losses: one a step. stats: {name: one value a step}. Random numbers need no state (`training.step_generator`).
    """

    vectors: dict[str, Tensor]
    step: int = 0
    moments: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    stopped_short_of: int = 0
    losses: list[float] = field(default_factory=list)
    stats: dict[str, list[float]] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    memory: dict[str, Tensor] = field(default_factory=dict)
    generator: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def start(cls, vectors: Mapping[str, Tensor], weights: Mapping[str, Tensor] | None = None) -> RunState:
        """A run at step 0 from initial vectors and weights."""
        leaves = [
            {k: v.detach().clone().requires_grad_() for k, v in part.items()} for part in (vectors, weights or {})
        ]
        return cls(leaves[0], weights=leaves[1])

    def make_optimizer(
        self, learning_rate: float, weight_decay: float, weights_learning_rate: float = 0.0
    ) -> torch.optim.AdamW:
        """AdamW over vectors and weights, where this state left it."""
        leaves = self._leaves()
        rates = [weights_learning_rate if name in self.weights else learning_rate for name in leaves]
        groups = [{"params": [leaf], "lr": rate} for leaf, rate in zip(leaves.values(), rates, strict=True)]
        optimizer = torch.optim.AdamW(groups, lr=learning_rate, weight_decay=weight_decay)
        if self.moments:
            values = optimizer.state_dict()
            values["state"] = {i: self.moments[name] for i, name in enumerate(leaves) if name in self.moments}
            optimizer.load_state_dict(values)
        return optimizer

    def _leaves(self) -> dict[str, Tensor]:
        return {**self.vectors, **self.weights, **self.generator}

    def finish_step(self, loss: float, stats: Mapping[str, float], optimizer: torch.optim.AdamW) -> None:
        """Record one finished step."""
        self.step += 1
        self.losses.append(loss)
        for key, value in stats.items():
            self.stats.setdefault(key, []).append(value)
        self.moments = {name: optimizer.state[v] for name, v in self._leaves().items() if v in optimizer.state}

    def save(self, path: Path) -> None:
        """Write the state to `path`. Raises ValueError naming the folder when it cannot be written."""
        tensors = {f"vectors.{tower}": v for tower, v in self.vectors.items()}
        tensors |= {f"weights.{name}": weight for name, weight in self.weights.items()}
        tensors |= {f"memory.{name}": kept for name, kept in self.memory.items()}
        tensors |= {f"generator.{name}": weight for name, weight in self.generator.items()}
        for name, moments in self.moments.items():
            tensors |= {f"moments.{name}.{key}": value for key, value in moments.items()}
        tensors["losses"] = torch.tensor(self.losses, dtype=torch.float64)
        tensors |= {f"stats.{key}": torch.tensor(v, dtype=torch.float64) for key, v in self.stats.items()}
        on_cpu = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        header = {"step": self.step, "stopped_short_of": self.stopped_short_of, "format_version": FORMAT_VERSION}
        write_safetensors(path, on_cpu, {key: str(value) for key, value in header.items()})

    @classmethod
    def load(cls, path: Path, device: torch.device) -> RunState:
        """Read a state. Raises ValueError naming the file when it is damaged."""
        tensors, header = read_safetensors(path, DAMAGED_RUN)
        losses = tensors.pop("losses").tolist()
        parts: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            part, name = key.split(".", 1)
            parts.setdefault(part, {})[name] = tensor
        moments: dict[str, dict[str, Tensor]] = {}
        for key, value in parts.get("moments", {}).items():
            name, moment = key.rsplit(".", 1)
            moments.setdefault(name, {})[moment] = value  # the optimiser brings it to the device
        leaves = [
            {name: v.to(device).requires_grad_() for name, v in parts.get(part, {}).items()}
            for part in ("vectors", "weights", "generator")
        ]
        return cls(
            leaves[0],
            int(header["step"]),
            moments,
            int(header["stopped_short_of"]),
            losses,
            {name: v.tolist() for name, v in parts.get("stats", {}).items()},
            leaves[1],
            {name: kept.to(device) for name, kept in parts.get("memory", {}).items()},
            leaves[2],
        )


def weights_fingerprint(*modules: nn.Module) -> str:
    """A hash of modules' weights that takes milliseconds: names, shapes and 64 spread values of each tensor.

    Different fine-tunes and merged LoRAs differ in nearly every value, so spread values tell them apart.
    """
    weights = (entry for module in modules for entry in sorted(module.state_dict().items()))
    return tensors_fingerprint((key, value) for key, value in weights if not key.endswith(UNLOADED))


def tensors_fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """A hash of named tensors in their order: names, shapes and 64 spread values of each."""
    digest = hashlib.sha256()
    for key, value in tensors:
        digest.update(f"{key}{tuple(value.shape)}".encode())
        flat = value.detach().reshape(-1)
        spread = flat[torch.linspace(0, flat.numel() - 1, min(64, flat.numel())).long().to(flat.device)]
        digest.update(spread.float().cpu().numpy().tobytes())
    return digest.hexdigest()


def run_fingerprint(decisions: Mapping[str, str | int | float | bool], tensors: Mapping[str, Tensor]) -> str:
    """The name of a run: a hash of everything that decides its result."""
    digest = hashlib.sha256(json.dumps(decisions, sort_keys=True).encode())
    for key in sorted(tensors):
        digest.update(f"{key}{tuple(tensors[key].shape)}".encode())
        digest.update(tensors[key].detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
