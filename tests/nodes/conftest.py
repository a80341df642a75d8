"""Fixtures of many files: how ComfyUI's executor calls a node, and the model that most of them use."""

import pytest
import torch


@pytest.fixture
def inference_mode():
    """The executor runs nodes in it; for a whole file: pytestmark = pytest.mark.usefixtures("inference_mode")."""
    with torch.inference_mode():
        yield


@pytest.fixture
def cancellable():
    """Takes a Cancel back that the test pressed: ComfyUI keeps it until something notices."""
    import comfy.model_management

    yield
    comfy.model_management.interrupt_current_processing(False)


@pytest.fixture
def as_in_a_prompt(monkeypatch, tmp_path, cancellable):
    """Train Concept is node NODE_ID of a prompt; the output folder is the test's own."""
    import folder_paths
    from comfy_api.latest._io import HiddenHolder
    from concept_atelier.nodes.train import AtelierTrain
    from train_node import NODE_ID

    monkeypatch.setattr(AtelierTrain, "hidden", HiddenHolder.from_dict({"UNIQUE_ID": NODE_ID}), raising=False)
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))


@pytest.fixture(scope="session")
def sd1(tiny):
    """The tiny model of SD1.x."""
    return tiny("sd1")
