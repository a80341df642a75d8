"""A real ComfyUI for tests: started in a fresh base folder with our pack, driven through /prompt and the websocket."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

PACK = Path(__file__).resolve().parents[2]
PACK_NAME = "concept-atelier"
FIXTURE_PACK = Path(__file__).parent / "fixture_pack"
TINY_CHECKPOINT = "tiny_sd1.safetensors"

# What the workflows on Stable Diffusion ask for: they run as they are, on tiny files of these names.
SD_CHECKPOINT = "v1-5-pruned-emaonly-fp16.safetensors"
SD_CONTROLNET = "control_v11p_sd15_canny_fp16.safetensors"
SD_SAM = "sam_vit_b_01ec64.pth"
SD_GROUNDING_DINO = "groundingdino_swint_ogc.pth"
SD_DINO = "dino_deitsmall16_pretrain.pth"
SD_ACTION_PICTURES = "my_action"
SD_DOMAIN_PICTURES = "my_domain"
SD_SUBJECT_PICTURES = "my_subject"
SD_OTHER_PICTURES = "my_other_subject"
SD_FOLDERS = (SD_ACTION_PICTURES, SD_DOMAIN_PICTURES, SD_SUBJECT_PICTURES, SD_OTHER_PICTURES)
SD_MODELS = (
    f"checkpoints/{SD_CHECKPOINT}",
    f"controlnet/{SD_CONTROLNET}",
    f"sams/{SD_SAM}",
    f"grounding-dino/{SD_GROUNDING_DINO}",
    f"dino/{SD_DINO}",
)
SD_PICTURE = "example.png"  # comes with ComfyUI

FRONTEND_SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.Minimap.Visible": False,
    "Comfy.Graph.CanvasInfo": False,
}

PREVIEW_WITH_NODE = 4  # the websocket's binary event type of a preview that names its node


@dataclass
class Outcome:
    """What became of one prompt."""

    status: str = "running"  # then: success, error, interrupted, or rejected (by validation)
    error: str = ""  # the sentence the artist sees
    executed: list[str] = field(default_factory=list)  # node ids in order, without cached ones
    cached: list[str] = field(default_factory=list)  # node ids whose results were there already
    previews: Counter = field(default_factory=Counter)  # preview pictures by node id
    training: list[dict[str, Any]] = field(default_factory=list)  # our own events
    outputs: dict[str, Any] = field(default_factory=dict)  # node id -> ui output
    seconds: float = 0.0


class ComfyServer:
    """One server process. Use as a context manager; `folder` gets models/, input/, output/, custom_nodes/."""

    def __init__(self, comfyui: Path, folder: Path, packs: dict[str, Path]) -> None:
        self.comfyui, self.folder = comfyui, folder
        for name in ("models/checkpoints", "input", "output", "custom_nodes"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        for name, pack in packs.items():
            (folder / "custom_nodes" / name).symlink_to(pack, target_is_directory=True)
        # No greeting dialog, which comes at some moment of its own choosing, and nothing drawn over the graph.
        settings = folder / "user" / "default" / "comfy.settings.json"
        settings.parent.mkdir(parents=True, exist_ok=True)
        settings.write_text(json.dumps(FRONTEND_SETTINGS))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / "server.log"

    def __enter__(self) -> ComfyServer:
        command = [sys.executable, "main.py", "--cpu", "--listen", "127.0.0.1", "--port", str(self.port)]
        command += ["--base-directory", str(self.folder), "--database-url", "sqlite:///:memory:"]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command,
                cwd=self.comfyui,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        deadline = time.monotonic() + 600
        while not self.answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.__exit__()
                raise RuntimeError(f"ComfyUI did not start:\n{self.log.read_text()[-4000:]}")
            time.sleep(0.3)
        return self

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def answers(self) -> bool:
        """Whether the server answers requests."""
        try:
            return self.get("/system_stats") is not None
        except OSError:
            return False

    def fetch(self, path: str) -> tuple[int, str]:
        """GET: status and text."""
        try:
            with urllib.request.urlopen(self.url + path, timeout=60) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def get(self, path: str) -> Any:
        """GET: the parsed JSON. Raises OSError where there is no answer."""
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return json.load(answer)

    def choices(self, node: str, name: str) -> list[str]:
        """What the input `name` of a node class offers to choose from."""
        kind, options = self.get(f"/object_info/{node}")[node]["input"]["required"][name]
        return kind if isinstance(kind, list) else options["options"]

    def pictures(self, outcome: Outcome, node: str) -> list[Path]:
        """The files of the pictures that a node of a prompt shows or saved."""
        images = outcome.outputs[node]["images"]
        return [self.folder / image["type"] / image["subfolder"] / image["filename"] for image in images]

    def forget(self) -> None:
        """Clear the cache of node results and unload all models, as running other workflows would."""
        self.post("/free", {"unload_models": True, "free_memory": True})
        time.sleep(1)  # the worker does it when it is idle; a prompt that comes before would still find the cache

    def post(self, path: str, data: dict[str, Any]) -> tuple[int, Any]:
        """POST JSON: status and parsed answer (None for an empty one)."""
        request = urllib.request.Request(
            self.url + path, json.dumps(data).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                status, body = answer.status, answer.read()
        except urllib.error.HTTPError as error:
            status, body = error.code, error.read()
        return status, json.loads(body) if body else None

    def run(
        self,
        prompt: dict[str, Any],
        on_training: Callable[[dict[str, Any]], None] | None = None,
        timeout: float = 900,
    ) -> Outcome:
        """Queue an API-form workflow and wait for its end. on_training is called with each of our training events."""
        return asyncio.run(asyncio.wait_for(self._run(prompt, on_training), timeout))

    async def _run(self, prompt: dict[str, Any], on_training: Callable[[dict[str, Any]], None] | None) -> Outcome:
        outcome, start, client = Outcome(), time.monotonic(), uuid.uuid4().hex
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(f"{self.url}/ws?clientId={client}", max_msg_size=0) as socket,
        ):
            await socket.send_json({"type": "feature_flags", "data": {"supports_preview_metadata": True}})
            status, answer = self.post("/prompt", {"prompt": prompt, "client_id": client})
            if status != 200:
                return Outcome(status="rejected", error=rejection(answer))
            while outcome.status == "running":
                message = await socket.receive()
                if message.type == aiohttp.WSMsgType.BINARY:
                    if int.from_bytes(message.data[:4], "big") == PREVIEW_WITH_NODE:
                        length = int.from_bytes(message.data[4:8], "big")
                        outcome.previews[json.loads(message.data[8 : 8 + length])["node_id"]] += 1
                elif message.type == aiohttp.WSMsgType.TEXT:
                    note(outcome, json.loads(message.data), answer["prompt_id"], on_training)
                else:
                    raise RuntimeError(f"The server closed the websocket:\n{self.log.read_text()[-4000:]}")
        outcome.seconds = time.monotonic() - start
        while not (history := self.get(f"/history/{answer['prompt_id']}")):  # written just after the last message
            await asyncio.sleep(0.05)
        outcome.outputs = history[answer["prompt_id"]]["outputs"]
        return outcome


def at_step(step: int, action: Callable[[], object]) -> Callable[[dict[str, Any]], None]:
    """An on_training callback that calls `action` once, at the first event from `step` on."""
    done = []

    def look(event: dict[str, Any]) -> None:
        if event["step"] >= step and not done:
            done.append(event["step"])
            action()

    return look


def rejection(answer: dict[str, Any]) -> str:
    """The sentences of a /prompt validation error."""
    of_nodes = [e for node in answer["node_errors"].values() for e in node["errors"]]
    return "; ".join(f"{e['message']}: {e['details']}" for e in of_nodes) or answer["error"]["message"]


def note(
    outcome: Outcome,
    message: dict[str, Any],
    prompt_id: str,
    on_training: Callable[[dict[str, Any]], None] | None,
) -> None:
    """Enter one websocket message into `outcome`."""
    data = message.get("data") or {}
    match message["type"]:
        case "concept-atelier.train":
            outcome.training.append(data)
            if on_training is not None:
                on_training(data)
        case "execution_cached" if data.get("prompt_id") == prompt_id:
            outcome.cached += data["nodes"]
        case "executing" if data.get("prompt_id") == prompt_id and data.get("node"):
            outcome.executed.append(data["node"])
        case "execution_success" | "execution_interrupted" as kind if data.get("prompt_id") == prompt_id:
            outcome.status = kind.removeprefix("execution_")
        case "execution_error" if data.get("prompt_id") == prompt_id:
            outcome.status = "error"
            outcome.error = data["exception_message"].strip()


def write_tiny_checkpoint(tiny_model: Any, path: Path) -> None:
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


def write_tiny_controlnet(path: Path) -> None:
    """Save a ControlNet for that checkpoint as a half-precision file of the usual layout, with random weights."""
    import tiny_models
    from comfy.cldm.cldm import ControlNet
    from safetensors.torch import save_file

    config = {name: value for name, value in tiny_models.unet_config("sd1").items() if name != "out_channels"}
    net = ControlNet(**config, num_heads=tiny_models.HEADS, hint_channels=3)
    tiny_models.fill(net, seed=3)
    save_file({f"control_model.{name}": weight.half() for name, weight in net.state_dict().items()}, path)


def write_tiny_segmenters(models: Path) -> None:
    """Save SAM and GroundingDINO with its vocabulary, as published but tiny, and a small DINO, with random weights."""
    import torch
    from concept_atelier.kernels.features import Dino

    sys.path.insert(0, str(PACK / "tests" / "kernels"))
    import tiny_segmenters

    for name in ("sams", "grounding-dino", "dino"):
        (models / name).mkdir()
    torch.save(tiny_segmenters.sam().state_dict(), models / "sams" / SD_SAM)
    torch.save({"model": tiny_segmenters.dino_weights()}, models / "grounding-dino" / SD_GROUNDING_DINO)
    tiny_segmenters.write_vocabulary(models / "bert-base-uncased")
    dino = Dino(384, 16, 1).requires_grad_(False)
    torch.save(tiny_segmenters.fill(dino, 0, 0.1).state_dict(), models / "dino" / SD_DINO)


def write_captioned_pictures(folder: Path, count: int = 3) -> None:
    """Pictures with a caption file beside each, as an artist would put them into the input folder."""
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True)
    noise = np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(noise.integers(0, 256, (96, 80 + 16 * i, 3), np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a photo of person {i} {{}} in a park")


def furnished(comfyui: Path, folder: Path, tiny_model: Any) -> ComfyServer:
    """A server, not yet started, with all that the shipped workflows need: our pack, tiny models, pictures."""
    server = ComfyServer(comfyui, folder, {PACK_NAME: PACK, "atelier_test_fixtures": FIXTURE_PACK})
    checkpoints, inputs = folder / "models" / "checkpoints", folder / "input"
    write_tiny_checkpoint(tiny_model, checkpoints / TINY_CHECKPOINT)
    (checkpoints / SD_CHECKPOINT).symlink_to(checkpoints / TINY_CHECKPOINT)
    controlnets = folder / "models" / "controlnet"
    controlnets.mkdir()
    write_tiny_controlnet(controlnets / SD_CONTROLNET)
    write_tiny_segmenters(folder / "models")
    for name in SD_FOLDERS:
        write_captioned_pictures(inputs / name)
    (inputs / SD_PICTURE).symlink_to(inputs / SD_DOMAIN_PICTURES / "0.png")
    return server
