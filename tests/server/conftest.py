"""One real ComfyUI for all tests of this folder."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # comfy_server.py; pytest's importlib mode adds no test folder
import comfy_server


@pytest.fixture(scope="session")
def server(comfyui, tiny, tmp_path_factory):
    """ComfyUI with our pack, the fixture pack, a tiny checkpoint and pictures, as a ComfyServer."""
    with comfy_server.furnished(comfyui, tmp_path_factory.mktemp("comfy_server"), tiny("sd1")) as started:
        yield started
