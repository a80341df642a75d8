"""Two learned subjects in one picture, six ways: on the toy model and on Stable Diffusion."""

from __future__ import annotations

from comfy_server import SD_OTHER_PICTURES, SD_SUBJECT_PICTURES
from compose_parts import PLAIN, WEIGHTS, Studio, Subject, compose
from workflow_builder import PICTURES, Workflow
from workflow_parts import TOY_SAMPLING, sd_checkpoint


def compose_toy() -> Workflow:
    """The toy world's two held-out subjects in one picture."""
    w = Workflow(
        thumbnail={
            "Two subjects it does not know: a wizard": "The first",
            "and a pig": "The second",
            "both words in one prompt": PLAIN,
            "each word, with trained weights, in its half (GCFG)": WEIGHTS,
        }
    )
    subjects = []
    with w.group("1  Two subjects the model does not know", PICTURES):
        w.note(
            "**Press Run** (eight words are learned: some minutes). Everything here is bundled. The toy model has "
            "never seen a wizard or a pig; each is learned from pictures of it *alone*, and then both are asked for in "
            "one picture.\n\n- *subject*: another one (then the words in the prompts, *init_word* and *name* too).",
            230,
        )
        toy = w.node("AtelierToyCheckpoint")
        for title, name, init_word in (("The first", "wizard", "man"), ("The second", "pig", "bear")):
            w.column()
            pictures = w.node("AtelierToyPictures", subject=f"{name} (held out)", count=10, other_actions=1)
            w.node("PreviewImage", title, node_size=(340, 260), images=pictures["images"])
            exemplars = w.node(
                "AtelierExemplars", node_size=(340, 220), images=pictures["images"], captions=pictures["captions"]
            )
            subjects.append(Subject(name, init_word, f"a <{name}> stands on grass", exemplars))
    studio = Studio(
        toy,
        tuple(subjects),
        "a <wizard> and a <pig> stands on grass",
        "a man and a bear stands on grass",
        {"weight": 0.25, "anchors": "my words", "words": ", ".join(TOY_WORDS)},
        {"weight": 0.05},
        TOY_TRAINING,
        {"learning_rate": 1e-3},
        {"words": "<wizard>", "steps": 5},
        True,
        0.5,
        TOY_SAMPLING,
        64,
        6,
    )
    compose(w, studio, TOY_NOTES)
    return w


TOY_WORDS = ("panda", "rabbit", "ninja", "penguin", "cat", "alien", "skeleton", "woman", "robot", "frog")
TOY_TRAINING = {
    "steps": 200,
    "learning_rate": 2e-2,
    "batch_size": 1,
    "sample_every": 100,
    "sample_steps": 15,
    "sample_cfg": 3.0,
    "sample_eta": 1.0,
}
TOY_NOTES = {
    "learn": "**Textual Inversion**: one word from everything it sees.\n\n**Anchor Loss**: the same, held near known "
    "words. *weight* is what to play with: the paper's 0.95 learns neither subject here, 0 is plain.\n\n**SeFi-IDE**: "
    "five stages, keys and values apart, and every word has to look where it looks when the class word (*man*, *bear*) "
    "stands in the place of the learned one.\n\n**Trained weights**: the plain word, and the model's keys and values "
    "learn along (Custom Diffusion).\n\n- *steps*: raise it and press Run again; training goes on.\n- To keep a word "
    "for other workflows: connect *Save Concept*.",
    "paint": "Change **The prompt**: all three methods here read it. Each word alone paints its subject: try `a <pig> "
    "stands on grass` (Layout Guidance and Attention Maps want both words).\n\n- *batch_size*: more seeds.",
    "layout": "In the first five steps the picture is moved until `<wizard>` looks into its box.\n\n**Layout "
    "Predictor** says where two such things usually stand. Only the first word is kept to its box: in the toy model "
    "the words of *both* figures look at the same places, so guiding both does harm.\n\n- *strength*, *iterations*: "
    "0 is plain.",
    "branches": "What no prompt of both words does: first two *known* figures take their places, then each half of the "
    "picture has a prompt of one learned subject alone.\n\n- *end_percent* of the first and *start_percent* of the "
    "others, together: lower and the figures merge, higher and they stay a man and a bear.",
    "compare": "Each column has the same seed.\n\n**Be prepared: wherever both words stand in one prompt, the toy "
    "model paints two figures that are a bit of a wizard, and no pig**, whichever way the words were learned and "
    "guided. A single vector, learned from figures that stand alone, says little about one that stands beside "
    "another. **GCFG** never has both words in one prompt, and paints something of each: a purple figure and a pink "
    "one. With **trained weights** the purple one has its white beard, and the pink one its ears.",
    "look": "Yellow: the places that look at the word most. Here **both words look at both figures**: that is why each "
    "figure gets a bit of each.\n\n- *layers*: coarse ones place things, fine ones draw them.",
}


def compose_sd() -> Workflow:
    """Two subjects of the artist's own in one picture, on a Stable Diffusion checkpoint."""
    w = Workflow()
    subjects = []
    with w.group("1  Your pictures of two subjects", PICTURES):
        w.note(
            f"1. Make the folders `input/{SD_SUBJECT_PICTURES}` and `input/{SD_OTHER_PICTURES}` in ComfyUI and put "
            "four to ten pictures of *one subject* into each.\n2. Say what they are: *init_word* of the eight Train "
            "Concept (a word of one piece) and **Two known things**.\n3. Press R to refresh, choose checkpoint and "
            "folders, press Run.",
            250,
        )
        loader = sd_checkpoint(w)
        for name, init_word, folder in (("first", "dog", SD_SUBJECT_PICTURES), ("second", "cat", SD_OTHER_PICTURES)):
            w.column()
            pictures = w.node("LoadImageDataSetFromFolder", f"Pictures of <{name}>", folder=folder)
            exemplars = w.node(
                "AtelierExemplars",
                node_size=(340, 220),
                images=pictures["images"],
                captions="a photo of a {}",
                size=512,
            )
            subjects.append(Subject(name, init_word, f"a photo of a <{name}> on a beach", exemplars))
    studio = Studio(
        loader,
        tuple(subjects),
        "a photo of a <first> and a <second> on a beach",
        "a photo of a dog and a cat on a beach",
        {"weight": 0.95},
        {},
        SD_TRAINING,
        {},
        {"words": "<first>, <second>", "steps": 5},
        False,
        0.4,
        SD_SAMPLING,
        512,
        4,
    )
    compose(w, studio, SD_NOTES)
    return w


# What SeFi-IDE and Compositional Inversion leave open, or give for eight pictures a step and many hours (5000 steps).
SD_TRAINING = {"steps": 1000, "learning_rate": 5e-3, "batch_size": 1}
SD_SAMPLING = {"steps": 25, "cfg": 7.5, "sampler_name": "dpmpp_2m", "scheduler": "normal", "denoise": 1.0}
SD_NOTES = {
    "learn": "A thousand steps each, two words by four methods; disconnect those you do not want. Watch the samples: "
    "*Stop and keep*.\n\n**Textual Inversion**: plain.\n\n**Anchor Loss**: held near known words; lower *weight* where "
    "the subject is not learned.\n\n**SeFi-IDE**: five stages, keys and values apart, attention held near that of the "
    "class word. Keep *attention : denoising* below 1; *weight* 0.003 is the paper's.\n\n**Trained weights**: the "
    "plain word, and the model's keys and values learn along (Custom Diffusion).\n\n- To keep a word for other "
    "workflows: connect *Save Concept*.",
    "paint": "Change **The prompt**: all three methods here read it.\n\n- *batch_size*: more seeds.\n- Another "
    "sampler: the one of the GCFG group too, so that all paint the same noise in the same way.",
    "layout": "In the first fifth of the steps the picture is moved until `<first>` looks to the left and `<second>` "
    "to the right, the constant layout of the released code.\n\n- Other places: draw them with *Create Bounding "
    "Boxes*, connected to *bboxes*.\n- *strength* lower or *largest_move* 0.2 when pictures burn.",
    "branches": "First two *known* things take their places, then each half of the picture has a prompt of one learned "
    "subject alone.\n\n- **Two known things** should be of the same kind as yours.\n- *end_percent* of the first and "
    "*start_percent* of the others, together: lower and they merge, higher and they stay a dog and a cat.",
    "compare": "Each column has the same seed. Look for: are both there, does each look like yours, and is the beach "
    "still there?\n\nThe papers' figures say which method helps on average; your two subjects may disagree. More seeds "
    "tell more than a better-looking one.",
    "look": "Yellow: the places that look at the word most. Where both words look at the *same* thing, one of the two "
    "is lost; where a word looks everywhere, it has taken over.\n\n- *layers*: coarse ones place things, fine ones "
    "draw them.",
}
