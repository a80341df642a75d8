"""The one-exemplar context model, on the toy model with random weights."""

import pytest
import torch
import torch.nn.functional as F
from concept_atelier.kernels.backbone import TextContext
from concept_atelier.kernels.context_model import (
    ContextSettings,
    choose_actions,
    fill_with_action,
    learn_context,
    paint_other_actions,
)
from concept_atelier.kernels.diffusers_backbone import DiffusersBackbone
from concept_atelier.kernels.exemplars import Exemplar
from concept_atelier.kernels.prompts import Prompt
from concept_atelier.toyworld.model import load_toy

QUICK = ContextSettings(steps=6, rank=2, learning_rate=1e-3, sampling_steps=3, cfg=2.0, seed=5)
ACTIONS = ("stands", "sits")


@pytest.fixture(scope="module")
def backbone() -> DiffusersBackbone:
    return DiffusersBackbone.from_toy(load_toy(random_weights=True))


@pytest.fixture
def exemplar() -> Exemplar:
    image = torch.rand(64, 64, 3, generator=torch.Generator().manual_seed(0))
    return Exemplar(image, "a panda {} on grass")


def base_state(backbone: DiffusersBackbone) -> dict[str, torch.Tensor]:
    modules = (backbone.unet, backbone.text_towers[0].encoder)
    return {f"{i}.{key}": v.clone() for i, m in enumerate(modules) for key, v in m.state_dict().items()}


def denoising_errors(backbone: DiffusersBackbone, exemplar: Exemplar, caption: str) -> float:
    x_0 = backbone.encode_image(exemplar.image[None]).repeat(32, 1, 1, 1)
    generator = torch.Generator().manual_seed(99)
    t = torch.randint(1000, (32,), generator=generator)
    eps = torch.randn(x_0.shape, generator=generator)
    hidden = backbone.encode_text(Prompt((caption,)), {}).hidden
    context = TextContext.plain(hidden, backbone.layers).repeat(32)
    with torch.no_grad():
        return F.mse_loss(backbone.predict_noise(backbone.schedule.add_noise(x_0, t, eps), t, context), eps).item()


def test_an_action_fills_the_blank_and_no_action_takes_it_out():
    assert fill_with_action("a panda {} on grass", "does a handstand") == "a panda does a handstand on grass"
    assert fill_with_action("a panda {} on grass", "") == "a panda on grass"
    assert fill_with_action("{} a panda", "") == "a panda"


def test_actions_are_used_in_turn():
    assert choose_actions(["a", "b", "c"], exemplars=3, pictures=2) == [("a", "b"), ("c", "a"), ("b", "c")]
    assert choose_actions(["a"], exemplars=1, pictures=3) == [("a", "a", "a")]


def test_it_learns_its_exemplar(backbone, exemplar):
    caption = "a panda on grass"
    before = denoising_errors(backbone, exemplar, caption)
    adapted, weights = learn_context(backbone, exemplar, ContextSettings(steps=60, learning_rate=1e-2))
    assert denoising_errors(backbone, exemplar, caption) == before
    with adapted.applied(weights):
        assert denoising_errors(backbone, exemplar, caption) < 0.96 * before


def test_the_text_it_learns_from_names_no_action(backbone, exemplar, monkeypatch):
    texts = []
    encode_text = backbone.encode_text

    def listening(prompt, vectors):
        texts.append(prompt.text)
        return encode_text(prompt, vectors)

    monkeypatch.setattr(backbone, "encode_text", listening)
    paint_other_actions(backbone, exemplar, ACTIONS, QUICK)
    assert texts == ["a panda on grass", "a panda stands on grass", "", "a panda sits on grass", ""]


def test_a_picture_for_each_action(backbone, exemplar):
    pictures = paint_other_actions(backbone, exemplar, ACTIONS, QUICK)
    assert [p.shape for p in pictures] == [(64, 64, 3)] * 2
    assert all(p.min() >= 0 and p.max() <= 1 for p in pictures)
    assert not torch.equal(*pictures)


def test_the_seed_decides(backbone, exemplar):
    first, again = (torch.stack(paint_other_actions(backbone, exemplar, ACTIONS, QUICK)) for _ in range(2))
    other = torch.stack(paint_other_actions(backbone, exemplar, ACTIONS, ContextSettings(**{**vars(QUICK), "seed": 6})))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_every_step_is_reported(backbone, exemplar):
    reported = []
    paint_other_actions(backbone, exemplar, ACTIONS, QUICK, reported.append)
    assert reported == list(range(1, QUICK.total_steps(2) + 1))


@pytest.mark.parametrize("when", [3, QUICK.steps + 2], ids=["while learning", "while sampling"])
def test_base_weights_are_untouched_also_after_a_cancel(backbone, exemplar, when):
    before, error = base_state(backbone), denoising_errors(backbone, exemplar, "a cat sits")

    def cancel(step: int) -> None:
        if step == when:
            raise KeyboardInterrupt

    paint_other_actions(backbone, exemplar, ACTIONS, QUICK)
    with pytest.raises(KeyboardInterrupt):
        paint_other_actions(backbone, exemplar, ACTIONS, QUICK, cancel)
    after = base_state(backbone)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert denoising_errors(backbone, exemplar, "a cat sits") == error


def test_a_gradient_that_is_not_finite_stops_it(backbone, exemplar):
    broken = Exemplar(exemplar.image * float("nan"), exemplar.caption)
    with pytest.raises(ValueError, match="not finite at step 1"):
        learn_context(backbone, broken, QUICK)
