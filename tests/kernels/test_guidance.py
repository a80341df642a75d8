"""The algebra of GCFG (METHODS.md 5.9), guidance rescale and adaptive projected guidance."""

from __future__ import annotations

import math

import pytest
import torch
from concept_atelier.kernels.guidance import (
    AdaptiveProjection,
    GuidanceWeight,
    check_weights,
    combine,
    rescale,
    unconditional_coefficient,
)
from torch import Tensor


def draw(count: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(count)
    return list(torch.randn(count, 2, 4, 5, 6, generator=generator, dtype=torch.float64).to(dtype))


def close(one: Tensor, other: Tensor, tolerance: float = 1e-5) -> bool:
    return bool((one - other).abs().max() <= tolerance * other.abs().max())


def test_one_condition_is_plain_cfg() -> None:
    eps_0, eps_1 = draw(2)
    assert torch.equal(combine([eps_1], [7.5], eps_0), eps_0 + (eps_1 - eps_0) * 7.5)
    assert close(combine([eps_1], [1.0], eps_0), eps_1)


def test_weights_of_nothing_and_of_one() -> None:
    eps_0, *eps = draw(4)
    assert torch.equal(combine(eps, [0.0, 0.0, 0.0], eps_0), eps_0)
    w = [0.1, 1.2, -0.3]
    assert unconditional_coefficient(w) == 0
    assert close(combine(eps, w, eps_0), combine(eps, w, None))
    assert close(combine(eps, w, eps_0), combine(eps, w, eps_0 + 10), 1e-4)
    assert unconditional_coefficient([2.5, 2.5]) == -4


def test_a_negative_prompt_is_a_branch() -> None:
    """{(positive, w), (negative, 1 - w)} is CFG at w with the negative prompt as unconditional (METHODS.md 5.1)."""
    eps_0, positive, negative = draw(3)
    assert close(combine([positive, negative], [6.0, -5.0], eps_0), combine([positive], [6.0], negative))


def test_order_does_not_matter_and_equal_branches_add_up() -> None:
    eps_0, a, b, c = draw(4)
    whole = combine([a, b, c], [3.0, -1.5, 2.0], eps_0)
    assert close(combine([c, a, b], [2.0, 3.0, -1.5], eps_0), whole)
    assert close(combine([a, a], [1.0, 2.0], eps_0), combine([a], [3.0], eps_0))
    assert torch.equal(combine([a, eps_0], [3.0, 40.0], eps_0), combine([a], [3.0], eps_0))


def test_affine() -> None:
    """A shift of all predictions shifts the result; so does a change between noise, velocity and clean latents."""
    eps_0, *eps = draw(4)
    w, shift = [3.0, -1.5, 2.0], torch.tensor([1.0, -2.0, 0.5, 3.0]).view(4, 1, 1)
    assert close(combine([e + shift for e in eps], w, eps_0 + shift), combine(eps, w, eps_0) + shift)
    x, sigma = draw(5)[0], 3.0
    clean = [x - sigma * e for e in eps]
    assert close(combine(clean, w, x - sigma * eps_0), x - sigma * combine(eps, w, eps_0))


def test_half_precision_is_combined_in_fp32() -> None:
    eps_0, *eps = draw(3, torch.float16)
    w = [30.0, -29.5]
    combined = combine(eps, w, eps_0)
    assert combined.dtype == torch.float32
    exact = combine([e.double().float() for e in eps], w, eps_0.double().float())
    assert torch.equal(combined, exact)
    assert not torch.equal((eps_0 + 30 * (eps[0] - eps_0) - 29.5 * (eps[1] - eps_0)).float(), exact)


def velocity(clean: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
    """v = alpha eps - sigma x_0 of Salimans and Ho, from k-diffusion's x."""
    alpha = 1 / (1 + sigma.view(-1, 1, 1, 1) ** 2).sqrt()
    eps = (x - clean) / sigma.view(-1, 1, 1, 1)
    return alpha * eps - sigma.view(-1, 1, 1, 1) * alpha * clean


@pytest.mark.parametrize("phi", [0.0, 0.7, 1.0])
def test_rescale_brings_back_the_contrast_of_the_branches(phi: float) -> None:
    D_0, a, b, x = draw(4)
    sigma, w = torch.tensor([2.0, 0.3]), [6.0, -2.0]
    combined = combine([a, b], w, D_0)
    out = rescale(combined, [a, b], w, x, sigma, phi)
    spread = [velocity(clean, x, sigma).std(dim=(1, 2, 3)) for clean in (a, b, combined, out)]
    target = phi * (0.75 * spread[0] + 0.25 * spread[1]) + (1 - phi) * spread[2]
    assert torch.allclose(spread[3], target, rtol=1e-4)
    if phi == 0:
        assert close(out, combined)


def paper_apg(D: Tensor, D_0: Tensor, w: float, eta: float, r: float) -> Tensor:
    """Sadat et al. 2024, Algorithm 1 without momentum, sample after sample in float64."""
    out = []
    for one, zero in zip(D.double(), D_0.double()):
        delta = one - zero
        delta = delta * min(1.0, r / float(delta.norm()))
        along = one / one.norm()
        parallel = (delta * along).sum() * along
        out.append(one + (w - 1) * (delta - parallel + eta * parallel))
    return torch.stack(out).float()


@pytest.mark.parametrize(("eta", "r"), [(0.0, 5.0), (0.5, 1e9), (-1.0, 2.0)])
def test_apg_with_one_branch_is_the_papers(eta: float, r: float) -> None:
    D_0, D = draw(2)
    guided = AdaptiveProjection(eta, r).guide(combine([D], [8.0], D_0), D_0, [8.0])
    assert close(guided, paper_apg(D, D_0, 8.0, eta, r))


@pytest.mark.parametrize(("eta", "r", "beta"), [(0.0, 5.0, -0.5), (0.5, 1e9, -0.75), (1.0, 2.0, 0.3)])
def test_apg_over_several_steps_is_that_of_diffusers(eta: float, r: float, beta: float) -> None:
    """An implementation by others, with its momentum; in its "original formulation" the scale is w - 1."""
    apg = pytest.importorskip("diffusers.guiders.adaptive_projected_guidance")
    buffer, ours = apg.MomentumBuffer(beta), AdaptiveProjection(eta, r, beta)
    predictions = draw(6)
    for D, D_0 in zip(predictions[::2], predictions[1::2], strict=True):
        expected = apg.normalized_guidance(D, D_0, 7.0, buffer, eta, r, use_original_formulation=True)
        assert close(ours.guide(combine([D], [8.0], D_0), D_0, [8.0]), expected)


def test_apg_takes_branches_for_their_mean_condition() -> None:
    D_0, a, b = draw(3)
    w = [4.0, 2.0]
    guided = AdaptiveProjection(0.0, 5.0).guide(combine([a, b], w, D_0), D_0, w)
    assert close(guided, paper_apg((4 * a + 2 * b) / 6, D_0, 6.0, 0.0, 5.0))


def test_apg_adds_its_past() -> None:
    D_0, D = draw(2)
    projection = AdaptiveProjection(eta=1.0, momentum=-0.5)
    combined = combine([D], [3.0], D_0)
    assert close(projection.guide(combined, D_0, [3.0]), combined)
    assert close(projection.guide(combined, D_0, [3.0]), D + 2 * (1 - 0.5) * (D - D_0))
    assert close(projection.guide(combined, D_0, [3.0]), D + 2 * (1 - 0.5 * 0.5) * (D - D_0))


def test_apg_leaves_small_guidance_alone() -> None:
    D_0, D = draw(2)
    combined = combine([D], [0.8], D_0)
    assert AdaptiveProjection(0.0, 1.0, -0.5).guide(combined, D_0, [0.8]) is combined
    assert AdaptiveProjection().guide(combined, D_0, [8.0]) is combined


def test_apg_needs_no_unconditional_where_only_rounding_keeps_the_weights_from_one() -> None:
    positive, negative = draw(2)
    w = [8.3, -7.3]
    assert math.fsum(w) > 1
    combined = combine([positive, negative], w, None)
    assert AdaptiveProjection(0.0, 1.0).guide(combined, None, w) is combined


def test_weight_over_the_sampling() -> None:
    weight = GuidanceWeight(4.0, 0.25, 0.75)
    assert [weight.at(p) for p in (0.0, 0.249, 0.25, 0.5, 0.749, 0.75, 1.0)] == [0, 0, 4, 4, 4, 0, 0]
    assert not weight.constant
    assert GuidanceWeight(4.0).constant
    assert [GuidanceWeight(4.0).at(p) for p in (0.0, 1.0)] == [4, 4]
    rising = GuidanceWeight(4.0, 0.5, 1.0, curve=lambda progress: progress)
    assert [rising.at(p) for p in (0.4, 0.5, 0.75, 1.0)] == [0, 0, 2, 4]


@pytest.mark.parametrize("w", [math.nan, math.inf, -math.inf])
def test_bad_weights_are_refused(w: float) -> None:
    with pytest.raises(ValueError, match=r"guidance weight is (nan|-?inf): give it a finite number"):
        GuidanceWeight(w)


@pytest.mark.parametrize(
    ("start", "end", "sentence"),
    [(0.6, 0.4, "exchange start and end"), (-0.1, 1, "within 0"), (0, 1.5, "within 0"), (math.nan, 1, "within 0")],
)
def test_bad_ranges_are_refused(start: float, end: float, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        GuidanceWeight(1.0, start, end)


def test_a_bad_curve_is_refused() -> None:
    with pytest.raises(ValueError, match="weight curve is nan at 50%"):
        GuidanceWeight(1.0, curve=lambda _: math.nan).at(0.5)


def test_nothing_to_guide_with_is_refused() -> None:
    with pytest.raises(ValueError, match="No guidance branch is connected"):
        check_weights([])
    with pytest.raises(ValueError, match="All guidance weights are 0"):
        check_weights([GuidanceWeight(0.0), GuidanceWeight(0.0)])
    check_weights([GuidanceWeight(0.0), GuidanceWeight(-1.0)])
