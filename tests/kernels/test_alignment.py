"""Alignment of masks (HiFi Tuner Eq. 8, 9, Alg. 4; METHODS.md 4.7, 4.11 item 12) on blobs drawn from formulas."""

import math

import pytest
import torch
from concept_atelier.kernels.alignment import (
    OBJECTIVES,
    Similarity,
    closed_form,
    distance_field,
    fit_masks,
    mask_l1,
    moments,
    one_sided,
    symmetric_chamfer,
    warp_mask,
    warp_picture,
)

CENTRE = torch.tensor([48.0, 50.0], dtype=torch.float64)


def number(value):
    return torch.tensor(float(value), dtype=torch.float64)


def pixels(height, width):
    y, x = (torch.arange(n, dtype=torch.float64) + 0.5 for n in (height, width))
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)


def blob(seed, transform=None, height=96, width=96):
    """A lobed blob about CENTRE, no two seeds alike; drawn where `transform` takes it."""
    generator = torch.Generator().manual_seed(seed)
    lobes, phases = torch.rand(4, generator=generator).double() * 0.35, torch.rand(4, generator=generator).double() * 6
    points = pixels(height, width)
    from_centre = (points if transform is None else transform.inverse(points)) - CENTRE
    angle = torch.atan2(from_centre[..., 1], from_centre[..., 0])
    border = 20 * (1 + sum(lobes[k] / (k + 1) * torch.cos((k + 1) * angle + phases[k]) for k in range(4)))
    return (from_centre.norm(dim=-1) < border).float()


def disc(radius, height=64, width=64):
    return ((pixels(height, width) - 32.5).norm(dim=-1) <= radius).float()


def misplaced(found, truth, mask):
    """The largest distance, in pixels of the target, between where two transforms take the mask's points."""
    points = mask.nonzero().flip(1).double() + 0.5
    return float((found(points) - truth(points)).norm(dim=-1).max())


# The transform


def test_translation_comes_first_then_rotation_then_scale_about_the_origin():
    """Eq. 8: T = S(theta_1) R(theta_2) Trans(theta_3, theta_4)."""
    transform = Similarity(number(2), number(math.pi / 2), torch.tensor([3.0, 1.0], dtype=torch.float64))
    # (1, 0) -> (4, 1) -> a quarter turn, y downwards: (-1, 4) -> (-2, 8)
    point = torch.tensor([1.0, 0.0], dtype=torch.float64)
    expected = torch.tensor([-2.0, 8.0], dtype=torch.float64)
    torch.testing.assert_close(transform(point), expected)
    torch.testing.assert_close(transform.inverse(expected), point)
    assert transform.degrees == pytest.approx(90)


def test_moments_of_a_known_rectangle():
    mask = torch.zeros(40, 60)
    mask[10:14, 20:40] = 1
    area, centroid, axis = moments(mask)
    assert area == 80 and centroid.tolist() == [30, 12] and axis == pytest.approx(0)
    assert moments(mask.T).axis.abs() == pytest.approx(math.pi / 2)


@pytest.mark.parametrize("objective", ["symmetric chamfer", "mask L1 (Eq. 9)"])
def test_equal_masks_need_no_transform(objective):
    mask = blob(0)
    found = fit_masks(mask, mask, objective)
    assert [float(found.scale), float(found.angle), *found.shift.tolist()] == pytest.approx([1, 0, 0, 0], abs=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_a_known_similarity_is_recovered(seed):
    """Random scale, rotation and place, masks of different sizes; the closed form alone has no better fit."""
    generator = torch.Generator().manual_seed(100 + seed)
    scale, turn, *place = torch.rand(4, generator=generator).double()
    target = torch.tensor([56 + 16 * place[0], 50 + 16 * place[1]], dtype=torch.float64)
    truth = Similarity.between(CENTRE, target, 0.6 + scale, (2 * turn - 1) * math.pi)
    reference, goal = blob(seed), blob(seed, truth, 120, 136)
    found = fit_masks(reference, goal)
    assert misplaced(found, truth, reference) < 0.8
    cost = symmetric_chamfer(reference, goal)
    start = closed_form(moments(reference), moments(goal), number(0))
    assert cost(found) <= cost(start)


def test_large_masks_are_compared_by_eq_9_at_fewer_pixels():
    """The cost is that of all pixels up to rounding, and the fit leads to the same place."""
    grown = Similarity(number(11), number(0), torch.zeros(2).double())
    truth = Similarity.between(CENTRE, CENTRE + 5, number(1.1), number(0.3))
    reference, goal = blob(3), blob(3, truth)
    large = [warp_mask(mask, grown, (1050, 1061)) for mask in (reference, goal)]
    for own, factor in ((reference, 11), (large[0], 1)):
        transform = Similarity.between(CENTRE * 11 / factor, CENTRE * 11 + 30, number(0.9 * factor), number(0.2))
        every = (warp_mask(own.double(), transform, large[1].shape) - large[1]).abs().sum().item()
        assert mask_l1(own, large[1])(transform).item() == pytest.approx(every, rel=2e-3)
    found = fit_masks(reference, large[1], "mask L1 (Eq. 9)", 60)
    assert misplaced(found, lambda points: grown(truth(points)), reference) < 0.8 * 11


@pytest.mark.parametrize("shift", [(9.0, -4.0), (-3.5, 6.25)])
def test_a_pure_translation_is_recovered(shift):
    truth = Similarity(number(1), number(0), torch.tensor(shift, dtype=torch.float64))
    found = fit_masks(blob(5), blob(5, truth))
    assert float(found.scale) == pytest.approx(1, abs=0.01)
    assert misplaced(found, truth, blob(5)) < 0.4
    upright = fit_masks(blob(5), blob(5, truth), turn=0)
    assert upright.shift.tolist() == pytest.approx(shift, abs=0.1)


@pytest.mark.parametrize("scale", [0.4, 1.7])
def test_a_pure_scale_is_recovered(scale):
    truth = Similarity.between(CENTRE, CENTRE, number(scale), number(0))
    found = fit_masks(blob(5), blob(5, truth))
    assert float(found.scale) == pytest.approx(scale, rel=0.02)
    assert misplaced(found, truth, blob(5)) < 0.5


def test_a_long_subject_is_turned_the_right_way_round():
    """The principal axis does not tell head from foot: both ways are tried."""
    y, x = pixels(96, 96).unbind(-1)[::-1]
    pear = (((x - 48).abs() < 6 + (y - 50) * 0.25) & ((y - 50).abs() < 24)).float()
    truth = Similarity.between(CENTRE, CENTRE, number(0.9), number(math.radians(160)))
    points = truth.inverse(pixels(96, 96)).flatten(0, 1).long().clamp(0, 95)
    goal = pear[points[:, 1], points[:, 0]].view(96, 96)
    assert fit_masks(pear, goal).degrees == pytest.approx(160, abs=3)


def test_a_limit_keeps_the_subject_upright():
    truth = Similarity.between(CENTRE, CENTRE, number(1), number(math.radians(100)))
    reference, goal = blob(1), blob(1, truth)
    assert abs(fit_masks(reference, goal).degrees - 100) < 3
    assert fit_masks(reference, goal, turn=0).degrees == 0
    assert 0 < abs(fit_masks(reference, goal, turn=20).degrees) <= 20


def test_subjects_of_different_shape_overlap_more_than_at_the_start():
    reference, goal = blob(2), blob(7, Similarity.between(CENTRE, CENTRE + 9, number(1.3), number(0.4)))
    found = fit_masks(reference, goal, turn=60)
    start = closed_form(moments(reference), moments(goal), number(0))

    def overlap(transform):
        moved = warp_mask(reference, transform, goal.shape)
        return float(torch.minimum(moved, goal).sum() / torch.maximum(moved, goal).sum())

    assert overlap(found) > overlap(start)


# The collapse of Algorithm 4


def scaled(scale):
    return Similarity.between(torch.full((2,), 32.5).double(), torch.full((2,), 32.5).double(), scale, number(0))


def test_algorithm_4_prefers_a_point_and_both_masks_together_do_not():
    """METHODS 4.7: a disc of radius 12 onto one of radius 9, the right scale being 0.75."""
    costs = {name: objective(disc(12), disc(9)) for name, objective in OBJECTIVES.items()}
    literal = costs["one-sided (Alg. 4)"]
    assert literal(scaled(number(0.05))).item() == pytest.approx(73.0, abs=0.05)
    assert literal(scaled(number(0.75))).item() == pytest.approx(84.5, abs=0.05)
    scales = [0.05, 0.2, 0.4, 0.6, 0.75, 0.9, 1.2]
    for name in ("symmetric chamfer", "mask L1 (Eq. 9)"):
        values = [costs[name](scaled(number(scale))).item() for scale in scales]
        assert min(values) == values[scales.index(0.75)], name


def test_fitting_with_algorithm_4_shrinks_the_subject_and_ours_does_not():
    truth = Similarity.between(CENTRE, CENTRE, number(0.8), number(0))
    reference, goal = blob(4), blob(4, truth)
    literal = fit_masks(reference, goal, "one-sided (Alg. 4)", turn=0)
    assert float(literal.scale) < 0.74
    assert float(fit_masks(reference, goal, turn=0).scale) == pytest.approx(0.8, rel=0.02)


def test_the_objectives_are_what_the_paper_writes():
    reference, goal, transform = disc(12), disc(9), scaled(number(0.9))
    expected = (warp_mask(reference.double(), transform, goal.shape) - goal).abs().sum()
    torch.testing.assert_close(mask_l1(reference, goal)(transform), expected)
    few = torch.zeros(8, 8)
    few[2, 3] = few[5, 5] = 1
    there = torch.zeros(8, 8)
    there[2, 4] = 1
    still = Similarity(number(1), number(0), torch.zeros(2).double())
    assert one_sided(few, there)(still).item() == pytest.approx(1 + (3**2 + 1**2))


def test_the_symmetric_cost_has_the_gradient_of_finite_differences():
    cost = symmetric_chamfer(blob(2), blob(6))

    def at(theta):
        return cost(Similarity.between(CENTRE, CENTRE + 10 * theta[2:], theta[0].exp(), theta[1]))

    theta = torch.tensor([0.1, 0.2, 0.5, -0.4], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(at(theta), theta)
    step = 1e-4 * torch.eye(4).double()
    differences = torch.stack([(at(theta + d) - at(theta - d)) / 2e-4 for d in step])
    torch.testing.assert_close(gradient, differences, rtol=0.02, atol=0.02 * float(gradient.abs().max()))


def test_distances_are_exact():
    inside = torch.zeros(9, 12, dtype=torch.bool)
    inside[4, 3] = inside[7, 9] = True
    y, x = torch.meshgrid(torch.arange(9), torch.arange(12), indexing="ij")
    both = [((y - a) ** 2 + (x - b) ** 2).double().sqrt() for a, b in ((4, 3), (7, 9))]
    torch.testing.assert_close(distance_field(inside), (torch.minimum(*both) - 0.5).clamp_min(0))


# Warping


def test_nothing_changes_without_a_transform():
    picture = torch.rand(24, 32, 3, generator=torch.Generator().manual_seed(0))
    still = Similarity(number(1), number(0), torch.zeros(2).double())
    torch.testing.assert_close(warp_picture(picture, still, (24, 32)), picture)
    torch.testing.assert_close(warp_mask(picture[..., 0], still, (24, 32)), picture[..., 0])


def test_borders_are_filled_by_reflection_and_masks_with_nothing():
    picture = torch.arange(8.0)[None, :, None].expand(8, 8, 3) / 8
    right = Similarity(number(1), number(0), torch.tensor([3.0, 0.0]).double())
    row = warp_picture(picture, right, (8, 8))[4, :, 0]
    torch.testing.assert_close(row, torch.tensor([2.0, 1, 0, 0, 1, 2, 3, 4]) / 8)
    mask = warp_mask(torch.ones(8, 8), right, (8, 8))[4]
    torch.testing.assert_close(mask, torch.tensor([0.0, 0, 0, 1, 1, 1, 1, 1]))


def test_a_shrunk_picture_is_averaged_not_thinned():
    stripes = (torch.arange(64) % 2).float()[None, :, None].expand(64, 64, 3)
    quarter = Similarity(number(0.25), number(0), torch.zeros(2).double())
    inner = warp_picture(stripes, quarter, (16, 16))[2:-2, 2:-2]
    assert (inner - 0.5).abs().max() < 0.1


def test_a_mask_lands_on_the_mask_it_was_fitted_to():
    truth = Similarity.between(CENTRE, CENTRE + 6, number(1.2), number(-0.5))
    reference, goal = blob(6), blob(6, truth, 110, 118)
    moved = warp_mask(reference, fit_masks(reference, goal), goal.shape)
    assert torch.minimum(moved, goal).sum() / torch.maximum(moved, goal).sum() > 0.95
