"""Measure the toy model: prompts from seeds that training never saw, sampled, and read by the judge.

`python -m concept_atelier.toyworld.evaluate --prompts 500` prints the share of right readings with 95 % intervals.
"""

import argparse
import math
import random

import numpy as np
import torch

from .autoencoder import PatchAutoencoder
from .dataset import HELD_OUT_SEED, RUNS, draw_all, to_pictures, to_tensor
from .judge import Judge, load_judge, truth
from .model import ToyModel, load_toy
from .render import picture_grid
from .sampling import ETA, GUIDANCE, STEPS, sample
from .train_autoencoder import psnr
from .vocabulary import ACTIONS, COLORED_SUBJECTS, NONE, Scene, caption, draw_scene

PROMPT_SEED = HELD_OUT_SEED + 1
GUIDANCE_SEED = HELD_OUT_SEED + 2
GUIDANCES = (2.0, 3.0, 4.0, 5.0)
GUIDANCE_PROMPTS = 96
GRID_PICTURES = 96


def prompt_scenes(count: int, seed: int) -> list[Scene]:
    """Scenes of trained subjects doing trained actions, each action equally often; no held-out pairs."""
    rng = random.Random(seed)
    return [draw_scene(rng, action=ACTIONS[index % len(ACTIONS)]) for index in range(count)]


def readings(judge: Judge, scenes: list[Scene], pictures: np.ndarray) -> dict[str, list[bool]]:
    """For each head, which pictures the judge reads as the scene says.

    Colour counts only where the prompt names one, object and side only where it names an object.
    """
    read = judge.read((to_tensor(pictures) + 1) / 2)
    right: dict[str, list[bool]] = {head: [] for head in (*read, "subject and action")}
    for index, scene in enumerate(scenes):
        wanted = truth(scene)
        correct = {head: names[index] == wanted[head] for head, names in read.items()}
        for head, value in correct.items():
            if head == "color" and scene.subject not in COLORED_SUBJECTS:
                continue
            if head in ("object", "side") and scene.object == NONE:
                continue
            right[head].append(value)
        right["subject and action"].append(correct["subject"] and correct["action"])
    return right


def interval(right: list[bool]) -> str:
    """The share with its 95 % Wilson interval, in per cent."""
    count, share, z = len(right), sum(right) / len(right), 1.96
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return f"{share:6.1%} ({max(0.0, middle - half):.1%} to {min(1.0, middle + half):.1%}, n={count})"


def report(title: str, right: dict[str, list[bool]]) -> None:
    """Print one line for each head."""
    print(title)
    for head, values in right.items():
        print(f"  {head:20s} {interval(values)}")


@torch.no_grad()
def reconstruct(autoencoder: PatchAutoencoder, pictures: np.ndarray) -> np.ndarray:
    """The pictures through the autoencoder."""
    return to_pictures(autoencoder(to_tensor(pictures)).clamp(-1, 1))


def choose_guidance(toy: ToyModel, judge: Judge) -> None:
    """Print the scores of several guidance strengths on prompts of their own."""
    scenes = prompt_scenes(GUIDANCE_PROMPTS, GUIDANCE_SEED)
    for guidance in GUIDANCES:
        pictures = sample(toy, [caption(scene) for scene in scenes], seed=1, guidance=guidance)
        right = readings(judge, scenes, pictures)
        print(f"guidance {guidance}:", {head: f"{sum(v) / len(v):.1%}" for head, v in right.items()}, flush=True)


def evaluate(toy: ToyModel, judge: Judge, count: int) -> None:
    """Print the judge's accuracy on renders and reconstructions, then the model's scores; write a sample grid."""
    scenes = prompt_scenes(count, PROMPT_SEED)
    renders = draw_all(scenes)[0]
    print(f"autoencoder: {psnr(toy.autoencoder, to_tensor(renders)):.2f} dB")
    report("judge on renders", readings(judge, scenes, renders))
    report("judge on reconstructions", readings(judge, scenes, reconstruct(toy.autoencoder, renders)))
    captions = [caption(scene) for scene in scenes]
    deterministic = sample(toy, captions, seed=0, eta=0.0)
    report(f"model, {STEPS} deterministic DDIM steps, guidance {GUIDANCE}", readings(judge, scenes, deterministic))
    pictures = sample(toy, captions, seed=0)
    right = readings(judge, scenes, pictures)
    report(f"model, {STEPS} DDIM steps with eta {ETA}, guidance {GUIDANCE}", right)
    by_action = {
        action: [value for value, scene in zip(right["action"], scenes) if scene.action == action] for action in ACTIONS
    }
    print("  by action:", ", ".join(f"{action} {sum(v)}/{len(v)}" for action, v in by_action.items() if v))
    RUNS.mkdir(exist_ok=True)
    picture_grid(list(pictures[:GRID_PICTURES]), 12).save(RUNS / "evaluation.png")
    picture_grid(list(deterministic[:GRID_PICTURES]), 12).save(RUNS / "evaluation_deterministic.png")


def main() -> None:
    """Parse the command line and evaluate the bundled weights."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--choose-guidance", action="store_true", help="compare guidance strengths instead")
    arguments = parser.parse_args()
    toy, judge = load_toy(), load_judge()
    if arguments.choose_guidance:
        choose_guidance(toy, judge)
    else:
        evaluate(toy, judge, arguments.prompts)


if __name__ == "__main__":
    main()
