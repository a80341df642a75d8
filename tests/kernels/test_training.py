"""The training loop on a small random model: METHODS.md 1.11, properties 1, 2, 5-9, 11, and section 8."""

import hashlib
import itertools

import pytest
import torch
from concept_atelier.kernels.concept import new_vectors
from concept_atelier.kernels.conditioning import encode_prompt
from concept_atelier.kernels.course import draw_timesteps
from concept_atelier.kernels.diffusers_backbone import DiffusersBackbone
from concept_atelier.kernels.exemplars import Exemplar, encode_exemplars
from concept_atelier.kernels.gradient_mask import GradientMask, context_mask
from concept_atelier.kernels.gradient_rules import MaskedTriples, PlainGradient
from concept_atelier.kernels.layouts import Layout
from concept_atelier.kernels.losses import Prediction, denoising_loss
from concept_atelier.kernels.prompts import fill_blank
from concept_atelier.kernels.run_state import RunState
from concept_atelier.kernels.training import TrainingSettings, concept_gradients, draw_anchors, train
from concept_atelier.toyworld.model import load_toy

NAME = "act"
PROMPT = fill_blank("a man {} on grass", NAME)


@pytest.fixture(scope="module")
def backbone() -> DiffusersBackbone:
    return DiffusersBackbone.from_toy(load_toy(random_weights=True))


def pictures(count: int, seed: int) -> list[torch.Tensor]:
    return list(torch.rand(count, 64, 64, 3, generator=torch.Generator().manual_seed(seed)))


@pytest.fixture(scope="module")
def data(backbone):
    exemplars = [
        Exemplar(image, "a man {} on grass", None, tuple(pictures(2, 10 + i))) for i, image in enumerate(pictures(3, 0))
    ]
    return encode_exemplars(backbone, exemplars, NAME)


def noise(backbone, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, backbone.latent_channels, 8, 8, generator=torch.Generator().manual_seed(seed))


def start(backbone, layout, spread: float = 0.0) -> RunState:
    vectors = new_vectors(backbone.token_vectors("poses"), layout.slots, 1)
    jitter = torch.randn(vectors["l"].shape, generator=torch.Generator().manual_seed(5))
    return RunState.start({"l": vectors["l"] + spread * jitter})


def run(backbone, data, rule, layout=None, state=None, **settings) -> RunState:
    layout = (layout or Layout("block")).bind(backbone.layers)
    state = state or start(backbone, layout)
    settings = TrainingSettings(**{"steps": 4, "learning_rate": 1e-2, "weight_decay": 0.0, **settings})
    train(backbone, data, NAME, layout, rule, settings, state, lambda _: False)
    return state


def gradients(backbone, data, vectors, layout, latents, t, eps):
    return concept_gradients(backbone, NAME, [PROMPT] * t.shape[1], vectors, layout, latents, t, eps)


def test_beta_zero_is_plain_layer_wise_inversion(backbone, data):
    plain, masked = run(backbone, data, PlainGradient()), run(backbone, data, MaskedTriples(GradientMask(beta=0.0)))
    assert torch.allclose(plain.vectors["l"], masked.vectors["l"], atol=1e-4)  # 4 steps of 1e-2
    assert plain.losses == pytest.approx(masked.losses, rel=1e-5)


def test_beta_one_moves_nothing(backbone, data):
    before = start(backbone, Layout("block").bind(backbone.layers)).vectors["l"].detach().clone()
    after = run(backbone, data, MaskedTriples(GradientMask(beta=1.0))).vectors["l"]
    assert torch.equal(before, after)


def test_masking_the_update_freezes_closed_channels_where_momentum_would_move_them(backbone, data):
    closed = {}

    class Watched(MaskedTriples):
        def combine(self, g, generator):
            update = super().combine(g, generator)
            closed["now"] = update.gradient == 0
            return update

    moved = {}
    for target in ("gradient", "update"):
        state = run(backbone, data, Watched(GradientMask(target=target)), steps=3)
        before = state.vectors["l"].detach().clone()
        run(backbone, data, Watched(GradientMask(target=target)), state=state, steps=4)
        moved[target] = (state.vectors["l"] - before)[closed["now"]].abs().max().item()
    assert moved["update"] == 0 < moved["gradient"]


@pytest.mark.parametrize("masked", [False, True])
def test_a_picture_of_the_anchors_own_action_differs_from_it_in_nothing(backbone, masked):
    mask = torch.zeros(64, 64)
    mask[16:48, 8:40] = 1
    exemplars = [Exemplar(p, "a man {} on grass", mask if masked else None, (p,)) for p in pictures(2, 0)]
    encoded = encode_exemplars(backbone, exemplars, NAME)
    roles = MaskedTriples(GradientMask()).pictures(encoded, 0, torch.Generator().manual_seed(0))
    masks = roles.masks[:, None] if masked else None
    layout, t = Layout("block").bind(backbone.layers), torch.full((3, 1), 500)
    vectors, eps = start(backbone, layout).vectors, noise(backbone, 1, 1).expand(3, -1, -1, -1, -1)
    latents = roles.latents[:, None]
    _, g = concept_gradients(backbone, NAME, [PROMPT], vectors, layout, latents, t, eps, masks)
    d_context, d_action = ((g["l"][0] - g["l"][role]).norm() for role in (1, 2))
    assert d_action < 1e-4 * g["l"][0].norm() < d_context


def test_equal_vectors_in_every_slot_are_one_token(backbone):
    one, many = Layout("prompt").bind(backbone.layers), Layout("layer").bind(backbone.layers)
    word = backbone.token_vectors("action")
    x_t, t = (
        noise(backbone, 1),
        torch.tensor([500]),
    )
    predictions = []
    for layout in (one, many):
        vectors = new_vectors(word, layout.slots, 1)
        staged = encode_prompt(backbone.encode_text, backbone.layers, PROMPT, {NAME: vectors}, {NAME: layout}, 1000)
        predictions.append(backbone.predict_noise(x_t, t, staged.at(500)))
    assert torch.allclose(*predictions, atol=1e-5)


def test_a_slot_reaches_its_own_layer_only(backbone):
    layout = Layout("layer").bind(backbone.layers)
    vectors = new_vectors(backbone.token_vectors("action"), layout.slots, 1)
    x_t, t = (
        noise(backbone, 1),
        torch.tensor([500]),
    )
    projections = [n for n in backbone.linears() if n.endswith(("attn2.to_k", "attn2.to_v"))]

    def read(v) -> dict[str, torch.Tensor]:
        seen, hooks = {}, []
        for name in projections:
            keep = lambda m, args, out, name=name: seen.__setitem__(name, args[0].detach().clone())  # noqa: E731
            hooks.append(backbone.linears()[name].register_forward_hook(keep))
        staged = encode_prompt(backbone.encode_text, backbone.layers, PROMPT, {NAME: v}, {NAME: layout}, 1000)
        backbone.predict_noise(x_t, t, staged.at(500))
        for hook in hooks:
            hook.remove()
        return seen

    plain = read(vectors)
    for slot in range(layout.slots):
        changed = read({"l": vectors["l"] + torch.eye(layout.slots)[slot][:, None, None]})
        differ = [name for name in projections if not torch.equal(plain[name], changed[name])]
        assert differ == projections[2 * slot : 2 * slot + 2]


def test_layers_before_a_slot_have_no_gradient_to_it(backbone):
    layout = Layout("layer").bind(backbone.layers)
    vectors = {"l": new_vectors(backbone.token_vectors("action"), layout.slots, 1)["l"].requires_grad_()}
    x_t, t = (
        noise(backbone, 1),
        torch.tensor([500]),
    )
    staged = encode_prompt(backbone.encode_text, backbone.layers, PROMPT, {NAME: vectors}, {NAME: layout}, 1000)
    read_at = 3
    layer = backbone.layers[read_at]
    with backbone.attention([layer], staged.positions[NAME]) as attention:
        backbone.predict_noise(x_t, t, staged.at(500))
    (gradient,) = torch.autograd.grad(attention.maps[layer][0].mean(), vectors["l"])
    reached = gradient.abs().sum((1, 2)) > 0
    assert reached.tolist() == [slot <= read_at for slot in range(layout.slots)]


def test_other_pictures_of_a_triple_change_vectors_through_the_mask_alone(backbone, data):
    import dataclasses

    others = tuple(o + 1.0 for o in data.other_actions)
    changed = dataclasses.replace(data, other_actions=others)
    open_mask = MaskedTriples(GradientMask(beta=0.0))
    assert torch.allclose(
        run(backbone, data, open_mask).vectors["l"], run(backbone, changed, open_mask).vectors["l"], atol=1e-5
    )
    masked = MaskedTriples(GradientMask(beta=0.6))
    assert not torch.allclose(
        run(backbone, data, masked).vectors["l"], run(backbone, changed, masked).vectors["l"], atol=1e-3
    )


def test_gradients_of_a_batched_triple_equal_three_single_passes(backbone, data):
    layout = Layout("block").bind(backbone.layers)
    vectors = start(backbone, layout, spread=0.1).vectors
    latents = torch.stack([data.latents[0], data.latents[1], data.other_actions[0][0]])[:, None]
    eps = noise(backbone, 1, 1, seed=2).expand(3, -1, -1, -1, -1)
    t = torch.tensor([[400]]).expand(3, 1)
    losses, together = gradients(backbone, data, vectors, layout, latents, t, eps)
    for r in range(3):
        loss, alone = gradients(backbone, data, vectors, layout, latents[r : r + 1], t[:1], eps[:1])
        assert torch.allclose(loss.total[0], losses.total[r], rtol=1e-5)
        scale = alone["l"].abs().max()
        assert torch.allclose(alone["l"][0], together["l"][r], atol=1e-5 * scale)


def test_gradients_equal_a_plain_backward_through_the_text_encoder(backbone, data):
    layout = Layout("block").bind(backbone.layers)
    vectors = start(backbone, layout, spread=0.1).vectors
    latents, t = data.latents[:2][None], torch.tensor([[100, 800]])
    eps = noise(backbone, 1, 2, seed=2)
    _, fast = gradients(backbone, data, vectors, layout, latents, t, eps)
    for b in range(2):
        leaf = {"l": vectors["l"].detach().clone().requires_grad_()}
        staged = encode_prompt(backbone.encode_text, backbone.layers, PROMPT, {NAME: leaf}, {NAME: layout}, 1000)
        x_t = backbone.schedule.add_noise(latents[0, b : b + 1], t[0, b : b + 1], eps[0, b : b + 1])
        eps_hat = backbone.predict_noise(x_t, t[0, b : b + 1], staged.at(int(t[0, b])))
        (eps[0, b : b + 1] - eps_hat).square().mean().backward()
        assert torch.allclose(fast["l"][0, b], leaf["l"].grad, atol=1e-5 * leaf["l"].grad.abs().max())


def test_gradients_are_those_of_encoding_every_prompt_for_all_stages(backbone, data):
    layout = Layout(stages=4, split_kv=True).bind(backbone.layers)
    vectors = start(backbone, layout, spread=0.1).vectors
    prompts = [PROMPT, PROMPT, fill_blank("a woman {}", NAME), PROMPT]
    latents = torch.stack([data.latents[[0, 1, 2, 0]], data.latents[[1, 2, 0, 1]]])
    t, eps = torch.tensor([[100, 900, 600, 240], [130, 400, 600, 20]]), noise(backbone, 2, 4, seed=2)
    _, fast = concept_gradients(backbone, NAME, prompts, vectors, layout, latents, t, eps)
    for r, b in itertools.product(range(2), range(4)):
        leaf = {"l": vectors["l"].detach().clone().requires_grad_()}
        staged = encode_prompt(backbone.encode_text, backbone.layers, prompts[b], {NAME: leaf}, {NAME: layout}, 1000)
        x_t = backbone.schedule.add_noise(latents[r, b][None], t[r, b][None], eps[r, b][None])
        eps_hat = backbone.predict_noise(x_t, t[r, b][None], staged.at(int(t[r, b])))
        (eps[r, b] - eps_hat).square().mean().backward()
        assert torch.allclose(fast["l"][r, b], leaf["l"].grad, atol=1e-5 * leaf["l"].grad.abs().max())


def test_equal_prompts_in_equal_stages_are_encoded_once(backbone, data, monkeypatch):
    layout = Layout(stages=4).bind(backbone.layers)
    stock, encoded = backbone.encode_text, []
    monkeypatch.setattr(
        backbone,
        "encode_text",
        lambda prompt, vectors: encoded.append((prompt, len(vectors[NAME]["l"]))) or stock(prompt, vectors),
    )
    prompts = [PROMPT, PROMPT, PROMPT, fill_blank("a woman {}", NAME)]
    t, eps = torch.tensor([[100, 200, 900, 100]]), noise(backbone, 1, 4)
    latents = data.latents[[0, 1, 2, 0]][None]
    concept_gradients(backbone, NAME, prompts, start(backbone, layout).vectors, layout, latents, t, eps)
    assert encoded == [(PROMPT, 1), (PROMPT, 1), (prompts[3], 1)]


def test_masks_from_half_precision_gradients_agree_with_single_precision(data):
    layout = Layout("block")
    masks = []
    for dtype in (torch.float32, torch.bfloat16):
        toy = load_toy()
        toy.unet.to(dtype)
        backbone = DiffusersBackbone.from_toy(toy)
        bound = layout.bind(backbone.layers)
        latents = torch.stack([data.latents[0], data.latents[1], data.other_actions[0][0]])[:, None]
        eps = noise(backbone, 1, 1, seed=2).expand(3, -1, -1, -1, -1)
        t = torch.tensor([[400]]).expand(3, 1)
        _, g = gradients(backbone, data, start(backbone, bound).vectors, bound, latents, t, eps)
        masks.append(context_mask(g["l"][0], g["l"][1], 0.6))
    jaccard = ((masks[0] & masks[1]).sum() / (masks[0] | masks[1]).sum()).item()
    print(f"Jaccard of context masks, fp32 against bf16: {jaccard:.3f}")
    assert jaccard > 0.9


def test_resuming_at_any_step_equals_an_uninterrupted_run(backbone, data, tmp_path):
    rule = MaskedTriples(GradientMask())
    whole = run(backbone, data, rule, steps=5)
    for at in (1, 3):
        part = run(backbone, data, rule, steps=at)
        part.save(tmp_path / "state.safetensors")
        resumed = run(
            backbone, data, rule, steps=5, state=RunState.load(tmp_path / "state.safetensors", torch.device("cpu"))
        )
        assert torch.equal(whole.vectors["l"], resumed.vectors["l"])
        assert whole.losses == resumed.losses and whole.stats == resumed.stats


def test_an_interrupted_step_leaves_the_state_of_the_step_before(backbone, data):
    layout = Layout("block").bind(backbone.layers)
    state, reference = start(backbone, layout), run(backbone, data, PlainGradient(), steps=2)
    calls = []

    def cancel_in_third_step(module, args):
        calls.append(1)
        if len(calls) > 2:
            raise KeyboardInterrupt

    hook = backbone.unet.register_forward_pre_hook(cancel_in_third_step)
    with pytest.raises(KeyboardInterrupt):
        run(backbone, data, PlainGradient(), state=state, steps=4)
    hook.remove()
    assert state.step == 2 and torch.equal(state.vectors["l"], reference.vectors["l"])
    run(backbone, data, PlainGradient(), state=state, steps=4)
    assert torch.equal(state.vectors["l"], run(backbone, data, PlainGradient(), steps=4).vectors["l"])


def test_training_changes_no_weight(backbone, data):
    def digest() -> str:
        weights = [*backbone.unet.state_dict().values(), *backbone.text_towers[0].encoder.state_dict().values()]
        return hashlib.sha256(b"".join(w.numpy().tobytes() for w in weights)).hexdigest()

    before = digest()
    run(backbone, data, MaskedTriples(GradientMask()), steps=2)
    assert digest() == before


def test_same_seed_same_vectors_other_seed_others(backbone, data):
    first, again, other = (run(backbone, data, PlainGradient(), steps=2, seed=s).vectors["l"] for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_loss_that_is_not_finite_stops_with_the_last_good_state(backbone, data):
    import dataclasses

    state = run(backbone, data, PlainGradient(), steps=2)
    good = state.vectors["l"].detach().clone()
    broken = dataclasses.replace(data, latents=data.latents * float("nan"))
    with pytest.raises(ValueError, match="not finite at step 3"):
        run(backbone, broken, PlainGradient(), state=state, steps=4)
    assert state.step == 2 and torch.equal(state.vectors["l"], good)


def test_masked_loss_is_the_mean_inside_the_mask():
    eps, eps_hat = torch.zeros(1, 2, 2, 2), torch.ones(1, 2, 2, 2)
    eps_hat[..., 0] = 3
    mask = torch.tensor([[[[1.0, 0.0], [1.0, 0.0]]]])
    t = torch.zeros(1)
    assert denoising_loss(Prediction(eps, eps_hat, t)).item() == 5
    assert denoising_loss(Prediction(eps, eps_hat, t, mask)).item() == 9


def test_early_timesteps_are_three_times_as_likely_at_the_noisy_end():
    t = draw_timesteps("early (ReVersion)", (40000,), 1000, torch.Generator().manual_seed(0))
    noisy, clean = (t >= 900).sum().item(), (t < 100).sum().item()
    assert t.min() >= 0 and t.max() <= 999 and noisy / clean == pytest.approx(3, rel=0.1)


def test_anchors_are_drawn_evenly():
    generator = torch.Generator().manual_seed(0)
    assert sorted(draw_anchors(3, 3, generator)) == [0, 1, 2]
    counts = [draw_anchors(3, 7, generator).count(i) for i in range(3)]
    assert len(draw_anchors(3, 7, generator)) == 7 and max(counts) - min(counts) <= 2


def test_rules_name_what_is_missing():
    image = torch.rand(64, 64, 3)
    rule = MaskedTriples(GradientMask())
    with pytest.raises(ValueError, match="at least two exemplars"):
        rule.check([Exemplar(image, "a man {}", None, (image,))])
    with pytest.raises(ValueError, match="Exemplar 2 has no pictures of other actions"):
        rule.check([Exemplar(image, "a man {}", None, (image,)), Exemplar(image, "a cat {}")])
