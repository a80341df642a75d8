"""DINO (arXiv 2104.14294): one vector a picture, by which pictures of the same subject are near each other.

The vision transformer in plain torch, in the published layout of facebookresearch/dino; files in the layout of
transformers (facebook/dino-vits16) are read through a map of their names.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .published_weights import PublishedWeights

HEAD_WIDTH = 64  # of all published models: 6 heads in ViT-S, 12 in ViT-B
SIZES = {384: "ViT-S", 768: "ViT-B"}
RESIZE, CROP = 256, 224  # pixels, of DINO's evaluation
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

TRANSFORMERS_LAYER = {
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "attention.output.dense": "attn.proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}
TRANSFORMERS = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "layernorm.weight": "norm.weight",
    "layernorm.bias": "norm.bias",
}


class Attention(nn.Module):
    """Multi-head self-attention with one projection for queries, keys and values."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, -1, HEAD_WIDTH)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(*qkv).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """One layer of the transformer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class Dino(nn.Module):
    """Pictures (B, H, W, 3) in 0..1, of any size, to unit vectors (B, width)."""

    def __init__(self, width: int, patch: int, depth: int) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, (CROP // patch) ** 2 + 1, width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch, stride=patch)})
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, pictures: Tensor) -> Tensor:
        patches = self.patch_embed["proj"](prepare(pictures).to(self.pos_embed)).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return F.normalize(self.norm(x)[:, 0], dim=-1)


def prepare(pictures: Tensor) -> Tensor:
    """(B, 3, 224, 224): the middle of pictures (B, H, W, 3) in 0..1 as DINO was trained to see them."""
    x = pictures.movedim(-1, 1)
    height, width = x.shape[-2:]
    scale = RESIZE / min(height, width)
    size = [max(CROP, round(side * scale)) for side in (height, width)]
    x = F.interpolate(x, size=size, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = ((side - CROP) // 2 for side in size)
    mean, std = (torch.tensor(values, device=x.device)[:, None, None] for values in (MEAN, STD))
    return (x[..., top : top + CROP, left : left + CROP] - mean) / std


def build_dino(weights: PublishedWeights) -> tuple[Dino, str]:
    """The network of a checkpoint in either layout, and its name. Raises ValueError for other and incomplete files."""
    weights = PublishedWeights(weights.file, published_names(weights.tensors))
    if "cls_token" not in weights or "patch_embed.proj.weight" not in weights or "blocks.0.ls1.gamma" in weights:
        raise ValueError(
            f"{weights.file} is no DINO vision transformer (DINOv2 and ResNets are others): choose "
            "dino_deitsmall16_pretrain.pth, or another ViT of the same page."
        )
    width, _, patch, _ = weights.shape("patch_embed.proj.weight")
    with torch.device("meta"):
        network = Dino(width, patch, weights.layers("blocks"))
    return weights.load_into(network), f"DINO {SIZES.get(width, f'ViT of width {width}')}/{patch}"


def published_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under the names of facebookresearch/dino, from those of transformers' ViTModel or these themselves."""
    tensors = {key.removeprefix("vit.").removeprefix("backbone."): value for key, value in tensors.items()}
    named = {}
    for key, value in tensors.items():
        if not key.startswith("encoder.layer."):
            named[TRANSFORMERS.get(key, key)] = value
            continue
        number, rest = key.removeprefix("encoder.layer.").split(".", 1)
        part, kind = rest.rsplit(".", 1)
        if part.endswith("attention.query"):
            parts = [tensors[key.replace("query", name)] for name in ("query", "key", "value")]
            named[f"blocks.{number}.attn.qkv.{kind}"] = torch.cat(parts)
        elif part in TRANSFORMERS_LAYER:
            named[f"blocks.{number}.{TRANSFORMERS_LAYER[part]}.{kind}"] = value
    return named


def similarities(pictures: Tensor, to: Tensor) -> list[float]:
    """Mean cosine of each of the vectors (N, d) with the vectors `to` (M, d)."""
    return (F.normalize(pictures, dim=-1) @ F.normalize(to, dim=-1).T).mean(dim=1).tolist()
