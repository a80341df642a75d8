"""Learning a concept: the one training node of all token methods."""

from __future__ import annotations

from comfy_api.latest import io, ui
from comfy_execution.graph_utils import ExecutionBlocker

from ..kernels.concept_run import ConceptRun, SamplePlan
from ..kernels.course import TIMESTEP_SAMPLINGS
from ..kernels.gradient_mask import GradientMask
from ..kernels.gradient_rules import MaskedTriples, PlainGradient
from ..kernels.training import TrainingSettings
from ..kernels.weight_plan import WeightPlan
from .native.backbone import native_session
from .native.live import LiveReport
from .native.output_files import runs_folder
from .native.pictures import to_tensor
from .types import Concept, Exemplars, GradientRule, Layout, LossTerm, Weights


class AtelierTrain(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AtelierTrain",
            display_name="Train Concept",
            category="Concept Atelier/Train",
            description="Learns a concept from exemplars, leaving the model as it is. Shows its loss and samples while "
            "it learns; Cancel and 'Stop and keep' lose nothing: the same settings queued again go on where they "
            "were left, and return at once when they are done.",
            search_aliases=["textual inversion", "train embedding", "ADI", "P+", "learn concept", "personalization"],
            has_intermediate_output=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Model.Input("model", tooltip="The model to learn on, LoRAs included. Its weights stay as they are."),
                io.Clip.Input("clip", tooltip="The text encoder of the same checkpoint."),
                io.Vae.Input("vae", tooltip="The VAE of the same checkpoint."),
                Exemplars.Input("exemplars", tooltip="The pictures, from Exemplars; from Triples for a gradient mask."),
                Layout.Input("layout", tooltip="How finely the concept is divided, from Token Layout."),
                io.String.Input(
                    "name",
                    default="concept",
                    tooltip="The concept's placeholder: write <name> in prompts. Letters, digits, dots, dashes.",
                ),
                io.String.Input(
                    "init_word",
                    default="action",
                    tooltip="A word near the concept, of one piece, from which all vectors start (ADI does not say "
                    "which; TwinAct takes 'action'). For tail rows: what the identifier reads as, such as dog.",
                ),
                io.Int.Input(
                    "steps",
                    default=3000,
                    min=1,
                    max=1_000_000,
                    tooltip="Steps in all (ADI section 5.1: 3000). Raise it to go on with a finished run.",
                ),
                io.Float.Input(
                    "learning_rate",
                    default=2e-4,
                    min=0.0,
                    max=1.0,
                    step=1e-6,
                    round=False,
                    tooltip="Of AdamW. ADI section 5.1: 0.0002; plain Textual Inversion is used with up to 0.005.",
                ),
                io.Int.Input("batch_size", default=1, min=1, max=64, tooltip="Exemplars (or triples) a step."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=io.ControlAfterGenerate.fixed,
                    tooltip="Decides pictures, timesteps and noise of every step.",
                ),
                io.String.Input(
                    "sample_prompts",
                    default="",
                    multiline=True,
                    tooltip="Painted while it learns, one a line, {} for the concept: 'a panda {}'. Empty: none.",
                ),
                io.Int.Input(
                    "sample_every",
                    default=250,
                    min=0,
                    max=100_000,
                    tooltip="Steps between samples. 0: only at the end.",
                ),
                GradientRule.Input(
                    "gradient_rule",
                    optional=True,
                    tooltip="Which part of the gradient the vectors follow, such as Gradient Mask (ADI). Empty: all.",
                ),
                io.Float.Input(
                    "weight_decay",
                    default=0.01,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    advanced=True,
                    tooltip="Of AdamW, whose default it is. It also pulls channels that the gradient mask closed.",
                ),
                io.Combo.Input(
                    "timestep_sampling",
                    options=list(TIMESTEP_SAMPLINGS),
                    advanced=True,
                    tooltip="uniform: all noise levels alike. early: more of the noisy ones, where pose and layout are "
                    "decided (ReVersion, Eq. 5).",
                ),
                io.Boolean.Input(
                    "use_masks",
                    default=True,
                    advanced=True,
                    tooltip="With masks on the exemplars: learn from what is inside them only.",
                ),
                io.Int.Input(
                    "sample_steps", default=20, min=1, max=1000, advanced=True, tooltip="DDIM steps of the samples."
                ),
                io.Float.Input(
                    "sample_cfg",
                    default=7.5,
                    min=0.0,
                    max=100.0,
                    step=0.5,
                    advanced=True,
                    tooltip="Guidance of the samples (ADI section 5.1: 7.5).",
                ),
                io.Float.Input(
                    "sample_eta",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.1,
                    advanced=True,
                    tooltip="Fresh noise at each DDIM step of the samples: 0 none, 1 as much as DDPM. The toy model "
                    "paints clean pictures with 1 only.",
                ),
                io.Boolean.Input(
                    "start_fresh",
                    default=False,
                    advanced=True,
                    tooltip="Forget what an earlier run with the same settings learned and start at step 0.",
                ),
                io.Autogrow.Input(
                    "loss_terms",
                    template=io.Autogrow.TemplatePrefix(
                        LossTerm.Input("loss_term", tooltip="Such as Anchor Loss or Subject Attention Loss."),
                        prefix="loss_term",
                        min=0,
                        max=8,
                    ),
                    tooltip="What the concept must satisfy beside explaining the pictures. Their size relative to the "
                    "denoising loss is shown while it learns.",
                ),
                Weights.Input(
                    "weights",
                    optional=True,
                    tooltip="Weights of the model that learn along, as in Custom Diffusion or DreamBooth, from Train "
                    "Weights. They are kept with the concept; the model itself stays as it is.",
                ),
                io.Int.Input(
                    "steps_each_stage",
                    default=0,
                    min=0,
                    max=10_000,
                    advanced=True,
                    optional=True,
                    tooltip="0: the stages of the layout learn side by side. Above 0, HiFi Tuner's Algorithm 1: all "
                    "stages learn as one for `steps`, then each by itself for so many more, from the noisiest to the "
                    "cleanest, at one noise level: set `stages` to the sampling steps. The paper: 1000 steps, 50 "
                    "stages, 10 each.",
                ),
            ],
            outputs=[
                Concept.Output(display_name="concept", tooltip="For Text Encode with Concepts and Save Concept."),
                io.Image.Output(display_name="samples", tooltip="The last samples, one a prompt."),
                io.LossMap.Output(display_name="loss_map", tooltip="The loss of every step, for Plot Loss Graph."),
            ],
        )

    @classmethod
    def execute(
        cls, model, clip, vae, exemplars, layout, name: str, init_word: str, steps: int, learning_rate: float,
        batch_size: int, seed: int, sample_prompts: str, sample_every: int, weight_decay: float,
        timestep_sampling: str, use_masks: bool, sample_steps: int, sample_cfg: float, sample_eta: float,
        start_fresh: bool, gradient_rule: GradientMask | None = None, loss_terms: io.Autogrow.Type = None,
        weights: WeightPlan | None = None, steps_each_stage: int = 0,
    ) -> io.NodeOutput:  # fmt: skip
        prompts = tuple(line.strip() for line in sample_prompts.splitlines() if line.strip())
        run = ConceptRun(
            name=name,
            init_word=init_word,
            exemplars=exemplars,
            layout=layout,
            rule=PlainGradient() if gradient_rule is None else MaskedTriples(gradient_rule),
            settings=TrainingSettings(
                steps, learning_rate, weight_decay, batch_size, seed, timestep_sampling, use_masks, steps_each_stage
            ),
            samples=SamplePlan(prompts, sample_every, seed, sample_steps, sample_cfg, sample_eta),
            loss_terms=tuple((loss_terms or {}).values()),
            weights=weights,
        )
        report = LiveReport(cls.hidden.unique_id, run.total_steps)
        with native_session(model, clip, vae) as backbone:
            concept, state, samples = run.learn(backbone, runs_folder(), report, start_fresh)
        if samples is None:
            samples = ExecutionBlocker("Train Concept paints no samples: write sample_prompts, or disconnect samples.")
        preview = to_tensor(report.picture(state.losses))
        return io.NodeOutput(concept, samples, {"loss": state.losses}, ui=ui.PreviewImage(preview, cls=cls))


NODES = [AtelierTrain]
