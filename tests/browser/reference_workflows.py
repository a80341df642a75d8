"""The workflows of reference-guided generation: a picture sampled along a real picture of its subject."""

from __future__ import annotations

from comfy_server import SD_DINO
from subject_workflows import SD_KIND, SD_PROMPT, learned_subject_sd, toy_training
from workflow_builder import LEARN, LOOK, PAINT, PICTURES, Link, Node, Workflow
from workflow_parts import (
    SD_DINO_SOURCE,
    concept_prompt,
    invert,
    mask_by_text,
    sampled_picture,
    side_by_side,
)

TOY_CFG, SD_CFG = 3.0, 7.5
TOY_PROMPT, TOY_SEED = "a <wizard> prays on the beach", 1
FIRST_STEPS = {"steps": 50, "scheduler": "ddim_uniform"}  # those of DDIM Inversion


def reference_toy() -> Workflow:
    """A learned subject of the toy world, drawn along one of its pictures."""
    w = Workflow(
        thumbnail={
            "A subject it does not know": "Pictures of the subject",
            "first pass; its mask; the reference laid over; guided by it": (
                "First pass",
                "Where the subject is",
                "Reference, aligned",
                "Guided by the reference",
            ),
        }
    )
    with w.group("1  Learn a word for a subject", LEARN):
        w.note(
            "**Press Run** (a minute or two). Everything here is bundled. A learned word alone seldom gets all of a "
            "subject: *the reference* is a real picture of it that a second pass follows.\n\nThe word is learned with "
            "plain Textual Inversion and the pictures' exact masks, which stand in for SAM's.\n\nTo keep the word for "
            "other workflows: connect *Save Concept*.",
            270,
        )
        toy = w.node("AtelierToyCheckpoint")
        pictures = w.node("AtelierToyPictures", subject="wizard (held out)", count=10, other_actions=1)
        w.node("PreviewImage", "Pictures of the subject", node_size=(420, 320), images=pictures["images"])
        w.column()
        exemplars = w.node(
            "AtelierExemplars",
            node_size=(340, 220),
            images=pictures["images"],
            captions=pictures["captions"],
            masks=pictures["masks"],
        )
        layout = w.node("AtelierTokenLayout", granularity="one token")
        trained = toy_training(
            w, "Train <wizard>", toy, exemplars, layout, name="wizard", steps=200, learning_rate=4e-2
        )
    with w.group("2  First pass, and where the subject is in it", PICTURES):
        w.note(
            "The first picture says where the subject goes. *Attention Maps* samples like KSampler and sees where the "
            "word looks; its map, cut off by *Threshold Mask*, stands in for SAM here.\n\n- *text*, *seed*: another "
            "picture. Set the same seed in *The noise of the first pass*.\n- *value*: lower for a larger mask.",
            230,
        )
        applied = w.node("AtelierApplyConcepts", model=toy["MODEL"])
        model = applied["MODEL"]
        prompt = concept_prompt(w, toy, "Prompt", TOY_PROMPT, trained)
        nothing = concept_prompt(w, toy, "Empty prompt", "")
        latent = w.node("EmptyLatentImage", width=64, height=64, batch_size=1)
        w.column()
        first = w.node(
            "AtelierAttentionMaps",
            "First pass, watched",
            room=320,
            model=model,
            positive=prompt["CONDITIONING"],
            negative=nothing["CONDITIONING"],
            latent_image=latent["LATENT"],
            vae=toy["VAE"],
            words="<wizard>",
            layers="full resolution",
            seed=TOY_SEED,
            cfg=TOY_CFG,
            sampler_name="euler",
            denoise=1.0,
            **FIRST_STEPS,
        )
        w.column()
        generated = w.node("VAEDecode", samples=first["latent"], vae=toy["VAE"])["IMAGE"]
        w.node("PreviewImage", "First pass", node_size=(320, 300), images=generated)
        place = w.node("ThresholdMask", mask=first["mask"], value=0.35)["MASK"]
        w.node("MaskPreview", "Where the subject is", node_size=(320, 300), mask=place)
    with w.group("3  A real picture, laid over it", LEARN):
        w.note(
            "The picture that does nearly the same as the prompt says is the best guide.\n\n- *index*: another "
            "picture, counted from 0. Then say in *What it shows* what is on it. (On photos DINO chooses.)\n- "
            "*max_rotation* above 0 for things that lie in any direction.",
            200,
        )
        chosen = w.node(
            "AtelierPickReference",
            room=40,
            pictures=pictures["images"],
            masks=pictures["masks"],
            generated=generated,
            by="index",
            index=0,
        )
        caption = concept_prompt(w, toy, "What it shows", "a man prays on gray")
        aligned, inversion = aligned_reference(w, toy, model, chosen, place, caption)
    with w.group("4  Second pass, guided", PAINT):
        noise = w.node("RandomNoise", "The noise of the first pass", noise_seed=TOY_SEED)
        guider = cfg_guider(w, model, prompt, nothing, TOY_CFG)
        guided = second_pass(w, toy, aligned, inversion, noise, guider, latent, **TOY_GUIDANCE)
    with w.group("5  Side by side", LOOK):
        side_by_side(w, [generated, chosen["reference"], guided], ["first pass", "reference", "guided by it"])
    return w


# Found by a few tries: the first pass of the toy model is too far from the subject to keep its layout from 40 on.
TOY_GUIDANCE = {"t_s": 30, "t_e": 5, "inner_steps": 5, "grow": 1}


def cfg_guider(w: Workflow, model: Link, prompt: Node, nothing: Node, cfg: float) -> Node:
    """CFG Guider."""
    return w.node("CFGGuider", model=model, positive=prompt["CONDITIONING"], negative=nothing["CONDITIONING"], cfg=cfg)


def aligned_reference(
    w: Workflow, loader: Node, model: Link, chosen: Node, place: Link, caption: Node
) -> tuple[Node, Node]:
    """Align Reference onto `place`, and DDIM Inversion of the result."""
    w.column()
    aligned = w.node(
        "AtelierAlignReference",
        room=320,
        reference=chosen["reference"],
        reference_mask=chosen["mask"],
        target_mask=place,
        max_rotation=0.0,
    )
    w.node("PreviewImage", "Reference, aligned", node_size=(320, 300), images=aligned["image"])
    w.column()
    return aligned, invert(w, loader, model, caption, aligned["image"])


def second_pass(
    w: Workflow,
    loader: Node,
    aligned: Node,
    inversion: Node,
    noise: Node,
    guider: Node,
    latent: Node,
    **guidance: object,
) -> Link:
    """Reference Guidance as the sampler of the same noise. Returns the picture."""
    w.note(
        "From the same noise, but between `t_s` and `t_e` the subject is drawn along the reference.\n\n- "
        "*inner_steps*: more come nearer to the reference, fewer vary more; 0 pastes it at `t_s` only.\n- *t_s* lower: "
        "the first picture's layout stays longer.\n- *grow*: widens the mask where it cuts the subject.",
        210,
    )
    guided = w.node(
        "AtelierReferenceGuidance",
        room=80,
        trajectory=inversion["trajectory"],
        mask=aligned["mask"],
        **guidance,
    )
    w.column()
    picture = sampled_picture(
        w, loader, noise["NOISE"], guider["GUIDER"], guided["sampler"], inversion["sigmas"], latent["LATENT"]
    )
    w.node(
        "SaveImage",
        "Guided by the reference",
        node_size=(320, 320),
        images=picture,
        filename_prefix="concept_atelier/reference",
    )
    return picture


def reference_sd() -> Workflow:
    """The artist's own subject, drawn along the picture of it that fits best, with the paper's settings."""
    w = Workflow()
    subject = learned_subject_sd(w, "*Load GroundingDINO*, *Load SAM* and *Pick Reference*")
    loader = subject.loader
    with w.group("3  First pass, and where the subject is in it", PICTURES):
        w.note(
            "The first picture says where the subject goes. (Groups 1 and 2 are those of *subject_sd*: what was "
            "trained there is here at once. Or put *Load Concept* in the place of the training.)\n\n- *text*, *seed*: "
            "another picture; the seed of the second pass is the same one.\n- *Detect by Text*: the kind of thing.",
            230,
        )
        applied = w.node("AtelierApplyConcepts", model=loader["MODEL"])
        model = applied["MODEL"]
        prompt = concept_prompt(w, loader, "Prompt", SD_PROMPT, subject.trained)
        nothing = concept_prompt(w, loader, "Empty prompt", "")
        latent = w.node("EmptyLatentImage", width=512, height=512, batch_size=1)
        noise = w.node("RandomNoise", "The noise of both passes", noise_seed=1)
        w.column()
        euler = w.node("KSamplerSelect", sampler_name="euler")
        sigmas = w.node("BasicScheduler", model=model, denoise=1.0, **FIRST_STEPS)
        guider = cfg_guider(w, model, prompt, nothing, SD_CFG)
        generated = sampled_picture(
            w, loader, noise["NOISE"], guider["GUIDER"], euler["SAMPLER"], sigmas["SIGMAS"], latent["LATENT"]
        )
        w.node("PreviewImage", "First pass", node_size=(340, 340), images=generated)
        w.column()
        _, place = mask_by_text(w, subject.segmenters, generated, SD_KIND)
        w.node("MaskPreview", "Where the subject is", node_size=(340, 340), mask=place["masks"])
    with w.group("4  The picture that fits best, laid over it", LEARN):
        w.note(
            "**DINO** chooses the picture that is nearest to the first pass.\n\n- *by* index: choose it yourself.\n- "
            "*What it shows*: the reference in plain words.\n- *max_rotation* above 0 for things that lie in any "
            "direction.\n\nLook at the overlay: where the outlines differ much, take another picture.",
            210,
        )
        chosen = w.node(
            "AtelierPickReference",
            room=60,
            properties={"models": [SD_DINO_SOURCE]},
            pictures=subject.pictures,
            masks=subject.masks,
            generated=generated,
            by="DINO",
            dino=SD_DINO,
        )
        caption = concept_prompt(w, loader, "What it shows", "a photo of a dog")
        aligned, inversion = aligned_reference(w, loader, model, chosen, place["masks"], caption)
    with w.group("5  Second pass, guided", PAINT):
        guided = second_pass(w, loader, aligned, inversion, noise, guider, latent)
    with w.group("6  Side by side", LOOK):
        side_by_side(w, [generated, chosen["reference"], guided], ["first pass", "reference", "guided by it"])
    return w
