"""Another subject in a photo."""

from __future__ import annotations

from comfy_api.latest import io

from .native.live import show_text
from .native.replacement import gigabytes, replace_subject
from .types import Trajectory

RECOMPUTE, STORE = "recompute", "store"


class AtelierReplaceSubject(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AtelierReplaceSubject",
            display_name="Replace Subject",
            category="Concept Atelier/Inversion",
            description="Paints an inverted picture again with another subject, a learned concept for instance. All "
            "other words look where the words of the source prompt look, so that the rest stays in its place.",
            search_aliases=["subject swap", "hifi tuner", "prompt to prompt", "real image editing", "edit photo"],
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Model.Input("model", tooltip="The MODEL of DDIM Inversion."),
                Trajectory.Input("trajectory", tooltip="One picture's, from DDIM Inversion. It holds the noise too."),
                io.Conditioning.Input(
                    "source",
                    tooltip="What the picture shows: the conditioning of DDIM Inversion, from Text Encode with "
                    "Concepts.",
                ),
                io.Conditioning.Input(
                    "target",
                    tooltip="The same prompt with the new subject, from Text Encode with Concepts. Word for word the "
                    "same elsewhere keeps the picture best.",
                ),
                io.Conditioning.Input(
                    "negative", tooltip="From Null-Text Optimize, with which the source prompt paints the picture."
                ),
                io.Float.Input(
                    "cfg",
                    default=7.5,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="Guidance scale: the cfg of Null-Text Optimize.",
                ),
                io.String.Input(
                    "subject",
                    default="",
                    tooltip="Words of the target prompt, or <names> of concepts, that are the new subject and look "
                    "where they like, separated by spaces or commas. Empty: all that the source prompt does not have.",
                ),
                io.Combo.Input(
                    "maps",
                    options=[RECOMPUTE, STORE],
                    tooltip="Where the source prompt looks. recompute: seen anew in each step; takes next to no "
                    "memory. store: kept in main memory, so that the next replacement in the same picture is a third "
                    "faster; 1.7 GB for SD1.5 at 512 x 512 and 50 steps.",
                ),
                io.Boolean.Input(
                    "renormalise",
                    default=False,
                    advanced=True,
                    tooltip="Off, as in the paper: what each place attends to need not sum to one. On: it is divided "
                    "by its sum.",
                ),
            ],
            outputs=[
                io.Latent.Output(display_name="latent", tooltip="The picture with its new subject, for VAE Decode."),
                io.String.Output(
                    display_name="report", tooltip="The new subject's words, and the memory that the maps take."
                ),
            ],
        )

    @classmethod
    def execute(cls, model, trajectory, source, target, negative, cfg, subject, maps, renormalise) -> io.NodeOutput:
        done = replace_subject(model, trajectory, source, target, negative, cfg, subject, maps == STORE, renormalise)
        new, steps = ", ".join(done.columns.subject), trajectory.steps
        report = f"New subject: {new}" if new else "No word differs: the picture is painted as it was"
        report += f"; attention of {len(done.columns.fixed)} of {done.tokens} tokens fixed; maps "
        if maps == STORE:
            report += f"of {steps} steps kept in {gigabytes(steps * done.maps_bytes)}"
        else:
            report += f"recomputed, {gigabytes(done.maps_bytes)} at a time"
        show_text(report, cls)
        return io.NodeOutput({"samples": done.latent}, report)


NODES = [AtelierReplaceSubject]
