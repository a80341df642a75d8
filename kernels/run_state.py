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


@dataclass
class RunState:
    """Vectors, optimiser and history after `step` finished steps.

    vectors: {tower: (S, n, width)} leaf tensors. moments: AdamW's state by tower, empty before the first step.
    stopped_short_of: the number of steps the run was to have when the artist ended it early and kept it; 0 otherwise.
    losses: one a step. stats: {name: one value a step}. Random numbers need no state (`training.step_generator`).
    """

    vectors: dict[str, Tensor]
    step: int = 0
    moments: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    stopped_short_of: int = 0
    losses: list[float] = field(default_factory=list)
    stats: dict[str, list[float]] = field(default_factory=dict)

    @classmethod
    def start(cls, vectors: Mapping[str, Tensor]) -> RunState:
        """A run at step 0 from initial vectors."""
        return cls({tower: v.detach().clone().requires_grad_() for tower, v in vectors.items()})

    def make_optimizer(self, learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
        """AdamW over the vectors alone, where this state left it."""
        groups = [{"params": [v]} for v in self.vectors.values()]
        optimizer = torch.optim.AdamW(groups, lr=learning_rate, weight_decay=weight_decay)
        if self.moments:
            values = optimizer.state_dict()
            values["state"] = {i: self.moments[tower] for i, tower in enumerate(self.vectors)}
            optimizer.load_state_dict(values)
        return optimizer

    def finish_step(self, loss: float, stats: Mapping[str, float], optimizer: torch.optim.AdamW) -> None:
        """Record one finished step."""
        self.step += 1
        self.losses.append(loss)
        for key, value in stats.items():
            self.stats.setdefault(key, []).append(value)
        self.moments = {tower: optimizer.state[v] for tower, v in self.vectors.items()}

    def save(self, path: Path) -> None:
        """Write the state to `path`. Raises ValueError naming the folder when it cannot be written."""
        tensors = {f"vectors.{tower}": v.detach().cpu().contiguous() for tower, v in self.vectors.items()}
        for tower, moments in self.moments.items():
            tensors |= {f"moments.{tower}.{key}": value.detach().cpu().contiguous() for key, value in moments.items()}
        tensors["losses"] = torch.tensor(self.losses, dtype=torch.float64)
        tensors |= {f"stats.{key}": torch.tensor(v, dtype=torch.float64) for key, v in self.stats.items()}
        header = {"step": self.step, "stopped_short_of": self.stopped_short_of, "format_version": FORMAT_VERSION}
        write_safetensors(path, tensors, {key: str(value) for key, value in header.items()})

    @classmethod
    def load(cls, path: Path, device: torch.device) -> RunState:
        """Read a state. Raises ValueError naming the file when it is damaged."""
        tensors, header = read_safetensors(path)
        vectors = {
            key.removeprefix("vectors."): v.to(device).requires_grad_()
            for key, v in tensors.items()
            if key.startswith("vectors.")
        }
        moments: dict[str, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("moments."):
                _, tower, name = key.split(".")
                moments.setdefault(tower, {})[name] = value if name == "step" else value.to(device)
        stats = {key.removeprefix("stats."): v.tolist() for key, v in tensors.items() if key.startswith("stats.")}
        return cls(
            vectors,
            int(header["step"]),
            moments,
            int(header["stopped_short_of"]),
            tensors["losses"].tolist(),
            stats,
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
