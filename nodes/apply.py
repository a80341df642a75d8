"""Concepts in prompts, and the MODEL that reads them."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from comfy_api.latest import io, ui

from ..kernels.backbone import Layer
from ..kernels.concept import Concept
from ..kernels.conditioning import encode_prompt, spell_out
from ..kernels.prompts import parse_prompt
from .native.payload import TIMESTEPS, concept_conditioning, plain_conditioning, route_concepts
from .native.text import describe_clip, encode_text, prompt_words
from .native.weights import apply_weights
from .types import Concept as ConceptSocket

CATEGORY = "Concept Atelier/Use"
WITH_WEIGHTS = (
    "<{name}> learned weights along: connect it to 'Apply Concepts' as well, or load its file with Load LoRA (Model)."
)
SCHEDULED_HOOKS = (
    "The CLIP carries hooks that change over the sampling, and this prompt would get one encoding for all of it: turn "
    "schedule_clip off in 'Set CLIP Hooks', or use CLIP Text Encode for a prompt without concepts."
)


def by_name(concepts: Iterable[Concept]) -> dict[str, Concept]:
    """The concepts under their names. Raises ValueError when two share one."""
    named: dict[str, Concept] = {}
    for concept in concepts:
        if concept.name in named:
            raise ValueError(
                f"Two connected concepts are called <{concept.name}>: disconnect one of them, or train it under "
                "another name."
            )
        named[concept.name] = concept
    return named


def common_layers(concepts: Iterable[Concept]) -> tuple[Layer, ...]:
    """The cross-attention layers that all concepts were learned on. Raises ValueError where they differ."""
    first, *others = concepts
    for other in others:
        if other.layers != first.layers:
            raise ValueError(
                f"Concepts <{first.name}> and <{other.name}> were learned on U-Nets with different cross-attention "
                f"layers ({len(first.layers)} and {len(other.layers)}): use them in separate prompts."
            )
    return first.layers


class AtelierTextEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        concept = ConceptSocket.Input(
            "concept",
            tooltip="A concept from Train Concept or Load Concept; one that was trained with Train Weights goes to "
            "Apply Concepts as well.",
        )
        return io.Schema(
            node_id="AtelierTextEncode",
            display_name="Text Encode with Concepts",
            category=CATEGORY,
            description="Encodes a prompt in which <name> stands for a learned concept. Use it with any sampler, "
            "after routing the MODEL through Apply Concepts.",
            search_aliases=["prompt", "clip text encode", "use concept", "placeholder"],
            inputs=[
                io.Clip.Input("clip", tooltip="The CLIP of the kind of checkpoint that the concepts were learned on."),
                io.String.Input(
                    "text",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip="The prompt. <name> stands for the concept of that name; weights as in (word:1.2) and "
                    "embedding:name work as in CLIP Text Encode.",
                ),
                io.Autogrow.Input(
                    "concepts",
                    template=io.Autogrow.TemplatePrefix(concept, prefix="concept", min=0, max=20),
                    tooltip="The concepts that the prompt may name, in any order. Those it does not name do nothing.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    display_name="CONDITIONING",
                    tooltip="The encoded prompt. In Conditioning (Concat), connect it as conditioning_to. Conditioning "
                    "(Average) mixes only concepts that are the same for all layers and timesteps.",
                ),
            ],
        )

    @classmethod
    def execute(cls, clip, text: str, concepts: io.Autogrow.Type) -> io.NodeOutput:
        if clip.use_clip_schedule and clip.patcher.forced_hooks:
            raise ValueError(SCHEDULED_HOOKS)
        named = by_name(concepts.values())
        kind = describe_clip(clip)
        for concept in named.values():
            concept.check_fits(kind.family, kind.towers)
        prompt = parse_prompt(text, named)
        used = {name: named[name] for name in prompt.names}
        layouts = {name: concept.bound_layout() for name, concept in used.items()}
        words = prompt_words(clip, spell_out(prompt, layouts), {name: c.layout.tokens for name, c in used.items()})
        if not used:
            encoding = encode_text(clip, prompt, {})
            conditioning = plain_conditioning(encoding.hidden, encoding.pooled, words)
            clip.add_hooks_to_dict(conditioning[0][1])
            return io.NodeOutput(conditioning)
        layers = common_layers(used.values())
        vectors = {name: concept.vectors for name, concept in used.items()}
        staged = encode_prompt(partial(encode_text, clip), layers, prompt, vectors, layouts, TIMESTEPS)
        owner = {at: f"<{name}>" for name, positions in staged.positions.items() for at in positions}
        conditioning = concept_conditioning(staged, layers, [owner.get(at, w) for at, w in enumerate(words)])
        clip.add_hooks_to_dict(conditioning[0][1])
        notes = [WITH_WEIGHTS.format(name=name) for name, concept in used.items() if concept.weights]
        return io.NodeOutput(conditioning, ui=ui.PreviewText("\n".join(notes)) if notes else None)


class AtelierApplyConcepts(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AtelierApplyConcepts",
            display_name="Apply Concepts",
            category=CATEGORY,
            description="Lets the MODEL read the concepts that the conditioning carries. Which concepts, the "
            "conditioning says; without any, the MODEL works as before. Also puts on the MODEL what concepts learned "
            "of its weights.",
            search_aliases=["use concept", "patch model"],
            inputs=[
                io.Model.Input("model", tooltip="The MODEL to paint with, before or after LoRAs and other patches."),
                io.Autogrow.Input(
                    "concepts",
                    template=io.Autogrow.TemplatePrefix(
                        ConceptSocket.Input("concept", tooltip="A concept that was trained with Train Weights."),
                        prefix="concept",
                        min=0,
                        max=20,
                    ),
                    optional=True,
                    tooltip="Needed for concepts that were trained with Train Weights: the weights they learned are "
                    "added to the MODEL's. Others do nothing here.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.05,
                    optional=True,
                    tooltip="Factor of these weights: 1 as learned, 0 none.",
                ),
            ],
            outputs=[io.Model.Output(display_name="MODEL", tooltip="The MODEL for the sampler.")],
        )

    @classmethod
    def execute(cls, model, concepts: io.Autogrow.Type = None, strength: float = 1.0) -> io.NodeOutput:
        for concept in by_name((concepts or {}).values()).values():
            if concept.weights:
                model = apply_weights(model, concept, strength)
        return io.NodeOutput(route_concepts(model))


NODES = [AtelierTextEncode, AtelierApplyConcepts]
