"""The training script on diffusers: alone, on two processes, resumed, from shards; bad input."""

from __future__ import annotations

import io
import socket
import tarfile
from pathlib import Path

import numpy as np
import pytest
import tiny_diffusers
import torch
from concept_atelier.kernels.diffusers_attention import transformer_blocks
from concept_atelier.kernels.files import read_safetensors
from concept_atelier.kernels.nulltext import load_concept_model
from concept_atelier.kernels.nulltext_unet import make_concept_model
from nulltext_worker import run_as_worker
from PIL import Image

pytest.importorskip("accelerate")
from accelerate.state import AcceleratorState
from concept_atelier.kernels.train_nulltext import main


@pytest.fixture(autouse=True)
def as_a_new_process():
    """accelerate keeps its first settings for the whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """A tiny SD1.x pipeline in `model`, five pictures in `pictures`, the same in two shards in `shards`."""
    root = tmp_path_factory.mktemp("script")
    tiny_diffusers.build("sd1").save_pretrained(root / "model")
    (root / "pictures").mkdir()
    (root / "shards").mkdir()
    shards = [tarfile.open(root / "shards" / f"{number}.tar", "w") for number in range(2)]  # noqa: SIM115
    for number in range(5):
        file = root / "pictures" / f"{number}.png"
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (64, 64, 3), np.uint8)).save(file)
        member = tarfile.TarInfo(f"{number:06}.png")
        member.size = file.stat().st_size
        shards[number // 3].addfile(member, io.BytesIO(file.read_bytes()))
    for shard in shards:
        shard.close()
    return root


def arguments(folders: Path, output: Path, *more: str) -> list[str]:
    return [
        *("--model", str(folders / "model"), "--pictures", str(folders / "pictures"), "--output", str(output)),
        *("--size", "128", "--steps", "3", "--batch-size", "4", "--learning-rate", "1e-3", "--seed", "3", *more),
    ]


def state_of(output: Path) -> dict[str, torch.Tensor]:
    [file] = output.with_suffix(".work").glob(f"runs/{output.stem}_*/state.safetensors")
    return read_safetensors(file)[0]


def weights(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in state.items() if key.startswith("weight/")}


@pytest.fixture(scope="module")
def alone(folders) -> Path:
    """The result of one process."""
    output = folders / "alone.safetensors"
    main(arguments(folders, output))
    return output


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_two_processes_give_the_weights_of_one(folders, alone):
    """The same global batch. Tolerance: sums in another order, and Adam makes full steps of gradients of nearly 0.

    At 128 pixels: at 64 the innermost group norms see two numbers each, and nearly all of their gradient is rounding.
    """
    output = folders / "two.safetensors"
    argv = arguments(folders, output, "--accumulation", "2")
    torch.multiprocessing.spawn(run_as_worker, args=(free_port(), argv), nprocs=2)
    one, two = state_of(alone), state_of(output)
    assert one.keys() == two.keys()
    torch.testing.assert_close(two["losses"], one["losses"], rtol=1e-5, atol=0)
    start = tiny_diffusers.build_unet("sd1").state_dict()
    moved = sum((one[key] - start[key.removeprefix("weight/")]).square().sum() for key in weights(one)).sqrt()
    apart = sum((one[key] - two[key]).square().sum() for key in weights(one)).sqrt()
    assert moved > 1
    assert apart < 0.01 * moved


def test_the_result_makes_a_concept_model(folders, alone):
    model = load_concept_model(alone)
    assert model.family == "sd1" and model.metadata["steps"] == "3" and model.metadata["pictures"] == "5"
    unet = tiny_diffusers.build_unet("sd1")
    names = {layer for layer, _ in transformer_blocks(unet)}
    make_concept_model(unet, model, "sd1")
    assert model.features.keys() == names and all(delta.any() for delta in model.deltas.values())
    averages = state_of(alone)
    for name, weight in unet.named_parameters():
        torch.testing.assert_close(weight, averages[f"average/{name}"], atol=2e-5, rtol=1e-3)


def test_resuming_is_bit_exact_and_a_finished_run_returns(folders, alone, monkeypatch):
    output = folders / "parts.safetensors"
    main([*arguments(folders, output), "--steps", "1"])
    main(arguments(folders, output))
    one, resumed = state_of(alone), state_of(output)
    assert one.keys() == resumed.keys() and all(torch.equal(one[key], resumed[key]) for key in one)
    monkeypatch.setattr("concept_atelier.kernels.nulltext_run.train_null_text", None)  # training again would fail
    main(arguments(folders, output))


def test_shards_are_pictures_like_any_others(folders, alone):
    """Here with the same names in the same order, so that even the weights are the same."""
    output = folders / "sharded.safetensors"
    argv = arguments(folders, output)
    argv[argv.index("--pictures") + 1] = str(folders / "shards")
    main(argv)
    one, sharded = state_of(alone), state_of(output)
    assert all(torch.equal(one[key], sharded[key]) for key in one)


def test_latents_are_encoded_once(folders, alone, monkeypatch):
    monkeypatch.setattr(
        "concept_atelier.kernels.diffusers_backbone.KLAutoencoder.encode", lambda *_: pytest.fail("encoded again")
    )
    work = ["--work", str(alone.with_suffix(".work"))]
    main(arguments(folders, folders / "again.safetensors", *work, "--seed", "9", "--steps", "1"))


def test_mixed_precision_keeps_float32_weights(folders, alone):
    output = folders / "bf16.safetensors"
    main(arguments(folders, output, "--mixed-precision", "bf16", "--steps", "1"))
    state = state_of(output)
    assert all(weight.dtype == torch.float32 for weight in weights(state).values())
    exact = state_of(alone)["losses"][0].item()
    assert state["losses"][0].item() == pytest.approx(exact, rel=0.05) and state["losses"][0].item() != exact


def test_an_unreadable_picture_is_named(folders, tmp_path, capsys):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (pictures / "a.png").write_bytes((folders / "pictures" / "0.png").read_bytes())
    (pictures / "b.png").write_text("no picture")
    argv = arguments(folders, tmp_path / "out.safetensors", "--steps", "1", "--form", "uniform")
    argv[argv.index("--pictures") + 1] = str(pictures)
    main(argv)
    assert "skipped, cannot be read" in (printed := capsys.readouterr().out) and "b.png" in printed
    assert load_concept_model(tmp_path / "out.safetensors").metadata["form"] == "uniform"


def test_bad_input_gets_one_sentence(folders, tmp_path):
    with pytest.raises(ValueError, match="make the batch size a multiple of 3"):
        main(arguments(folders, tmp_path / "out.safetensors", "--accumulation", "3"))
    argv = arguments(folders, tmp_path / "out.safetensors")
    argv[argv.index("--pictures") + 1] = str(tmp_path)
    with pytest.raises(ValueError, match="There are no pictures in"):
        main(argv)
