"""Training the toy world: it resumes, starts from an earlier world, and bundles the best."""

import json

import numpy as np
import pytest
import torch
from concept_atelier.toyworld import train_model
from concept_atelier.toyworld.model import TOKENIZER_FOLDER
from concept_atelier.toyworld.tokenizer import load_tokenizer
from concept_atelier.toyworld.train_checkpoint import Checkpoint
from concept_atelier.toyworld.train_model import TOKEN_EMBEDDING, ModelTraining, learning_rate, training_loss
from concept_atelier.toyworld.training_set import TrainingSet
from concept_atelier.toyworld.weights import TEXT_ENCODER, UNET, WEIGHTS, read_weights
from safetensors.torch import save_file


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.setattr(train_model, "RUNS", tmp_path)
    monkeypatch.setattr(train_model, "CURVE", tmp_path / "curve.jsonl")
    return tmp_path


def tiny_set() -> TrainingSet:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 300, (2, 8, 24), generator=generator).short()
    return TrainingSet(
        torch.randn(8, 24, 8, 8, generator=generator).half(), torch.ones(8, 1, 8, 8).half(), ids, ids[0, :1]
    )


def step(training: ModelTraining, seed: int) -> float:
    torch.manual_seed(seed)
    loss = training_loss(training, tiny_set(), np.arange(4), np.random.default_rng(seed))
    training.optimizer.zero_grad()
    loss.backward()
    training.optimizer.step()
    training.checkpoint.step += 1
    training.update_average()
    return loss.item()


def test_a_resumed_training_goes_on_where_it_stopped(runs):
    first = ModelTraining(1, 0, "cpu", None)
    step(first, 0)
    first.checkpoint.save()
    expected = step(first, 1)
    resumed = ModelTraining(1, 0, "cpu", None)
    assert resumed.checkpoint.step == 1
    assert step(resumed, 1) == pytest.approx(expected, rel=1e-5)
    for a, b in zip(first.averages, resumed.averages):
        assert torch.allclose(a, b, atol=1e-6)


def test_time_that_is_spent_stays_spent(tmp_path):
    layer = torch.nn.Linear(2, 2)
    checkpoint = Checkpoint(tmp_path / "a.pt", 1, {"layer": layer})
    checkpoint._start -= 30
    checkpoint.step = 7
    checkpoint.save()
    again = Checkpoint(tmp_path / "a.pt", 1, {"layer": torch.nn.Linear(2, 2)})
    assert again.step == 7 and 0.5 <= again.done < 0.6
    assert torch.equal(again.parts["layer"].weight, layer.weight)


def test_words_keep_their_embeddings_in_a_new_world(runs, tmp_path):
    """An earlier world with other words: here one whose word numbers are shifted by one."""
    earlier = tmp_path / "earlier"
    (earlier / TOKENIZER_FOLDER).mkdir(parents=True)
    vocabulary = json.loads((WEIGHTS / TOKENIZER_FOLDER / "vocab.json").read_text())
    forgotten = "panda</w>"
    shifted = {word: number + 1 for word, number in vocabulary.items() if word != forgotten}
    (earlier / TOKENIZER_FOLDER / "vocab.json").write_text(json.dumps({forgotten: 0, **shifted}))
    (earlier / TOKENIZER_FOLDER / "merges.txt").write_text((WEIGHTS / TOKENIZER_FOLDER / "merges.txt").read_text())
    state = read_weights(WEIGHTS / TEXT_ENCODER)
    table = torch.cat([torch.zeros(1, 128), state[TOKEN_EMBEDDING]])
    save_file(state | {TOKEN_EMBEDDING: table}, str(earlier / TEXT_ENCODER))
    (earlier / UNET).write_bytes((WEIGHTS / UNET).read_bytes())
    training = ModelTraining(1, 0, "cpu", earlier)
    taken = training.text_encoder.get_input_embeddings().weight
    numbers = load_tokenizer(WEIGHTS / TOKENIZER_FOLDER).get_vocab()
    cat = numbers["cat</w>"]
    assert torch.equal(taken[cat], state[TOKEN_EMBEDDING][cat])
    unet = read_weights(WEIGHTS / UNET)
    assert all(torch.equal(value, unet[name]) for name, value in training.unet.state_dict().items())


@pytest.mark.parametrize(("shares", "bundled"), [((0.2, 0.5, 0.3), 2), ((0.2, 0.5, 0.5), 3)])
def test_the_best_is_bundled(shares, bundled, runs, tmp_path, monkeypatch):
    saved, shown = [], iter(shares)
    monkeypatch.setattr(train_model, "save_weights", lambda state, path: saved.append(path.name))
    monkeypatch.setattr(train_model, "sample", lambda *_args, **_kwargs: np.zeros((2, 64, 64, 3), np.uint8))
    monkeypatch.setattr(train_model, "GRID_PROMPTS", 2)
    monkeypatch.setattr(train_model, "readings", lambda *_args: {"everything": [next(shown)]})
    training = ModelTraining(1, 0, "cpu", None)
    for pictures in range(3):
        training.evaluate(pictures)
    assert saved.count(UNET) == bundled
    curve = [json.loads(line) for line in train_model.CURVE.read_text().splitlines()]
    assert [line["everything"] for line in curve] == list(shares)


def test_the_learning_rate_rises_rests_and_falls():
    rates = [learning_rate(1.0, step, done) for step, done in ((0, 0.0), (199, 0.1), (500, 0.25), (900, 0.6), (999, 1))]
    assert rates[0] == pytest.approx(0.00505) and rates[1] == rates[2] == pytest.approx(1.01)
    assert rates[2] > rates[3] > rates[4] == pytest.approx(0.01)
