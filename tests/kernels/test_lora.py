"""Low-rank additions: invisible at first, learnable, and gone without a trace."""

import pytest
import torch
from concept_atelier.kernels.lora import LowRank
from torch import nn


@pytest.fixture
def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3)).requires_grad_(False)


def low_rank(network: nn.Sequential, rank: int = 2, seed: int = 0) -> LowRank:
    return LowRank({"first": network[0], "last": network[2]}, rank, seed, torch.device("cpu"))


def test_a_new_one_changes_nothing(network):
    x = torch.randn(5, 6)
    before = network(x)
    with low_rank(network).applied():
        assert torch.equal(network(x), before)


def test_it_adds_up_times_down(network):
    added = low_rank(network)
    with torch.no_grad():
        added.up["last"].normal_()
    x = torch.randn(5, 8)
    with added.applied():
        out = network[2](x)
    merged = network[2].weight + added.up["last"] @ added.down["last"]
    torch.testing.assert_close(out, x @ merged.T + network[2].bias)


def test_only_its_own_parameters_learn(network):
    added = low_rank(network)
    weights = [p.clone() for p in network.parameters()]
    optimizer = torch.optim.AdamW(added.parameters(), lr=0.05)
    x, target = torch.randn(16, 6), torch.randn(16, 3)
    losses = []
    with added.applied():
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
    added = low_rank(network)
    with torch.no_grad():
        added.up["first"].fill_(1.0)
    x = torch.randn(5, 6)
    before = network(x)
    with pytest.raises(KeyboardInterrupt), added.applied():
        assert not torch.equal(network(x), before)
        raise KeyboardInterrupt
    assert torch.equal(network(x), before)


def test_the_seed_decides_its_start(network):
    first, again, other = low_rank(network, seed=1), low_rank(network, seed=1), low_rank(network, seed=2)
    assert torch.equal(first.down["first"], again.down["first"])
    assert not torch.equal(first.down["first"], other.down["first"])


def test_the_rank_is_cut_to_what_a_layer_can_hold(network):
    added = low_rank(network, rank=64)
    assert added.down["first"].shape == (6, 6) and added.up["last"].shape == (3, 3)


def test_half_precision_layers_keep_their_type(network):
    network.half()
    added = low_rank(network)
    with added.applied():
        assert network(torch.randn(2, 6).half()).dtype == torch.float16
    assert all(p.dtype == torch.float32 for p in added.parameters())


@pytest.mark.parametrize("rank", [0, -1])
def test_a_rank_below_one_is_refused(network, rank):
    with pytest.raises(ValueError, match="at least 1"):
        low_rank(network, rank)


def test_a_model_without_linear_layers_is_refused():
    with pytest.raises(ValueError, match="no linear layers"):
        LowRank({}, 4, 0, torch.device("cpu"))
