"""What other nodes do to a MODEL before ours get it: LoRAs, other patches of weights, dynamic VRAM."""

from collections.abc import Callable

import comfy.sd
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher

LORA_LAYERS = ("attn2.to_k", "attn2.to_v", "attn1.to_q", "ff.net.2")
KEYS_AND_VALUES = ("attn2.to_k", "attn2.to_v")


def lora_file(model: ModelPatcher, seed: int, layers: tuple[str, ...] = LORA_LAYERS) -> dict[str, torch.Tensor]:
    """The random content of a LoRA file of rank 2 for every module whose name ends like one of `layers`."""
    lora, generator = {}, torch.Generator().manual_seed(seed)
    for name, module in model.model.diffusion_model.named_modules():
        if name.endswith(layers):
            rows, columns = module.weight.shape
            lora[f"diffusion_model.{name}.lora_up.weight"] = torch.randn(rows, 2, generator=generator) * 0.3
            lora[f"diffusion_model.{name}.lora_down.weight"] = torch.randn(2, columns, generator=generator) / 8
    return lora


def with_lora(
    model: ModelPatcher, seed: int, strength: float = 1.0, layers: tuple[str, ...] = LORA_LAYERS
) -> ModelPatcher:
    """A clone of MODEL with that LoRA, by ComfyUI's own loader."""
    return comfy.sd.load_lora_for_models(model, None, lora_file(model, seed, layers), strength, 0.0)[0]


def with_ones_added(
    model: ModelPatcher, key: str = "diffusion_model.out.2.weight", strength: float = 1.0
) -> ModelPatcher:
    """A clone of MODEL with ones added to a single weight: the smallest change that makes it another model."""
    clone = model.clone()
    delta = torch.ones_like(comfy.utils.get_attr(model.model, key))
    assert clone.add_patches({key: ("diff", (delta,))}, strength)
    return clone


def with_uniform_attention(model: ModelPatcher) -> ModelPatcher:
    """A clone of MODEL whose cross-attention weighs all tokens alike: K projections of zero, patched."""
    clone = model.clone()
    keys = [key for key in clone.model.state_dict() if key.endswith("attn2.to_k.weight")]
    clone.add_patches({key: ("set", (torch.zeros_like(comfy.utils.get_attr(clone.model, key)),)) for key in keys})
    return clone


def make_dynamic(patcher: ModelPatcher, reload: Callable[[], ModelPatcher]) -> None:
    """Let a patcher pass for one of dynamic VRAM, which needs a GPU: `reload` builds its weights anew."""
    kind = type(patcher)
    patcher.__class__ = type("Dynamic", (kind,), {"is_dynamic": lambda self: True})
    patcher.cached_patcher_init = (lambda disable_dynamic: reload(), ())
