"""Checkpoints as others published them: their shapes tell what to build, and nothing may be missing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Size, Tensor, nn


@dataclass(frozen=True)
class PublishedWeights:
    """The tensors of a file, and the file's name for messages."""

    file: str
    tensors: Mapping[str, Tensor]

    def __contains__(self, key: str) -> bool:
        return key in self.tensors

    def shape(self, key: str) -> Size:
        """Shape of a tensor that a whole file would have. Raises ValueError where it is missing."""
        if key not in self.tensors:
            raise ValueError(f"{self.file} is incomplete, it lacks the tensor {key}: download it again.")
        return self.tensors[key].shape

    def layers(self, prefix: str) -> int:
        """How many layers prefix.0, prefix.1, ... there are."""
        return len({key[len(prefix) :].split(".")[1] for key in self.tensors if key.startswith(prefix + ".")})

    def load_into(self, module: nn.Module) -> nn.Module:
        """`module`, on any device or none ("meta"), frozen and in float32, with these parameters and buffers.

        Tensors that the module does not have are left out. Raises ValueError naming the first that is missing or has
        another shape.
        """
        wanted = {}
        for key, expected in module.state_dict().items():
            if self.shape(key) != expected.shape:
                raise ValueError(
                    f"{self.file} is damaged, its tensor {key} has the shape {tuple(self.shape(key))} where "
                    f"{tuple(expected.shape)} fits the others: download it again."
                )
            value = self.tensors[key]
            wanted[key] = value.float() if value.is_floating_point() else value
        module.load_state_dict(wanted, assign=True)
        return module.eval().requires_grad_(False)
