"""Changes of whole weights and biases of frozen layers: W + dW, with W never written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

# What ComfyUI's LoRA files call the change of a layer's weight and of its bias.
PARAMETERS = {"diff": "weight", "diff_b": "bias"}


def start_full(layers: Mapping[str, nn.Module], device: torch.device) -> dict[str, Tensor]:
    """Changes of 0 for all weights of `layers`: {"name.diff": of the weight, "name.diff_b": of the bias}, float32."""
    return {
        f"{name}.{change}": torch.zeros(parameter.shape, device=device)
        for name, layer in layers.items()
        for change, parameter in _own(layer).items()
    }


def _own(layer: nn.Module) -> dict[str, Tensor]:
    """The weight and bias that a layer has, by the names of their changes."""
    parameters = {change: getattr(layer, parameter, None) for change, parameter in PARAMETERS.items()}
    return {change: parameter for change, parameter in parameters.items() if parameter is not None}


@contextmanager
def weights_changed(layers: Mapping[str, nn.Module], changes: Mapping[str, Tensor]) -> Iterator[None]:
    """While open, layers compute with W + dW, differentiable in dW; afterwards all is as before.

    changes: as from `start_full`; those of other names are left out. W + dW is formed in float32 at each call and
    rounded to the type in which the layer computes.
    """
    changed = {
        name: (layer, own)
        for name, layer in layers.items()
        if (own := {PARAMETERS[c]: changes[f"{name}.{c}"] for c in PARAMETERS if f"{name}.{c}" in changes})
    }
    hooks = []
    for layer, own in changed.values():
        hooks += [layer.register_forward_pre_hook(_covering(own)), layer.register_forward_hook(_uncover)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for layer, _ in changed.values():  # an interrupted call leaves its cover behind
            _uncover(layer)


def _covering(own: Mapping[str, Tensor]) -> Callable[[nn.Module, tuple[Tensor]], None]:
    def cover(layer: nn.Module, inputs: tuple[Tensor]) -> None:
        for parameter, change in own.items():
            # An entry here hides the parameter from the layer's own forward and from nobody else: state_dict, moves
            # between devices and the optimisers of others go on seeing W. Reading it through the layer lets changes
            # that are open at the same time add up.
            vars(layer)[parameter] = (getattr(layer, parameter) + change).to(inputs[0].dtype)

    return cover


def _uncover(layer: nn.Module, *_call: object) -> None:
    for parameter in PARAMETERS.values():
        vars(layer).pop(parameter, None)
