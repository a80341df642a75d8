"""A real ComfyUI for the browser, and what its frontend complains about without our pack."""

import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS / "server"))  # pytest's importlib mode adds no test folder
sys.path.insert(0, str(TESTS / "browser"))
import comfy_server  # noqa: E402


@pytest.fixture(scope="session")
def server(comfyui, tiny, tmp_path_factory):
    """ComfyUI with our pack, the fixture pack, a tiny checkpoint and pictures, as a ComfyServer."""
    with comfy_server.furnished(comfyui, tmp_path_factory.mktemp("comfy_browser"), tiny("sd1")) as started:
        yield started


@pytest.fixture(scope="session")
def usual_errors(comfyui, tmp_path_factory):
    """What a fresh install logs as errors by itself when a workflow is opened."""
    from frontend import frontend

    folder = tmp_path_factory.mktemp("comfy_bare")
    with comfy_server.ComfyServer(comfyui, folder, {}) as bare, frontend(bare.url) as page:
        page.page.evaluate("() => window.app.extensionManager.command.execute('Comfy.LoadDefaultWorkflow')")
        page.page.wait_for_timeout(1000)
        return set(page.errors)


@pytest.fixture
def page(server, request):
    """The frontend in a fresh browser, with its nodes drawn as `request.param` says."""
    from frontend import frontend

    with frontend(server.url) as opened:
        opened.draw_nodes_as(request.param)
        yield opened
