"""What tests of bad input share: the sentence that the artist gets, and an output folder that cannot be written."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from comfy_server import ComfyServer


def assert_one_sentence(error: str, words: Iterable[str]) -> None:
    """On one line, with all of `words` in it: what is wrong and what to do."""
    for word in words:
        assert word in error, f"{word!r} is not in {error!r}"
    assert "\n" not in error, error


@contextmanager
def unwritable_runs(server: ComfyServer) -> Iterator[Path]:
    """The folder of the training runs, which must exist, while nothing can be written into it."""
    runs = server.folder / "output" / "concept_atelier_runs"
    aside = runs.with_name("runs_aside")
    runs.rename(aside)
    runs.write_text("a file where the folder should be: not even root can write into it")
    try:
        yield runs
    finally:
        runs.unlink()
        aside.rename(runs)
