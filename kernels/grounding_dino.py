"""GroundingDINO's published checkpoints in two engines: transformers, and groundingdino-py where it is installed.

The sizes come from the tensors, so no configuration file is read, and no .py of a model folder is run. BERT's weights
are in the checkpoint; only its vocabulary is a file of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .detection import MAX_TOKENS, SEPARATORS
from .grounding_dino_keys import to_hub_layout
from .published_weights import PublishedWeights

NAMES = {96: "SwinT", 128: "SwinB"}  # by the width of the backbone
# What tensors do not tell; the same in all published models.
HEADS, BERT_HEAD_WIDTH, STAGES = 8, 64, 4
TEMPERATURE = 20  # of the sine embedding of places
# transformers has this one, the network does not use it and the published files lack it.
NEVER_THERE = ".swin.layernorm."


@dataclass(frozen=True)
class Shape:
    """The sizes of a GroundingDINO, as its tensors tell them."""

    embed_dim: int
    depths: list[int]
    swin_heads: list[int]
    window: int
    d_model: int
    queries: int
    outputs: int  # stages of the backbone that are looked at, the last ones
    levels: int
    encoder_layers: int
    decoder_layers: int
    feed_forward: int
    points: int
    bert: dict[str, int]

    @property
    def name(self) -> str:
        """SwinT or SwinB, or the width of another backbone."""
        return "GroundingDINO " + NAMES.get(self.embed_dim, f"with a backbone of width {self.embed_dim}")


def read_shape(weights: PublishedWeights) -> Shape:
    """The sizes of a checkpoint in the published layout. Raises ValueError for other models and incomplete files."""
    if "transformer.tgt_embed.weight" not in weights or "bert.embeddings.word_embeddings.weight" not in weights:
        raise ValueError(
            f"{weights.file} is no GroundingDINO in the layout of its authors: choose groundingdino_swint_ogc.pth or "
            "groundingdino_swinb_cogcoor.pth."
        )
    stages = [f"backbone.0.layers.{stage}.blocks" for stage in range(STAGES)]
    tables = [weights.shape(f"{stage}.0.attn.relative_position_bias_table") for stage in stages]
    levels = weights.layers("input_proj")
    kernels = [weights.shape(f"input_proj.{level}.0.weight")[-1] for level in range(levels)]
    queries, d_model = weights.shape("transformer.tgt_embed.weight")
    vocabulary, bert_width = weights.shape("bert.embeddings.word_embeddings.weight")
    return Shape(
        embed_dim=weights.shape("backbone.0.patch_embed.proj.weight")[0],
        depths=[weights.layers(stage) for stage in stages],
        swin_heads=[heads for _, heads in tables],
        window=(round(tables[0][0] ** 0.5) + 1) // 2,
        d_model=d_model,
        queries=queries,
        outputs=kernels.count(1),
        levels=levels,
        encoder_layers=weights.layers("transformer.encoder.layers"),
        decoder_layers=weights.layers("transformer.decoder.layers"),
        feed_forward=weights.shape("transformer.encoder.layers.0.linear1.weight")[0],
        points=weights.shape("transformer.encoder.layers.0.self_attn.attention_weights.bias")[0] // HEADS // levels,
        bert={
            "vocab_size": vocabulary,
            "hidden_size": bert_width,
            "num_hidden_layers": weights.layers("bert.encoder.layer"),
            "num_attention_heads": bert_width // BERT_HEAD_WIDTH,
            "intermediate_size": weights.shape("bert.encoder.layer.0.intermediate.dense.weight")[0],
            "max_position_embeddings": weights.shape("bert.embeddings.position_embeddings.weight")[0],
        },
    )


def read_vocabulary(file: Path, shape: Shape) -> Any:
    """BERT's tokenizer from vocab.txt, without the network. Raises ValueError when it is not that of the model."""
    from transformers import BertTokenizerFast

    # Not BertTokenizerFast(vocab_file=...), which silently knows no word in transformers 5.
    tokenizer = BertTokenizerFast.from_pretrained(str(file.parent), local_files_only=True)
    marks = tuple(tokenizer.convert_tokens_to_ids(["[CLS]", "[SEP]", ".", "?"]))
    if len(tokenizer) != shape.bert["vocab_size"] or marks != SEPARATORS:
        raise ValueError(
            f"{file} is not the vocabulary of bert-base-uncased ({len(tokenizer)} words where this model knows "
            f"{shape.bert['vocab_size']}): replace it with vocab.txt of bert-base-uncased."
        )
    return tokenizer


class TransformersEngine(nn.Module):
    """transformers' GroundingDinoForObjectDetection as an engine of kernels/detection.py."""

    def __init__(self, network: nn.Module, tokenizer: Any) -> None:
        super().__init__()
        self.network = network
        self.tokenizer = tokenizer

    def forward(self, pixels: Tensor, caption: str) -> tuple[Tensor, Tensor]:
        device = self.network.device
        tokens = self.tokenizer(caption, return_tensors="pt").to(device)
        found = self.network(pixel_values=pixels.to(device), **tokens)
        return found.logits[0], found.pred_boxes[0]


class PackageEngine(nn.Module):
    """groundingdino-py's GroundingDINO as an engine of kernels/detection.py."""

    def __init__(self, network: nn.Module, tokenizer: Any) -> None:
        super().__init__()
        self.network = network
        self.tokenizer = network.tokenizer = tokenizer

    def forward(self, pixels: Tensor, caption: str) -> tuple[Tensor, Tensor]:
        device = self.network.feat_map.weight.device
        found = self.network(pixels.to(device), captions=[caption])
        return found["pred_logits"][0], found["pred_boxes"][0]


def build_with_transformers(weights: PublishedWeights, vocabulary: Path) -> TransformersEngine:
    """The checkpoint in transformers 4.50 and newer, in float32 (half precision fails in 4.x).

    Raises ValueError for other models, incomplete files and another vocabulary.
    """
    from transformers import BertConfig, GroundingDinoConfig, GroundingDinoForObjectDetection, SwinConfig

    shape = read_shape(weights)
    config = GroundingDinoConfig(
        backbone_config=SwinConfig(
            embed_dim=shape.embed_dim,
            depths=shape.depths,
            num_heads=shape.swin_heads,
            window_size=shape.window,
            out_indices=list(range(STAGES + 1 - shape.outputs, STAGES + 1)),
        ),
        text_config=BertConfig(**shape.bert),
        d_model=shape.d_model,
        num_queries=shape.queries,
        num_feature_levels=shape.levels,
        encoder_layers=shape.encoder_layers,
        decoder_layers=shape.decoder_layers,
        encoder_ffn_dim=shape.feed_forward,
        decoder_ffn_dim=shape.feed_forward,
        encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS,
        encoder_n_points=shape.points,
        decoder_n_points=shape.points,
        positional_embedding_temperature=TEMPERATURE,
        max_text_len=MAX_TOKENS,
        disable_custom_kernels=True,
    )
    network, report = GroundingDinoForObjectDetection.from_pretrained(
        None, config=config, state_dict=to_hub_layout(weights.tensors), output_loading_info=True
    )
    missing = sorted(key for key in report["missing_keys"] if NEVER_THERE not in key)
    if missing:
        raise ValueError(
            f"{weights.file} is incomplete, transformers misses {len(missing)} tensors, the first {missing[0]}: "
            "download it again."
        )
    return TransformersEngine(network.float().eval().requires_grad_(False), read_vocabulary(vocabulary, shape))


class BertInPlace(nn.Module):
    """BERT as groundingdino-py calls it, in place of its own wrapper, which needs methods that transformers dropped.

    The children have the wrapper's names, and with them the names in checkpoints.
    """

    def __init__(self, bert_model: nn.Module) -> None:
        super().__init__()
        self.config = bert_model.config
        self.embeddings = bert_model.embeddings
        self.encoder = bert_model.encoder
        self.pooler = bert_model.pooler

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor, position_ids: Tensor
    ) -> dict[str, Tensor]:
        """attention_mask: (B, L, L) bool, which token sees which. Returns last_hidden_state (B, L, width)."""
        embedded = self.embeddings(input_ids=input_ids, token_type_ids=token_type_ids, position_ids=position_ids)
        hidden = torch.zeros_like(attention_mask, dtype=embedded.dtype)
        hidden = hidden.masked_fill(~attention_mask, torch.finfo(embedded.dtype).min)[:, None]
        return {"last_hidden_state": self.encoder(embedded, attention_mask=hidden)[0]}


@contextmanager
def bert_without_download(sizes: dict[str, int], tokenizer: Any) -> Iterator[None]:
    """While it lasts, groundingdino-py builds an empty BERT of these sizes instead of downloading one."""
    from groundingdino.models.GroundingDINO import groundingdino as package
    from groundingdino.util import get_tokenlizer as loaders
    from transformers import BertConfig, BertModel

    kept = package.BertModelWarper, loaders.get_tokenlizer, loaders.get_pretrained_language_model
    package.BertModelWarper = BertInPlace
    loaders.get_tokenlizer = lambda _: tokenizer
    loaders.get_pretrained_language_model = lambda _: BertModel(BertConfig(**sizes))
    try:
        yield
    finally:
        package.BertModelWarper, loaders.get_tokenlizer, loaders.get_pretrained_language_model = kept


def build_with_package(weights: PublishedWeights, vocabulary: Path) -> PackageEngine:
    """The checkpoint in groundingdino-py 0.4, on any transformers from 4.50.

    Raises ValueError for other models, incomplete files and another vocabulary.
    """
    from groundingdino.models.GroundingDINO.backbone.backbone import Joiner
    from groundingdino.models.GroundingDINO.backbone.position_encoding import PositionEmbeddingSineHW
    from groundingdino.models.GroundingDINO.backbone.swin_transformer import SwinTransformer
    from groundingdino.models.GroundingDINO.groundingdino import GroundingDINO
    from groundingdino.models.GroundingDINO.transformer import Transformer

    shape = read_shape(weights)
    tokenizer = read_vocabulary(vocabulary, shape)
    swin = SwinTransformer(
        embed_dim=shape.embed_dim,
        depths=shape.depths,
        num_heads=shape.swin_heads,
        window_size=shape.window,
        out_indices=tuple(range(STAGES - shape.outputs, STAGES)),
    )
    places = PositionEmbeddingSineHW(shape.d_model // 2, TEMPERATURE, TEMPERATURE, normalize=True)
    backbone = Joiner(swin, places)
    backbone.num_channels = swin.num_features[-shape.outputs :]
    transformer = Transformer(
        d_model=shape.d_model,
        nhead=HEADS,
        num_queries=shape.queries,
        num_encoder_layers=shape.encoder_layers,
        num_decoder_layers=shape.decoder_layers,
        dim_feedforward=shape.feed_forward,
        return_intermediate_dec=True,
        query_dim=4,
        num_feature_levels=shape.levels,
        enc_n_points=shape.points,
        dec_n_points=shape.points,
        learnable_tgt_init=True,
        two_stage_type="standard",
        embed_init_tgt=True,
        use_text_enhancer=True,
        use_fusion_layer=True,
        use_text_cross_attention=True,
    )
    with bert_without_download(shape.bert, tokenizer):
        network = GroundingDINO(
            backbone,
            transformer,
            num_queries=shape.queries,
            iter_update=True,
            query_dim=4,
            num_feature_levels=shape.levels,
            nheads=HEADS,
            two_stage_type="standard",
            two_stage_bbox_embed_share=False,
            two_stage_class_embed_share=False,
            max_text_len=MAX_TOKENS,
        )
    return PackageEngine(weights.load_into(network), tokenizer)


ENGINES = {"transformers": build_with_transformers, "groundingdino-py": build_with_package}
