"""The workflows of HiFi Tuner's learning: a word for one subject, on the toy model and on Stable Diffusion."""

from __future__ import annotations

from typing import NamedTuple

from comfy_server import SD_SUBJECT_PICTURES
from workflow_builder import LEARN, LOOK, PAINT, PICTURES, Link, Node, Workflow
from workflow_parts import (
    TOY_SAMPLING,
    Segmenters,
    concept_prompt,
    files_to_get,
    load_segmenters,
    mask_by_text,
    sd_checkpoint,
    sd_look,
    sd_painting,
    toy_prompt,
)


def subject_toy() -> Workflow:
    """A held-out subject of the toy world, learned with HiFi Tuner's tail rows and with plain Textual Inversion."""
    w = Workflow(
        thumbnail={
            "A subject it does not know": "Pictures of the subject",
            "its exact masks, in the place of SAM's": "Masks",
            "a <wizard> squats on grass: HiFi Tuner": "HiFi Tuner",
            "a <ti> squats on grass: Textual Inversion": "Textual Inversion",
        }
    )
    with w.group("1  Ten pictures of a subject the model does not know", PICTURES):
        w.note(
            "**Press Run.** Everything here is bundled. The toy model has never seen a wizard.\n\nThe **masks** say "
            "where he is, so that the word learns him and not the places. The toy world knows them exactly; on photos "
            "they come from *Detect by Text* and *SAM Mask*.\n\n- *subject*: another one (then change *init_word* "
            "too: `bear` for the pig).\n- *count*: fewer pictures.",
            290,
        )
        toy = w.node("AtelierToyCheckpoint")
        pictures = w.node("AtelierToyPictures", subject="wizard (held out)", count=10, other_actions=1)
        w.column()
        w.node("PreviewImage", "Pictures of the subject", node_size=(420, 320), images=pictures["images"])
        w.node("MaskPreview", "Masks", node_size=(420, 320), mask=pictures["masks"])
    with w.group("2  Learn a word for him, in two ways", LEARN):
        w.note(
            "**HiFi Tuner** (above) leaves the prompt's words alone and learns five rows behind them: from inside of "
            "the masks only, held near the empty prompt by the **prior**, first all stages of the painting as one, "
            "then each by itself.\n\n**Textual Inversion** (below) learns one word from everything it sees.\n\n- "
            "*weight* of the prior: keep *prior : denoising* on the node between 0.01 and 0.1.\n- *stages* 1 and "
            "*steps_each_stage* 0: without the last part.",
            310,
        )
        exemplars = w.node(
            "AtelierExemplars",
            node_size=(340, 260),
            images=pictures["images"],
            captions=pictures["captions"],
            masks=pictures["masks"],
        )
        w.column()
        rows = w.node("AtelierTokenLayout", "Token Layout (HiFi Tuner)", **tail_rows(stages=25))
        prior = w.node("AtelierNullTextPrior", weight=1e-4)
        hifi = toy_training(
            w,
            "Train with HiFi Tuner",
            toy,
            exemplars,
            rows,
            name="wizard",
            steps_each_stage=4,
            loss_terms__loss_term0=prior["loss_term"],
        )
        w.column()
        single = w.node("AtelierTokenLayout", "Token Layout (Textual Inversion)", granularity="one token")
        plain = toy_training(
            w,
            "Train with plain Textual Inversion",
            toy,
            exemplars,
            single,
            name="ti",
            use_masks=False,
        )
        w.node("AtelierSaveConcept", concept=hifi["concept"], file_name="toy/wizard", overwrite=True)
    with w.group("3  Paint him doing something else somewhere else", PAINT):
        w.note(
            "Write any prompt in the toy's words, with `<wizard>` or `<ti>` for the subject: *kicks*, *sits*, "
            "*salutes* ... *at night*, *in the snow*, *in a room*. Look for hat and beard, and whether action and "
            "place are those of the prompt.",
            170,
        )
        applied = w.node("AtelierApplyConcepts", model=toy["MODEL"])
        nothing = toy_prompt(w, toy, "Empty prompt", "")
        latent = w.node("EmptyLatentImage", width=64, height=64, batch_size=6)
        for name, title, trained in (("wizard", "HiFi Tuner", hifi), ("ti", "Textual Inversion", plain)):
            w.column()
            text = concept_prompt(w, toy, f"Prompt ({title})", f"a <{name}> squats on grass", trained)
            sampled = w.node(
                "KSampler",
                model=applied["MODEL"],
                positive=text["CONDITIONING"],
                negative=nothing["CONDITIONING"],
                latent_image=latent["LATENT"],
                seed=1,
                **TOY_SAMPLING,
            )
            decoded = w.node("VAEDecode", samples=sampled["LATENT"], vae=toy["VAE"])
            w.node(
                "SaveImage",
                title,
                node_size=(360, 300),
                images=decoded["IMAGE"],
                filename_prefix=f"concept_atelier/subject_{name}",
            )
    return w


def tail_rows(stages: int) -> dict[str, object]:
    """HiFi Tuner's layout, as settings of Token Layout."""
    return {"granularity": "one token", "tokens": 5, "stages": stages, "place": "tail rows, added"}


def toy_training(w: Workflow, title: str, toy: Node, exemplars: Node, layout: Node, **settings: object) -> Node:
    """Train Concept on the toy model: as in the subjects' table of benchmarks/methods, with three times the steps."""
    return w.node(
        "AtelierTrain",
        title,
        room=240,
        model=toy["MODEL"],
        clip=toy["CLIP"],
        vae=toy["VAE"],
        exemplars=exemplars["exemplars"],
        layout=layout["layout"],
        **{
            "init_word": "man",
            "steps": 600,
            "learning_rate": 2e-2,
            "batch_size": 1,
            "sample_prompts": "a {} squats on grass\na {} salutes at night",
            "sample_every": 100,
            "sample_steps": 15,
            "sample_cfg": 3.0,
            "sample_eta": 1.0,
            **settings,
        },
    )


def subject_sd() -> Workflow:
    """The artist's own subject on a Stable Diffusion checkpoint, with HiFi Tuner as in the paper."""
    w = Workflow()
    subject = learned_subject_sd(w, "*Load GroundingDINO* and *Load SAM*")
    loader, trained = subject.loader, subject.trained
    with w.group("3  Paint it elsewhere", PAINT):
        w.note("`<subject>` is the word you taught. Any sampler, LoRA or ControlNet works as always.", 110)
        applied = w.node("AtelierApplyConcepts", model=loader["MODEL"])
        positive = concept_prompt(w, loader, "Prompt", SD_PROMPT, trained)
        painting = sd_painting(w, loader, applied, positive, "blurry, deformed", "subject")
    with w.group("4  Where it looks", LOOK):
        w.note("*words*: `<subject>`, or any words of the prompt.", 110)
        sd_look(w, painting, "<subject>")
    return w


class LearnedSubject(NamedTuple):
    """What the first two groups of a workflow on the artist's own subject give to the others."""

    loader: Node
    segmenters: Segmenters
    pictures: Link
    masks: Link
    trained: Node


def learned_subject_sd(w: Workflow, loaders: str) -> LearnedSubject:
    """Two groups: pictures of a subject with their masks, and a word for it. loaders: as `files_to_get` takes them."""
    with w.group("1  Your pictures of one subject, and its masks", PICTURES):
        w.note(
            files_to_get(loaders)
            + f"2. Make the folder `input/{SD_SUBJECT_PICTURES}` in ComfyUI and put four to ten pictures of *one "
            "subject* into it, the subject near the middle.\n3. Say in *Detect by Text* what kind of thing it is: `a "
            "dog`. The surest box of each picture becomes its mask.\n4. Press R to refresh, choose checkpoint and "
            "folder, press Run.\n\nLook at the **masks** before you trust the training: where nothing was found, lower "
            "*threshold*; where one is wrong, leave that picture out.",
            430,
        )
        loader = sd_checkpoint(w)
        folder = w.node("LoadImageDataSetFromFolder", "Your pictures", folder=SD_SUBJECT_PICTURES)
        squares = w.node(
            "ImageScale", upscale_method="lanczos", width=512, height=512, crop="center", image=folder["images"]
        )
        pictures = w.node("RebatchImages", "All in one batch", images=squares["IMAGE"], batch_size=4096)["IMAGE"]
        w.column()
        segmenters = load_segmenters(w)
        _, masks = mask_by_text(w, segmenters, pictures, SD_KIND)
        w.column()
        w.node("PreviewImage", "Your pictures, cut", node_size=(340, 320), images=pictures)
        w.node("MaskPreview", "The masks", node_size=(340, 320), mask=masks["masks"])
    with w.group("2  Learn a word for it", LEARN):
        w.note(
            "HiFi Tuner: five rows behind the prompt's words, learned from inside of the masks only; 1000 steps as "
            "one, then 10 for each of 50 stages.\n\n- *init_word*: what the identifier reads as, the kind of thing "
            "your subject is.\n- *weight* of the prior: the paper does not give it; keep *prior : denoising* on the "
            "node between 0.01 and 0.1.\n- *stages* 1 and *steps_each_stage* 0: a third less time, a little less "
            "likeness.",
            290,
        )
        exemplars = w.node(
            "AtelierExemplars",
            node_size=(340, 200),
            images=pictures,
            captions="a photo of a {}",
            masks=masks["masks"],
        )
        layout = w.node("AtelierTokenLayout", **tail_rows(stages=50))
        prior = w.node("AtelierNullTextPrior")
        w.column()
        trained = w.node(
            "AtelierTrain",
            room=240,
            model=loader["MODEL"],
            clip=loader["CLIP"],
            vae=loader["VAE"],
            exemplars=exemplars["exemplars"],
            layout=layout["layout"],
            name="subject",
            init_word="dog",
            sample_prompts="a photo of a {} on a beach",
            loss_terms__loss_term0=prior["loss_term"],
            **SD_TRAINING,
        )
        w.node("AtelierSaveConcept", concept=trained["concept"])
    return LearnedSubject(loader, segmenters, pictures, masks["masks"], trained)


SD_KIND = "a dog"
SD_PROMPT = "a photo of a <subject> on a beach"
# HiFi Tuner section 3.2 and Algorithm 1; its guidance is not in the paper.
SD_TRAINING = {"steps": 1000, "learning_rate": 5e-3, "weight_decay": 0.0, "steps_each_stage": 10}
