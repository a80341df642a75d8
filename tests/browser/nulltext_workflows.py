"""The null-text concept model by itself, on the toy model: a subject learned from pictures without a word."""

from __future__ import annotations

from workflow_builder import LEARN, LOOK, PAINT, PICTURES, Workflow
from workflow_parts import guided_picture, plain_picture, toy_prompt

CONTROL = "squats on grass"  # which none of the pictures shows


def nulltext_toy() -> Workflow:
    """A concept model of one held-out subject, told by the base model what to do."""
    w = Workflow(
        thumbnail={
            "What it learns from: a wizard, no captions": "The pictures",
            f"the base model, told '{CONTROL}'": "Base model",
            "surgery only, no prompt: anybody": "Without text",
            "the trained concept model, no prompt": "Concept model alone",
            f"concept + '{CONTROL}'": "Concept and prompt",
        }
    )
    with w.group("1  Pictures of one subject, without captions", PICTURES):
        w.note(
            "**Press Run** (it trains for a minute or two). The toy model has never seen a wizard and no word here "
            "says *wizard*: the **concept model** learns from pictures alone, and the base model's prompt says what to "
            "do.\n\n- *subject*: another one.\n- *count*: more pictures, more variety.",
            230,
        )
        toy = w.node("AtelierToyCheckpoint")
        pictures = w.node("AtelierToyPictures", subject="wizard (held out)", count=64, other_actions=1)
        w.node("PreviewImage", "The pictures", node_size=(420, 320), images=pictures["images"])
    with w.group("2  The base model, and what is left of it without text", LOOK):
        w.note(
            "Each cross-attention becomes a constant: what it adds for an empty prompt. The node tells how far that "
            "moves the model. Untrained, it paints anybody doing anything.\n\n- *form*: uniform is the paper's Eq. 5 "
            "to the letter.",
            190,
        )
        control = toy_prompt(w, toy, "Prompt: names nobody", CONTROL)
        nothing = toy_prompt(w, toy, "Empty prompt", "")
        latent = w.node("EmptyLatentImage", width=64, height=64, batch_size=6)
        null = w.node(
            "AtelierNullTextSurgery",
            room=200,
            model=toy["MODEL"],
            clip=toy["CLIP"],
            vae=toy["VAE"],
            images=pictures["images"],
            size=64,
        )
        w.column()
        plain_picture(w, "Base model", toy, control, nothing, latent)
        plain_picture(w, "Without text", toy, nothing, nothing, latent, model=null["MODEL"])
    with w.group("3  Train it on the pictures", LEARN):
        w.note(
            "All weights of a copy learn; the checkpoint stays as it is. *Stop and keep* and *Cancel* lose nothing.\n\n"
            "- *steps*: raise it and press Run again to go on.\n- Instead of training: *Load Concept Model*.",
            170,
        )
        trained = w.node(
            "AtelierTrainNullText",
            room=240,
            model=null["MODEL"],
            clip=toy["CLIP"],
            vae=toy["VAE"],
            images=pictures["images"],
            name="toy_wizard",
            **TOY_TRAINING,
        )
        w.column()
        plain_picture(w, "Concept model alone", toy, nothing, nothing, latent, model=trained["MODEL"])
    with w.group("4  Both: the concept says who, the prompt says what", PAINT):
        w.note(
            "No picture shows a wizard squatting on grass.\n\n- *weight* of the concept: more of the wizard, less of "
            "the prompt.\n- *weight* of the prompt: more of what it says; far up, the base model's own people come "
            "through.\n- Other prompts: *stands at night*, *salutes on pink*. *does a handstand at night* often fails.",
            230,
        )
        concept = w.node(
            "AtelierGuidanceBranch",
            "The concept, without words",
            model=trained["MODEL"],
            conditioning=nothing["CONDITIONING"],
            weight=1.5,
        )
        told = w.node(
            "AtelierGuidanceBranch",
            "The prompt, base model",
            model=toy["MODEL"],
            conditioning=control["CONDITIONING"],
            weight=2.0,
        )
        guided_picture(w, "Concept and prompt", toy, toy["MODEL"], nothing, [concept, told], latent)
    return w


# Found by a few tries (judged pictures of seven prompts); the paper's 1e-5 is for a large model and days.
TOY_TRAINING = {
    "steps": 400,
    "learning_rate": 1e-3,
    "batch_size": 8,
    "size": 64,
    "sample_count": 4,
    "sample_every": 100,
    "sample_steps": 15,
    "sample_eta": 1.0,
    "ema_decay": 0.99,
}
