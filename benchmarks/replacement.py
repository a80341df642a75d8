"""Another subject in the picture, everything else in its place: HiFi Tuner's Algorithm 3 in the toy world.

`python -m concept_atelier.benchmarks.replacement` inverts rendered pictures, optimises their null text, and paints each
again with the name of another subject: with all other words' attention fixed to the source prompt's, and with the
prompt changed alone, from the same noise with the same null text. `--learn pig` learns a subject first that the model
has never seen. The judge reads the pictures; PSNR is measured where neither figure is. Through ComfyUI and the pack's
own nodes.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..kernels.concept import Concept
from ..kernels.concept_run import ConceptRun
from ..kernels.gradient_rules import PlainGradient
from ..kernels.inversion import PivotalSettings
from ..kernels.layouts import Layout
from ..kernels.training import TrainingSettings
from ..toyworld.backdrop import SIZE
from ..toyworld.intervals import wilson
from ..toyworld.judge import load_judge, truth
from ..toyworld.render import figure_mask, render
from ..toyworld.vocabulary import ACTIONS, HELD_OUT_PAIRS, HELD_OUT_SUBJECTS, NONE, SUBJECTS, Scene, caption, draw_scene
from .comfyui import PACK, find_comfyui, start_comfyui
from .demo import Console
from .methods.pictures import contact_sheet, to_image
from .methods.subjects import INIT_WORDS, Subjects
from .methods.table import NAME, Row

STEPS, CFG = 50, 3.0  # of the paper's grid; the guidance at which the toy model paints
LEARNING = TrainingSettings(steps=200, learning_rate=0.04, use_masks=True)  # best in the subjects' table
MARGIN = 3  # pixels around the figures that count as theirs: latents are patches of 4 x 4
SHOWN = 8
KEPT = ("action", "background", "object")


def swaps(count: int, subject: str | None = None) -> list[tuple[Scene, Scene]]:
    """Scenes with an object, and the same with another subject, `subject` if given.

    Who does what in them, the model was trained on, except what a held-out `subject` does.
    """
    rng, pairs = random.Random(0), []
    plain = [subject for subject in SUBJECTS if subject not in ("man", "woman", "robot")]  # that have no colour word
    while len(pairs) < count:
        old, other = rng.sample(plain, 2)
        new = subject or other
        action = rng.choice(list(ACTIONS))
        scene = draw_scene(rng, old, action, accessory=NONE)
        if scene.object == NONE or {(old, action), (new, action)} & HELD_OUT_PAIRS:
            continue
        character = replace(scene.characters[0], subject=new)
        pairs.append((scene, replace(scene, characters=(character,))))
    return pairs


def outside(old: Scene, new: Scene) -> Tensor:
    """(H, W) bool: the pixels that belong to neither figure."""
    covered = torch.maximum(to_image(figure_mask(old)), to_image(figure_mask(new)))[None]
    return torch.nn.functional.max_pool2d(covered, 2 * MARGIN + 1, stride=1, padding=MARGIN)[0] == 0


class Studio:
    """The pack's nodes and core's sampler on the toy model."""

    def __init__(self, comfyui: Path) -> None:
        start_comfyui(comfyui)
        from ..nodes.toy import AtelierToyCheckpoint

        self.model, self.clip, self.vae = AtelierToyCheckpoint.execute().args
        self.concepts: dict[str, Concept] = {}

    def learn(self, subject: str) -> None:
        """Textual Inversion with masks on ten pictures, as the benchmark of methods has it; prompts then know <it>."""
        from ..nodes.native.backbone import native_session

        exemplars = Subjects().exemplars(Row(subject), subject, seed=0)
        run = ConceptRun(NAME, INIT_WORDS[subject], exemplars, Layout("prompt"), PlainGradient(), LEARNING)
        with tempfile.TemporaryDirectory() as folder, native_session(self.model, self.clip, self.vae) as backbone:
            self.concepts[NAME] = run.learn(backbone, Path(folder), Console())[0]

    def encode(self, prompt: str) -> list:
        """CONDITIONING of a prompt."""
        from ..nodes.apply import AtelierTextEncode

        return AtelierTextEncode.execute(self.clip, prompt, self.concepts).args[0]

    @torch.inference_mode()
    def replaced(self, picture: Tensor, source: str, target: str, cfg: float) -> dict[str, Tensor]:
        """Pictures (H, W, 3) by the name of their row, all from the noise of `picture` with its null text."""
        import comfy.sample

        from ..nodes.apply import AtelierApplyConcepts
        from ..nodes.inversion import AtelierDDIMInversion, AtelierNullTextOptimize
        from ..nodes.replacement import RECOMPUTE, AtelierReplaceSubject

        old, new, empty = self.encode(source), self.encode(target), self.encode("")
        latent = {"samples": self.vae.encode(picture[None])}
        noise, path, sigmas, _ = AtelierDDIMInversion.execute(self.model, old, latent, STEPS, "ddim_uniform", 5).args
        settings = PivotalSettings(cfg)
        negative = AtelierNullTextOptimize.execute(
            self.model, path, old, empty, cfg, settings.inner_steps, settings.learning_rate, settings.early_stop
        ).args[0]
        routed = AtelierApplyConcepts.execute(self.model).args[0]

        def sampled(prompt: list) -> Tensor:
            x = noise["samples"]
            return comfy.sample.sample(
                routed, torch.zeros_like(x), STEPS, cfg, "euler", "ddim_uniform", prompt, negative, x, sigmas=sigmas,
                disable_noise=True, disable_pbar=True,
            )  # fmt: skip

        def fixed(renormalise: bool) -> Tensor:
            return AtelierReplaceSubject.execute(
                self.model, path, old, new, negative, cfg, "", RECOMPUTE, renormalise
            ).args[0]["samples"]

        latents = {
            "source prompt": sampled(old),
            "target prompt alone": sampled(new),
            "attention fixed": fixed(False),
            "attention fixed, renormalised": fixed(True),
        }
        return {"the picture": picture} | {row: self.vae.decode(x)[0].clone() for row, x in latents.items()}


def report(title: str, pictures: Tensor, pairs: Sequence[tuple[Scene, Scene]], originals: Tensor) -> None:
    """One line of the table."""
    read = load_judge().read(pictures.movedim(-1, 1))
    expected = [truth(new) for _, new in pairs]
    subject = [name == scene["subject"] for name, scene in zip(read["subject"], expected)]
    kept = [all(read[head][i] == scene[head] for head in KEPT) for i, scene in enumerate(expected)]
    masks = torch.stack([outside(*pair) for pair in pairs])
    error = torch.stack([(p - o)[m].square().mean() for p, o, m in zip(pictures, originals, masks)])
    decibel = (-10 * error.log10()).mean().item()
    both = [s and k for s, k in zip(subject, kept)]
    print(f"| {title} | {wilson(subject)} | {wilson(kept)} | {wilson(both)} | {decibel:.1f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=32, help="pictures")
    parser.add_argument("--cfg", type=float, default=CFG)
    parser.add_argument("--learn", choices=HELD_OUT_SUBJECTS, help="the new subject, learned first; else known ones")
    parser.add_argument("--output", type=Path, default=PACK / "benchmarks" / "runs" / "replacement.png")
    arguments = parser.parse_args()
    comfyui = find_comfyui()
    if comfyui is None:
        parser.exit(1, "ComfyUI was not found: set COMFYUI_PATH to its folder.\n")
    torch.set_num_threads(1)
    studio, pairs, rows = Studio(comfyui), swaps(arguments.count, arguments.learn), {}
    if arguments.learn:
        studio.learn(arguments.learn)
    for old, new in pairs:
        target = caption(new).replace(new.subject, f"<{NAME}>") if arguments.learn else caption(new)
        painted = studio.replaced(to_image(render(old)), caption(old), target, arguments.cfg)
        for row, picture in painted.items():
            rows.setdefault(row, []).append(picture)
    rows = {row: torch.stack(pictures) for row, pictures in rows.items()}
    print(f"{len(pairs)} pictures of {SIZE} x {SIZE}, {STEPS} steps, cfg {arguments.cfg:g}\n")
    print(f"| from the same noise | new subject | {', '.join(KEPT)} | all | PSNR outside, dB |\n|---|---|---|---|---|")
    for row, pictures in rows.items():
        report(row, pictures, pairs, rows["the picture"])
    strips = [
        (row, (pictures[:SHOWN].clamp(0, 1) * 255).round().to(torch.uint8).numpy()) for row, pictures in rows.items()
    ]
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(strips).save(arguments.output)
    print(f"\nWrote {arguments.output}")


if __name__ == "__main__":
    main()
