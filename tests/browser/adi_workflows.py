"""The workflows of ADI: a word for an action, on the bundled toy model and on Stable Diffusion."""

from __future__ import annotations

from comfy_server import SD_ACTION_PICTURES, SD_CHECKPOINT
from workflow_builder import LEARN, LOOK, PAINT, PICTURES, Workflow
from workflow_parts import SD_CHECKPOINT_SOURCE, TOY_SAMPLING, sd_look, sd_painting

SD_OTHER_ACTIONS = "stands\nsits\nwalks\nlies down\njumps\nwaves"
SD_NEGATIVE = "blurry, deformed, extra limbs"


def adi_toy() -> Workflow:
    """A held-out action of the toy world, learned with ADI and with plain Textual Inversion."""
    w = Workflow(
        thumbnail={
            "An action it does not know": "Pictures of the action",
            "a panda <adi>: learned with ADI": "ADI",
            "a panda <ti>: plain Textual Inversion": "Textual Inversion",
        }
    )
    with w.group("1  Ten pictures of an action the model does not know", PICTURES):
        w.note(
            "**Press Run** (it trains twice: a minute or two on a CPU). Everything here is bundled: a toy model that "
            "paints little figures, and pictures of an action it has never seen.\n\n- *action*: another held-out "
            "action.\n- *count*: fewer pictures.\n\nThe blank `{}` in each caption is where the learned word goes.",
            250,
        )
        toy = w.node("AtelierToyCheckpoint")
        pictures = w.node("AtelierToyPictures", count=10, other_actions=4)
        w.node("PreviewImage", "Pictures of the action", node_size=(420, 320), images=pictures["images"])
        w.column()
        exemplars = w.node(
            "AtelierExemplars",
            node_size=(340, 260),
            images=pictures["images"],
            captions=pictures["captions"],
        )
        triples = w.node(
            "AtelierTriples",
            room=320,
            exemplars=exemplars["exemplars"],
            other_action_pictures=pictures["other_action_images"],
        )
    with w.group("2  Learn one word for the action, in two ways", LEARN):
        w.note(
            "**ADI** (above) learns a word for each part of the network, and lets only those channels learn that "
            "speak of the action.\n\n**Textual Inversion** (below) learns a single word from everything it sees.\n\n- "
            "*steps*: raise it and press Run again; training goes on where it stopped.\n- *beta*: how much is masked.",
            250,
        )
        fine = w.node("AtelierTokenLayout", "Token Layout (ADI)", granularity="per block")
        mask = w.node("AtelierGradientMask")
        adi = w.node(
            "AtelierTrain",
            "Train with ADI",
            room=240,
            model=toy["MODEL"],
            clip=toy["CLIP"],
            vae=toy["VAE"],
            exemplars=triples["exemplars"],
            layout=fine["layout"],
            gradient_rule=mask["gradient_rule"],
            name="adi",
            **TOY_TRAINING,
        )
        w.column()
        single = w.node("AtelierTokenLayout", "Token Layout (Textual Inversion)", granularity="one token")
        plain = w.node(
            "AtelierTrain",
            "Train with plain Textual Inversion",
            room=240,
            model=toy["MODEL"],
            clip=toy["CLIP"],
            vae=toy["VAE"],
            exemplars=triples["exemplars"],
            layout=single["layout"],
            name="ti",
            **TOY_TRAINING,
        )
        w.node("AtelierSaveConcept", concept=adi["concept"], file_name="toy/adi", overwrite=True)
    with w.group("3  Paint others doing it", PAINT):
        w.note(
            "Write any prompt in the toy's words, with `<adi>` or `<ti>` for the action: a *panda*, *cat*, *frog*, "
            "*alien* ... *on the beach*, *in the snow*, *at night* ... *with a tree on the left*.",
            150,
        )
        applied = w.node("AtelierApplyConcepts", model=toy["MODEL"])
        nothing = w.node("CLIPTextEncode", "Negative prompt (empty)", node_size=(340, 100), clip=toy["CLIP"], text="")
        latent = w.node("EmptyLatentImage", width=64, height=64, batch_size=8)
        w.column()
        painted = {}
        for name, title, trained in (("adi", "ADI", adi), ("ti", "Textual Inversion", plain)):
            painted[name] = text = w.node(
                "AtelierTextEncode",
                f"Prompt ({title})",
                node_size=(360, 150),
                clip=toy["CLIP"],
                text=f"a panda <{name}> on the beach",
                concepts__concept0=trained["concept"],
            )
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
                filename_prefix=f"concept_atelier/{name}",
            )
            w.column()
    with w.group("4  Where the word looks", LOOK):
        w.note("*words*: any words of the prompt. *layers*: coarse ones place things, fine ones draw them.", 110)
        w.node(
            "AtelierAttentionMaps",
            room=320,
            model=applied["MODEL"],
            positive=painted["adi"]["CONDITIONING"],
            negative=nothing["CONDITIONING"],
            latent_image=latent["LATENT"],
            vae=toy["VAE"],
            words="<adi>",
            seed=1,
            **TOY_SAMPLING,
        )
    return w


# The settings of benchmarks/demo.py.
TOY_TRAINING = {
    "init_word": "poses",
    "steps": 600,
    "learning_rate": 2e-2,
    "batch_size": 1,
    "sample_prompts": "a panda {}\na cat {} on the beach",
    "sample_every": 100,
    "sample_steps": 15,
    "sample_cfg": 3.0,
    "sample_eta": 1.0,
}


def adi_sd() -> Workflow:
    """The artist's own pictures on a Stable Diffusion checkpoint, with ADI as in the paper."""
    w = Workflow()
    with w.group("1  Your pictures of one action", PICTURES):
        w.note(
            f"1. Make the folder `input/{SD_ACTION_PICTURES}` in ComfyUI and put about ten pictures of *one action* "
            "into it, best each with another person or animal.\n2. Beside each picture `name.png` write a text file "
            "`name.txt` with what it shows, **without any word for the action** and with a blank `{}` in its place: "
            "`a photo of a woman in a red coat {} in a park`.\n3. Press R to refresh, choose checkpoint and folder, "
            "press Run.",
            330,
        )
        loader = w.node(
            "CheckpointLoaderSimple", properties={"models": [SD_CHECKPOINT_SOURCE]}, ckpt_name=SD_CHECKPOINT
        )
        pictures = w.node("LoadImageTextDataSetFromFolder", "Your pictures and captions", folder=SD_ACTION_PICTURES)
        exemplars = w.node(
            "AtelierExemplars", node_size=(340, 200), images=pictures["images"], captions=pictures["texts"], size=512
        )
    with w.group("2  The same people doing other things", PICTURES):
        w.note(
            "ADI compares each picture with *the same person doing something else*. A small model of each picture "
            "(300 steps each, the slow part) paints them; the contact sheet shows whether it kept the person.\n\n- "
            "*other_actions*: what people in your pictures could do instead.\n- Better: connect your own photos to "
            "*other_action_pictures*.",
            270,
        )
        triples = w.node(
            "AtelierTriples",
            room=420,
            exemplars=exemplars["exemplars"],
            model=loader["MODEL"],
            clip=loader["CLIP"],
            vae=loader["VAE"],
            other_actions=SD_OTHER_ACTIONS,
        )
    with w.group("3  Learn a word for the action", LEARN):
        w.note(
            "The settings are the paper's. Watch the samples: *Stop and keep* when they show the action.\n\n- "
            "*steps*: raise it later to go on.\n- *beta*: higher masks more of what is not the action.",
            210,
        )
        layout = w.node("AtelierTokenLayout", granularity="per block")
        mask = w.node("AtelierGradientMask")
        trained = w.node(
            "AtelierTrain",
            room=240,
            model=loader["MODEL"],
            clip=loader["CLIP"],
            vae=loader["VAE"],
            exemplars=triples["exemplars"],
            layout=layout["layout"],
            gradient_rule=mask["gradient_rule"],
            name="action",
            sample_prompts="a photo of a panda {}",
        )
        w.node("AtelierSaveConcept", concept=trained["concept"])
    with w.group("4  Paint others doing it", PAINT):
        w.note("`<action>` is the word you taught. Any sampler, LoRA or ControlNet works as always.", 110)
        applied = w.node("AtelierApplyConcepts", model=loader["MODEL"])
        positive = w.node(
            "AtelierTextEncode",
            node_size=(360, 150),
            clip=loader["CLIP"],
            text="a photo of a panda <action>",
            concepts__concept0=trained["concept"],
        )
        painting = sd_painting(w, loader, applied, positive, SD_NEGATIVE, "action")
    with w.group("5  Where the word looks", LOOK):
        w.note("*words*: any words of the prompt. *layers*: coarse ones place things, fine ones draw them.", 110)
        sd_look(w, painting, "<action>")
    return w
