"""Finds ComfyUI for the tests that need it, sets it up for exact CPU arithmetic, and offers tiny native models.

ComfyUI is looked for in $COMFYUI_PATH, in the folders that enclose this checkout, and in ~/comfy/ComfyUI. Without it
the tests under nodes, server and browser are skipped with that reason; the others run.
"""

import gc
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from concept_atelier.benchmarks.comfyui import find_comfyui, start_comfyui

TESTS = Path(__file__).resolve().parent
NEED_COMFYUI = ("nodes", "server", "browser")
# Each may import those before it.
HELPERS = ("tiny_models", "prompting", "comparing", "cancelling", "patched_models", "guiding", "train_node")


COMFYUI = find_comfyui()
NOT_FOUND = (
    "ComfyUI was not found in $COMFYUI_PATH, in the folders around this checkout or in ~/comfy/ComfyUI: "
    "set COMFYUI_PATH to its folder"
)


def load_helper(name: str) -> None:
    """Make tests/nodes/<name>.py importable as `name`: pytest's importlib mode puts no test folder on sys.path."""
    spec = importlib.util.spec_from_file_location(name, TESTS / "nodes" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)


torch.set_num_threads(1)
if COMFYUI is not None:
    start_comfyui(COMFYUI)
    for name in HELPERS:
        load_helper(name)


class SkippedModule(pytest.Module):
    """Stands for a test module that cannot be imported without ComfyUI."""

    def collect(self):
        pytest.skip(NOT_FOUND, allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """Skip, not ignore, what needs ComfyUI, so that the summary says so."""
    if COMFYUI is None and module_path.relative_to(TESTS).parts[0] in NEED_COMFYUI:
        return SkippedModule.from_parent(parent, path=module_path)
    return None


def pytest_report_header() -> str:
    return f"ComfyUI: {COMFYUI or NOT_FOUND}"


@pytest.fixture(scope="module", autouse=True)
def frozen_heap() -> None:
    """ComfyUI collects garbage with every model that it loads, and that takes the longer the more objects are alive.

    What is alive before a module's first test is passed over from then on: the tests of nodes take half the time.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def comfyui() -> Path:
    """The folder of ComfyUI."""
    return COMFYUI


@pytest.fixture(scope="session")
def tiny():
    """tiny(topology) -> TinyModel(model, clip, vae), built once a session: see tests/nodes/tiny_models.py."""
    import tiny_models

    built = {}

    def build(topology: str) -> "tiny_models.TinyModel":
        if topology not in built:
            built[topology] = tiny_models.build(topology)
        return built[topology]

    return build


@pytest.fixture(scope="session", params=["sd1", "sd2", "sd2_v", "sdxl"])
def any_tiny(request, tiny):
    """Each of the tiny models in turn."""
    return tiny(request.param)
