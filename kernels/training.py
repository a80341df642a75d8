"""The one training loop of all token methods.

A method is what is plugged in: a layout (where vectors go), loss terms (what they must explain), a gradient rule
(which part of the gradient they may follow), a course (which timesteps, in what order), weights that learn along. ADI
is per-block layout + denoising loss + gradient mask on triples; plain Textual Inversion is one token + denoising loss
and nothing else; HiFi Tuner is tail rows + masked denoising + prior, first for all timesteps and then for each.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from .backbone import Backbone, TextContext
from .conditioning import encode_prompt
from .course import AllTimesteps, Course, SharedThenStagewise
from .exemplars import EncodedExemplars
from .gradient_rules import GradientRule
from .layouts import BoundLayout, Layout
from .losses import Prediction
from .objective import DENOISING, Objective, SampleLosses
from .prompts import Prompt
from .run_state import RunState
from .token_generator import FREE, FreeVectors, TokenGenerator
from .weight_plan import NO_WEIGHTS, AdaptedWeights


@dataclass(frozen=True)
class TrainingSettings:
    """Numbers of a run.

    steps: those of all timesteps together; raising it continues a run. learning_rate, weight_decay: of AdamW.
    batch_size: anchors a step. timestep_sampling: "uniform" over 0..T-1, or "early (ReVersion)", which prefers noisy
    timesteps. use_masks: mean the loss over the exemplars' masks. steps_each_stage: when not 0, the layout's stages
    learn as one for `steps`, then each by itself for so many more (HiFi Tuner, Algorithm 1: 10).
    """

    steps: int = 3000
    learning_rate: float = 2e-4
    weight_decay: float = 0.01
    batch_size: int = 1
    seed: int = 0
    timestep_sampling: str = "uniform"
    use_masks: bool = True
    steps_each_stage: int = 0

    def total_steps(self, layout: Layout) -> int:
        """Steps of the whole run: those of all stages together, then those of each by itself."""
        return self.steps + layout.stages * self.steps_each_stage

    def course(self, layout: BoundLayout, schedule_length: int) -> Course:
        """The course of a run with these settings."""
        if self.steps_each_stage:
            return SharedThenStagewise(
                layout, self.steps, self.steps_each_stage, self.timestep_sampling, schedule_length
            )
        return AllTimesteps(self.timestep_sampling, schedule_length)


def concept_gradients(
    backbone: Backbone,
    name: str,
    prompts: Sequence[Prompt],
    vectors: Mapping[str, Tensor],
    layout: BoundLayout,
    latents: Tensor,
    t: Tensor,
    eps: Tensor,
    masks: Tensor | None = None,
    watch: AbstractContextManager[Callable[[Prediction], SampleLosses]] | None = None,
) -> tuple[SampleLosses, dict[str, Tensor]]:
    """The gradient of each picture's loss with respect to the vectors, from one forward and one backward pass.

    R roles share each of B anchors' prompts (R = 3 for ADI's triple). latents, eps: (R, B, C, h, w). t: (R, B).
    masks: (R, B, 1, h, w). vectors: {tower: (S, n, width)}. watch: `Objective.watch` of the batch, else the denoising
    loss alone. Returns losses, each (R, B), and {tower: (R, B, S, n, width)}. Weights that ask for a gradient get
    gradient_scale times that of the sum of all losses.

    Each prompt is encoded once, however many roles and anchors share it, and for the stages they are in alone (METHODS
    1.9, 3.6): the contexts enter the U-Net as leaf tensors, and each picture's context gradient goes back through the
    text encoder's graph by itself.
    """
    roles, anchors = t.shape
    schedule_length, timesteps = len(backbone.schedule), t.T.tolist()  # (B, R)
    # Anchors of one prompt in the same stages share an encoding, known by the two.
    keys = [
        (prompt, frozenset(layout.stage(t_b, schedule_length) for t_b in of_roles))
        for prompt, of_roles in zip(prompts, timesteps, strict=True)
    ]
    leaves = {key: {tower: v.detach().clone().requires_grad_() for tower, v in vectors.items()} for key in keys}
    staged = {
        key: encode_prompt(
            backbone.encode_text, backbone.layers, key[0], {name: leaves[key]}, {name: layout}, schedule_length, read_at
        )
        for key, read_at in dict(zip(keys, timesteps)).items()
    }
    with_graph = [staged[keys[b]].at(timesteps[b][r]) for r in range(roles) for b in range(anchors)]
    joined = TextContext.cat(with_graph)  # rows (G, R * B, T, d)
    context_leaf = joined.rows.detach().requires_grad_()
    # No gradient through the pooled embedding, though it follows the vectors: it is a mean over those of all stages,
    # which would no longer learn from their own timesteps alone. It has little say beside the context.
    pooled = None if joined.pooled is None else joined.pooled.detach()
    context = TextContext(context_leaf, joined.key, joined.value, pooled)

    x_0, noise, t_flat = latents.flatten(0, 1), eps.flatten(0, 1), t.flatten().to(latents.device)
    with watch or DENOISING.watch(range(anchors), roles) as losses_of:
        eps_hat = backbone.predict_noise(backbone.schedule.add_noise(x_0, t_flat, noise), t_flat, context)
        prediction = Prediction(noise, eps_hat, t_flat, None if masks is None else masks.flatten(0, 1))
        losses = losses_of(prediction)  # each (R * B,)
    (losses.total.sum() * backbone.gradient_scale).backward()

    gradients: dict[str, list[Tensor]] = {tower: [] for tower in vectors}
    for i, encoded in enumerate(with_graph):
        leaf, grad = leaves[keys[i % anchors]], context_leaf.grad[:, i : i + 1]
        pulled_back = torch.autograd.grad(encoded.rows, list(leaf.values()), grad, retain_graph=True)
        for tower, gradient in zip(leaf, pulled_back, strict=True):
            gradients[tower].append(gradient / backbone.gradient_scale)
    by_picture = {tower: torch.stack(g).unflatten(0, (roles, anchors)) for tower, g in gradients.items()}
    return losses.detached((roles, anchors)), by_picture


def train(
    backbone: Backbone,
    data: EncodedExemplars,
    name: str,
    layout: BoundLayout,
    rule: GradientRule,
    settings: TrainingSettings,
    state: RunState,
    after_step: Callable[[RunState], bool],
    objective: Objective = DENOISING,
    adapted: AdaptedWeights = NO_WEIGHTS,
    source: FreeVectors | TokenGenerator = FREE,
) -> None:
    """Train `state.vectors` and `state.weights` in place from `state.step` to the last of the settings' steps.

    The base weights are left alone. after_step: sees the state after each step; returns True to stop early; may raise
    to cancel. adapted: where `state.weights` go. source: what the vectors come from, themselves or a network. Whenever
    this function is left, by whichever way, `state` is that of the last finished step, so a run resumed from it equals
    one never interrupted, bit for bit.

    Raises ValueError when the loss or a gradient is not finite.
    """
    source.attach(state)
    optimizer = state.make_optimizer(settings.learning_rate, settings.weight_decay, adapted.learning_rate)
    schedule_length, count = len(backbone.schedule), len(data.prompts)
    course = settings.course(layout, schedule_length)
    while state.step < settings.total_steps(layout.layout):
        # Random numbers are a function of (seed, step), so a resumed run draws what an uninterrupted one would; the
        # rule has its own, so that runs which differ in the rule alone see the same anchors, timesteps and noise.
        generator = step_generator(settings.seed, state.step, "batch")
        rule_generator = step_generator(settings.seed, state.step, "rule")
        course.begin(state.step, state.vectors, optimizer)

        # What to look at: B anchors, for each the pictures of all roles (R, B, C, h, w), timesteps and noise.
        anchors = draw_anchors(count, settings.batch_size, generator)
        pictures = [rule.pictures(data, i, rule_generator) for i in anchors]
        latents = torch.stack([p.latents for p in pictures], dim=1)
        masks = None
        if settings.use_masks and data.masks is not None:
            masks = torch.stack([p.masks for p in pictures], dim=1)
        roles, batch = latents.shape[:2]
        t_shape = (1 if rule.share_timestep else roles, batch)
        t = course.timesteps(state.step, t_shape, generator).expand(roles, batch)
        noise_shape = (1 if rule.share_noise else roles, *latents.shape[1:])
        eps = torch.randn(noise_shape, generator=generator).to(latents).expand_as(latents)

        # What they ask of the vectors, what the rule lets through, and what the terms of the vectors alone ask.
        prompts = [data.prompts[i] for i in anchors]
        optimizer.zero_grad()
        with adapted.applied(state.weights):
            watch = objective.watch(anchors, roles)
            losses, gradients = concept_gradients(
                backbone, name, prompts, state.vectors, layout, latents, t, eps, masks, watch
            )
        updates = {tower: rule.combine(g, rule_generator) for tower, g in gradients.items()}
        read = layout.slots_of({layout.stage(int(t_), schedule_length) for t_ in t.flatten()})
        pulls, values = objective.pull(state.vectors, read, state.step, state.memory)

        for tower, v in state.vectors.items():
            v.grad = course.route(state.step, updates[tower].gradient + pulls[tower])
        for weight in state.weights.values():
            weight.grad /= batch * backbone.gradient_scale
        leaves = [*state.vectors.values(), *state.weights.values()]
        check_finite([losses.total, *gradients.values(), *(leaf.grad for leaf in leaves)], state.step)

        before = {tower: v.detach().clone() for tower, v in state.vectors.items()}
        source.pull_back(state)
        optimizer.step()
        source.put(state)
        with torch.no_grad():
            for tower, v in state.vectors.items():
                for movable in (updates[tower].movable, course.movable(state.step, v)):
                    if movable is not None:
                        v.copy_(torch.where(movable, v, before[tower]))

        denoising = losses.denoising[0].mean().item()
        values |= {label: value[0].mean().item() for label, value in losses.terms.items()}
        stats = {k: v for update in updates.values() for k, v in update.stats.items()}
        stats |= {label: value / denoising for label, value in values.items()}
        state.finish_step(denoising, stats, optimizer)
        if after_step(state):
            return


def step_generator(seed: int, step: int, purpose: str) -> torch.Generator:
    """Random numbers of one step of a run, on the CPU."""
    digest = hashlib.sha256(f"{seed} {step} {purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))


def draw_anchors(count: int, batch_size: int, generator: torch.Generator) -> list[int]:
    """batch_size of `count` exemplars, each at most once more than any other."""
    rounds = [torch.randperm(count, generator=generator) for _ in range(math.ceil(batch_size / count))]
    return torch.cat(rounds)[:batch_size].tolist()


def check_finite(values: Sequence[Tensor], step: int) -> None:
    """Raise ValueError when a loss or gradient is NaN or infinite."""
    if not all(value.isfinite().all() for value in values):
        raise ValueError(
            f"The loss is not finite at step {step + 1}; the vectors of step {step} are kept. Lower the learning "
            "rate, or load the checkpoint in bf16 or fp32 if it runs in fp16."
        )
