"""ADI's pictures of the same context with other actions, x^(abar,c), made from one exemplar (arXiv 2311.15841, 4.2).

The paper fine-tunes a whole diffusion model on each single exemplar (DreamBooth, no prior pictures), then fills the
exemplar's own caption with descriptions of other actions and samples. Here the fine-tuning is low-rank (METHODS 1.3:
whole models cost twice as much as ADI itself, and the pictures need not be perfect).

The paper does not say which text goes with the exemplar while fine-tuning. Here it is the exemplar's caption with the
blank taken out: it names the person and the place, which are to be kept, and no action, so that no word for an action
is bound to the pose of the exemplar and every such word still means what the base model knows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .backbone import Backbone, TextContext
from .exemplars import Exemplar
from .prompts import BLANK, Prompt
from .sampling import paint
from .weight_plan import ATTENTION, AdaptedWeights, WeightPlan


@dataclass(frozen=True)
class ContextSettings:
    """How a one-exemplar model is learned and sampled.

    steps, rank, learning_rate: of the low-rank fine-tuning (AdamW, batch of one). sampling_steps, cfg, eta: of
    DDIM. seed: of everything random.
    """

    steps: int = 300
    rank: int = 4
    learning_rate: float = 1e-4
    sampling_steps: int = 25
    cfg: float = 7.5
    seed: int = 0
    eta: float = 0.0

    def total_steps(self, pictures: int) -> int:
        """Steps reported for one exemplar and that many pictures."""
        return self.steps + pictures * self.sampling_steps


def fill_with_action(caption: str, action: str) -> str:
    """The caption with words for an action in its blank; with no words, the blank is taken out."""
    return re.sub(r"\s+", " ", caption.replace(BLANK, action)).strip()


def choose_actions(actions: Sequence[str], exemplars: int, pictures: int) -> list[tuple[str, ...]]:
    """The actions of each exemplar's pictures, in turn, so that all actions are used equally often."""
    return [tuple(actions[(e * pictures + p) % len(actions)] for p in range(pictures)) for e in range(exemplars)]


def learn_context(
    backbone: Backbone,
    exemplar: Exemplar,
    settings: ContextSettings,
    on_step: Callable[[int], None] = lambda step: None,
) -> tuple[AdaptedWeights, Mapping[str, Tensor]]:
    """Fit a low-rank change to one exemplar: || eps - eps_theta(x_t, t, caption without blank) ||^2.

    on_step: called with the number of finished steps, may raise to cancel. Gradients must be possible.
    Returns where the change goes and the change itself.
    Raises ValueError when the loss or a gradient is not finite.
    """
    x_0 = backbone.encode_image(exemplar.image[None].to(backbone.device))
    text = fill_with_action(exemplar.caption, "")
    with torch.no_grad():
        encoding = backbone.encode_text(Prompt((text,) if text else ()), {})
    context = TextContext.plain(encoding.hidden, backbone.layers, encoding.pooled)
    adapted = WeightPlan(ATTENTION, settings.rank, settings.learning_rate).bind(backbone)
    weights = {name: weight.requires_grad_() for name, weight in adapted.start(settings.seed).items()}
    optimizer = torch.optim.AdamW(weights.values(), lr=settings.learning_rate)
    generator = torch.Generator().manual_seed(settings.seed)
    with adapted.applied(weights):
        for step in range(settings.steps):
            t = torch.randint(len(backbone.schedule), (1,), generator=generator).to(backbone.device)
            eps = torch.randn(x_0.shape, generator=generator).to(backbone.device)
            x_t = backbone.schedule.add_noise(x_0, t, eps)
            loss = F.mse_loss(backbone.predict_noise(x_t, t, context), eps)
            optimizer.zero_grad()
            (loss * backbone.gradient_scale).backward()
            for weight in weights.values():
                weight.grad /= backbone.gradient_scale
            if not torch.stack([weight.grad.isfinite().all() for weight in weights.values()]).all():
                raise ValueError(
                    f"The context model's gradient is not finite at step {step + 1}: lower the context learning rate, "
                    "or load the checkpoint in bf16 or fp32 if it runs in fp16."
                )
            optimizer.step()
            on_step(step + 1)
    return adapted, weights


def paint_other_actions(
    backbone: Backbone,
    exemplar: Exemplar,
    actions: Sequence[str],
    settings: ContextSettings,
    on_step: Callable[[int], None] = lambda step: None,
) -> tuple[Tensor, ...]:
    """Pictures (H, W, 3) of the exemplar's context, one for each of `actions`: learn the context, then sample.

    on_step: called with the number of finished steps out of settings.total_steps(len(actions)), may raise to cancel;
    the model is left as it was then, too.
    """
    adapted, weights = learn_context(backbone, exemplar, settings, on_step)
    height, width = exemplar.image.shape[:2]
    pictures = []
    with adapted.applied(weights):
        for number, action in enumerate(actions):
            prompt = Prompt((fill_with_action(exemplar.caption, action),))
            done = settings.total_steps(number)
            [picture] = paint(
                backbone,
                [prompt],
                {},
                {},
                [settings.seed + number],
                (height, width),
                settings.sampling_steps,
                settings.cfg,
                settings.eta,
                lambda step, done=done: on_step(done + step),
            )
            pictures.append(picture.cpu())
    return tuple(pictures)
