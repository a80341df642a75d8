"""When a run's state is written, and when that is left out."""

import os
from pathlib import Path

import pytest
import torch
from concept_atelier.kernels import state_file
from concept_atelier.kernels.files import write_safetensors
from concept_atelier.kernels.run_state import RunState
from concept_atelier.kernels.state_file import StateFile


class Clock:
    def __init__(self) -> None:
        self.now, self.saves = 1000.0, []


@pytest.fixture(autouse=True)
def clock(monkeypatch) -> Clock:
    """Stands still but for the 3 seconds that saving takes, and remembers what was saved."""
    clock, stock_save = Clock(), RunState.save

    def save(state, path) -> None:
        stock_save(state, path)
        clock.now += 3
        clock.saves.append((state.step, state.stopped_short_of))

    monkeypatch.setattr(state_file, "monotonic", lambda: clock.now)
    monkeypatch.setattr(RunState, "save", save)
    return clock


def opened(path, steps: int = 1000, writes: bool = True, start_fresh: bool = False) -> tuple[StateFile, RunState]:
    file = StateFile(path, writes)
    new = RunState.start({"l": torch.zeros(1, 1, 2)})
    return file, file.open(lambda path: RunState.load(path, torch.device("cpu")), lambda: new, steps, start_fresh)


def test_saving_takes_a_twentieth_of_the_time(clock, tmp_path):
    file, state = opened(tmp_path / "state.safetensors")
    for step in range(1, 1001):
        state.step = step
        clock.now += 0.25
        file.save_when_due(state)
    # The first after 100 steps, each next one at least 60 s, that is 240 steps, after the one before it.
    assert [step for step, _ in clock.saves] == [100, 400, 700, 1000]


def test_quick_saves_are_made_every_hundred_steps(clock, tmp_path):
    file, state = opened(tmp_path / "state.safetensors")
    for step in range(1, 301):
        state.step = step
        clock.now += 1
        file.save_when_due(state)
    assert [step for step, _ in clock.saves] == [100, 200, 300]


def test_what_the_file_holds_is_not_saved_again(clock, tmp_path):
    file, state = opened(tmp_path / "state.safetensors")
    file.save(state)
    assert clock.saves == [] and not file.path.exists()  # nothing is done yet
    state.step = 100
    file.save_when_due(state)
    file.save(state)
    state.stopped_short_of = 500
    file.save(state)  # whatever the clock says
    assert clock.saves == [(100, 0), (100, 500)]
    again, loaded = opened(file.path)
    again.save(loaded)
    assert (loaded.step, loaded.stopped_short_of) == (100, 500) and len(clock.saves) == 2
    loaded.stopped_short_of = 0
    again.save(loaded)
    assert clock.saves[2:] == [(100, 0)]


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(os, "fsync", lambda file: done.append(os.fstat(file).st_size))
    monkeypatch.setattr(Path, "replace", lambda partial, path: done.append((partial.stat().st_size, path.name)))
    write_safetensors(tmp_path / "a.safetensors", {"a": torch.zeros(3)}, {})
    size = (tmp_path / "a.safetensors.partial").stat().st_size
    assert size > 12 and done == [size, (size, "a.safetensors")]


def test_only_one_worker_writes(tmp_path):
    file, state = opened(tmp_path / "runs" / "state.safetensors", writes=False)
    state.step = 100
    file.save_when_due(state)
    file.save(state)
    assert not file.path.parent.exists()


def test_starting_fresh_forgets_what_the_file_held(tmp_path):
    file, state = opened(tmp_path / "state.safetensors")
    state.step = 7
    file.save(state)
    _, fresh = opened(file.path, start_fresh=True)
    assert fresh.step == 0 and list(tmp_path.iterdir()) == []


def test_a_new_runs_file_must_be_writable(tmp_path):
    (tmp_path / "runs").write_text("a file, not a folder")
    with pytest.raises(ValueError, match=r"Cannot write state\.safetensors into the folder .*runs"):
        opened(tmp_path / "runs" / "state.safetensors")


def test_a_longer_run_is_named_and_kept(tmp_path):
    file, state = opened(tmp_path / "state.safetensors")
    state.step = 7
    file.save(state)
    with pytest.raises(ValueError, match="already has 7 steps: raise steps above 5, or turn start_fresh on"):
        opened(file.path, steps=5)
    assert opened(file.path, steps=7)[1].step == 7
