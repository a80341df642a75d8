"""Tiny SAM and GroundingDINO with random weights, made by the packages' own classes, named as in published files."""

from functools import cache
from pathlib import Path
from types import SimpleNamespace

import torch
from concept_atelier.kernels.grounding_dino import bert_without_download
from torch import Tensor, nn

WIDTH, GRID, PATCH = 32, 8, 8  # of SAM's image encoder, which sees 64 x 64 pixels
LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = ("a", "dog", "cat", "red", "ball", "man", "on", "grass")
BERT = {
    "vocab_size": 1100,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "intermediate_size": 64,
    "max_position_embeddings": 300,
}


def fill(module: nn.Module, seed: int, scale: float) -> nn.Module:
    """`module` with random weights that let every layer count; norms stay near 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            # One dimension and called weight: a norm's. Else matrices of gain about 1, and small biases.
            if parameter.dim() > 1:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(scale * noise + name.endswith("weight"))
    return module.eval().requires_grad_(False)


@cache
def sam(seed: int = 0) -> nn.Module:
    """The package's Sam, tiny."""
    from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

    encoder = ImageEncoderViT(
        img_size=GRID * PATCH,
        patch_size=PATCH,
        embed_dim=WIDTH,
        depth=3,
        num_heads=2,
        out_chans=16,
        norm_layer=lambda width: nn.LayerNorm(width, eps=1e-6),
        use_rel_pos=True,
        window_size=3,
        global_attn_indexes=(1,),
    )
    prompts = PromptEncoder(16, (GRID, GRID), (GRID * PATCH, GRID * PATCH), mask_in_chans=4)
    decoder = MaskDecoder(
        transformer_dim=16,
        transformer=TwoWayTransformer(depth=2, embedding_dim=16, num_heads=8, mlp_dim=32),
        iou_head_hidden_dim=16,
    )
    model = Sam(encoder, prompts, decoder, [123.675, 116.28, 103.53], [58.395, 57.12, 57.375])
    return fill(model, seed, 0.1)


def write_vocabulary(folder: Path) -> Path:
    """A vocabulary of 1100 words with the special ones where bert-base-uncased has them."""
    words = ["[PAD]", *(f"[unused{number}]" for number in range(99)), "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    words += [letter for letter in LETTERS if letter not in WORDS] + ["##" + letter for letter in LETTERS]
    words += [f"filler{number}" for number in range(BERT["vocab_size"] - len(words))]
    words[1012], words[1029] = ".", "?"
    file = folder / "vocab.txt"
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(words) + "\n", encoding="utf-8")
    return file


@cache
def dino(backbone: str = "swin_T_224_1k") -> nn.Module:
    """The package's GroundingDINO with its own configuration: a whole Swin, the rest tiny."""
    from groundingdino.config import GroundingDINO_SwinT_OGC as published
    from groundingdino.models.GroundingDINO.groundingdino import build_groundingdino

    tiny = {"backbone": backbone, "enc_layers": 2, "dec_layers": 2, "dim_feedforward": 64, "num_queries": 30}
    settings = SimpleNamespace(**{**vars(published), **tiny})
    tokenizer = SimpleNamespace(convert_tokens_to_ids=lambda words: [101, 102, 1012, 1029])
    with bert_without_download(BERT, tokenizer):
        network = build_groundingdino(settings)
    fill(network, 0, 0.1)
    network.transformer.decoder.norm.weight *= 0.2  # logits of a size that sigmoid tells apart
    return network


def dino_weights(backbone: str = "swin_T_224_1k") -> dict[str, Tensor]:
    """Its tensors as published files have them: with those of the training for denoising."""
    return {**dino(backbone).state_dict(), "label_enc.weight": torch.zeros(4, 256)}
