"""Segment Anything (arXiv 2304.02643) on plain tensors, in its two halves.

The image encoder is large and runs once a picture; the decoder is small and answers points and boxes in milliseconds.
Both are the modules of the package segment-anything 1.0, built to the size that a checkpoint's tensors tell.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .published_weights import PublishedWeights

NAMES = {768: "SAM ViT-B", 1024: "SAM ViT-L", 1280: "SAM ViT-H"}  # by the width of the image encoder
DECODER_HEADS = 8  # the same in all published models, and what tensors do not tell
PIXEL_MEAN, PIXEL_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
# A tensor, or the beginning of its name, that only another family has -> what the file holds, and what to do.
OTHER_FAMILIES = {
    "mask_decoder.hf_": "SAM-HQ, whose decoder is another one",
    "image_encoder.layers.": "MobileSAM, whose image encoder is another one",
    "image_encoder.trunk.": "SAM 2, which this node does not run",
    "sam_mask_decoder.": "SAM 2 or 3, which this node does not run",
    "detector.": "SAM 3, which ComfyUI runs itself (node SAM3 Detect)",
    "vision_encoder.": "SAM in the layout of transformers",
}


@dataclass(frozen=True)
class Features:
    """What the decoder knows of a picture: features (1, C, h, w); its size (H, W); its size as the encoder saw it."""

    features: Tensor
    picture_size: tuple[int, int]
    input_size: tuple[int, int]


@dataclass(frozen=True)
class Prompt:
    """What asks for one mask, in pixels: points (N, 2) x y, their labels (N,) 1 inside, 0 outside; box (4,) x y x y."""

    points: Tensor
    labels: Tensor
    box: Tensor | None = None

    @property
    def ambiguous(self) -> bool:
        """A lone point may mean a button, a shirt or a man: the paper asks for several masks then (section 3)."""
        return self.box is None and len(self.points) == 1


def build_sam(weights: PublishedWeights) -> tuple[SamEncoder, SamDecoder, str]:
    """The two halves with the weights of a checkpoint in the published layout, and the model's name.

    Raises ValueError for other models and for incomplete files.
    """
    for prefix, found in OTHER_FAMILIES.items():
        if any(key.startswith(prefix) for key in weights.tensors):
            raise ValueError(f"{weights.file} holds {found}: choose sam_vit_b, sam_vit_l or sam_vit_h.")
    if "image_encoder.pos_embed" not in weights:
        raise ValueError(f"{weights.file} is no Segment Anything model: choose sam_vit_b, sam_vit_l or sam_vit_h.")
    with torch.device("meta"):
        encoder, decoder = SamEncoder(image_encoder_like(weights)), SamDecoder(*decoder_like(weights))
    weights.load_into(encoder)
    weights.load_into(decoder)
    width = weights.shape("image_encoder.pos_embed")[-1]
    return encoder, decoder, NAMES.get(width, f"SAM of width {width}")


def image_encoder_like(weights: PublishedWeights) -> nn.Module:
    """An image encoder (ViT, section 3 and appendix A) of the size of `weights`."""
    from segment_anything.modeling import ImageEncoderViT

    prefix = "image_encoder."
    width, channels, patch, _ = weights.shape(prefix + "patch_embed.proj.weight")
    grid = weights.shape(prefix + "pos_embed")[1]
    depth = weights.layers(prefix + "blocks")
    tables = [weights.shape(f"{prefix}blocks.{block}.attn.rel_pos_h") for block in range(depth)]
    lengths = [length for length, _ in tables]  # 2 n - 1 for attention among n x n patches
    return ImageEncoderViT(
        img_size=grid * patch,
        patch_size=patch,
        in_chans=channels,
        embed_dim=width,
        depth=depth,
        num_heads=width // tables[0][1],
        mlp_ratio=weights.shape(prefix + "blocks.0.mlp.lin1.weight")[0] / width,
        out_chans=weights.shape(prefix + "neck.0.weight")[0],
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=(min(lengths) + 1) // 2,
        global_attn_indexes=tuple(block for block, length in enumerate(lengths) if length == 2 * grid - 1),
    )


def decoder_like(weights: PublishedWeights) -> tuple[nn.Module, nn.Module, int]:
    """A prompt encoder and a mask decoder (appendix A) of the size of `weights`, and the encoder's picture size."""
    from segment_anything.modeling import MaskDecoder, PromptEncoder, TwoWayTransformer

    grid = weights.shape("image_encoder.pos_embed")[1]
    size = grid * weights.shape("image_encoder.patch_embed.proj.weight")[-1]
    masks, width = weights.shape("mask_decoder.mask_tokens.weight")
    transformer = TwoWayTransformer(
        depth=weights.layers("mask_decoder.transformer.layers"),
        embedding_dim=width,
        num_heads=DECODER_HEADS,
        mlp_dim=weights.shape("mask_decoder.transformer.layers.0.mlp.lin1.weight")[0],
    )
    decoder = MaskDecoder(
        transformer_dim=width,
        transformer=transformer,
        num_multimask_outputs=masks - 1,
        iou_head_depth=weights.layers("mask_decoder.iou_prediction_head.layers"),
        iou_head_hidden_dim=weights.shape("mask_decoder.iou_prediction_head.layers.0.weight")[0],
    )
    prompts = PromptEncoder(
        embed_dim=width,
        image_embedding_size=(grid, grid),
        input_image_size=(size, size),
        mask_in_chans=weights.shape("prompt_encoder.mask_downscaling.3.weight")[0],
    )
    return prompts, decoder, size


class SamEncoder(nn.Module):
    """Picture -> features. Its image encoder alone may be in half precision."""

    def __init__(self, image_encoder: nn.Module) -> None:
        super().__init__()
        self.image_encoder = image_encoder

    @property
    def activation_bytes(self) -> int:
        """Memory of the global attention, the peak: its scores, their positional terms, their sum, its softmax."""
        weight = self.image_encoder.pos_embed
        heads = self.image_encoder.blocks[0].attn.num_heads
        return 4 * heads * (weight.shape[1] * weight.shape[2]) ** 2 * weight.element_size()

    def forward(self, picture: Tensor) -> Features:
        """picture: (H, W, 3) in 0..1, on any device. Resized and normalised as by the package's own predictor."""
        from segment_anything.utils.transforms import ResizeLongestSide

        weight = self.image_encoder.pos_embed
        size = self.image_encoder.img_size
        pixels = (picture * 255).round().clamp(0, 255).to("cpu", torch.uint8).numpy()
        resized = torch.from_numpy(ResizeLongestSide(size).apply_image(pixels))
        height, width = resized.shape[:2]
        normal = (resized - torch.tensor(PIXEL_MEAN)) / torch.tensor(PIXEL_STD)
        padded = F.pad(normal.permute(2, 0, 1)[None], (0, size - width, 0, size - height))
        features = self.image_encoder(padded.to(weight)).float()
        return Features(features, tuple(picture.shape[:2]), (height, width))


class SamDecoder(nn.Module):
    """Features and a prompt -> masks; always in float32, in which the prompt encoder works."""

    def __init__(self, prompt_encoder: nn.Module, mask_decoder: nn.Module, encoder_size: int) -> None:
        super().__init__()
        self.prompt_encoder = prompt_encoder
        self.mask_decoder = mask_decoder
        self.encoder_size = encoder_size

    def forward(self, features: Features, prompt: Prompt) -> tuple[Tensor, Tensor]:
        """Masks (M, H, W) as logits, above 0 inside, at the picture's size, and the quality (M,) expected of each.

        M is 3 for an ambiguous prompt, else 1.
        """
        device = self.prompt_encoder.no_mask_embed.weight.device
        scale = torch.tensor(features.input_size[::-1], dtype=torch.float64) / torch.tensor(features.picture_size[::-1])
        points = box = None
        if len(prompt.points):
            points = (prompt.points * scale).float()[None].to(device), prompt.labels.int()[None].to(device)
        if prompt.box is not None:
            box = (prompt.box * scale.repeat(2)).float()[None].to(device)
        sparse, dense = self.prompt_encoder(points=points, boxes=box, masks=None)
        small, quality = self.mask_decoder(
            image_embeddings=features.features.to(device),
            image_pe=self.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=prompt.ambiguous,
        )
        size, (height, width) = self.encoder_size, features.input_size
        padded = F.interpolate(small, (size, size), mode="bilinear", align_corners=False)[..., :height, :width]
        masks = F.interpolate(padded, features.picture_size, mode="bilinear", align_corners=False)
        return masks[0], quality[0]


def make_prompts(boxes: Tensor, inside: Tensor, outside: Tensor) -> list[Prompt]:
    """What to ask the decoder for: boxes (K, 4) x y x y, points inside (P, 2) and outside (N, 2) of the subject.

    A point inside belongs to the boxes that contain it; those in no box ask for a mask of their own. Points outside
    belong to every prompt.
    """
    low, high = boxes[:, None, :2], boxes[:, None, 2:]
    contained = ((inside >= low) & (inside <= high)).all(dim=-1)  # (K, P)
    groups = [(inside[chosen], box) for chosen, box in zip(contained, boxes)]
    free = inside[~contained.any(dim=0)]
    if len(free):
        groups.append((free, None))
    return [
        Prompt(torch.cat([points, outside]), torch.tensor([1] * len(points) + [0] * len(outside)), box)
        for points, box in groups
    ]


def segment(decoder: SamDecoder, features: Features, prompts: list[Prompt]) -> tuple[Tensor, list[float]]:
    """The union (H, W) of the prompts' masks, bool, and the quality of each: the best where there are several."""
    union = torch.zeros(features.picture_size, dtype=torch.bool)
    scores = []
    for prompt in prompts:
        masks, quality = decoder(features, prompt)
        best = quality.argmax()
        union |= (masks[best] > 0).cpu()
        scores.append(float(quality[best]))
    return union, scores
