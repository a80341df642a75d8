"""Training that can stop and go on: a checkpoint with everything a trainer needs, and the time already spent."""

import os
import time
from pathlib import Path

import torch

CHECKPOINT_SECONDS = 120


class Checkpoint:
    """The state of one training in a file, written now and then and read again by the next call.

    `parts` are modules or optimizers; `step` and `done` (the share of the time budget that is spent) go on from where
    an earlier call stopped.
    """

    def __init__(self, path: Path, minutes: float, parts: dict[str, torch.nn.Module | torch.optim.Optimizer]):
        self.path, self.parts, self.budget = path, parts, minutes * 60
        self.step, self._spent = 0, 0.0
        if path.exists():
            state = torch.load(path, map_location="cpu")
            for name, part in parts.items():
                part.load_state_dict(state[name])
            self.step, self._spent = state["step"], state["seconds"]
        self._start = self._saved = time.monotonic()

    @property
    def seconds(self) -> float:
        """Training time so far, earlier calls included."""
        return self._spent + time.monotonic() - self._start

    @property
    def done(self) -> float:
        """Share of the budget that is spent."""
        return self.seconds / self.budget

    def save_when_due(self) -> None:
        """Save when the last time is long ago."""
        if time.monotonic() - self._saved > CHECKPOINT_SECONDS:
            self.save()

    def save(self) -> None:
        """Write the file; a reader never sees half of it."""
        states = {name: part.state_dict() for name, part in self.parts.items()}
        temporary = self.path.with_suffix(".tmp")
        torch.save(states | {"step": self.step, "seconds": self.seconds}, temporary)
        os.replace(temporary, self.path)
        self._saved = time.monotonic()
