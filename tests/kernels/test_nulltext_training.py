"""Training a concept model: what learns, what is kept, what resumes, and pictures on disk."""

from __future__ import annotations

import copy
import io
import tarfile
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from concept_atelier.kernels import files
from concept_atelier.kernels.diffusers_backbone import DiffusersBackbone
from concept_atelier.kernels.latent_cache import cache_latents, cached, find_pictures, tensor_pictures
from concept_atelier.kernels.nulltext import ConceptModel, uniform_features
from concept_atelier.kernels.nulltext_run import DomainSamples, NullTextRun
from concept_atelier.kernels.nulltext_training import ModelState, NullTextSettings, train_null_text
from concept_atelier.kernels.nulltext_unet import make_concept_model, remove_cross_attention
from concept_atelier.toyworld.autoencoder import LATENT_CHANNELS, PATCH
from concept_atelier.toyworld.model import TEXT_WIDTH, ToyModel, load_toy
from diffusers import UNet2DConditionModel
from PIL import Image

SETTINGS = NullTextSettings(steps=4, learning_rate=1e-3, batch_size=4)
SIZE = 32
NO_SAMPLES = DomainSamples(count=0)


class Quiet:
    """A report that can stop or cancel after a step."""

    stop_requested = False

    def __init__(self, cancel_after: int = 0, stop_after: int = 0) -> None:
        self.cancel_after, self.stop_after, self.steps, self.grids = cancel_after, stop_after, [], []

    def step(self, step, loss_history, stats):
        self.steps.append(step)
        self.stop_requested = step == self.stop_after
        if step == self.cancel_after:
            raise InterruptedError

    def samples(self, image_grid):
        self.grids.append(image_grid)


@cache
def small_toy() -> ToyModel:
    """The toy model with random weights and a smaller U-Net: 3 cross-attention layers of 32 channels."""
    toy = load_toy(random_weights=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        toy.unet = UNet2DConditionModel(
            sample_size=SIZE // PATCH,
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            block_out_channels=(32,),
            down_block_types=("CrossAttnDownBlock2D",),
            up_block_types=("CrossAttnUpBlock2D",),
            layers_per_block=1,
            cross_attention_dim=TEXT_WIDTH,
            attention_head_dim=4,
        )
    return toy


def base_unet() -> UNet2DConditionModel:
    return copy.deepcopy(small_toy().unet)


def operated() -> tuple[DiffusersBackbone, ConceptModel]:
    """A backbone after surgery, ready to train, and its untrained form."""
    backbone = DiffusersBackbone.from_toy(replace(small_toy(), unet=base_unet()))
    form = ConceptModel("toy", uniform_features(backbone))
    remove_cross_attention(backbone.unet, form.features)
    backbone.unet.requires_grad_(True)
    return backbone, form


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    """Five encoded pictures."""
    backbone = DiffusersBackbone.from_toy(replace(small_toy(), unet=base_unet()))
    pictures = tensor_pictures(torch.rand(5, SIZE, SIZE, 3, generator=torch.Generator().manual_seed(0)))
    folder = tmp_path_factory.mktemp("latents")
    assert cache_latents(pictures, backbone.encode_image, folder) == []
    return cached(pictures, folder)


def learn(latents, folder: Path, report=None, samples=NO_SAMPLES, start_fresh=False, **changes):
    backbone, form = operated()
    run = NullTextRun("run", form, latents, replace(SETTINGS, **changes), samples)
    weights = dict(backbone.unet.named_parameters())
    model, state, pictures = run.learn(backbone, weights, folder, report or Quiet(), start_fresh=start_fresh)
    return model, state, pictures


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_every_weight_learns_and_features_do_not(latents, tmp_path):
    backbone, form = operated()
    before = {name: buffer.clone() for name, buffer in backbone.unet.named_buffers()}
    run = NullTextRun("run", form, latents, SETTINGS)
    model, state, _ = run.learn(backbone, dict(backbone.unet.named_parameters()), tmp_path, Quiet())
    assert state.step == 4 and len(state.losses) == 4 and len(state.stats["gradient norm"]) == 4
    assert model.deltas.keys() == dict(backbone.unet.named_parameters()).keys()
    assert all(delta.any() for delta in model.deltas.values())
    features = {name: buffer for name, buffer in backbone.unet.named_buffers() if name.endswith("feature")}
    assert len(features) == len(backbone.layers)
    assert all(buffer.grad is None and not buffer.requires_grad for buffer in features.values())
    assert same(dict(backbone.unet.named_buffers()), before)


def test_loss_falls(latents, tmp_path):
    _, state, _ = learn(latents, tmp_path, steps=40)
    assert sum(state.losses[-10:]) < 0.9 * sum(state.losses[:10])


def test_the_result_is_the_average_on_top_of_the_base(latents, tmp_path):
    model, state, _ = learn(latents, tmp_path)
    base = base_unet()
    start = {name: weight.clone() for name, weight in base.named_parameters()}
    make_concept_model(base, model, "toy")
    for name, weight in base.named_parameters():
        torch.testing.assert_close(weight, state.averages[name], atol=2e-5, rtol=1e-3)
    assert not torch.equal(state.averages["conv_in.weight"], state.vectors["conv_in.weight"])
    assert not torch.equal(base.conv_in.weight, start["conv_in.weight"])


def test_the_average_follows_as_it_should(latents, tmp_path):
    backbone, _ = operated()
    weights = dict(backbone.unet.named_parameters())
    state = ModelState.start(weights)
    expected = weights["conv_in.weight"].detach().clone()

    def after_step(state):
        decay = (state.step) / (9 + state.step)  # (1 + n) / (10 + n), n steps done before
        expected.copy_(decay * expected + (1 - decay) * weights["conv_in.weight"].detach())
        return False

    predict = lambda x_t, t: backbone.unet(x_t, t, None).sample  # noqa: E731
    train_null_text(predict, backbone.schedule, latents, SETTINGS, state, after_step)
    torch.testing.assert_close(state.averages["conv_in.weight"], expected, atol=1e-6, rtol=1e-5)


def test_accumulation_gives_the_same_weights(latents, tmp_path):
    """Up to the order of sums: differences below a hundredth of what training moved."""
    whole = learn(latents, tmp_path / "a")[1]
    parts = learn(latents, tmp_path / "b", accumulation=2)[1]
    start = dict(operated()[0].unet.named_parameters())
    moved = sum((whole.vectors[name] - start[name]).square().sum() for name in start).sqrt()
    apart = sum((whole.vectors[name] - parts.vectors[name]).square().sum() for name in start).sqrt()
    assert whole.losses == pytest.approx(parts.losses, rel=1e-4)
    assert apart < 0.01 * moved


def test_a_run_goes_on_with_another_accumulation(latents, tmp_path):
    """Up to the order of sums, as above; in parts of two pictures instead of four where memory is short."""
    whole = learn(latents, tmp_path / "whole")[1]
    learn(latents, tmp_path / "parts", steps=2)
    report = Quiet()
    parts = learn(latents, tmp_path / "parts", report, accumulation=2)[1]
    assert report.steps == [3, 4] and parts.losses == pytest.approx(whole.losses, rel=1e-4)


def test_samples_of_the_largest_seed_are_painted(latents, tmp_path):
    """Each has its own seed, and after the largest comes 0 again."""
    paint = partial(learn, latents, tmp_path, steps=1)
    last, first = (paint(samples=DomainSamples(2, seed=seed, steps=1, size=SIZE))[2] for seed in (2**64 - 1, 0))
    assert torch.equal(last[1], first[0]) and not torch.equal(last[0], last[1])


def test_gradients_are_clipped(latents, tmp_path):
    backbone, _ = operated()
    weights = dict(backbone.unet.named_parameters())
    norms = []

    def after_step(state):
        norms.append(torch.stack([weight.grad.norm() for weight in weights.values()]).norm().item())
        return False

    predict = lambda x_t, t: backbone.unet(x_t, t, None).sample  # noqa: E731
    settings = replace(SETTINGS, steps=1, clip=0.01)
    state = ModelState.start(weights)
    train_null_text(predict, backbone.schedule, latents, settings, state, after_step)
    assert norms == pytest.approx([0.01], rel=1e-3)
    assert state.stats["gradient norm"][0] > 0.01


def test_cancelled_and_resumed_is_bit_exact(latents, tmp_path):
    whole_model, whole, _ = learn(latents, tmp_path / "whole")
    with pytest.raises(InterruptedError):
        learn(latents, tmp_path / "parts", Quiet(cancel_after=2))
    model, state, _ = learn(latents, tmp_path / "parts")
    assert state.losses == whole.losses and state.stats == whole.stats
    assert same(state.vectors, whole.vectors) and same(state.averages, whole.averages)
    assert same(model.deltas, whole_model.deltas)


def test_cancelled_while_painting_keeps_the_weights(latents, tmp_path):
    whole = learn(latents, tmp_path / "whole")[1]

    class CancelWhilePainting(Quiet):
        def samples(self, image_grid):
            raise InterruptedError

    samples = DomainSamples(1, every=2, steps=2, size=SIZE)
    with pytest.raises(InterruptedError):
        learn(latents, tmp_path / "parts", CancelWhilePainting(), samples)
    assert same(learn(latents, tmp_path / "parts")[1].vectors, whole.vectors)


def test_raising_steps_continues_and_the_same_again_returns(latents, tmp_path, monkeypatch):
    whole = learn(latents, tmp_path / "whole")[1]
    learn(latents, tmp_path / "parts", steps=2)
    report = Quiet()
    state = learn(latents, tmp_path / "parts", report)[1]
    assert report.steps == [3, 4] and same(state.vectors, whole.vectors)
    monkeypatch.setattr("concept_atelier.kernels.nulltext_run.train_null_text", None)  # training again would fail
    assert same(learn(latents, tmp_path / "parts")[1].vectors, whole.vectors)


def test_stopped_is_kept_and_start_fresh_forgets_it(latents, tmp_path, monkeypatch):
    report = Quiet(stop_after=1)
    assert learn(latents, tmp_path, report)[1].step == 1
    with monkeypatch.context() as patch:
        patch.setattr("concept_atelier.kernels.nulltext_run.train_null_text", None)
        assert learn(latents, tmp_path)[1].step == 1
    assert learn(latents, tmp_path, start_fresh=True)[1].step == 4


def test_kept_short_it_goes_on_to_fewer_steps_than_it_was_to_have(latents, tmp_path):
    learn(latents, tmp_path, Quiet(stop_after=1))
    report = Quiet()
    learn(latents, tmp_path, report, steps=2)
    assert report.steps == [2]


@pytest.mark.parametrize("damaged", ["state", "samples"])
def test_a_damaged_file_of_a_run_is_named_and_forgotten_by_starting_fresh(latents, tmp_path, damaged):
    samples = DomainSamples(1, every=0, steps=2, size=SIZE)
    learn(latents, tmp_path, samples=samples)
    (file,) = tmp_path.rglob(f"{damaged}.safetensors")
    file.write_bytes(b"")
    with pytest.raises(ValueError, match=rf"{damaged}\.safetensors is damaged .*: turn start_fresh on, or delete"):
        learn(latents, tmp_path, samples=samples)
    report = Quiet()
    learn(latents, tmp_path, report, samples, start_fresh=True)
    assert report.steps == [1, 2, 3, 4] and len(report.grids) == 1


def test_fewer_steps_than_a_run_has_are_refused(latents, tmp_path):
    learn(latents, tmp_path)
    with pytest.raises(ValueError, match="already has 4 steps: raise steps above 2, or turn start_fresh on"):
        learn(latents, tmp_path, steps=2)


def test_what_decides_the_result_names_the_run(latents, tmp_path):
    learn(latents, tmp_path, steps=1)
    learn(replace(latents, files=latents.files[:4]), tmp_path, steps=1)
    learn(latents, tmp_path, steps=1, learning_rate=2e-3)
    assert len(list(tmp_path.iterdir())) == 3


def test_training_goes_on_from_a_trained_model(latents, tmp_path):
    first = learn(latents, tmp_path)[0]
    base = base_unet()
    make_concept_model(base, first, "toy")
    base.requires_grad_(True)
    backbone, _ = operated()
    backbone.unet = base
    run = NullTextRun("more", first, latents, SETTINGS)
    model, state, _ = run.learn(backbone, dict(base.named_parameters()), tmp_path, Quiet())
    again = base_unet()
    make_concept_model(again, model, "toy")
    for name, weight in again.named_parameters():
        torch.testing.assert_close(weight, state.averages[name], atol=5e-5, rtol=1e-3)


def test_samples_are_of_the_averaged_weights_and_painted_once(latents, tmp_path, monkeypatch):
    samples = DomainSamples(2, every=2, steps=2, size=SIZE)
    report = Quiet()
    pictures = learn(latents, tmp_path, report, samples)[2]
    assert pictures.shape == (2, SIZE, SIZE, 3) and pictures.min() >= 0 and pictures.max() <= 1
    assert len(report.grids) == 2 and report.grids[0].shape == (SIZE, 2 * SIZE, 3)
    monkeypatch.setattr("concept_atelier.kernels.nulltext_run.ddim_sample", None)  # painting again would fail
    assert torch.equal(learn(latents, tmp_path, samples=samples)[2], pictures)


def test_out_of_disk_keeps_the_state(latents, tmp_path, monkeypatch):
    whole = learn(latents, tmp_path / "whole")[1]
    monkeypatch.setattr("concept_atelier.kernels.state_file.SAVE_EVERY", 1)
    monkeypatch.setattr("concept_atelier.kernels.state_file.REST", 0)
    stock, writes = files.save_file, []

    def full_after_two(tensors, path, metadata):
        writes.append(path)
        if len(writes) > 2:
            raise OSError(28, "No space left on device")
        stock(tensors, path, metadata=metadata)

    with monkeypatch.context() as patch:
        patch.setattr(files, "save_file", full_after_two)
        with pytest.raises(ValueError, match=r"state\.safetensors.*No space left"):
            learn(latents, tmp_path / "parts")
    report = Quiet()
    state = learn(latents, tmp_path / "parts", report)[1]
    assert report.steps == [3, 4] and same(state.vectors, whole.vectors)


def test_a_loss_that_is_not_finite_is_named_and_nothing_is_lost(latents, tmp_path):
    with pytest.raises(ValueError, match="not finite at step 2; the weights of step 1 are kept: set steps to 1 to get"):
        learn(latents, tmp_path, learning_rate=1e30)
    [state] = tmp_path.rglob("state.safetensors")
    assert len(files.read_safetensors(state)[0]["losses"]) == 1
    assert learn(latents, tmp_path, learning_rate=1e30, steps=1)[1].step == 1  # as the message says


def test_a_batch_that_cannot_be_shared_out_is_refused(latents, tmp_path):
    with pytest.raises(ValueError, match="multiple of 3"):
        learn(latents, tmp_path, accumulation=3)


# ---- pictures on disk


def save_picture(path: Path, seed: int, size=(40, 30), mode="RGB") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], len(mode)), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels, mode).save(path)
    return path.read_bytes()


def shard(path: Path, contents: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def fake_encode(images):
    """Latents that show which picture they are of: (B, 3, H / 8, W / 8)."""
    return torch.nn.functional.avg_pool2d(images.movedim(-1, 1), 8)


def test_pictures_are_found_in_folders_and_shards(tmp_path):
    first = save_picture(tmp_path / "a.png", 1)
    second = save_picture(tmp_path / "sub" / "b.JPG", 2)
    (tmp_path / "a.txt").write_text("a caption")
    shard(tmp_path / "c.tar", {"0001.png": first, "0001.json": b"{}", "0002.jpg": second})
    pictures = find_pictures(tmp_path, 32)
    assert [p.name.rsplit("/", 1)[-1] for p in pictures] == ["a.png", "c.tar:0001.png", "c.tar:0002.jpg", "b.JPG"]
    assert all(p.load().shape == (32, 32, 3) for p in pictures)
    assert torch.equal(pictures[0].load(), pictures[1].load())
    assert torch.equal(pictures[3].load(), pictures[2].load())
    assert len({p.key for p in pictures}) == 4
    assert [p.name for p in find_pictures(tmp_path / "c.tar", 32)] == [p.name for p in pictures[1:3]]


def test_each_picture_is_encoded_once_as_it_is_and_mirrored(tmp_path):
    for seed in range(3):
        save_picture(tmp_path / "in" / f"{seed}.png", seed)
    pictures = find_pictures(tmp_path / "in", 32)
    calls = []

    def encode(images):
        calls.append(images)
        return fake_encode(images)

    cache_latents(pictures, encode, tmp_path / "cache")
    latents = cached(pictures, tmp_path / "cache")
    assert len(calls) == len(latents) == 3
    image = pictures[1].load()
    torch.testing.assert_close(latents.read(1, False), fake_encode(image[None])[0], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(latents.read(1, True), fake_encode(image[None].flip(2))[0], atol=1e-3, rtol=1e-3)

    save_picture(tmp_path / "in" / "9.png", 9)
    more = find_pictures(tmp_path / "in", 32)
    cache_latents(more, encode, tmp_path / "cache")
    assert len(calls) == 4 and len(cached(more, tmp_path / "cache")) == 4
    assert find_pictures(tmp_path / "in", 64)[0].key != more[0].key


def test_transparency_becomes_white(tmp_path):
    Image.new("RGBA", (40, 40), (255, 0, 0, 0)).save(tmp_path / "a.png")
    assert torch.equal(find_pictures(tmp_path, 32)[0].load(), torch.ones(32, 32, 3))


def test_an_unreadable_picture_is_skipped_and_named(tmp_path):
    save_picture(tmp_path / "a.png", 1)
    content = save_picture(tmp_path / "b.png", 2)
    (tmp_path / "b.png").write_bytes(content[: len(content) // 2])
    (tmp_path / "c.jpg").write_text("no picture")
    pictures = find_pictures(tmp_path, 32)
    unreadable = cache_latents(pictures, fake_encode, tmp_path / "cache")
    assert len(unreadable) == 2 and "b.png (" in unreadable[0] and "c.jpg (" in unreadable[1]
    assert len(cached(pictures, tmp_path / "cache")) == 1


def test_folders_without_pictures_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(ValueError, match="There are no pictures in"):
        find_pictures(tmp_path, 32)
    with pytest.raises(ValueError, match=r"There are no pictures in .*nowhere"):
        find_pictures(tmp_path / "nowhere", 32)
    (tmp_path / "a.png").write_text("no picture")
    pictures = find_pictures(tmp_path, 32)
    cache_latents(pictures, fake_encode, tmp_path / "cache")
    with pytest.raises(ValueError, match=r"None of the 1 pictures can be read.*a\.png"):
        cached(pictures, tmp_path / "cache")


def test_a_damaged_shard_is_named(tmp_path):
    (tmp_path / "c.tar").write_bytes(b"x" * 2000)
    with pytest.raises(ValueError, match=r"c\.tar is damaged"):
        find_pictures(tmp_path, 32)


def test_encoding_is_resumed_after_an_interruption(tmp_path):
    pictures = tensor_pictures(torch.rand(3, 32, 32, 3, generator=torch.Generator().manual_seed(0)))
    encoded = []

    def encode(images):
        encoded.append(images)
        return fake_encode(images)

    def cancel(done):
        if done == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        cache_latents(pictures, encode, tmp_path, cancel)
    cache_latents(pictures, encode, tmp_path)
    assert len(encoded) == 3 and len(cached(pictures, tmp_path)) == 3


def test_damaged_latents_are_named(tmp_path):
    pictures = tensor_pictures(torch.rand(1, 32, 32, 3, generator=torch.Generator().manual_seed(0)))
    cache_latents(pictures, fake_encode, tmp_path)
    latents = cached(pictures, tmp_path)
    latents.files[0].write_bytes(b"")
    with pytest.raises(ValueError, match=r"is damaged .*: delete it, and it will be encoded again"):
        latents.read(0, False)
