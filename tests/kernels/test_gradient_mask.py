"""ADI's masks by themselves: METHODS.md 1.11, properties 3, 4, 5, 10, 12."""

import itertools

import pytest
import torch
from concept_atelier.kernels.gradient_mask import (
    STRATEGIES,
    GradientMask,
    action_mask,
    context_mask,
    control_mask,
    independent_overlap,
    lowest_channels,
    masked_channels,
    merge_masks,
    overlap,
)
from concept_atelier.kernels.gradient_rules import MaskedTriples

LAYERS, D = 5, 64


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def gradients() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    # Whole numbers, so that adding a common vector or scaling by two is exact.
    return tuple(torch.randint(-1000, 1000, (LAYERS, D), generator=rng(i)).double() for i in range(3))


@pytest.mark.parametrize("beta", [0.0, 0.2, 0.6, 0.99, 1.0])
def test_each_mask_keeps_exactly_its_share_in_every_layer(gradients, beta):
    anchor, context, action = gradients
    kept = D - round(beta * D)
    assert masked_channels(D, beta) == round(beta * D)
    assert (context_mask(anchor, context, beta).sum(-1) == kept).all()
    assert (action_mask(anchor, action, beta).sum(-1) == kept).all()


def test_context_mask_closes_the_largest_and_action_mask_the_smallest_differences():
    anchor = torch.zeros(5)
    other = torch.tensor([5.0, -1.0, 3.0, -4.0, 2.0])
    assert context_mask(anchor, other, 0.4).tolist() == [False, True, True, False, True]
    assert action_mask(anchor, other, 0.4).tolist() == [True, False, True, True, False]


def test_masks_ignore_a_common_scale_and_a_common_vector(gradients):
    shift = torch.randint(-1000, 1000, (LAYERS, D), generator=rng(9)).double()
    rule = GradientMask()
    expected = rule.mask(*gradients, rng())
    assert torch.equal(rule.mask(*(2 * g for g in gradients), rng()), expected)
    assert torch.equal(rule.mask(*(g + shift for g in gradients), rng()), expected)


def test_masks_follow_a_permutation_of_channels():
    # Distinct values: ties would be decided by position.
    gradients = [torch.randn(LAYERS, D, generator=rng(i)) for i in range(3)]
    order = torch.randperm(D, generator=rng(4))
    permuted = GradientMask().mask(*(g[:, order] for g in gradients), rng())
    assert torch.equal(permuted, GradientMask().mask(*gradients, rng())[:, order])


def test_intersection_is_inside_both_and_union_around_both(gradients):
    anchor, context, action = gradients
    m_c, m_a = context_mask(anchor, context, 0.6), action_mask(anchor, action, 0.6)
    both, either = merge_masks(m_c, m_a, "intersection"), merge_masks(m_c, m_a, "union")
    assert not (both & ~m_c).any() and not (both & ~m_a).any()
    assert not (m_c & ~either).any() and not (m_a & ~either).any()
    assert both.sum() + either.sum() == m_c.sum() + m_a.sum()
    assert torch.equal(merge_masks(m_c, m_a, "context only"), m_c)
    assert torch.equal(merge_masks(m_c, m_a, "action only"), m_a)


def test_equal_pictures_leave_ties_that_go_to_the_lower_channel(gradients):
    anchor, _, action = gradients
    same = context_mask(anchor, anchor.clone(), 0.6)
    assert same[:, : D - masked_channels(D, 0.6)].all() and not same[:, D - masked_channels(D, 0.6) :].any()
    assert torch.equal(action_mask(anchor, action, 0.6), action_mask(anchor, action.clone(), 0.6))


def test_lowest_channels_of_a_known_row():
    assert lowest_channels(torch.tensor([3.0, 1.0, 2.0, 1.0]), 2).tolist() == [False, True, False, True]


def test_reversed_is_the_complement(gradients):
    adi = GradientMask(strategy="adi").mask(*gradients, rng())
    assert torch.equal(GradientMask(strategy="reversed").mask(*gradients, rng()), ~adi)


@pytest.mark.parametrize("strategy", [s for s in STRATEGIES if s not in ("adi", "reversed")])
def test_controls_keep_as_many_channels_as_adi_but_others(gradients, strategy):
    adi = GradientMask().mask(*gradients, rng())
    control = GradientMask(strategy=strategy).mask(*gradients, rng())
    assert torch.equal(control.sum(-1), adi.sum(-1))
    assert not torch.equal(control, adi)


def test_controls_choose_what_their_names_say():
    g = torch.tensor([4.0, -1.0, 3.0, -2.0])
    kept = torch.tensor([2])
    assert control_mask("min", g, kept, rng()).tolist() == [False, True, False, True]
    assert control_mask("max", g, kept, rng()).tolist() == [True, False, True, False]
    assert control_mask("uniform", g, kept, rng()).tolist() == [False, True, False, True]
    draws = {tuple(control_mask("random", g, kept, rng(seed)).tolist()) for seed in range(40)}
    assert draws == {tuple(i in pair for i in range(4)) for pair in itertools.combinations(range(4), 2)}


def test_overlap_counts_common_channels_among_kept_ones():
    m_c = torch.tensor([[True, True, False, False, False]])
    m_a = torch.tensor([[True, False, True, False, False]])
    assert overlap(m_c, m_a, 0.6) == 0.5


@pytest.mark.parametrize(("heavy_tails", "expected"), [(False, 0.338), (True, 0.306)])
def test_independent_gradients_overlap_as_the_null_simulation_says(heavy_tails, expected):
    # METHODS 1.7: d = 1024, beta 0.6: 33.8 % for Gaussian, 30.6 % for Student-t3 entries.
    torch.manual_seed(0)
    draw = torch.distributions.StudentT(3.0).sample if heavy_tails else torch.randn
    shape = (64, 1024)
    anchor, context, action = (draw(torch.Size(shape)) for _ in range(3))
    measured = overlap(context_mask(anchor, context, 0.6), action_mask(anchor, action, 0.6), 0.6)
    shuffled = independent_overlap(anchor, context, action, 0.6, rng(7))
    assert measured == pytest.approx(expected, abs=0.005)
    assert shuffled == pytest.approx(expected, abs=0.005)


def test_the_shuffled_control_does_not_see_what_gradients_have_in_common():
    torch.manual_seed(0)
    shared = 10 * torch.randn(64, 1024)
    anchor, context = shared + torch.randn_like(shared), shared + torch.randn_like(shared)
    action = torch.randn_like(shared)
    expected = independent_overlap(anchor, context, action, 0.6, rng(7))
    permutation = torch.argsort(torch.rand(shared.shape), dim=-1)
    assert independent_overlap(anchor, context.gather(-1, permutation), action, 0.6, rng(8)) == pytest.approx(
        expected, abs=0.01
    )


def test_figures_are_of_the_slots_that_a_step_reads():
    read = torch.randn(3, 2, 1, 1, D, generator=rng())
    gradients = torch.zeros(3, 2, 5, 1, D)
    gradients[:, 0, 1], gradients[:, 1, 3] = read[:, 0, 0], read[:, 1, 0]  # of two anchors, each at its own stage
    rule = MaskedTriples(GradientMask())
    assert rule.combine(gradients, rng()).stats == rule.combine(read, rng()).stats


@pytest.mark.parametrize("wrong", [{"beta": 1.2}, {"merge": "both"}, {"strategy": "best"}, {"target": "loss"}])
def test_values_outside_the_options_are_refused(wrong):
    with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
        GradientMask(**wrong)
