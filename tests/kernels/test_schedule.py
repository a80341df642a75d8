"""The noise schedule against closed forms and diffusers' DDIM scheduler: METHODS.md 0.5."""

import pytest
import torch
from concept_atelier.kernels.schedule import NoiseSchedule


@pytest.fixture(scope="module")
def schedule() -> NoiseSchedule:
    return NoiseSchedule.scaled_linear()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(0))


T = torch.tensor([1, 500, 999])


def test_it_is_stable_diffusions(schedule):
    from diffusers import DDIMScheduler

    stock = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    assert torch.allclose(schedule.alphas_cumprod.float(), stock.alphas_cumprod, rtol=1e-4)


def test_noise_and_clean_latents_are_recovered(schedule, x):
    eps = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    x_t = schedule.add_noise(x, T, eps)
    abar = schedule.abar(T)
    assert torch.allclose((x_t - (1 - abar).sqrt() * eps) / abar.sqrt(), x, atol=1e-4)
    v = abar.sqrt() * eps - (1 - abar).sqrt() * x
    assert torch.allclose(schedule.eps_from_v(x_t, T, v), eps, atol=1e-5)


def test_a_ddim_step_is_diffusers(schedule, x):
    from diffusers import DDIMScheduler

    stock = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=True
    )
    stock.set_timesteps(20)
    eps = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    t = int(stock.timesteps[3])
    expected = stock.step(eps, t, x).prev_sample
    assert torch.allclose(schedule.ddim_step(x, eps, t, t - 50), expected, atol=1e-5)


def test_a_ddpm_step_is_diffusers(schedule, x):
    from diffusers import DDIMScheduler

    stock = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=True
    )
    stock.set_timesteps(20)
    eps, fresh = (torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    t = int(stock.timesteps[3])
    expected = stock.step(eps, t, x, eta=1.0, variance_noise=fresh).prev_sample
    assert torch.allclose(schedule.ddim_step(x, eps, t, t - 50, 1.0, fresh), expected, atol=1e-5)


def test_the_inverse_step_undoes_the_step(schedule, x):
    eps = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    there = schedule.ddim_step(x, eps, 300, 250)
    assert torch.allclose(schedule.ddim_step(there, eps, 250, 300), x, atol=1e-5)


def test_the_last_step_lands_on_the_clean_latents(schedule, x):
    eps = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    x_t = schedule.add_noise(x, torch.tensor([20, 20, 20]), eps)
    assert torch.allclose(schedule.ddim_step(x_t, eps, 20, -1), x, atol=1e-5)


def test_sampling_timesteps_start_at_pure_noise(schedule):
    assert schedule.sampling_timesteps(4) == [999, 749, 499, 249]
    assert len(schedule.sampling_timesteps(1000)) == len(set(schedule.sampling_timesteps(1000))) == 1000
    with pytest.raises(ValueError, match=r"1\.\.1000"):
        schedule.sampling_timesteps(0)
