"""Train Concept run in a test: as node NODE_ID of a prompt (fixture as_in_a_prompt), with settings of few steps."""

from typing import Any

import torch
from comfy_api.latest import io
from concept_atelier.nodes.train import AtelierTrain

NODE_ID = "12"
# The inputs that no test leaves to the node; exemplars, layout, name and init_word are each test's own.
SETTINGS = {
    "steps": 3,
    "learning_rate": 1e-2,
    "batch_size": 1,
    "seed": 0,
    "sample_prompts": "",
    "sample_every": 0,
    "weight_decay": 0.0,
    "timestep_sampling": "uniform",
    "use_masks": True,
    "sample_steps": 2,
    "sample_cfg": 3.0,
    "sample_eta": 0.0,
    "start_fresh": False,
}


def run_train(parts, **inputs: Any) -> io.NodeOutput:
    """Run the node on (MODEL, CLIP, VAE) as the executor does: in inference mode."""
    with torch.inference_mode():
        return AtelierTrain.execute(*parts, **SETTINGS | inputs)
