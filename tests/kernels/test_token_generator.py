"""Vectors that a small network makes: they start as the word, learn through it, and come back from a file."""

import pytest
import torch
from concept_atelier.kernels.concept_run import ConceptRun
from concept_atelier.kernels.diffusers_backbone import DiffusersBackbone
from concept_atelier.kernels.exemplars import Exemplar
from concept_atelier.kernels.gradient_mask import GradientMask
from concept_atelier.kernels.gradient_rules import MaskedTriples, PlainGradient
from concept_atelier.kernels.layouts import Layout
from concept_atelier.kernels.run_state import RunState
from concept_atelier.kernels.token_generator import TokenGenerator
from concept_atelier.kernels.training import TrainingSettings
from concept_atelier.toyworld.model import load_toy
from torch import Tensor

SLOTS = 10


def words(n: int = 1, towers: tuple[tuple[str, int], ...] = (("l", 24),)) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {tower: 0.02 * torch.randn(n, width, generator=generator) for tower, width in towers}


@pytest.mark.parametrize("towers", [(("l", 24),), (("l", 24), ("g", 40))])
@pytest.mark.parametrize("n", [1, 3])
def test_every_slot_starts_as_the_word(n, towers):
    start = words(n, towers)
    vectors = TokenGenerator(start, SLOTS, 0).vectors()
    assert list(vectors) == list(start)
    for tower, word in start.items():
        assert torch.equal(vectors[tower], word.expand(SLOTS, -1, -1))


def pull_back(made: TokenGenerator, gradients: dict[str, Tensor]) -> None:
    state = RunState.start(made.vectors())
    for tower, gradient in gradients.items():
        state.vectors[tower].grad = gradient
    made.pull_back(state)
    assert all(v.grad is None for v in state.vectors.values())


def moved(seed: int = 0, steps: int = 3) -> TokenGenerator:
    """A generator some steps on its way to ten different vectors."""
    made = TokenGenerator(words(2), SLOTS, seed)
    target = torch.randn(SLOTS, 2, 24, generator=torch.Generator().manual_seed(2))
    optimizer = torch.optim.AdamW(made.parameters(), 1e-3)
    for _ in range(steps):
        pull_back(made, {"l": (made.vectors()["l"] - target).detach()})
        optimizer.step()
    return made


def test_it_learns_what_free_vectors_would():
    target = torch.randn(SLOTS, 2, 24, generator=torch.Generator().manual_seed(2))
    errors = [(moved(steps=steps).vectors()["l"] - target).square().mean().item() for steps in (0, 100)]
    assert errors[1] < 0.1 * errors[0]


def test_the_gradient_is_pulled_back_through_the_whole_network():
    made = moved()
    pull = torch.randn(SLOTS, 2, 24, generator=torch.Generator().manual_seed(3))
    pull_back(made, {"l": pull})
    weights = list(made.parameters())
    assert all(w.grad.any() for w in weights)
    norm = torch.stack([w.grad.square().sum() for w in weights]).sum().sqrt()
    with torch.no_grad():
        values = []
        for h in (1e-2, -2e-2):  # from +h to -h, along the gradient
            for w in weights:
                w.add_(w.grad, alpha=h / norm.item())
            values.append((made.vectors()["l"] * pull).sum().item())
    assert (values[0] - values[1]) / 2e-2 == pytest.approx(norm.item(), rel=0.02)


def test_words_stay_and_slots_part():
    made = moved()
    assert torch.equal(made.blocks["l"].words, words(2)["l"])
    vectors = made.vectors()["l"]
    assert all((vectors[i] - vectors[j]).abs().max() > 1e-3 for i in range(SLOTS) for j in range(i))


def test_the_seed_decides_and_the_global_generator_is_left_alone():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    assert torch.equal(moved(1).vectors()["l"], moved(1).vectors()["l"])
    assert not torch.equal(moved(1).vectors()["l"], moved(2).vectors()["l"])
    assert torch.equal(torch.rand(3), expected)


def test_its_size_is_that_of_prospect():
    made = TokenGenerator({"l": torch.zeros(1, 768)}, 10, 0)
    assert sum(w.numel() for w in made.parameters()) == pytest.approx(31.4e6, rel=0.01)


class Quiet:
    """A report that stops after a number of steps."""

    def __init__(self, stop_at: int) -> None:
        self.stop_at, self.stop_requested = stop_at, False

    def step(self, step, loss_history, stats) -> None:
        self.stop_requested = step == self.stop_at

    def samples(self, image_grid) -> None:
        pass

    def say(self, lines) -> None:
        pass


def a_run(rule=None, **settings) -> ConceptRun:
    images = torch.rand(4, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    exemplars = [Exemplar(image, "a {} on grass", None, (other,)) for image, other in zip(images[:2], images[2:])]
    layout = Layout(stages=3, split_kv=True, generated=True)
    values = {"steps": 4, "learning_rate": 1e-3, "weight_decay": 0.0, **settings}
    return ConceptRun("it", "man", exemplars, layout, rule or PlainGradient(), TrainingSettings(**values))


def test_the_loop_trains_the_network_and_keeps_its_vectors(tmp_path):
    backbone = DiffusersBackbone.from_toy(load_toy(random_weights=True))
    concept, state, _ = a_run().learn(backbone, tmp_path / "a", Quiet(0))
    word, vectors = backbone.token_vectors("man")["l"], concept.vectors["l"]
    assert vectors.shape == (6, 1, word.shape[1]) and (vectors - word).abs().max() > 1e-4
    assert all(name.startswith("blocks.l") for name in state.generator) and set(state.moments) == set(state.generator)

    run = a_run(steps=5)
    whole, _, _ = run.learn(backbone, tmp_path / "b", Quiet(0))
    run.learn(backbone, tmp_path / "c", Quiet(2))
    [folder] = (tmp_path / "c").iterdir()
    stopped = RunState.load(folder / "state.safetensors", backbone.device)
    stopped.stopped_short_of = 0  # as after a cancel
    stopped.save(folder / "state.safetensors")
    resumed, _, _ = run.learn(backbone, tmp_path / "c", Quiet(0))
    assert torch.equal(whole.vectors["l"], resumed.vectors["l"])


@pytest.mark.parametrize(
    ("rule", "settings"), [(MaskedTriples(GradientMask(target="update")), {}), (None, {"steps_each_stage": 2})]
)
def test_generated_vectors_cannot_be_held_still_one_by_one(rule, settings):
    with pytest.raises(ValueError, match="choose free vectors in Token Layout"):
        a_run(rule, **settings)
