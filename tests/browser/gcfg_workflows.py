"""The ready forms of GCFG on the toy model: what it is good for, each on a graph small enough to read."""

from __future__ import annotations

from workflow_builder import LEARN, LOOK, PAINT, PICTURES, Workflow
from workflow_parts import COST_ROOM, guided_picture, plain_picture, toy_prompt


def gcfg_negative_toy() -> Workflow:
    """A negative prompt weaker than the one of plain CFG."""
    w = Workflow(
        thumbnail={
            "a cat sits": "No negative",
            "its negative 'at night' in KSampler: all places go": "KSampler's negative",
            "the same at weight -0.5: the night goes, others stay": "Negative at -0.5",
        }
    )
    with w.group("1  A prompt, and what it should not show", PICTURES):
        w.note(
            "**Press Run.** KSampler's own negative prompt is always as strong as *cfg - 1*: at cfg 3 it drives the "
            "picture so far from *at night* that all ends on white. As a branch of **GCFG** it is as strong as you "
            "say.\n\n- *weight* of the branch: -0.25, -1, -2.\n- The negative prompt: *on white*, *in a room*.\n- "
            "Add branches: each negative prompt has a weight of its own.",
            270,
        )
        toy = w.node("AtelierToyCheckpoint")
        prompt = toy_prompt(w, toy, "Prompt", "a cat sits")
        nothing = toy_prompt(w, toy, "Empty prompt", "")
        night = toy_prompt(w, toy, "Negative prompt", "at night")
        latent = w.node("EmptyLatentImage", width=64, height=64, batch_size=8)
    with w.group("2  Without it, and as KSampler does it", LOOK):
        plain_picture(w, "No negative", toy, prompt, nothing, latent)
        plain_picture(w, "KSampler's negative", toy, prompt, night, latent)
    with w.group("3  With a strength of your own", PAINT):
        branch = w.node("AtelierGuidanceBranch", model=toy["MODEL"], conditioning=night["CONDITIONING"], weight=-0.5)
        gcfg = w.node("AtelierGCFG", model=toy["MODEL"], branches__branch0=branch["branch"])
        w.node("PreviewAny", "Cost", room=COST_ROOM, source=gcfg["cost"])
        w.column()
        plain_picture(w, "Negative at -0.5", toy, prompt, nothing, latent, model=gcfg["MODEL"])
    return w


def gcfg_two_prompts_toy() -> Workflow:
    """Two prompts for one picture, each with its own weight, instead of one prompt of both."""
    w = Workflow(
        thumbnail={
            "one prompt: a cat and a panda": "One prompt",
            "two prompts: a cat, a panda": "Two prompts",
        }
    )
    with w.group("1  One prompt, or two", PICTURES):
        w.note(
            "**Press Run.** In one prompt, *a cat and a panda* are two animals. As two prompts of one picture, each "
            "with its own weight, they are one animal that is both.\n\n- The *weights* of the branches: 2 and 1 is "
            "more of a cat.\n- *end_percent* 0.4 of one: it counts at first only, and the other has the last word.\n- "
            "Other things to keep apart: *a panda* with weight 3 and *on pink* with weight 1.",
            270,
        )
        toy = w.node("AtelierToyCheckpoint")
        both = toy_prompt(w, toy, "Both in one prompt", "a cat and a panda sits on grass")
        first = toy_prompt(w, toy, "First prompt", "a cat sits on grass")
        second = toy_prompt(w, toy, "Second prompt", "a panda sits on grass")
        nothing = toy_prompt(w, toy, "Empty prompt", "")
        latent = w.node("EmptyLatentImage", width=64, height=64, batch_size=6)
    with w.group("2  One prompt, plain CFG", LOOK):
        plain_picture(w, "One prompt", toy, both, nothing, latent)
    with w.group("3  Two prompts, GCFG", PAINT):
        branches = [
            w.node("AtelierGuidanceBranch", title, model=toy["MODEL"], conditioning=text["CONDITIONING"], weight=1.5)
            for title, text in (("First branch", first), ("Second branch", second))
        ]
        guided_picture(w, "Two prompts", toy, toy["MODEL"], nothing, branches, latent)
    return w


def gcfg_rectified_toy() -> Workflow:
    """A fine-tune guided by the model it was made from."""
    w = Workflow(
        thumbnail={
            "a panda poses: the base model": "Base model",
            "fine-tuned on the splits, guided by itself": "Fine-tune, plain CFG",
            "fine-tuned on the splits, guided by its base": "Fine-tune, guided by its base",
        }
    )
    with w.group("1  A fine-tune: a LoRA of ten pictures", LEARN):
        w.note(
            "**Press Run** (the LoRA trains for a minute or two). *poses* shall mean a split.\n\nPlain CFG compares "
            "the fine-tune with *itself* without a prompt, which has learned the splits as well: what they have in "
            "common cancels. Compared with its **base** it shows all it has learned.\n\n- *weight* of the branch.\n- "
            "Any LoRA or fine-tuned checkpoint: load it here, its base beside it.",
            310,
        )
        toy = w.node("AtelierToyCheckpoint")
        pictures = w.node("AtelierToyPictures", action="splits (held out)", count=10)
        latents = w.node("VAEEncode", pixels=pictures["images"], vae=toy["VAE"])
        poses = toy_prompt(w, toy, "What the pictures show", "poses")
        w.column()
        lora = w.node(
            "TrainLoraNode",
            model=toy["MODEL"],
            latents=latents["LATENT"],
            positive=poses["CONDITIONING"],
            **TOY_LORA,
        )
        tuned = w.node("LoraModelLoader", "The fine-tune", model=toy["MODEL"], lora=lora["lora"])
    with w.group("2  Base and fine-tune, plain CFG", LOOK):
        prompt = toy_prompt(w, toy, "Prompt", "a panda poses on the beach")
        nothing = toy_prompt(w, toy, "Empty prompt", "")
        latent = w.node("EmptyLatentImage", width=64, height=64, batch_size=6)
        w.column()
        plain_picture(w, "Base model", toy, prompt, nothing, latent)
        plain_picture(w, "Fine-tune, plain CFG", toy, prompt, nothing, latent, model=tuned["model"])
    with w.group("3  The fine-tune, guided by its base", PAINT):
        branch = w.node("AtelierGuidanceBranch", model=tuned["model"], conditioning=prompt["CONDITIONING"], weight=3.0)
        guided_picture(w, "Fine-tune, guided by its base", toy, toy["MODEL"], nothing, [branch], latent)
    return w


def gcfg_subjects_toy() -> Workflow:
    """Two subjects in one picture, each with a learned concept of its own."""
    w = Workflow(
        thumbnail={
            "one prompt: a cat <first> and a panda <second>": "One prompt",
            "a branch each: arms out on the left, hands on hips on the right": "One branch each",
        }
    )
    with w.group("1  Two actions the model does not know", PICTURES):
        w.note(
            "**Press Run** (it learns two words, about a minute in all). One subject shall hold its arms out, the "
            "other its hands on the hips: in one prompt the words get into each other's way.\n\nEach **branch** holds "
            "both subjects and *one* of the words, and its mask lets it speak in one half only.\n\n- *action* of the "
            "pictures.\n- The two subjects and the place: the same in both prompts.\n- To keep a word for other "
            "workflows: connect *Save Concept*.\n- Instead of training: *Load Concept*, with what was saved before.",
            370,
        )
        toy = w.node("AtelierToyCheckpoint")
    trained, branches = [], []
    with w.group("2  Learn a word for each", LEARN):
        layout = w.node("AtelierTokenLayout", granularity="one token")
        for name, action in SUBJECT_ACTIONS.items():
            w.column()
            pictures = w.node("AtelierToyPictures", action=action, count=10, other_actions=1)
            exemplars = w.node("AtelierExemplars", images=pictures["images"], captions=pictures["captions"])
            trained.append(
                w.node(
                    "AtelierTrain",
                    f"Train <{name}>",
                    room=240,
                    model=toy["MODEL"],
                    clip=toy["CLIP"],
                    vae=toy["VAE"],
                    exemplars=exemplars["exemplars"],
                    layout=layout["layout"],
                    name=name,
                    **TOY_TRAINING,
                )
            )
    with w.group("3  Both words in one prompt", LOOK):
        applied = w.node("AtelierApplyConcepts", model=toy["MODEL"])
        one_prompt = w.node(
            "AtelierTextEncode",
            "Both words in one prompt",
            node_size=(360, 170),
            clip=toy["CLIP"],
            text="a cat <first> and a panda <second> on grass",
            concepts__concept0=trained[0]["concept"],
            concepts__concept1=trained[1]["concept"],
        )
        nothing = toy_prompt(w, toy, "Empty prompt", "")
        latent = w.node("EmptyLatentImage", width=64, height=64, batch_size=6)
        w.column()
        plain_picture(w, "One prompt", toy, one_prompt, nothing, latent, model=applied["MODEL"])
    with w.group("4  A branch for each, in its half of the picture", PAINT):
        empty = w.node("SolidMask", "Nothing", value=0.0, width=64, height=64)
        half = w.node("SolidMask", "Half", value=1.0, width=32, height=64)
        right = w.node(
            "MaskComposite", "Right half", destination=empty["MASK"], source=half["MASK"], x=32, operation="add"
        )
        left = w.node("InvertMask", "Left half", mask=right["MASK"])
        for name, concept, mask in zip(SUBJECT_ACTIONS, trained, (left, right)):
            w.column()
            text = w.node(
                "AtelierTextEncode",
                f"Prompt with <{name}>",
                node_size=(360, 150),
                clip=toy["CLIP"],
                text=f"a cat and a panda <{name}> on grass",
                concepts__concept0=concept["concept"],
            )
            there = w.node("ConditioningSetMask", conditioning=text["CONDITIONING"], mask=mask["MASK"])
            branches.append(
                w.node(
                    "AtelierGuidanceBranch",
                    f"Branch of <{name}>",
                    model=applied["MODEL"],
                    conditioning=there["CONDITIONING"],
                    weight=3.0,
                )
            )
        w.column()
        guided_picture(w, "One branch each", toy, applied["MODEL"], nothing, branches, latent)
    return w


SUBJECT_ACTIONS = {"first": "tpose (held out)", "second": "akimbo (held out)"}
TOY_TRAINING = {
    "init_word": "poses",
    "steps": 400,
    "learning_rate": 2e-2,
    "batch_size": 1,
    "sample_prompts": "a cat and a panda {} on grass",
    "sample_every": 100,
    "sample_steps": 15,
    "sample_cfg": 3.0,
    "sample_eta": 1.0,
}
TOY_LORA = {
    "batch_size": 4,
    "steps": 150,
    "learning_rate": 1e-3,
    "training_dtype": "fp32",
    "lora_dtype": "fp32",
    "gradient_checkpointing": False,
}
