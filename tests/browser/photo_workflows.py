"""The workflows of inversion: a picture back from its noise, and another subject in it."""

from __future__ import annotations

from comfy_server import SD_PICTURE
from subject_workflows import tail_rows, toy_training
from workflow_builder import LEARN, LOOK, PAINT, PICTURES, Link, Node, Workflow
from workflow_parts import concept_prompt, invert, sampled_picture, sd_checkpoint, side_by_side

TOY_CFG, SD_CFG = 3.0, 7.5  # the toy model paints best at 3
TOY_SUBJECT, TOY_NEW = "bear", "penguin"
TOY_SEED = 5


def toy_photo(w: Workflow) -> Node:
    """A drawn picture of the toy world."""
    pictures = w.node(
        "AtelierToyPictures", "Your picture: drawn", subject=TOY_SUBJECT, count=1, other_actions=1, seed=TOY_SEED
    )
    w.node("PreviewImage", "Your picture", node_size=(320, 300), images=pictures["images"])
    return pictures


def sd_photo(w: Workflow) -> Link:
    """A photo, cut to what Stable Diffusion was made for."""
    photo = w.node("LoadImage", "Your photo", room=240, image=SD_PICTURE)
    cut = w.node("ImageScale", upscale_method="lanczos", width=512, height=512, crop="center", image=photo["IMAGE"])
    return cut["IMAGE"]


def toy_words(w: Workflow, pictures: Node, title: str, subject: str) -> Link:
    """The sentence of the toy picture, with a subject in its blank."""
    return w.node(
        "StringReplace", title, node_size=(320, 190), string=pictures["captions"], find="{}", replace=subject
    )["STRING"]


class Inverted:
    """A picture, what it shows, and its noise, from which euler paints."""

    def __init__(self, w: Workflow, loader: Node, picture: Link, shown: Node) -> None:
        self.w, self.loader, self.picture, self.shown = w, loader, picture, shown
        self.model = w.node("AtelierApplyConcepts", model=loader["MODEL"])["MODEL"]
        self.inversion = invert(w, loader, self.model, shown, picture)
        self.noise = w.node("DisableNoise", "The noise is complete")["NOISE"]
        self.euler = w.node("KSamplerSelect", sampler_name="euler")["SAMPLER"]

    def painted(self, title: str, prompt: Node, negative: Link, cfg: float) -> Link:
        """What euler paints from the noise, shown under this title."""
        guider = self.w.node("CFGGuider", model=self.model, positive=prompt["CONDITIONING"], negative=negative, cfg=cfg)
        picture = sampled_picture(
            self.w,
            self.loader,
            self.noise,
            guider["GUIDER"],
            self.euler,
            self.inversion["sigmas"],
            self.inversion["noise"],
        )
        self.w.node("PreviewImage", title, node_size=(320, 300), images=picture)
        return picture

    def null_text(self, nothing: Node, cfg: float) -> Node:
        """Null-Text Optimize with the settings of the reference code."""
        return self.w.node(
            "AtelierNullTextOptimize",
            room=60,
            model=self.model,
            trajectory=self.inversion["trajectory"],
            conditioning=self.shown["CONDITIONING"],
            unconditional=nothing["CONDITIONING"],
            cfg=cfg,
        )


def inversion_toy() -> Workflow:
    """The round trip on a drawn picture."""
    w = Workflow(
        thumbnail={
            "the picture; back from its noise at cfg 1; at cfg 3; at cfg 3 with null text": (
                "Your picture",
                "Back at cfg 1",
                "Back at cfg 3",
                "Back at cfg 3 with null text",
            )
        }
    )
    with w.group("1  A picture, and what it shows", PICTURES):
        w.note(
            "**Press Run.** Everything here is bundled. A picture becomes *noise from which a sampler paints it "
            "again*: the start of all work on photos.\n\n- *seed* and *subject* of the picture: another one. For "
            "another subject, change *replace* in *What it shows: words*.\n- A wrong prompt in *What it shows: "
            "words*: at cfg 1 the picture still comes back.",
            250,
        )
        toy = w.node("AtelierToyCheckpoint")
        pictures = toy_photo(w)
        w.column()
        words = toy_words(w, pictures, "What it shows: words", TOY_SUBJECT)
        shown = concept_prompt(w, toy, "What it shows", words)
        nothing = concept_prompt(w, toy, "Empty prompt", "")
    round_trip(w, toy, pictures["images"], shown, nothing, TOY_CFG)
    return w


def inversion_sd() -> Workflow:
    """The round trip on a photo."""
    w = Workflow()
    with w.group("1  A photo, and what it shows", PICTURES):
        w.note(
            "A photo becomes *noise from which a sampler paints it again*: the start of all work on photos. Here you "
            "see how exactly yours comes back.\n\n1. Choose checkpoint and photo.\n2. Say in *What it shows* what is "
            "on it.\n3. Press Run.",
            210,
        )
        loader = sd_checkpoint(w)
        photo = sd_photo(w)
        w.column()
        shown = concept_prompt(w, loader, "What it shows", "a photo of a cat on a bench")
        nothing = concept_prompt(w, loader, "Empty prompt", "")
    round_trip(w, loader, photo, shown, nothing, SD_CFG)
    return w


def round_trip(w: Workflow, loader: Node, picture: Link, shown: Node, nothing: Node, cfg: float) -> None:
    """From a picture to its noise and back: at cfg 1, at `cfg`, and at `cfg` with null-text optimisation."""
    with w.group("2  Its noise", LEARN):
        w.note(
            "*DDIM Inversion* says how exactly the picture comes back: **PSNR** in dB. Above 40 no eye sees a "
            "difference; what the VAE loses is not counted.\n\n- *iterations* 0: plain DDIM inversion, as published; "
            "the picture comes back softer.\n- *steps* 10: less exact still.",
            190,
        )
        photo = Inverted(w, loader, picture, shown)
        w.node("PreviewAny", "How exactly it comes back", room=60, source=photo.inversion["report"])
    with w.group("3  Back from the noise", LOOK):
        w.note(
            f"With the prompt and cfg 1 the sampler goes the same way back. At cfg {cfg:g}, which you need for any "
            "change by prompt, it drifts away.",
            130,
        )
        empty = nothing["CONDITIONING"]
        back = [picture, photo.painted("Back at cfg 1", shown, empty, 1.0)]
        w.column()
        back.append(photo.painted(f"Back at cfg {cfg:g}", shown, empty, cfg))
    with w.group("4  Held fast by null-text optimisation", PAINT):
        w.note(
            "*Null-Text Optimize* finds an empty prompt for each step with which the sampler stays on its way at this "
            "cfg.\n\n- *inner_steps*: more come nearer and take longer.\n- *cfg*: the same here and in the guider.",
            170,
        )
        held = photo.null_text(nothing, cfg)
        w.node("PreviewAny", "How near it comes", room=80, source=held["report"])
        w.column()
        back.append(photo.painted(f"Back at cfg {cfg:g} with null text", shown, held["negative"], cfg))
    with w.group("5  Side by side", LOOK):
        side_by_side(w, back, ["the picture", "cfg 1", f"cfg {cfg:g}", f"cfg {cfg:g}, null text"])


def replace_toy() -> Workflow:
    """Another subject in a drawn picture: one that the model knows, and one that it learns first."""
    w = Workflow(
        thumbnail={
            "the picture; held fast; a penguin by prompt alone, and replaced; a <wizard> likewise": (
                "Your picture",
                "The picture, held fast",
                "Prompt alone",
                "Replaced",
                "<wizard>, prompt alone",
                "<wizard>",
            )
        }
    )
    with w.group("1  A picture", PICTURES):
        w.note(
            f"**Press Run** (it learns a word and inverts a picture: a minute or two). The {TOY_SUBJECT} of this "
            f"picture becomes a {TOY_NEW}, then a wizard that the model has never seen.\n\n- *seed*: another picture; "
            "the prompts follow.",
            190,
        )
        toy = w.node("AtelierToyCheckpoint")
        pictures = toy_photo(w)
    with w.group("2  A new subject to learn", LEARN):
        w.note(
            "Five rows for the wizard, as in *subject_toy*, but the same at all stages.\n\nTo keep the word for other "
            "workflows: connect *Save Concept*.",
            140,
        )
        wizards = w.node("AtelierToyPictures", "The new subject", subject="wizard (held out)", other_actions=1)
        exemplars = w.node(
            "AtelierExemplars",
            node_size=(340, 220),
            images=wizards["images"],
            captions=wizards["captions"],
            masks=wizards["masks"],
        )
        w.column()
        layout = w.node("AtelierTokenLayout", **tail_rows(stages=1))
        prior = w.node("AtelierNullTextPrior", weight=1e-4)
        trained = toy_training(
            w,
            "Train <wizard>",
            toy,
            exemplars,
            layout,
            name="wizard",
            loss_terms__loss_term0=prior["loss_term"],
        )
    with w.group("3  The same sentence, another subject", PICTURES):
        w.note("Only the subject's word differs: so the rest of the picture is kept best.", 90)
        prompts = []
        for title, word in (
            ("What it shows", TOY_SUBJECT),
            ("What it shall show", TOY_NEW),
            ("What it shall show: <wizard>", "<wizard>"),
        ):
            words = toy_words(w, pictures, f"{title}: words", word)
            prompts.append(concept_prompt(w, toy, title, words, trained))
            w.column()
        nothing = concept_prompt(w, toy, "Empty prompt", "")
    source, target, learned = prompts
    photo = HeldPhoto(w, 4, toy, pictures["images"], source, nothing, TOY_CFG)
    shown = [pictures["images"], photo.back]
    with w.group("5  Another subject that the model knows", PAINT):
        w.note(REPLACED, 170)
        shown += photo.replaced("Prompt alone", "Replaced", target)
    with w.group("6  The subject it learned", PAINT):
        w.note("It starts from the word *man*: so both names are its *subject*.", 90)
        shown += photo.replaced("<wizard>, prompt alone", "<wizard>", learned, subject="<wizard>, man")
    with w.group("7  Side by side", LOOK):
        titles = ["the picture", "held fast", f"{TOY_NEW}: prompt alone", f"{TOY_NEW}: attention fixed"]
        side_by_side(w, shown, [*titles, "wizard: prompt alone", "wizard: attention fixed"])
    return w


def replace_sd() -> Workflow:
    """Another subject in a photo."""
    w = Workflow()
    with w.group("1  A photo, and what it shall show instead", PICTURES):
        w.note(
            "1. Choose checkpoint and photo.\n2. Say in *What it shows* what is on it, and the same with the new "
            "subject in *What it shall show*.\n3. Press Run.\n\n**A learned subject:** put *Load Concept* beside it, "
            "connect it to both prompts and write `a photo of a <subject> on a bench`.\n\nKeep all other words the "
            "same: so the photo is kept best.",
            270,
        )
        loader = sd_checkpoint(w)
        picture = sd_photo(w)
        w.column()
        source = concept_prompt(w, loader, "What it shows", "a photo of a cat on a bench")
        target = concept_prompt(w, loader, "What it shall show", "a photo of a dog on a bench")
        nothing = concept_prompt(w, loader, "Empty prompt", "")
    photo = HeldPhoto(w, 2, loader, picture, source, nothing, SD_CFG)
    with w.group("3  The new subject", PAINT):
        w.note(REPLACED, 170)
        replaced = photo.replaced("Prompt alone", "Replaced", target)
    with w.group("4  Side by side", LOOK):
        titles = ["the photo", "held fast", "prompt alone", "attention fixed"]
        side_by_side(w, [picture, photo.back, *replaced], titles)
    return w


REPLACED = (
    "Above, the prompt is changed alone. Below, *Replace Subject* lets all other words look where they look in the "
    "original.\n\n- *subject*: name the new words yourself where more than the subject differs.\n- *maps* store: "
    "faster the next time, for more memory."
)


class HeldPhoto:
    """A picture whose noise and null text are found, so that the same prompt paints it again at `cfg`."""

    def __init__(
        self, w: Workflow, group: int, loader: Node, picture: Link, source: Node, nothing: Node, cfg: float
    ) -> None:
        self.cfg = cfg
        with w.group(f"{group}  Its noise, and the prompt that holds it fast", LEARN):
            w.note(
                "Look whether the picture comes back before you change it. Where it does not: more *inner_steps*, or a "
                "sentence that fits better.",
                110,
            )
            self.photo = Inverted(w, loader, picture, source)
            w.column()
            self.negative = self.photo.null_text(nothing, cfg)["negative"]
            self.back = self.photo.painted("The picture, held fast", source, self.negative, cfg)

    def replaced(self, alone: str, title: str, target: Node, subject: str = "") -> list[Link]:
        """Two columns: `target` as a changed prompt alone, and with Replace Subject. subject: its words in `target`."""
        photo, w = self.photo, self.photo.w
        pictures = [photo.painted(alone, target, self.negative, self.cfg)]
        w.column()
        replaced = w.node(
            "AtelierReplaceSubject",
            room=60,
            model=photo.model,
            trajectory=photo.inversion["trajectory"],
            source=photo.shown["CONDITIONING"],
            target=target["CONDITIONING"],
            negative=self.negative,
            cfg=self.cfg,
            subject=subject,
        )
        pictures.append(w.node("VAEDecode", samples=replaced["latent"], vae=photo.loader["VAE"])["IMAGE"])
        prefix = "concept_atelier/replaced"
        w.node("SaveImage", title, node_size=(320, 320), images=pictures[-1], filename_prefix=prefix)
        return pictures
