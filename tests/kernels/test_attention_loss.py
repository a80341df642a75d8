"""SeFi-IDE's attention loss and its five pairs of K and V: METHODS.md 3.8, the numbers in brackets are its."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import tiny_diffusers
import torch
from concept_atelier.kernels.attention_loss import SubjectAttentionLoss, attention_loss
from concept_atelier.kernels.attention_recording import Recording
from concept_atelier.kernels.backbone import Layer, TextContext
from concept_atelier.kernels.concept import new_vectors
from concept_atelier.kernels.conditioning import encode_prompt
from concept_atelier.kernels.diffusers_backbone import DiffusersBackbone
from concept_atelier.kernels.exemplars import Exemplar, encode_exemplars
from concept_atelier.kernels.gradient_rules import PlainGradient
from concept_atelier.kernels.layouts import BoundLayout, Layout
from concept_atelier.kernels.losses import Learning, PictureTerm, Prediction
from concept_atelier.kernels.objective import Objective
from concept_atelier.kernels.prompts import Prompt, fill_blank
from concept_atelier.kernels.run_state import RunState
from concept_atelier.kernels.sampling import paint
from concept_atelier.kernels.training import TrainingSettings, train
from concept_atelier.toyworld.model import load_toy
from torch import Tensor

NAME = "x"
SHORT, LONG = fill_blank("a {} sits", NAME), fill_blank("a {} sits on grass with a red ball", NAME)
PAIRS = Layout(stages=5, split_kv=True)
K, V = 0, 1  # slots of one stage of PAIRS


@pytest.fixture(scope="module")
def backbone() -> DiffusersBackbone:
    toy = load_toy(random_weights=True)
    tiny_diffusers.fill(toy.unet, 0)
    tiny_diffusers.fill(toy.text_encoder, 1)
    return DiffusersBackbone.from_toy(toy)


@pytest.fixture(scope="module")
def sdxl() -> DiffusersBackbone:
    return DiffusersBackbone.from_pipeline(tiny_diffusers.build("sdxl", seed=10))


def bind(backbone, term=None, layout=PAIRS, prompts: Sequence[Prompt] = (SHORT,), init_word="man") -> PictureTerm:
    bound = layout.bind(backbone.layers)
    return (term or SubjectAttentionLoss(1.0)).bind(Learning(backbone, NAME, bound, init_word, tuple(prompts)))


def words(backbone, layout: Layout | BoundLayout, spread=0.0, word="man", seed=5) -> dict[str, Tensor]:
    """A word in every slot, each moved at random by `spread`."""
    bound = layout.bind(backbone.layers) if isinstance(layout, Layout) else layout
    start = new_vectors(backbone.token_vectors(word), bound.slots, bound.layout.tokens)
    generator = torch.Generator().manual_seed(seed)
    noise = {tower: torch.randn(v.shape, generator=generator) for tower, v in start.items()}
    return {tower: (v + spread * noise[tower]).requires_grad_() for tower, v in start.items()}


def noisy(backbone, batch=1, seed=3) -> Tensor:
    return torch.randn(batch, backbone.latent_channels, 8, 8, generator=torch.Generator().manual_seed(seed))


def contexts(backbone, vectors, layout=PAIRS, prompt=SHORT, t=500) -> TextContext:
    bound = {NAME: layout.bind(backbone.layers)}
    return encode_prompt(backbone.encode_text, backbone.layers, prompt, {NAME: vectors}, bound, 1000).at(t)


def predict(backbone, vectors, layout=PAIRS, prompt=SHORT, t=500) -> Tensor:
    return backbone.predict_noise(noisy(backbone), torch.tensor([t]), contexts(backbone, vectors, layout, prompt, t))


def value(backbone, term: PictureTerm, vectors, layout=PAIRS, t=500) -> Tensor:
    with term.watch([0], 1) as loss:
        eps_hat = predict(backbone, vectors, layout, t=t)
    return loss(Prediction(eps_hat, eps_hat, torch.tensor([t]))).squeeze(0)


def gradients(loss: Tensor, vectors) -> Tensor:
    """The gradient of every slot, (S, n * width), towers side by side."""
    return torch.cat([g.flatten(1) for g in torch.autograd.grad(loss, list(vectors.values()))], dim=1)


def test_the_class_itself_has_no_loss_and_no_gradient(backbone):
    """(3) also the initial state of a run whose vectors start from the class word."""
    term = bind(backbone, layout=Layout())
    vectors = words(backbone, Layout())
    loss = value(backbone, term, vectors, Layout())
    assert loss.item() == 0 and not gradients(loss, vectors).any()
    assert value(backbone, bind(backbone), words(backbone, PAIRS)).item() < 1e-9  # other batch sizes, other rounding
    assert value(backbone, bind(backbone), words(backbone, PAIRS, word="panda")).item() > 0.1


def test_a_class_phrase_replaces_the_init_word(backbone):
    pandas = words(backbone, PAIRS, word="panda")
    assert value(backbone, bind(backbone, SubjectAttentionLoss(1.0, "panda")), pandas).item() < 1e-9
    assert value(backbone, bind(backbone, SubjectAttentionLoss(1.0, "  ")), pandas).item() > 0.1
    two = Layout(tokens=2, split_kv=True)
    of_two = bind(backbone, SubjectAttentionLoss(1.0, "red ball"), two)
    vectors = {tower: v.expand(2, -1, -1) for tower, v in backbone.token_vectors("red ball").items()}
    assert value(backbone, of_two, vectors, two).item() < 1e-9


def test_the_value_is_lambda_times_the_sum_over_places_and_words(backbone):
    """The sum over pixels and tokens, the mean over heads and layers, of (A_t - A_r)^2, from K_r made by hand."""
    vectors = words(backbone, PAIRS, 0.3)
    term = bind(backbone, SubjectAttentionLoss(0.05, "panda"))
    panda = {NAME: {tower: v[None] for tower, v in backbone.token_vectors("panda").items()}}
    reference = backbone.encode_text(SHORT, panda).hidden
    spans = range(1, 4)  # a, man, sits: no start, end or padding
    seen, hooks = {}, []
    linears = {n: linear for n, linear in backbone.linears().items() if n.endswith(("attn2.to_q", "attn2.to_k"))}
    for name, linear in linears.items():

        def keep_first(_module, _args, out, name=name) -> None:
            seen.setdefault(name, out.detach())

        hooks.append(linear.register_forward_hook(keep_first))
    loss = value(backbone, term, vectors)
    for hook in hooks:
        hook.remove()

    def attention(q: Tensor, k: Tensor) -> Tensor:
        q, k = (x.unflatten(-1, (4, -1)).transpose(1, 2) for x in (q, k))
        return (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(dim=-1)[..., spans]

    by_hand = []
    for name in [n for n in linears if n.endswith("to_q")]:
        of_k = name.removesuffix("to_q") + "to_k"
        a_t, a_r = attention(seen[name], seen[of_k]), attention(seen[name], linears[of_k](reference))
        by_hand.append((a_t - a_r).square().sum() / 4)
    assert loss.item() == pytest.approx(0.05 * torch.stack(by_hand).mean().item(), rel=1e-4)


def test_detached_queries_keep_the_loss_from_the_values(backbone):
    """(4) exactly, while every other stage has no gradient at all."""
    vectors = words(backbone, PAIRS, 0.3)
    detached = gradients(value(backbone, bind(backbone), vectors, t=0), vectors).abs().amax(1)
    attached = gradients(
        value(backbone, bind(backbone, SubjectAttentionLoss(1.0, detach_query=False)), vectors, t=0), vectors
    )
    assert detached[K] > 0 and not detached[V] and not detached[2:].any()
    assert attached[V].any() and not attached[2:].any()


def test_a_first_layer_knows_nothing_of_the_values(backbone):
    """(4, 5) The queries of the first layer come before any V; those of later layers after."""
    first, *_, last = backbone.layers
    vectors = words(backbone, PAIRS, 0.3)

    def maps(changed: int | None) -> tuple[Tensor, Tensor]:
        moved = {tower: v.detach().clone() for tower, v in vectors.items()}
        if changed is not None:
            moved["l"][changed] *= 1.5
        with backbone.attention(backbone.layers, range(1, 4)) as recorded:
            predict(backbone, moved, t=0)
        return recorded.maps[first][0], recorded.maps[last][0]

    plain, other_v, other_k = maps(None), maps(V), maps(K)
    assert torch.equal(plain[0], other_v[0]) and not torch.allclose(plain[1], other_v[1], atol=1e-4)
    assert not torch.allclose(plain[0], other_k[0], atol=1e-4)

    with backbone.attention([first], range(1, 4)) as recorded:
        predict(backbone, vectors, t=0)
    of_first = gradients(recorded.maps[first][0].square().sum(), vectors)
    assert of_first[K].any() and not of_first[V].any()


def test_references_are_reached_by_gradients_through_attached_queries_alone(backbone):
    vectors = words(backbone, PAIRS, 0.3)

    def gradient(detach_query: bool, detach_reference: bool) -> Tensor:
        term = SubjectAttentionLoss(1.0, detach_query=detach_query, detach_reference=detach_reference)
        return gradients(value(backbone, bind(backbone, term), vectors), vectors)

    assert torch.equal(gradient(True, True), gradient(True, False))
    assert not torch.allclose(gradient(False, True), gradient(False, False), rtol=0.01)


def test_the_gradient_is_the_finite_difference(backbone):
    """Nothing detached: a detached query makes the gradient another than that of the value, on purpose."""
    term = bind(backbone, SubjectAttentionLoss(1.0, "panda", detach_query=False, detach_reference=False))
    vectors = words(backbone, PAIRS, 0.3)
    gradient = gradients(value(backbone, term, vectors), vectors)
    direction = (gradient / gradient.norm()).view_as(vectors["l"])
    with torch.no_grad():
        up, down = (value(backbone, term, {"l": vectors["l"] + h * direction}).item() for h in (1e-2, -1e-2))
    assert (up - down) / 2e-2 == pytest.approx(gradient.norm().item(), rel=0.02)


def test_no_lambda_is_no_term_and_watching_changes_no_bit(backbone):
    """(7)"""
    assert bind(backbone, SubjectAttentionLoss(0.0)).weight == 0
    assert bind(backbone).weight == 1
    vectors = words(backbone, PAIRS, 0.3)
    plain = predict(backbone, vectors)
    with bind(backbone).watch([0], 1):
        assert torch.equal(predict(backbone, vectors), plain)
    assert torch.equal(predict(backbone, vectors), plain)


def test_rows_sum_to_one_and_bound_the_loss(backbone):
    """(8)"""
    vectors = words(backbone, PAIRS, 0.5)
    reference = TextContext.plain(torch.randn(1, 24, 128, generator=torch.Generator().manual_seed(1)), backbone.layers)
    with backbone.attention(backbone.layers, range(24), reference) as recorded:
        predict(backbone, vectors)
    for maps in (recorded.maps, recorded.reference):
        assert set(maps) == set(backbone.layers)
        assert all(torch.allclose(a.sum(dim=-1), torch.ones(a.shape[:-1]), atol=1e-5) for (a,) in maps.values())
    learned, other = ([a for (a,) in maps.values()] for maps in (recorded.maps, recorded.reference))
    everything = torch.ones(1, 24, dtype=torch.bool)
    assert 0 < attention_loss(learned, other, everything).item() <= 2 * 64

    here, there = (torch.eye(24)[torch.full((1, 4, 64), token)] for token in (0, 3))
    assert attention_loss([here], [there], everything).item() == 2 * 64
    assert attention_loss([here], [there], torch.arange(24)[None] == 3).item() == 64


def test_keys_of_the_class_and_values_of_the_subject_are_the_reference_map_times_v(backbone):
    """(10)"""
    bound = PAIRS.bind(backbone.layers)
    learned, person = words(backbone, PAIRS, 0.5), words(backbone, PAIRS)
    rows = torch.cat([contexts(backbone, person).rows[:1], contexts(backbone, learned).rows[1:]])  # K, then V
    swapped = TextContext(rows, (0,) * len(bound.group), (1,) * len(bound.group))
    reference = TextContext.plain(rows[0], backbone.layers)
    seen, hooks = {}, []
    for name, linear in backbone.linears().items():
        keep = lambda _module, args, out, name=name: seen.update({name: (args[0], out)})  # noqa: E731
        hooks.append(linear.register_forward_hook(keep))
    with backbone.attention(backbone.layers, range(24), reference) as recorded:
        backbone.predict_noise(noisy(backbone), torch.tensor([500]), swapped)
    for hook in hooks:
        hook.remove()
    names = [name.removesuffix("to_v") for name in seen if name.endswith("attn2.to_v")]
    assert len(names) == len(backbone.layers)
    for name, layer in zip(names, backbone.layers):
        (a_t,), (a_r,) = recorded.maps[layer], recorded.reference[layer]
        assert torch.equal(a_t, a_r)
        v = seen[name + "to_v"][1].unflatten(-1, (4, -1)).transpose(1, 2)
        assert torch.allclose(seen[name + "to_out.0"][0], (a_r @ v).transpose(1, 2).flatten(2), atol=1e-5)


@pytest.mark.parametrize("collapsed", [Layout(), Layout(stages=5), Layout(split_kv=True)])
def test_equal_pairs_are_the_simpler_layout(backbone, collapsed):
    """(1, 2, 9) in the prediction, in its gradient, and in a sampled picture."""
    bound, pairs = collapsed.bind(backbone.layers), PAIRS.bind(backbone.layers)
    simple = words(backbone, collapsed, 0.3)
    same = torch.empty(pairs.slots, dtype=torch.int64)  # slot of the simple layout for each slot of the pairs
    for stage in range(5):
        of_simple = bound.table(stage if collapsed.stages == 5 else 0)
        for side, of_pairs in enumerate(pairs.table(stage)):
            same[list(of_pairs)] = torch.tensor(of_simple[side])
    full = {tower: v.detach()[same].requires_grad_() for tower, v in simple.items()}

    target = noisy(backbone, seed=8)
    losses = []
    for vectors, layout in ((simple, collapsed), (full, PAIRS)):
        losses.append(sum((predict(backbone, vectors, layout, t=t) - target).square().sum() for t in (100, 300, 900)))
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    of_simple, of_full = gradients(losses[0], simple), gradients(losses[1], full)
    assert torch.allclose(of_simple, torch.zeros_like(of_simple).index_add(0, same, of_full), rtol=1e-3, atol=1e-3)

    with torch.no_grad():
        pictures = [
            paint(backbone, [SHORT], {NAME: v}, {NAME: layout}, [0], (64, 64), 5, 2.0, 0.0)
            for v, layout in ((simple, bound), (full, pairs))
        ]
    assert torch.allclose(*pictures, atol=1e-4)


@pytest.mark.parametrize(("t", "stage"), [(0, 0), (199, 0), (200, 1), (799, 3), (800, 4), (999, 4)])
def test_a_stage_learns_from_its_own_timesteps_alone(backbone, t, stage):
    """(6)"""
    vectors = words(backbone, PAIRS, 0.3)
    moved = gradients(predict(backbone, vectors, t=t).square().sum(), vectors).any(dim=1).nonzero().flatten()
    assert moved.tolist() == [2 * stage + K, 2 * stage + V]


def test_a_thousand_stages_are_a_vector_for_each_timestep(backbone):
    """(9)"""
    bound = Layout(stages=1000).bind(backbone.layers)
    assert [bound.table(bound.stage(t, 1000))[0][0] for t in range(1000)] == list(range(1000))


def test_each_sample_of_a_batch_has_the_loss_of_its_own_prompt(backbone):
    """Prompts of different lengths in one batch, several roles each: values of samples alone."""
    term = bind(backbone, SubjectAttentionLoss(1.0, "panda"), prompts=(SHORT, LONG, SHORT))
    vectors = words(backbone, PAIRS, 0.3)
    of_prompts = {prompt: contexts(backbone, vectors, prompt=prompt) for prompt in (SHORT, LONG)}
    x_t, t = noisy(backbone, 6), torch.tensor([500] * 6)
    with term.watch([1, 0, 2], 2) as loss:
        order = [of_prompts[prompt] for prompt in (LONG, SHORT, SHORT)]
        eps_hat = backbone.predict_noise(x_t, t, TextContext.cat(order).repeat(2))
    together = loss(Prediction(eps_hat, eps_hat, t))
    alone = []
    for sample, anchor in enumerate([1, 0, 2] * 2):
        with term.watch([anchor], 1) as loss:
            eps_hat = backbone.predict_noise(
                x_t[sample : sample + 1], t[:1], of_prompts[LONG if anchor == 1 else SHORT]
            )
        alone.append(loss(Prediction(eps_hat, eps_hat, t[:1])))
    assert together.shape == (6,) and torch.allclose(together, torch.cat(alone), rtol=1e-3)


def test_reference_prompts_are_encoded_once_each(backbone, monkeypatch):
    encoded = []
    encode = backbone.encode_text
    monkeypatch.setattr(backbone, "encode_text", lambda prompt, v: encoded.append(prompt) or encode(prompt, v))
    term = bind(backbone, prompts=(SHORT, LONG, SHORT))
    assert encoded == [SHORT, LONG]
    with term.watch([0, 1, 2], 1):
        pass
    assert len(encoded) == 2


def test_padding_counts_when_asked(backbone):
    vectors = words(backbone, PAIRS, 0.3)
    of_words = value(backbone, bind(backbone, SubjectAttentionLoss(1.0, "panda")), vectors)
    of_all = value(backbone, bind(backbone, SubjectAttentionLoss(1.0, "panda", with_padding=True)), vectors)
    assert of_all > 1.01 * of_words > 0


def test_large_maps_are_left_out(backbone):
    """The toy model attends at 8 x 8 and 4 x 4."""
    vectors = words(backbone, PAIRS, 0.3)
    with backbone.attention(backbone.layers, [1], contexts(backbone, vectors), at_most=16) as recorded:
        predict(backbone, vectors)
    small = [layer for layer in backbone.layers if recorded.maps[layer]]
    assert 0 < len(small) < len(backbone.layers)
    assert all(recorded.maps[layer][0].shape[2] == recorded.reference[layer][0].shape[2] == 16 for layer in small)

    values = [
        value(backbone, bind(backbone, SubjectAttentionLoss(1.0, "panda", largest_map=n)), vectors) for n in (4, 8)
    ]
    assert 0 < values[0] < values[1]
    with pytest.raises(ValueError, match="at most 2 x 2 places: raise largest_map"):
        value(backbone, bind(backbone, SubjectAttentionLoss(1.0, "panda", largest_map=2)), vectors)


def test_half_precision_is_compared_in_single():
    """The difference of two nearly equal maps, squared, is below what half precision holds (METHODS 3.7)."""
    layer = Layer("middle", 0, 0)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 2, 9, 8, generator=generator).half()
    k = torch.randn(1, 2, 77, 8, generator=generator).half()
    near = k.transpose(1, 2).flatten(2) + 1e-3
    recording = Recording.start([layer], range(77), TextContext.plain(near, [layer]), False, None)
    recording.see(layer, 0, q, k, lambda c: c.unflatten(-1, (2, -1)).transpose(1, 2))
    (a_t,), (a_r,) = recording.maps.maps[layer], recording.maps.reference[layer]
    assert a_t.dtype == a_r.dtype == torch.float32
    near = near.unflatten(-1, (2, -1)).transpose(1, 2)
    exact = [(q.double() @ keys.double().transpose(-1, -2) / 8**0.5).softmax(dim=-1) for keys in (k, near)]
    everything = torch.ones(1, 77, dtype=torch.bool)
    expected = attention_loss(*([a] for a in exact), everything).item()
    assert attention_loss([a_t], [a_r], everything).item() == pytest.approx(expected, rel=0.01)
    in_half = attention_loss([a_t.half()], [a_r.half()], everything).item()
    assert in_half != pytest.approx(expected, rel=0.5)


def test_both_towers_of_sdxl(sdxl):
    vectors = words(sdxl, PAIRS, 0.3)
    loss = value(sdxl, bind(sdxl, SubjectAttentionLoss(1.0, "panda")), vectors)
    of_slots = {tower: torch.autograd.grad(loss, v, retain_graph=True)[0] for tower, v in vectors.items()}
    assert set(of_slots) == {"l", "g"}
    for gradient in of_slots.values():
        assert gradient[4 + K].any() and not gradient[4 + V].any()


def trained(backbone, *terms: SubjectAttentionLoss) -> RunState:
    """Twelve steps from "man" on two random pictures."""
    images = torch.rand(2, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    captions = ("a {} sits", "a {} sits on grass with a red ball")
    data = encode_exemplars(backbone, [Exemplar(i, c) for i, c in zip(images, captions)], NAME)
    layout = PAIRS.bind(backbone.layers)
    objective = Objective.of(terms, Learning(backbone, NAME, layout, "man", data.prompts))
    state = RunState.start(new_vectors(backbone.token_vectors("man"), layout.slots, 1))
    settings = TrainingSettings(12, learning_rate=5e-2, batch_size=2)
    train(backbone, data, NAME, layout, PlainGradient(), settings, state, lambda _: False, objective)
    return state


def test_in_training_it_pulls_the_attention(backbone):
    plain, off, on = (
        trained(backbone, *terms)
        for terms in ((), (SubjectAttentionLoss(0.0),), (SubjectAttentionLoss(100.0, "panda"),))
    )
    assert torch.equal(plain.vectors["l"], off.vectors["l"]) and plain.losses == off.losses and not off.stats
    shown = on.stats["attention : denoising"]
    assert len(shown) == 12 and min(shown) > 0

    term = bind(backbone, SubjectAttentionLoss(1.0, "panda"))
    far, near = (sum(value(backbone, term, s.vectors, t=t).item() for t in range(100, 1000, 200)) for s in (plain, on))
    assert near < 0.7 * far


@pytest.mark.parametrize(
    ("layout", "phrase", "sentence"),
    [
        (Layout(), "red ball", r'"red ball" has 2 tokens .*<x> has 1: choose a class phrase of 1 tokens'),
        (Layout(tokens=2), "", r'"man" has 1 tokens .*<x> has 2'),
        (Layout(place="tail residual"), "", "tail rows are no words"),
    ],
)
def test_what_cannot_be_compared_is_refused(backbone, layout, phrase, sentence):
    learning = Learning(backbone, NAME, layout.bind(backbone.layers, "man"), "man", (SHORT,))
    with pytest.raises(ValueError, match=sentence):
        SubjectAttentionLoss(class_phrase=phrase).bind(learning)
