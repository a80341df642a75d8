"""What makes gradients possible, piece by piece."""

import comfy.clip_model
import comfy.model_management
import pytest
import tiny_models
import torch
from comfy.ldm.modules.attention import attention_pytorch
from concept_atelier.nodes.native import gradients
from patched_models import make_dynamic
from torch import nn


def linear_in_inference_mode():
    with torch.inference_mode():
        module = nn.Linear(3, 3)
        module.register_buffer("scale", torch.ones(3))
    return module


def test_inference_weights_cannot_be_trained_through_until_they_leave_inference():
    module = linear_in_inference_mode()
    x = torch.ones(2, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match="Inference tensors"):
        module(x).sum().backward()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    gradients.leave_inference(module)
    (module(x) * module.scale).sum().backward()
    assert x.grad is not None
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    kept = module.weight
    gradients.leave_inference(module)
    assert module.weight is kept  # nothing to do the second time


def test_weights_that_a_reload_moved_can_be_trained_through():
    with torch.inference_mode():
        model = tiny_models.build_unet("sd1")
    for _ in range(2):
        gradients.load_for_gradients([model])
        assert not any(p.is_inference() for p in model.model.parameters())
        with torch.inference_mode():
            model.model.to(torch.float64).to(torch.float32)  # as moving to a device and back does
        assert all(p.is_inference() for p in model.model.parameters())


def test_frozen_restores_what_asked_for_gradients():
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    module[1].requires_grad_(False)
    with pytest.raises(KeyError), gradients.frozen(module):
        assert not any(p.requires_grad for p in module.parameters())
        raise KeyError
    assert [p.requires_grad for p in module.parameters()] == [True, True, False, False]


def test_residuals_are_added_out_of_place_with_the_same_result(tiny):
    text_model = tiny("sd1").clip.cond_stage_model
    layer = next(m for m in text_model.modules() if isinstance(m, comfy.clip_model.CLIPLayer))
    x = torch.randn(1, 5, 64)
    expected = layer(x.clone(), None, attention_pytorch)
    own = object()
    layer.forward = own  # another node's patch on the instance
    with gradients.residuals_out_of_place(text_model):
        kept = x.clone()
        assert torch.equal(layer(kept, None, attention_pytorch), expected) and torch.equal(kept, x)
    assert layer.forward is own
    del layer.forward


@pytest.mark.parametrize("part", ["MODEL", "CLIP"])
def test_quantised_weights_are_refused_before_anything_is_loaded(tiny, part, monkeypatch):
    model, clip, _ = tiny_models.build("sd1")
    monkeypatch.setattr(comfy.model_management, "load_models_gpu", lambda *a, **k: pytest.fail("loaded"))
    quantised = model.model.diffusion_model if part == "MODEL" else clip.cond_stage_model
    quantised.to(torch.float8_e4m3fn)
    refused = pytest.raises(ValueError, match=f"The {part} is quantised .*float8_e4m3fn.* load an fp16")
    with refused, gradients.differentiable(model, clip):
        pass
    assert not torch.is_inference_mode_enabled()


def test_a_dynamic_model_that_cannot_be_reloaded_is_refused(tiny, monkeypatch):
    model, clip, _ = tiny_models.build("sd1")
    monkeypatch.setattr(type(model), "is_dynamic", lambda self: True)
    with pytest.raises(ValueError, match="disable-dynamic-vram"), gradients.differentiable(model, clip):
        pass


def test_a_dynamic_model_is_loaded_whole_beside_it():
    with torch.inference_mode():
        model, clip, _ = tiny_models.build("sd1")
        stock = clip.encode_from_tokens(clip.tokenize("a cat"))
    clip.clip_layer(-2)
    make_dynamic(model, lambda: tiny_models.build_unet("sd1", 0))
    make_dynamic(clip.patcher, lambda: tiny_models.build_clip("sd1", 1).patcher)
    with torch.inference_mode(), gradients.differentiable(model, clip) as (whole_model, whole_clip):
        assert whole_model.model is not model.model and whole_clip.cond_stage_model is not clip.cond_stage_model
        assert whole_clip.cond_stage_model is whole_clip.patcher.model and whole_clip.layer_idx == -2
        assert not any(p.is_inference() for p in whole_model.model.parameters())
        whole_clip.clip_layer(None)
        assert torch.equal(whole_clip.encode_from_tokens(whole_clip.tokenize("a cat")), stock)


def test_streamed_weights_are_refused(monkeypatch):
    model = tiny_models.build_unet("sd1")
    monkeypatch.setattr(comfy.model_management, "vram_state", comfy.model_management.VRAMState.NO_VRAM)
    monkeypatch.setattr(comfy.model_management, "is_device_cpu", lambda device: False)
    with pytest.raises(ValueError, match="--novram"):
        gradients.load_for_gradients([model])


def test_an_attention_function_without_backward_is_refused():
    q, k, v = (torch.randn(1, 4, 8, requires_grad=True) for _ in range(3))
    options = {
        "optimized_attention_override": lambda func, q, k, v, heads: func(q.detach(), k.detach(), v.detach(), heads)
    }
    attend = gradients.attention_with_backward(options)
    with pytest.raises(ValueError, match="attention function without gradients"):
        attend(None, q, k, v, 2)
    assert attend(None, q.detach(), k.detach(), v.detach(), 2).shape == (1, 4, 8)
    halved = {"optimized_attention_override": lambda func, *args: func(*args) / 2}
    plain, half = (gradients.attention_with_backward(o)(None, q, k, v, 2) for o in ({}, halved))
    assert torch.equal(half, plain / 2) and plain.requires_grad
