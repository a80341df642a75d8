"""The file that a run's state is kept in: written often enough to lose little, seldom enough to cost little."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import TypeVar

from .files import check_writable
from .run_state import RunState

SAVE_EVERY = 100  # steps
REST = 20  # times as long as saving took: a state may have 13 GB, and saving shall take at most 5 % of the time

State = TypeVar("State", bound=RunState)


class StateFile:
    """path: of the file. writes: whether it is this worker's part to write it."""

    def __init__(self, path: Path, writes: bool = True) -> None:
        self.path, self.writes = path, writes
        self._kept = (0, 0)  # step and stopped_short_of of what need not be saved again
        self._due = 0.0  # on the clock

    def open(self, load: Callable[[Path], State], start: Callable[[], State], steps: int, start_fresh: bool) -> State:
        """The state of an earlier run, else a new one, which is not written before there is anything to lose.

        steps: that the run is to have. start_fresh: forget an earlier run. Raises ValueError when the earlier run has
        more steps, and when the file of a new one cannot be written.
        """
        if self.path.exists() and not start_fresh:
            state = load(self.path)
            if state.step > steps:
                raise ValueError(
                    f"This run already has {state.step} steps: raise steps above {steps}, or turn start_fresh on to "
                    f"train fewer (the run is kept in {self.path.parent})."
                )
        else:
            state = start()
            if self.writes:
                check_writable(self.path)
                self.path.unlink(missing_ok=True)
        self._kept = state.step, state.stopped_short_of
        return state

    def save_when_due(self, state: RunState) -> None:
        """After each step: save the state now and then."""
        if state.step % SAVE_EVERY == 0 and monotonic() >= self._due:
            self.save(state)

    def save(self, state: RunState) -> None:
        """Write the state, unless the file holds it already. Raises ValueError when it cannot be written."""
        now = state.step, state.stopped_short_of
        if not self.writes or now == self._kept:
            return
        started = monotonic()
        state.save(self.path)
        ended = monotonic()
        self._kept, self._due = now, ended + REST * (ended - started)
