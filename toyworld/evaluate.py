"""Measure the toy model and its judge on seeds that training never saw.

`python -m concept_atelier.toyworld.evaluate --prompts 1000` prints the shares of right readings with 95 % intervals;
`--judge` measures the judge alone: its accuracy, its calibration, and what it says to junk.
"""

import argparse
import random
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch

from .autoencoder import PatchAutoencoder
from .dataset import HELD_OUT_SEED, RUNS, draw_all, to_pictures, to_tensor
from .intervals import wilson
from .judge import NAMES, Judge, load_judge, truth
from .junk import KINDS, decoded_noise
from .model import ToyModel, load_toy
from .render import picture_grid
from .sampling import ETA, GUIDANCE, STEPS, sample
from .train_autoencoder import psnr
from .train_judge import judge_scene
from .vocabulary import ACTIONS, NONE, Scene, caption, draw_pair_scene, draw_scene

PROMPT_SEED = HELD_OUT_SEED + 1
GUIDANCE_SEED = HELD_OUT_SEED + 2
JUDGE_SEED = HELD_OUT_SEED + 4
GUIDANCES = (2.0, 3.0, 4.0, 5.0)
GUIDANCE_PROMPTS = 192
GRID_PICTURES = 96
JUNK_OF_EACH_KIND = 250
CONFIDENCE_EDGES = (0.0, 0.5, 0.7, 0.9, 0.97, 1.0)
# One prompt in four has two subjects.
PAIR_EVERY = 4


def prompt_scenes(count: int, seed: int) -> list[Scene]:
    """Scenes of trained subjects doing trained actions, each action equally often; no held-out pairs."""
    rng = random.Random(seed)
    scenes = []
    for index in range(count):
        if index % PAIR_EVERY == PAIR_EVERY - 1:
            scenes.append(draw_pair_scene(rng))
        else:
            singles = index - index // PAIR_EVERY
            scenes.append(draw_scene(rng, action=ACTIONS[singles % len(ACTIONS)]))
    return scenes


def readings(judge: Judge, scenes: Sequence[Scene], pictures: np.ndarray) -> dict[str, list[bool]]:
    """For each head, which pictures the judge reads as the scene says.

    Colour, object and side count only where the sentence names them; "both subjects" only where it names two, in
    either order, and "subject" where it names one. "everything": all that the sentence names.
    """
    read = judge.read((to_tensor(pictures) + 1) / 2)
    right: dict[str, list[bool]] = {head: [] for head in (*read, "both subjects", "subject and action", "everything")}
    del right["second"]
    for index, scene in enumerate(scenes):
        wanted, got = truth(scene), {head: names[index] for head, names in read.items()}
        correct = {head: got[head] == wanted[head] for head in got}
        if len(scene.characters) == 2:
            named = {"both subjects": {got["subject"], got["second"]} == {wanted["subject"], wanted["second"]}}
        else:
            named = {"subject": correct["subject"]}
            named["subject and action"] = correct["subject"] and correct["action"]
            if wanted["color"] != NONE:
                named["color"] = correct["color"]
            if wanted["object"] != NONE:
                named |= {"object": correct["object"], "side": correct["side"]}
        named |= {"action": correct["action"], "background": correct["background"]}
        named["everything"] = all(named.values())
        for head, value in named.items():
            right[head].append(value)
    return right


def report(title: str, right: dict[str, list[bool]]) -> None:
    """Print one line for each head."""
    print(title)
    for head, values in right.items():
        print(f"  {head:20s} {wilson(values)}, n={len(values)}", flush=True)


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


def evaluate_judge(autoencoder: PatchAutoencoder, judge: Judge, count: int) -> None:
    """Print the judge's accuracy over the whole world, held-out words too, its calibration, and what junk passes."""
    rng = random.Random(JUDGE_SEED)
    scenes = [judge_scene(rng) for _ in range(count)]
    renders = draw_all(scenes)[0]
    rebuilt = reconstruct(autoencoder, renders)
    wanted = [truth(scene) for scene in scenes]
    for title, pictures in (("renders", renders), ("reconstructions", rebuilt)):
        read = judge.read((to_tensor(pictures) + 1) / 2)
        print(f"judge on {title}")
        for head, names in read.items():
            values = [name == truth_[head] for name, truth_ in zip(names, wanted)]
            print(f"  {head:20s} {wilson(values)}, n={len(values)}")
    print("calibration on reconstructions: confidence, right, pictures")
    probabilities = judge.probabilities((to_tensor(rebuilt) + 1) / 2)
    for head in ("action", "subject", "object"):
        confidence, index = probabilities[head].max(1)
        right = torch.tensor([NAMES[head][i] == t[head] for i, t in zip(index.tolist(), wanted)])
        for low, high in pairwise(CONFIDENCE_EDGES):
            inside = (confidence > low) & (confidence <= high)
            if inside.any():
                mean, share = confidence[inside].mean(), right[inside].float().mean()
                print(f"  {head:8s} {low:.2f} to {high:.2f}: {mean:6.1%} {share:6.1%} {inside.sum():5d}")
    print("junk called 'none' for action and subject")
    junk_rng = np.random.default_rng(JUDGE_SEED)
    junk = {
        name: np.stack([maker(junk_rng, renders) for _ in range(JUNK_OF_EACH_KIND)]) for name, maker in KINDS.items()
    }
    junk["decoded noise"] = decoded_noise(JUNK_OF_EACH_KIND, autoencoder, torch.Generator().manual_seed(JUDGE_SEED))
    for name, pictures in junk.items():
        read = judge.read((to_tensor(pictures) + 1) / 2)
        refused = [action == subject == NONE for action, subject in zip(read["action"], read["subject"])]
        print(f"  {name:20s} {wilson(refused)}, n={len(refused)}")


def evaluate(toy: ToyModel, judge: Judge, count: int) -> None:
    """Print the judge's reading of renders and reconstructions, then of the model's pictures; write a sample grid."""
    scenes = prompt_scenes(count, PROMPT_SEED)
    renders = draw_all(scenes)[0]
    print(f"autoencoder: {psnr(toy.autoencoder, to_tensor(renders)):.2f} dB")
    report("judge on renders", readings(judge, scenes, renders))
    report("judge on reconstructions", readings(judge, scenes, reconstruct(toy.autoencoder, renders)))
    captions = [caption(scene) for scene in scenes]
    RUNS.mkdir(exist_ok=True)
    for name, eta in (("eta_1", ETA), ("deterministic", 0.0)):
        pictures = sample(toy, captions, seed=0, eta=eta)
        right = readings(judge, scenes, pictures)
        report(f"model, {STEPS} DDIM steps with eta {eta}, guidance {GUIDANCE}", right)
        by_action = {
            action: [value for value, scene in zip(right["action"], scenes) if scene.action == action]
            for action in ACTIONS
        }
        print("  by action:", ", ".join(f"{action} {sum(v)}/{len(v)}" for action, v in by_action.items()))
        picture_grid(list(pictures[:GRID_PICTURES]), 12).save(RUNS / f"evaluation_{name}.png")


def main() -> None:
    """Parse the command line and evaluate the bundled weights."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--choose-guidance", action="store_true", help="compare guidance strengths instead")
    parser.add_argument("--judge", action="store_true", help="measure the judge instead")
    arguments = parser.parse_args()
    toy, judge = load_toy(), load_judge()
    if arguments.choose_guidance:
        choose_guidance(toy, judge)
    elif arguments.judge:
        evaluate_judge(toy.autoencoder, judge, arguments.prompts)
    else:
        evaluate(toy, judge, arguments.prompts)


if __name__ == "__main__":
    main()
