"""Anchors, their sparse code and the anchor loss: METHODS.md 2.10, properties 1 to 4 and 9."""

import dataclasses
from itertools import combinations

import pytest
import tiny_diffusers
import torch
import torch.nn.functional as F
from concept_atelier.kernels.anchor_loss import AnchorLoss, BoundAnchorLoss
from concept_atelier.kernels.anchors import (
    COCO_NAMES,
    anchor_weights,
    sparse_code,
    split_words,
    squared_distance,
)
from concept_atelier.kernels.concept import new_vectors
from concept_atelier.kernels.diffusers_backbone import DiffusersBackbone
from concept_atelier.kernels.exemplars import Exemplar, encode_exemplars
from concept_atelier.kernels.gradient_rules import PlainGradient
from concept_atelier.kernels.layouts import Layout
from concept_atelier.kernels.losses import Learning
from concept_atelier.kernels.objective import DENOISING, Objective
from concept_atelier.kernels.prompts import fill_blank
from concept_atelier.kernels.run_state import RunState
from concept_atelier.kernels.training import TrainingSettings, train
from concept_atelier.toyworld.model import load_toy

NAME = "thing"
WORDS = ("cat", "panda", "robot", "tree", "ball")


@pytest.fixture(scope="module")
def toy() -> DiffusersBackbone:
    return DiffusersBackbone.from_toy(load_toy(random_weights=True))


@pytest.fixture(scope="module")
def sdxl() -> DiffusersBackbone:
    return DiffusersBackbone.from_pipeline(tiny_diffusers.build("sdxl"))


@pytest.fixture(scope="module")
def data(toy):
    images = torch.rand(2, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    return encode_exemplars(toy, [Exemplar(image, "a {} cat on grass") for image in images], NAME)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def error(e: torch.Tensor, dictionary: torch.Tensor, delta: torch.Tensor) -> float:
    return (e - delta @ dictionary).norm().item()


def brute_force(e: torch.Tensor, dictionary: torch.Tensor, atoms: int) -> torch.Tensor:
    """The best of all non-negative codes: the least squares on every set of at most `atoms` anchors."""
    best = torch.zeros(len(dictionary), dtype=torch.float64)
    for size in range(1, atoms + 1):
        for chosen in map(list, combinations(range(len(dictionary)), size)):
            fitted = torch.linalg.lstsq(dictionary[chosen].T, e[:, None]).solution[:, 0]
            delta = torch.zeros_like(best)
            delta[chosen] = fitted
            if (fitted >= 0).all() and error(e, dictionary, delta) < error(e, dictionary, best):
                best = delta
    return best


# Sparse coding


@pytest.mark.parametrize("seed", range(8))
def test_one_anchor_is_the_best_single_one(seed):
    e, dictionary = random(6, seed=seed), random(7, 6, seed=100 + seed)
    assert torch.allclose(sparse_code(e, dictionary, 1), brute_force(e, dictionary, 1))


@pytest.mark.parametrize("seed", range(8))
def test_without_a_limit_it_is_the_best_non_negative_code(seed):
    e, dictionary = random(8, seed=seed), random(6, 8, seed=100 + seed) + 0.8  # correlated, so that anchors leave again
    assert torch.allclose(sparse_code(e, dictionary, 6), brute_force(e, dictionary, 6), atol=1e-9)


@pytest.mark.parametrize("seed", range(8))
def test_what_is_made_of_few_distinct_anchors_is_found(seed):
    basis = torch.linalg.qr(random(8, 8, seed=seed))[0]
    dictionary = basis[:6] + 0.03 * random(6, 8, seed=100 + seed)
    made_of = torch.tensor([0, 2.0, 0, 0.7, 1.1, 0], dtype=torch.float64).roll(seed)
    e = made_of @ dictionary
    delta = sparse_code(e, dictionary, 3)
    assert torch.allclose(delta, made_of, atol=1e-9)
    assert torch.allclose(delta, brute_force(e, dictionary, 3), atol=1e-9)


@pytest.mark.parametrize("seed", range(8))
def test_a_greedy_code_lies_between_the_best_one_and_a_single_anchor(seed):
    e, dictionary = random(10, seed=seed), random(8, 10, seed=100 + seed)
    greedy = error(e, dictionary, sparse_code(e, dictionary, 3))
    assert error(e, dictionary, brute_force(e, dictionary, 3)) <= greedy + 1e-9
    assert greedy < error(e, dictionary, brute_force(e, dictionary, 1))


@pytest.mark.parametrize("atoms", [1, 2, 3, 5])
def test_a_code_is_sparse_and_not_negative(atoms):
    for seed in range(20):
        delta = sparse_code(random(16, seed=seed), random(30, 16, seed=100), atoms)
        assert (delta >= 0).all() and 1 <= (delta > 0).sum() <= atoms


def test_an_anchor_codes_as_itself_and_is_not_pulled():
    dictionary = random(9, 12)
    weights = anchor_weights(dictionary[4], dictionary, 3)
    assert torch.equal(weights, torch.eye(9, dtype=torch.float64)[4])
    assert squared_distance(dictionary[4], weights, dictionary) == 0


def test_order_and_unseen_directions_of_other_anchors_do_not_matter():
    e, dictionary = random(12, seed=1), random(9, 12)
    delta = sparse_code(e, dictionary, 3)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(2))
    assert torch.allclose(sparse_code(e, dictionary[order], 3), delta[order])

    used = delta > 0
    span = torch.linalg.qr(torch.cat([dictionary[used], e[None]]).T)[0]
    noise = random(9, 12, seed=3)
    noise[used] = 0
    noise -= noise @ span @ span.T
    assert noise.abs().max() > 1
    assert torch.allclose(sparse_code(e, dictionary + noise, 3), delta)


def test_a_longer_vector_has_the_same_anchors():
    e, dictionary = random(12, seed=1), random(9, 12)
    assert torch.allclose(sparse_code(5 * e, dictionary, 3), 5 * sparse_code(e, dictionary, 3))
    assert torch.allclose(anchor_weights(5 * e, dictionary, 3), anchor_weights(e, dictionary, 3))


def test_weights_sum_to_one_for_every_vector():
    vectors, dictionary = random(2, 3, 12).float(), random(9, 12, seed=1).float()
    weights = anchor_weights(vectors, dictionary, 3)
    assert weights.shape == (2, 3, 9) and weights.dtype == torch.float32
    assert torch.allclose(weights.sum(dim=-1), torch.ones(2, 3))
    assert torch.allclose(weights[1, 2], anchor_weights(vectors[1, 2], dictionary, 3))


def test_what_points_away_from_all_anchors_belongs_to_the_class_word():
    assert anchor_weights(torch.tensor([-1.0, -1.0]), torch.eye(2), 2).tolist() == [1, 0]


def test_the_spring_has_the_gradient_of_equation_6():
    e, dictionary = random(12, seed=1).requires_grad_(), random(9, 12)
    weights = anchor_weights(e, dictionary, 3)
    equation_6 = (weights * (e - dictionary).square().sum(dim=1)).sum()
    spring = squared_distance(e, weights, dictionary)
    assert torch.allclose(*(torch.autograd.grad(value, e)[0] for value in (equation_6, spring)))
    spread = (weights * (weights @ dictionary - dictionary).square().sum(dim=1)).sum()
    assert spring.item() == pytest.approx((equation_6 - spread).item())


def test_words_are_read_from_lines_and_commas():
    assert split_words(" Cat, hot  dog\n\ncat,\npanda ") == ("cat", "hot dog", "panda")
    assert len(COCO_NAMES) == 80


# The loss term


def learning(backbone: DiffusersBackbone, layout: Layout | None = None, init_word: str = "cat") -> Learning:
    prompts = (fill_blank("a {} cat on grass", NAME),)
    return Learning(backbone, NAME, (layout or Layout()).bind(backbone.layers, init_word), init_word, prompts)


def bind(backbone: DiffusersBackbone, layout: Layout | None = None, **changes) -> BoundAnchorLoss:
    return AnchorLoss(**{"source": "words", "words": WORDS, **changes}).bind(learning(backbone, layout))


def away(backbone: DiffusersBackbone, slots: int = 1, tokens: int = 1, word: str = "cat") -> dict[str, torch.Tensor]:
    """Vectors near a word, each somewhere else."""
    vectors = new_vectors(backbone.token_vectors(word), slots, tokens)
    return {
        tower: v + 0.3 * v.norm(dim=-1).mean() * random(*v.shape).float() / v.shape[-1] ** 0.5
        for tower, v in vectors.items()
    }


def test_anchors_are_the_words_of_one_piece_with_the_class_word_first(toy):
    assert bind(toy).dictionaries["l"].words == WORDS
    assert bind(toy, class_word="man").dictionaries["l"].words == ("man", *WORDS)
    coco = bind(toy, source="coco", words=()).dictionaries["l"]
    assert coco.words[0] == "cat" and {"person", "bear", "cup"} < set(coco.words) < set(COCO_NAMES)
    assert all(torch.equal(row, toy.token_vectors(word)["l"][0]) for word, row in zip(*coco, strict=True))


def test_nearest_words_are_those_of_the_smallest_angle(sdxl):
    dictionaries = bind(sdxl, source="nearest", words=(), neighbours=4).dictionaries
    for tower, dictionary in dictionaries.items():
        words, table = sdxl.word_table(tower)
        cosine = F.cosine_similarity(table, sdxl.token_vectors("cat")[tower])
        by_angle = sorted(words, key=lambda word: -cosine[words.index(word)].item())
        assert dictionary.words == tuple(by_angle[:5]) and dictionary.words[0] == "cat"
        assert torch.equal(dictionary.vectors[3], table[words.index(dictionary.words[3])])
    assert dictionaries["l"].words != dictionaries["g"].words


def test_at_the_class_word_alone_nothing_pulls(toy):
    term = bind(toy, source="class word", words=(), scale="code")
    e = new_vectors(toy.token_vectors("cat"), 1, 1)["l"].requires_grad_()
    value = term.value({"l": e}, 0, {})
    value.backward()
    assert value == 0 and not e.grad.any()
    assert term.describe({"l": e}, {}) == "cat 1.00"


@pytest.mark.parametrize("batch", [1, 3])
def test_the_codes_form_is_the_mean_over_the_released_codes_tensors(toy, batch):
    """There, token embeddings of a batch of prompts, the placeholder's column against the class word's."""
    e, e_class = away(toy)["l"], toy.token_vectors("cat")["l"]
    prompts = random(batch, 77, e.shape[-1]).float()
    ours, theirs = prompts.clone(), prompts.clone()
    for row in range(batch):
        ours[row, 4 + row], theirs[row, 4 + row] = e[0, 0], e_class[0]
    value = bind(toy, source="class word", words=(), scale="code").value({"l": e}, 0, {})
    assert value.item() == pytest.approx(F.mse_loss(ours, theirs).item(), rel=1e-4)
    assert value.item() == pytest.approx((e[0, 0] - e_class[0]).square().sum().item() / (77 * e.shape[-1]), rel=1e-6)


def test_the_papers_form_is_the_printed_sum_over_the_number_of_anchors(toy):
    e, term = away(toy)["l"].requires_grad_(), bind(toy, scale="paper")
    dictionary = term.dictionaries["l"].vectors
    weights = anchor_weights(e, dictionary, 3)[0, 0]
    printed = (weights * (e[0] - dictionary).square().sum(dim=1)).sum() / len(WORDS)
    ours = torch.autograd.grad(term.value({"l": e}, 0, {}), e)[0]
    assert torch.allclose(ours, torch.autograd.grad(printed, e)[0], atol=1e-7)


def test_lambda_means_the_same_for_any_anchors_and_any_scale_of_embeddings(toy, sdxl):
    """A vector twice as long as the class word is its length away from it, whatever the anchors are."""
    for source, words in (("words", WORDS), ("words", WORDS[:2]), ("class word", ()), ("coco", ())):
        e = 2 * new_vectors(toy.token_vectors("cat"), 1, 1)["l"]
        term = bind(toy, source=source, words=words, atoms=1)
        assert term.value({"l": e}, 0, {}).item() == pytest.approx(1 / e.shape[-1], rel=1e-5)
    vectors = {tower: 2 * v for tower, v in new_vectors(sdxl.token_vectors("cat"), 1, 1).items()}
    widths = sdxl.towers.values()
    expected = sum(1 / width for width in widths) / len(widths)
    assert bind(sdxl, atoms=1).value(vectors, 0, {}).item() == pytest.approx(expected, rel=1e-5)


def test_several_vectors_count_by_their_mean(toy):
    layout, vectors = Layout("block", tokens=2), away(toy, slots=7, tokens=2)
    term = bind(toy, layout)
    each = [term.value({"l": vectors["l"][s : s + 1, n : n + 1]}, 0, {}) for s in range(7) for n in range(2)]
    assert term.value(vectors, 0, {}).item() == pytest.approx(torch.stack(each).mean().item(), rel=1e-5)


def test_each_tower_has_its_own_spring(sdxl):
    vectors = {tower: v.requires_grad_() for tower, v in away(sdxl).items()}
    term, memory = bind(sdxl), {}
    term.value(vectors, 0, memory).backward()
    assert not torch.allclose(*memory.values())
    for tower, v in vectors.items():
        dictionary = term.dictionaries[tower].vectors
        pull = v.detach() - anchor_weights(v, dictionary, 3) @ dictionary
        assert F.cosine_similarity(v.grad, pull, dim=-1).item() == pytest.approx(1, abs=1e-5)
    line_l, line_g = term.describe(vectors, memory).split("; ")
    assert line_l.startswith("l: cat 0.") and line_g.startswith("g: cat 0.")


def test_the_code_is_kept_and_refreshed_every_k_steps(toy):
    term, memory = bind(toy, refresh=3), {}
    codes = []
    for step in range(7):
        vectors = {"l": new_vectors(toy.token_vectors(WORDS[step % 5]), 1, 1)["l"]}
        term.value(vectors, step, memory)
        codes.append(term.describe(vectors, memory))
    assert codes == ["cat 1.00"] * 3 + ["tree 1.00"] * 3 + ["panda 1.00"]


def test_a_layout_of_stages_codes_the_slots_that_a_step_reads(toy):
    term, memory = bind(toy, Layout(stages=5)), {}
    assert term.value(new_vectors(toy.token_vectors("cat"), 1, 1), 0, memory) == 0
    assert term.value(new_vectors(toy.token_vectors("tree"), 1, 1), 1, memory) == 0
    assert term.describe(new_vectors(toy.token_vectors("ball"), 5, 1), memory) == "ball 1.00"


def test_the_line_shows_weights_in_order_and_what_was_left_out(toy):
    dictionary = bind(toy).dictionaries["l"].vectors
    e = (0.2 * dictionary[0] + 0.7 * dictionary[2] + 0.1 * dictionary[3])[None, None]
    term = bind(toy, words=(*WORDS, "wine glass"))
    assert term.describe({"l": e}, {}) == "robot 0.70, cat 0.20, tree 0.10; left out, not one piece: wine glass"


def test_bad_words_are_named(toy):
    with pytest.raises(ValueError, match=r"anchor words \(wine glass, toothbrush\) is one piece"):
        bind(toy, words=("wine glass", "toothbrush"))
    for source in ("words", "nearest", "class word"):
        with pytest.raises(ValueError, match='class word "polar bear" is not one piece'):
            bind(toy, source=source, class_word="polar bear")
    with pytest.raises(ValueError, match='"words", which is empty'):
        AnchorLoss(source="words")
    with pytest.raises(ValueError, match="tail rows"):
        bind(toy, Layout(place="tail residual"))


# In the training loop


def run(toy, data, *terms: AnchorLoss, state: RunState | None = None, layout: Layout | None = None, **settings):
    bound = (layout or Layout()).bind(toy.layers)
    state = state or RunState.start(away(toy, bound.slots))
    settings = TrainingSettings(**{"steps": 4, "learning_rate": 1e-2, "weight_decay": 0.0, **settings})
    objective = Objective.of(terms, learning(toy, layout)) if terms else DENOISING
    train(toy, data, NAME, bound, PlainGradient(), settings, state, lambda _: False, objective)
    return state


def test_lambda_zero_is_plain_textual_inversion_bit_for_bit(toy, data):
    plain, with_term = run(toy, data), run(toy, data, AnchorLoss(lam=0.0))
    assert torch.equal(plain.vectors["l"], with_term.vectors["l"])
    assert plain.losses == with_term.losses


def test_two_terms_of_a_kind_are_refused_unless_one_is_off(toy):
    with pytest.raises(ValueError, match='one kind, "anchor : denoising": connect a single one'):
        Objective.of([AnchorLoss(0.5), AnchorLoss(0.25)], learning(toy))
    assert len(Objective.of([AnchorLoss(0.5), AnchorLoss(0.0)], learning(toy)).vector_terms) == 1


def test_lambda_one_goes_to_the_centroid(toy, data):
    loss = AnchorLoss(lam=1.0, source="words", words=WORDS, refresh=10**6)
    term, start = loss.bind(learning(toy)), away(toy)["l"]
    dictionary = term.dictionaries["l"].vectors
    centroid = anchor_weights(start, dictionary, 3) @ dictionary

    e = start.clone().requires_grad_()
    optimizer = torch.optim.AdamW([e], lr=1e-2, weight_decay=0.0)
    decay = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
    memory = {}
    for step in range(800):
        optimizer.zero_grad()
        term.value({"l": e}, step, memory).backward()
        optimizer.step()
        if step == 3:
            # The loop takes the same steps: the pictures have no say.
            assert torch.allclose(run(toy, data, loss, steps=4).vectors["l"], e, atol=1e-6)
        if step > 3:
            decay.step()
    assert (start - centroid).norm() > 0.05
    assert torch.allclose(e, centroid, atol=1e-5)


def test_the_objective_is_the_convex_sum_and_the_ratio_is_shown(toy, data):
    start = away(toy)["l"]
    gradients = []
    for lam in (0.0, 1.0, 0.3):
        state = run(toy, data, AnchorLoss(lam=lam, source="words", words=WORDS), steps=1)
        gradients.append(state.moments["l"]["exp_avg"] * 10)  # AdamW's first moment after a step is 0.1 g
    assert torch.allclose(gradients[2], 0.7 * gradients[0] + 0.3 * gradients[1], atol=1e-7)
    value = bind(toy).value({"l": start}, 0, {}).item()
    assert state.stats["anchor : denoising"] == pytest.approx([value / state.losses[0]])


def test_a_resumed_run_goes_on_with_the_code_it_had(toy, data, tmp_path):
    loss = AnchorLoss(lam=0.5, source="words", words=WORDS, refresh=3)
    through = run(toy, data, loss, steps=5, layout=Layout("block"))
    state = run(toy, data, loss, steps=2, layout=Layout("block"))
    state.save(tmp_path / "state.safetensors")
    state = RunState.load(tmp_path / "state.safetensors", toy.device)
    run(toy, data, loss, steps=5, layout=Layout("block"), state=state)
    assert torch.equal(state.vectors["l"], through.vectors["l"])
    assert state.losses == through.losses and state.stats == through.stats


def test_a_region_mask_masks(toy, data):
    ones = torch.ones(2, 1, *data.latents.shape[-2:])
    half = ones.clone()
    half[..., : half.shape[-1] // 2] = 0
    plain, whole, left_out = (
        run(toy, d, AnchorLoss(lam=0.3), steps=2)
        for d in (data, *(dataclasses.replace(data, masks=masks) for masks in (ones, half)))
    )
    assert whole.losses == pytest.approx(plain.losses, rel=1e-5)
    assert left_out.losses != pytest.approx(plain.losses, rel=1e-3)
