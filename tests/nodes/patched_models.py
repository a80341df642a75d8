"""What other nodes do to a MODEL before ours get it: LoRAs, other patches, tiles, dynamic VRAM."""

from collections.abc import Callable

import comfy.samplers
import comfy.sd
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from comparing import relative

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


def in_halves(model: ModelPatcher, together: bool) -> ModelPatcher:
    """A clone of MODEL that runs the halves of the picture one by one, or in one batch as Tiled Diffusion does."""

    def halves(apply_model, given):
        x, t, c = given["input"].chunk(2, dim=-1), given["timestep"], given["c"]
        if not together:
            return torch.cat([apply_model(half, t, **c) for half in x], dim=-1)
        twice = {key: torch.cat([value] * 2) if torch.is_tensor(value) else value for key, value in c.items()}
        return torch.cat(apply_model(torch.cat(x), torch.cat([t] * 2), **twice).chunk(2), dim=-1)

    clone = model.clone()
    clone.set_model_unet_function_wrapper(halves)
    return clone


def with_doubled_contexts(model: ModelPatcher) -> ModelPatcher:
    """A clone of MODEL whose cross-attention computes K from twice the context, by a patch."""
    clone = model.clone()
    clone.set_model_attn2_patch(lambda n, context, value, extra: (n, context * 2, value))
    return clone


def asking_again(model: ModelPatcher) -> tuple[ModelPatcher, list[float]]:
    """A clone of MODEL with a node that predicts the condition again after CFG, as PAG does.

    Also, filled while sampling: how far that is from what it is told that the condition predicted.
    """
    apart = []

    def again(given: dict) -> torch.Tensor:
        asked = given["model"], [given["cond"]], given["input"], given["sigma"], given["model_options"]
        [predicted] = comfy.samplers.calc_cond_batch(*asked)
        apart.append(relative(predicted, given["cond_denoised"]))
        return given["denoised"]

    clone = model.clone()
    clone.set_model_sampler_post_cfg_function(again)
    return clone, apart


def make_dynamic(patcher: ModelPatcher, reload: Callable[[], ModelPatcher]) -> None:
    """Let a patcher pass for one of dynamic VRAM, which needs a GPU: `reload` builds its weights anew."""
    kind = type(patcher)
    patcher.__class__ = type("Dynamic", (kind,), {"is_dynamic": lambda self: True})
    patcher.cached_patcher_init = (lambda disable_dynamic: reload(), ())
