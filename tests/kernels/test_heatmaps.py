"""Attention maps: their sizes, and their colours."""

import pytest
import torch
from concept_atelier.kernels.heatmaps import VIRIDIS, colour, map_level, map_shape, overlay, resize, stretch


def test_maps_of_odd_latents():
    shapes = [(9, 13), (5, 7), (3, 4), (2, 2)]
    assert [map_shape(level, 9, 13) for level in range(4)] == shapes
    assert [map_level(h * w, 9, 13) for h, w in shapes] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="50 places"):
        map_level(50, 9, 13)


def test_heatmaps():
    maps = torch.arange(12.0).view(1, 3, 4)
    assert stretch(maps).aminmax() == (0, 1)
    assert torch.equal(stretch(torch.ones(1, 2, 2)), torch.zeros(1, 2, 2))
    assert resize(maps, 6, 8).shape == (1, 6, 8)
    shades = colour(torch.linspace(0, 1, 100).view(1, 1, 100))[0, 0]
    assert torch.allclose(shades[[0, -1]], VIRIDIS[[0, -1]])
    luminance = shades @ torch.tensor([0.2126, 0.7152, 0.0722])
    assert (luminance.diff() > 0).all()
    pictures = torch.rand(1, 3, 4, 3)
    assert torch.equal(overlay(pictures, stretch(maps), 0.0), pictures)
    assert torch.allclose(overlay(pictures, stretch(maps), 1.0), colour(stretch(maps)))
