"""One real ComfyUI for all tests of this folder."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # comfy_server.py; pytest's importlib mode adds no test folder
import comfy_server


def write_tiny_checkpoint(tiny_model, path: Path) -> None:
    """Save a tests/nodes/tiny_models.py SD1.x model as a half-precision checkpoint file of the usual layout (18 MB)."""
    from safetensors.torch import save_file

    parts = {
        "model.diffusion_model.": tiny_model.model.model.diffusion_model.state_dict(),
        "first_stage_model.": tiny_model.vae.first_stage_model.state_dict(),
        "cond_stage_model.": {
            name.removeprefix("clip_l."): weight
            for name, weight in tiny_model.clip.cond_stage_model.state_dict().items()
            if name.startswith("clip_l.transformer.") and "text_projection" not in name
        },
    }
    weights = {
        prefix + name: weight.half().contiguous() if weight.ndim else weight
        for prefix, part in parts.items()
        for name, weight in part.items()
    }
    save_file(weights, path)


@pytest.fixture(scope="session")
def server(comfyui, tiny, tmp_path_factory):
    """ComfyUI with our pack, the fixture pack and a tiny checkpoint, as a ComfyServer."""
    folder = tmp_path_factory.mktemp("comfy_server")
    packs = {comfy_server.PACK_NAME: comfy_server.PACK, "atelier_test_fixtures": comfy_server.FIXTURE_PACK}
    started = comfy_server.ComfyServer(comfyui, folder, packs)
    write_tiny_checkpoint(tiny("sd1"), folder / "models" / "checkpoints" / comfy_server.TINY_CHECKPOINT)
    with started:
        yield started
