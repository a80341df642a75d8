"""Low-rank additions: invisible at first, learnable, and gone without a trace."""

import pytest
import torch
from concept_atelier.kernels.lora import low_rank_added, start_low_rank
from torch import nn


@pytest.fixture
def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3)).requires_grad_(False)


def linears(network: nn.Sequential) -> dict[str, nn.Linear]:
    return {"first": network[0], "last": network[2]}


def start(network: nn.Sequential, rank: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    return start_low_rank(linears(network), rank, seed, torch.device("cpu"))


def test_a_new_one_changes_nothing(network):
    x = torch.randn(5, 6)
    before = network(x)
    with low_rank_added(linears(network), start(network)):
        assert torch.equal(network(x), before)


def test_it_adds_up_times_down(network):
    added = start(network)
    added["last.lora_up.weight"].normal_()
    x = torch.randn(5, 8)
    with low_rank_added(linears(network), added):
        out = network[2](x)
    merged = network[2].weight + added["last.lora_up.weight"] @ added["last.lora_down.weight"]
    torch.testing.assert_close(out, x @ merged.T + network[2].bias)


def test_only_its_own_parameters_learn(network):
    added = {name: value.requires_grad_() for name, value in start(network).items()}
    weights = [p.clone() for p in network.parameters()]
    optimizer = torch.optim.AdamW(added.values(), lr=0.05)
    x, target = torch.randn(16, 6), torch.randn(16, 3)
    losses = []
    with low_rank_added(linears(network), added):
        for _ in range(30):
            loss = (network(x) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(p.grad is None for p in network.parameters())
    assert all(torch.equal(p, before) for p, before in zip(network.parameters(), weights))


def test_it_is_gone_afterwards_even_after_an_error(network):
    added = start(network)
    added["first.lora_up.weight"].fill_(1.0)
    x = torch.randn(5, 6)
    before = network(x)
    with pytest.raises(KeyboardInterrupt), low_rank_added(linears(network), added):
        assert not torch.equal(network(x), before)
        raise KeyboardInterrupt
    assert torch.equal(network(x), before)


def test_the_seed_decides_its_start(network):
    first, again, other = (start(network, seed=seed)["first.lora_down.weight"] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_rank_is_cut_to_what_a_layer_can_hold(network):
    added = start(network, rank=64)
    assert added["first.lora_down.weight"].shape == (6, 6) and added["last.lora_up.weight"].shape == (3, 3)


def test_half_precision_layers_keep_their_type(network):
    network.half()
    added = start(network)
    with low_rank_added(linears(network), added):
        assert network(torch.randn(2, 6).half()).dtype == torch.float16
    assert all(value.dtype == torch.float32 for value in added.values())
