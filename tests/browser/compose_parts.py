"""The workflow of two learned subjects in one picture: the same prompt and seeds, painted by each method."""

from __future__ import annotations

from typing import Any, NamedTuple

from workflow_builder import LEARN, LOOK, PAINT, Link, Node, Workflow
from workflow_parts import Sampling, concept_prompt, guided_picture, guided_sampling

PLAIN, ANCHORS, LAYOUT, SEFI, GCFG = "Textual Inversion", "+ Anchor Loss", "+ Layout Guidance", "SeFi-IDE", "GCFG"
WEIGHTS = "GCFG, trained weights"
METHODS = (PLAIN, ANCHORS, LAYOUT, SEFI, GCFG, WEIGHTS)


class Subject(NamedTuple):
    """One of the two. name: its placeholder. init_word: the known word it starts from. alone: a prompt of it alone."""

    name: str
    init_word: str
    alone: str
    exemplars: Node


class Studio(NamedTuple):
    """What the workflow on the toy model and the one on Stable Diffusion have, each with values of its own.

    subjects: that of the left half first. prompt: of both; known: with the init words in their places. anchors,
    attention, training, weights, guidance, sampling: settings of the nodes. predicted: whether Layout Predictor says
    where. known_share: of the steps of GCFG, in which two known things take their places. batch: seeds.
    """

    loader: Node
    subjects: tuple[Subject, Subject]
    prompt: str
    known: str
    anchors: dict[str, Any]
    attention: dict[str, Any]
    training: dict[str, Any]
    weights: dict[str, Any]
    guidance: dict[str, Any]
    predicted: bool
    known_share: float
    sampling: dict[str, Any]
    size: int
    batch: int


class Halves(NamedTuple):
    """What GCFG starts from: the branch of two known things, the masks of left and right half, noise and sampler."""

    known: Node
    masks: tuple[Node, Node]
    sampling: Sampling


class Canvas(NamedTuple):
    """What all pictures have in common. prompt: the text."""

    model: Link
    prompt: Link
    nothing: Node
    latent: Node


def compose(w: Workflow, studio: Studio, notes: dict[str, str]) -> None:
    """The groups after the pictures: learn, paint six ways, compare, look. notes: for the canvas, one a group."""
    with w.group("2  Learn a word for each, in four ways", LEARN):
        w.note(notes["learn"], 430)
        trained = learn(w, studio)
    with w.group("3  One prompt of both, the same seeds", PAINT):
        w.note(notes["paint"], 210)
        applied = w.node("AtelierApplyConcepts", model=studio.loader["MODEL"])
        text = w.node("PrimitiveStringMultiline", "The prompt", node_size=(340, 120), value=studio.prompt)
        nothing = concept_prompt(w, studio.loader, "Empty prompt", "")
        latent = w.node("EmptyLatentImage", width=studio.size, height=studio.size, batch_size=studio.batch)
        canvas = Canvas(applied["MODEL"], text["STRING"], nothing, latent)
        prompts, painted = {}, {}
        for method in (PLAIN, ANCHORS, SEFI):
            w.column()
            prompts[method] = concept_prompt(w, studio.loader, f"Prompt ({method})", canvas.prompt, *trained[method])
            painted[method] = paint(w, studio, canvas, method, prompts[method], canvas.model)
    with w.group("4  The words of Textual Inversion, kept to their places", PAINT):
        w.note(notes["layout"], 250)
        guided = lay_out(w, studio, canvas, prompts[PLAIN], trained[PLAIN])
        painted[LAYOUT] = paint(w, studio, canvas, LAYOUT, prompts[PLAIN], guided)
    with w.group("5  Each word in its half: branches of GCFG", PAINT):
        w.note(notes["branches"], 250)
        halves = halve(w, studio, canvas)
        painted[GCFG] = guide_halves(w, studio, canvas, halves, GCFG, trained[PLAIN])
        painted[WEIGHTS] = guide_halves(w, studio, canvas, halves, WEIGHTS, trained[WEIGHTS])
    with w.group("6  Side by side", LOOK):
        w.note(notes["compare"], 290)
        compare(w, "Six ways", {method: painted[method] for method in METHODS}, caption=canvas.prompt)
    with w.group("7  Where each word looks", LOOK):
        w.note(notes["look"], 190)
        look(w, studio, canvas, {method: prompts[method] for method in (PLAIN, SEFI)})


def learn(w: Workflow, studio: Studio) -> dict[str, list[Node]]:
    """Train Concept for both subjects by each method that learns: {method: the two nodes}."""
    single = w.node("AtelierTokenLayout", "Token Layout (one word)", granularity="one token")
    anchor = w.node("AtelierAnchorLoss", node_size=(340, 320), **studio.anchors)
    stages = w.node("AtelierTokenLayout", "Token Layout (SeFi-IDE)", granularity="one token", stages=5, split_kv=True)
    attention = w.node("AtelierSubjectAttentionLoss", **studio.attention)
    weights = w.node("AtelierTrainWeights", **studio.weights)
    trained = {}
    for method, layout, beside in (
        (PLAIN, single, {}),
        (ANCHORS, single, {"loss_terms__loss_term0": anchor["loss_term"]}),
        (SEFI, stages, {"loss_terms__loss_term0": attention["loss_term"]}),
        (WEIGHTS, single, {"weights": weights["weights"]}),
    ):
        w.column()
        trained[method] = [
            w.node(
                "AtelierTrain",
                f"<{subject.name}>: {method}",
                room=240,
                model=studio.loader["MODEL"],
                clip=studio.loader["CLIP"],
                vae=studio.loader["VAE"],
                exemplars=subject.exemplars["exemplars"],
                layout=layout["layout"],
                name=subject.name,
                init_word=subject.init_word,
                sample_prompts=subject.alone.replace(f"<{subject.name}>", "{}"),
                **beside,
                **studio.training,
            )
            for subject in studio.subjects
        ]
    return trained


def paint(w: Workflow, studio: Studio, canvas: Canvas, method: str, prompt: Node, model: Link) -> Link:
    """KSampler and its pictures."""
    sampled = w.node(
        "KSampler",
        model=model,
        positive=prompt["CONDITIONING"],
        negative=canvas.nothing["CONDITIONING"],
        latent_image=canvas.latent["LATENT"],
        seed=1,
        **studio.sampling,
    )
    decoded = w.node("VAEDecode", samples=sampled["LATENT"], vae=studio.loader["VAE"])
    w.node("PreviewImage", method, node_size=(360, 300), images=decoded["IMAGE"])
    return decoded["IMAGE"]


def lay_out(w: Workflow, studio: Studio, canvas: Canvas, prompt: Node, trained: list[Node]) -> Link:
    """Layout Guidance, with Layout Predictor where there is one. Returns the MODEL."""
    boxes = {}
    if studio.predicted:
        predictor = w.node(
            "AtelierLayoutPredictor",
            room=80,
            clip=studio.loader["CLIP"],
            words=", ".join(f"<{subject.name}>" for subject in studio.subjects),
            width=studio.size,
            height=studio.size,
            **{f"concepts__concept{number}": node["concept"] for number, node in enumerate(trained)},
        )
        boxes = {"bboxes": predictor["bboxes"]}
    w.column()
    guided = w.node(
        "AtelierLayoutGuidance",
        room=60,
        model=canvas.model,
        positive=prompt["CONDITIONING"],
        width=studio.size,
        height=studio.size,
        **studio.guidance,
        **boxes,
    )
    return guided["MODEL"]


def halve(w: Workflow, studio: Studio, canvas: Canvas) -> Halves:
    """The first steps of GCFG, in which two known things take their places, and the halves for those after."""
    half = studio.size // 2
    empty = w.node("SolidMask", "Nothing", value=0.0, width=studio.size, height=studio.size)
    solid = w.node("SolidMask", "Half", value=1.0, width=half, height=studio.size)
    right = w.node(
        "MaskComposite", "Right half", destination=empty["MASK"], source=solid["MASK"], x=half, operation="add"
    )
    left = w.node("InvertMask", "Left half", mask=right["MASK"])
    w.column()
    both = concept_prompt(w, studio.loader, "Two known things", studio.known)
    known = w.node(
        "AtelierGuidanceBranch",
        "First the known ones",
        model=canvas.model,
        conditioning=both["CONDITIONING"],
        weight=studio.sampling["cfg"],
        end_percent=studio.known_share,
    )
    return Halves(known, (left, right), guided_sampling(w, canvas.model, studio.sampling["sampler_name"]))


def guide_halves(w: Workflow, studio: Studio, canvas: Canvas, halves: Halves, method: str, trained: list[Node]) -> Link:
    """GCFG: first two known things, then each subject in its half, with the weights that it brings along.

    Returns the pictures.
    """
    branches = [halves.known]
    for subject, concept, mask in zip(studio.subjects, trained, halves.masks):
        w.column()
        applied = w.node("AtelierApplyConcepts", model=studio.loader["MODEL"], concepts__concept0=concept["concept"])
        alone = concept_prompt(w, studio.loader, f"<{subject.name}> alone", subject.alone, concept)
        there = w.node("ConditioningSetMask", conditioning=alone["CONDITIONING"], mask=mask["MASK"])
        branches.append(
            w.node(
                "AtelierGuidanceBranch",
                f"Then <{subject.name}>, in its half",
                model=applied["MODEL"],
                conditioning=there["CONDITIONING"],
                weight=studio.sampling["cfg"],
                start_percent=studio.known_share,
            )
        )
    w.column()
    return guided_picture(
        w,
        method,
        studio.loader,
        canvas.model,
        canvas.nothing,
        branches,
        canvas.latent,
        halves.sampling,
    )


def look(w: Workflow, studio: Studio, canvas: Canvas, prompts: dict[str, Node]) -> None:
    """Attention Maps of both words by each method of `prompts`, in one grid."""
    seen = {}
    for method, prompt in prompts.items():
        for subject in studio.subjects:
            title = f"<{subject.name}>, {method}"
            maps = w.node(
                "AtelierAttentionMaps",
                title,
                room=320,
                model=canvas.model,
                positive=prompt["CONDITIONING"],
                negative=canvas.nothing["CONDITIONING"],
                latent_image=canvas.latent["LATENT"],
                vae=studio.loader["VAE"],
                words=f"<{subject.name}>",
                seed=1,
                **studio.sampling,
            )
            seen[title] = maps["overlay"]
        w.column()
    compare(w, "Where the words look", seen)


def compare(w: Workflow, title: str, rows: dict[str, Link], **settings: Link) -> None:
    """Compare Grid with a row for each."""
    w.node(
        "AtelierCompareGrid",
        title,
        node_size=(900, 900),
        **{f"pictures__picture{number}": pictures for number, pictures in enumerate(rows.values())},
        row_titles="\n".join(rows),
        picture_size=192,
        **settings,
    )
