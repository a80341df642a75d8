"""The names of GroundingDINO's tensors: from the published checkpoints to those that transformers reads.

The aim is the layout of the files on the Hugging Face Hub. transformers renames that layout to whatever its modules are
called in each of its versions, so one map serves all of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

FUSED = ("query", "key", "value")  # published as one tensor, read as three: {} in a new name stands for them
SWIN = "model.backbone.conv_encoder.model."

# A part of the network: its names begin with the first pattern, which becomes the second; then each of the pairs that
# follow replaces a piece of what is left. N stands for a number that stays.
PARTS = {
    "backbone.0.patch_embed.": (SWIN + "embeddings.", {"proj.": "patch_embeddings.projection."}),
    "backbone.0.norm1.": (SWIN + "hidden_states_norms.stage2.", {}),
    "backbone.0.norm2.": (SWIN + "hidden_states_norms.stage3.", {}),
    "backbone.0.norm3.": (SWIN + "hidden_states_norms.stage4.", {}),
    "backbone.0.layers.N.downsample.": (SWIN + "encoder.layers.N.downsample.", {}),
    "backbone.0.layers.N.blocks.N.": (
        SWIN + "encoder.layers.N.blocks.N.",
        {
            "norm1.": "layernorm_before.",
            "norm2.": "layernorm_after.",
            "attn.qkv.": "attention.self.{}.",
            "attn.proj.": "attention.output.dense.",
            "attn.relative": "attention.self.relative",
            "mlp.fc1.": "intermediate.dense.",
            "mlp.fc2.": "output.dense.",
        },
    ),
    "bert.embeddings.": ("model.text_backbone.embeddings.", {}),
    "bert.encoder.": ("model.text_backbone.encoder.", {}),
    "feat_map.": ("model.text_projection.", {}),
    "input_proj.": ("model.input_proj_vision.", {}),
    "transformer.level_embed": ("model.level_embed", {}),
    "transformer.tgt_embed.": ("model.query_position_embeddings.", {}),
    "transformer.enc_output.": ("model.enc_output.", {}),
    "transformer.enc_output_norm.": ("model.enc_output_norm.", {}),
    "transformer.enc_out_bbox_embed.": ("model.encoder_output_bbox_embed.", {}),
    "transformer.encoder.layers.N.": (
        "model.encoder.layers.N.deformable_layer.",
        {"norm1.": "self_attn_layer_norm.", "norm2.": "final_layer_norm.", "linear1.": "fc1.", "linear2.": "fc2."},
    ),
    "transformer.encoder.text_layers.N.": (
        "model.encoder.layers.N.text_enhancer_layer.",
        {
            "self_attn.in_proj_": "self_attn.{}.",
            "norm1.": "layer_norm_before.",
            "norm2.": "layer_norm_after.",
            "linear1.": "fc1.",
            "linear2.": "fc2.",
        },
    ),
    "transformer.encoder.fusion_layers.N.": (
        "model.encoder.layers.N.fusion_layer.",
        {
            "gamma_v": "vision_param",
            "gamma_l": "text_param",
            "layer_norm_v.": "layer_norm_vision.",
            "layer_norm_l.": "layer_norm_text.",
            "v_proj.": "vision_proj.",
            "l_proj.": "text_proj.",
        },
    ),
    "transformer.decoder.layers.N.": (
        "model.decoder.layers.N.",
        {
            "self_attn.in_proj_": "self_attn.{}.",
            "ca_text.in_proj_": "encoder_attn_text.{}.",
            "ca_text.out_proj.": "encoder_attn_text.out_proj.",
            "catext_norm.": "encoder_attn_text_layer_norm.",
            "cross_attn.": "encoder_attn.",
            "norm1.": "encoder_attn_layer_norm.",
            "norm2.": "self_attn_layer_norm.",
            "norm3.": "final_layer_norm.",
            "linear1.": "fc1.",
            "linear2.": "fc2.",
        },
    ),
    "transformer.decoder.norm.": ("model.decoder.layer_norm.", {}),
    "transformer.decoder.ref_point_head.": ("model.decoder.reference_points_head.", {}),
    "transformer.decoder.bbox_embed.": ("model.decoder.bbox_embed.", {}),
    "bbox_embed.": ("bbox_embed.", {}),
}
PATTERNS = [(re.compile(re.escape(old).replace("N", r"(\d+)")), *new) for old, new in PARTS.items()]


def hub_name(key: str) -> str | None:
    """The name of a published tensor in the Hub's layout, with {} where three are in one.

    None for what detection does not use: BERT's pooler, and label_enc, which only training needed.
    """
    for pattern, beginning, pieces in PATTERNS:
        if found := pattern.match(key):
            rest = key[found.end() :]
            for old, new in pieces.items():
                rest = rest.replace(old, new)
            for number in found.groups():
                beginning = beginning.replace("N", number, 1)
            return beginning + rest
    return None


def to_hub_layout(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a published checkpoint under the names of the Hub's files. Unused ones are left out."""
    renamed = {}
    for key, value in weights.items():
        name = hub_name(key)
        if name is None:
            continue
        for part, piece in zip(FUSED, value.chunk(3)) if "{}" in name else [("", value)]:
            renamed[name.format(part)] = piece
    return renamed
