"""DINO in plain torch: transformers' ViT gives the same numbers from the same file."""

import pytest
import torch
from concept_atelier.kernels.features import Dino, build_dino, prepare, similarities
from concept_atelier.kernels.published_weights import PublishedWeights
from safetensors.torch import load_file
from torch import nn


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A small ViT as transformers saves it, and transformers' own."""
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 512}
    network = ViTModel(ViTConfig(**sizes, patch_size=32, layer_norm_eps=1e-6)).eval()
    with torch.no_grad():
        for weight in network.parameters():
            weight.copy_(torch.randn(weight.shape) * 0.1)
    folder = tmp_path_factory.mktemp("vit")
    network.save_pretrained(folder)
    return network, load_file(folder / "model.safetensors")


def pictures(count=2, height=240, width=300):
    return torch.rand(count, height, width, 3, generator=torch.Generator().manual_seed(1))


def test_it_equals_transformers(file):
    network, tensors = file
    ours, name = build_dino(PublishedWeights("vit.safetensors", tensors))
    with torch.no_grad():
        expected = network(prepare(pictures())).last_hidden_state[:, 0]
        torch.testing.assert_close(ours(pictures()), nn.functional.normalize(expected, dim=-1), rtol=0, atol=1e-5)
    assert name == "DINO ViT of width 128/32"


def test_the_published_layout_is_read_and_told_by_its_size():
    network = Dino(384, 16, 1)
    loaded, name = build_dino(PublishedWeights("dino.pth", network.state_dict()))
    assert name == "DINO ViT-S/16"
    assert not any(weight.requires_grad for weight in loaded.parameters())
    keys = network.state_dict().keys()
    assert {"blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1.bias", "patch_embed.proj.weight", "pos_embed"} <= keys


def test_pictures_are_cut_as_dino_was_trained():
    grey = torch.full((1, 100, 50, 3), 0.5)
    out = prepare(grey)
    assert out.shape == (1, 3, 224, 224)
    torch.testing.assert_close(out[0, :, 5, 5], (torch.full((3,), 0.5) - torch.tensor([0.485, 0.456, 0.406]))
                               / torch.tensor([0.229, 0.224, 0.225]), rtol=0, atol=1e-4)  # fmt: skip
    sides = torch.cat([torch.zeros(1, 256, 100, 3), torch.ones(1, 256, 412, 3)], dim=2)
    # 512 wide at 256 high: the middle 224 columns start at 144, right of the border.
    assert (prepare(sides) > 0).all()


def test_similarity_is_the_mean_cosine():
    x, y = torch.tensor([1.0, 0]), torch.tensor([0, 2.0])
    assert similarities(torch.stack([x, x + y / 2]), torch.stack([x, y])) == pytest.approx([0.5, 0.5**0.5])


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda t: t | {"blocks.0.ls1.gamma": torch.ones(3)}, "is no DINO vision transformer"),
        (lambda t: {"conv1.weight": torch.ones(3)}, "is no DINO vision transformer"),
        (lambda t: {k: v for k, v in t.items() if k != "norm.weight"}, "lacks the tensor norm.weight"),
        (lambda t: t | {"pos_embed": torch.ones(1, 5, 64)}, "damaged, its tensor pos_embed"),
    ],
)
def test_other_files_are_named(damage, sentence):
    tensors = damage(dict(Dino(64, 32, 1).state_dict()))
    with pytest.raises(ValueError, match=sentence):
        build_dino(PublishedWeights("file.pth", tensors))
