"""Changes of whole weights: W + dW while they are open, in whatever kind of layer, and W untouched."""

import pytest
import torch
from concept_atelier.kernels.full_weights import start_full, weights_changed
from torch import nn

CPU = torch.device("cpu")


@pytest.fixture
def layers() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    parts = {
        "conv": nn.Conv2d(4, 8, 3, stride=2, padding=1),
        "norm": nn.GroupNorm(2, 8),
        "bare": nn.Linear(8, 8, bias=False),
        "last": nn.LayerNorm(8),
    }
    return {name: part.requires_grad_(False) for name, part in parts.items()}


def run(layers: dict[str, nn.Module], x: torch.Tensor) -> torch.Tensor:
    x = layers["norm"](layers["conv"](x))
    return layers["last"](layers["bare"](x.movedim(1, -1)))


def some_changes(layers: dict[str, nn.Module]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: (0.1 * torch.randn(v.shape, generator=generator)).requires_grad_()
        for name, v in start_full(layers, CPU).items()
    }


def written(layers: dict[str, nn.Module], changes: dict[str, torch.Tensor]) -> None:
    """Write the changes into the weights themselves."""
    for name, layer in layers.items():
        layer.weight.add_(changes[f"{name}.diff"].detach())
        if layer.bias is not None:
            layer.bias.add_(changes[f"{name}.diff_b"].detach())


X = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2))


def test_every_weight_has_a_change_that_changes_nothing(layers):
    changes, before = start_full(layers, CPU), run(layers, X)
    assert set(changes) == {f"{n}.diff" for n in layers} | {f"{n}.diff_b" for n in ("conv", "norm", "last")}
    assert all(change.dtype == torch.float32 for change in changes.values())
    with weights_changed(layers, changes):
        assert torch.equal(run(layers, X), before)


def test_output_and_gradients_are_those_of_weights_that_hold_the_change(layers):
    changes = some_changes(layers)
    with weights_changed(layers, changes):
        out = run(layers, X)
        out.square().mean().backward()
    assert all(p.grad is None for layer in layers.values() for p in layer.parameters())
    written(layers, changes)
    for layer in layers.values():
        layer.requires_grad_(True)
    reference = run(layers, X)
    reference.square().mean().backward()
    torch.testing.assert_close(out, reference)
    torch.testing.assert_close(changes["conv.diff"].grad, layers["conv"].weight.grad)
    torch.testing.assert_close(changes["norm.diff_b"].grad, layers["norm"].bias.grad)
    torch.testing.assert_close(changes["bare.diff"].grad, layers["bare"].weight.grad)


def test_the_weights_are_neither_written_nor_hidden(layers):
    before = {name: layer.state_dict() for name, layer in layers.items()}
    parameter, seen = layers["bare"].weight, []
    with weights_changed(layers, some_changes(layers)):
        hook = layers["bare"].register_forward_hook(lambda *_: seen.append(layers["bare"].state_dict()["weight"]))
        run(layers, X)
        hook.remove()
        assert layers["bare"].weight is parameter
    assert torch.equal(seen[0], parameter)
    assert all(torch.equal(layers[n].state_dict()[k], v) for n, state in before.items() for k, v in state.items())


def test_it_is_gone_after_an_error_inside_a_layer(layers):
    before, changes = run(layers, X), some_changes(layers)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), weights_changed(layers, changes):
        hook = layers["norm"].register_forward_pre_hook(interrupt)  # after the change's own: the cover is on
        run(layers, X)
    hook.remove()
    assert torch.equal(run(layers, X), before)


def test_changes_that_are_open_together_add_up(layers):
    one, two = some_changes(layers), {name: 2 * change.detach() for name, change in some_changes(layers).items()}
    with weights_changed(layers, one), weights_changed(layers, two):
        together = run(layers, X)
    with weights_changed(layers, {name: 3 * change for name, change in one.items()}):
        torch.testing.assert_close(run(layers, X), together)


def test_half_precision_layers_compute_in_their_type(layers):
    for layer in layers.values():
        layer.half()
    with weights_changed(layers, some_changes(layers)):
        out = run(layers, X.half())
        out.float().sum().backward()
    assert out.dtype == torch.float16
