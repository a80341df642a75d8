"""What it takes to differentiate through ComfyUI's models, all of it undone at the end.

ComfyUI runs every node in inference mode, so weights are inference tensors, which autograd refuses to save; its CLIP
layers add residuals in place; and the fastest attention functions have no backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from types import MethodType
from typing import Any

import comfy.clip_model
import comfy.model_management
import comfy.quant_ops
import comfy.sd
import torch
from comfy.ldm.modules.attention import attention_pytorch
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

PLAIN_DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
ALL_MEMORY = 1e20  # bytes to make free: everything that is not asked for by name leaves the device


@contextmanager
def differentiable(model: ModelPatcher, clip: comfy.sd.CLIP) -> Iterator[tuple[ModelPatcher, comfy.sd.CLIP]]:
    """While open, autograd works through MODEL and CLIP; yields the two to use, which may be copies.

    Inference mode is off; both are loaded completely, their weights are frozen plain tensors; CLIP's residuals are
    added out of place. On the way out, also after an error or an interruption, inference mode, requires_grad and
    forward methods are as before; the weights stay plain tensors (any later use is unaffected) with unchanged values.
    Raises ValueError for quantised weights, and where a dynamically loaded model cannot be loaded whole.
    """
    refuse_quantised(model.model, "MODEL")
    refuse_quantised(clip.cond_stage_model, "CLIP")
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        model, clip = _whole_model(model), _whole_clip(clip)
        stack.callback(model.cleanup)
        load_for_gradients([model, clip.patcher])
        stack.enter_context(frozen(model.model))
        stack.enter_context(frozen(clip.cond_stage_model))
        stack.enter_context(residuals_out_of_place(clip.cond_stage_model))
        model.pre_run()
        yield model, clip


@contextmanager
def differentiable_model(model: ModelPatcher, beside: Sequence[ModelPatcher] = ()) -> Iterator[ModelPatcher]:
    """As `differentiable`, where there is nothing to differentiate but MODEL; yields the one to use.

    For ComfyUI's own sampling, which loads what a conditioning brings along: run that in inference mode again and let
    the sampler inside leave it. Opened inside of a sampler, name in `beside` what it has loaded, which is to stay.
    """
    refuse_quantised(model.model, "MODEL")
    with torch.inference_mode(False):
        model = _whole_model(model)
        load_for_gradients([model, *beside])
        with frozen(model.model):
            yield model


def refuse_quantised(module: nn.Module, name: str) -> None:
    """Raise ValueError when a weight matrix of `module` is stored in fewer than 16 bits. name: of the node input."""
    for weight in module.parameters():
        quantised = isinstance(weight, comfy.quant_ops.QuantizedTensor) or weight.dtype not in PLAIN_DTYPES
        if quantised and weight.ndim > 1:
            raise ValueError(
                f"The {name} is quantised (its weights are {_describe(weight)}), and gradients through it are not "
                f"reliable: load an fp16, bf16 or fp32 checkpoint for training."
            )


def _describe(weight: Tensor) -> str:
    return type(weight).__name__ if isinstance(weight, comfy.quant_ops.QuantizedTensor) else str(weight.dtype)


def _whole_model(model: ModelPatcher) -> ModelPatcher:
    """A MODEL whose weights can be resident: dynamic VRAM evicts them while autograd still holds them."""
    if not model.is_dynamic():
        return model
    if model.cached_patcher_init is None:
        raise ValueError(
            "The MODEL or CLIP comes from a loader that cannot load it again without dynamic VRAM: use Load "
            "Checkpoint, or start ComfyUI with --disable-dynamic-vram."
        )
    return model.clone(disable_dynamic=True)


def _whole_clip(clip: comfy.sd.CLIP) -> comfy.sd.CLIP:
    if not clip.patcher.is_dynamic():
        return clip
    whole = clip.clone()
    whole.patcher = _whole_model(clip.patcher)
    whole.cond_stage_model = whole.patcher.model
    return whole


def load_for_gradients(patchers: Sequence[ModelPatcher]) -> None:
    """Load all of `patchers` completely and side by side, and make their weights plain tensors.

    To be called again after anything else was loaded (a VAE), because that may have moved them. Raises ValueError where
    ComfyUI streams weights instead: autograd would keep the buffer they are streamed through.
    """
    # Loading outside inference mode would leave weights that deny being inference tensors and still have no version
    # counter: they fail only in the backward pass.
    with torch.inference_mode():
        comfy.model_management.load_models_gpu(list(patchers), memory_required=ALL_MEMORY, force_full_load=True)
    for patcher in patchers:
        if patcher.model.model_lowvram:
            raise ValueError(
                "The MODEL or CLIP stays off the device (ComfyUI was started with --novram), where it has no "
                "gradients: start ComfyUI without it for training."
            )
        leave_inference(patcher.model)


def leave_inference(module: nn.Module) -> None:
    """Replace the inference tensors among the weights of `module` by copies, one at a time."""
    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is not None and weight.is_inference():
                part._parameters[name] = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None and buffer.is_inference():
                part._buffers[name] = buffer.clone()


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """While open, no weight of `module` asks for a gradient: a third of every step saved."""
    learnable = [name for name, weight in module.named_parameters() if weight.requires_grad]
    for name in learnable:
        module.get_parameter(name).requires_grad_(False)
    try:
        yield
    finally:
        for name in learnable:
            module.get_parameter(name).requires_grad_(True)


@contextmanager
def residuals_out_of_place(module: nn.Module) -> Iterator[None]:
    """While open, the CLIP layers inside `module` add their residuals out of place, as autograd needs."""
    layers = [part for part in module.modules() if isinstance(part, comfy.clip_model.CLIPLayer)]
    replaced = [vars(layer).get("forward") for layer in layers]
    for layer in layers:
        layer.forward = MethodType(_clip_layer_forward, layer)
    try:
        yield
    finally:
        for layer, forward in zip(layers, replaced):
            del layer.forward
            if forward is not None:
                layer.forward = forward


def _clip_layer_forward(
    layer: comfy.clip_model.CLIPLayer,
    x: Tensor,
    mask: Tensor | None = None,
    optimized_attention: Callable[..., Tensor] | None = None,
) -> Tensor:
    x = x + layer.self_attn(layer.layer_norm1(x), mask, optimized_attention)
    return x + layer.mlp(layer.layer_norm2(x))


def saved_for_backward(transformer_options: Mapping[str, Any]) -> AbstractContextManager[None]:
    """While open, what autograd saves are copies where a patch may change activations in place (FreeU V2 does)."""
    if "output_block_patch" not in transformer_options.get("patches", {}):
        return nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(
        lambda saved: saved if saved.grad_fn is None else saved.detach().clone(), lambda saved: saved
    )


def attention_with_backward(transformer_options: Mapping[str, Any]) -> Callable[..., Tensor]:
    """An optimized_attention_override that computes attention with PyTorch's own function, which has a backward.

    An override that another node installed in `transformer_options` stays in effect around it. Raises ValueError
    where that one cuts the gradient.
    """
    previous = transformer_options.get("optimized_attention_override")

    def attend(_: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if previous is None:
            return attention_pytorch(q, k, v, *args, **kwargs)
        out = previous(attention_pytorch, q, k, v, *args, **kwargs)
        if not out.requires_grad and (q.requires_grad or k.requires_grad or v.requires_grad):
            raise ValueError(
                "Another node gave this MODEL an attention function without gradients (sage, flash, int8): "
                "connect the MODEL as it comes before that node."
            )
        return out

    return attend
