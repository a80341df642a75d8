"""A custom node pack for tests only: lets the stock CheckpointLoaderSimple load a tiny checkpoint as SD1.x.

The classes name a 32-channel U-Net and a 64-wide CLIP; ComfyUI's detection matches them by these two widths.
"""

import comfy.sd1_clip
import comfy.supported_models
import comfy.supported_models_base

WIDTH = 64
TEXT_CONFIG = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 2 * WIDTH,
    "projection_dim": WIDTH,
}


class TinyTextModel(comfy.sd1_clip.SD1ClipModel):
    def __init__(self, device="cpu", dtype=None, model_options=None):
        options = {**(model_options or {}), "clip_l_model_config": TEXT_CONFIG}
        super().__init__(device=device, dtype=dtype, model_options=options)


class TinyTokenizer(comfy.sd1_clip.SD1Tokenizer):
    def __init__(self, embedding_directory=None, tokenizer_data=None):
        super().__init__(embedding_directory=embedding_directory, tokenizer_data=tokenizer_data or {})
        self.clip_l.embedding_size = WIDTH


class TinySD1(comfy.supported_models.SD15):
    unet_config = {**comfy.supported_models.SD15.unet_config, "context_dim": WIDTH, "model_channels": 32}

    def clip_target(self, state_dict=None):
        return comfy.supported_models_base.ClipTarget(TinyTokenizer, TinyTextModel)


comfy.supported_models.models.append(TinySD1)
NODE_CLASS_MAPPINGS = {}
