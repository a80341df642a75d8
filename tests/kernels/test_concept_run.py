"""A run is named by what decides it, saved as it goes, resumed, continued, returned at once."""

import dataclasses
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from concept_atelier.kernels import concept_run
from concept_atelier.kernels.anchor_loss import AnchorLoss
from concept_atelier.kernels.concept import load_concept, save_concept
from concept_atelier.kernels.concept_run import ConceptRun, SamplePlan
from concept_atelier.kernels.diffusers_backbone import DiffusersBackbone
from concept_atelier.kernels.exemplars import Exemplar
from concept_atelier.kernels.gradient_mask import GradientMask
from concept_atelier.kernels.gradient_rules import MaskedTriples, PlainGradient
from concept_atelier.kernels.layouts import Layout
from concept_atelier.kernels.schedule import NoiseSchedule
from concept_atelier.kernels.training import TrainingSettings
from concept_atelier.kernels.weight_plan import KEY_AND_VALUE, WeightPlan
from concept_atelier.toyworld.model import load_toy


class Recorder:
    """A report that remembers, and stops or cancels where told."""

    def __init__(self, stop_at: int = 0, cancel_at: int = 0) -> None:
        self.steps, self.grids, self.stop_at, self.cancel_at = [], [], stop_at, cancel_at

    @property
    def stop_requested(self) -> bool:
        return bool(self.steps) and self.steps[-1] == self.stop_at

    def step(self, step, loss_history, stats) -> None:
        self.steps.append(step)
        assert len(loss_history) == step and set(stats) == {"overlap", "overlap_if_independent", "kept"}
        if step == self.cancel_at:
            raise KeyboardInterrupt

    def samples(self, image_grid) -> None:
        self.grids.append(image_grid)

    def say(self, lines) -> None:
        self.said = list(lines)


@pytest.fixture(scope="module")
def backbone() -> DiffusersBackbone:
    return DiffusersBackbone.from_toy(load_toy(random_weights=True))


def a_run(steps: int = 4, **changes) -> ConceptRun:
    images = torch.rand(4, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    run = ConceptRun(
        name="act",
        init_word="poses",
        exemplars=tuple(Exemplar(images[i], "a man {} on grass", None, (images[i + 2],)) for i in range(2)),
        layout=Layout("block"),
        rule=MaskedTriples(GradientMask()),
        settings=TrainingSettings(steps=steps, learning_rate=1e-2),
        samples=SamplePlan(("a cat {}", "a dog"), every=2, steps=2),
    )
    return dataclasses.replace(run, **changes)


def vectors(concept) -> torch.Tensor:
    return concept.vectors["l"]


def test_samples_come_before_during_and_after(backbone, tmp_path):
    report = Recorder()
    _, _, samples = a_run().learn(backbone, tmp_path, report)
    assert report.steps == [1, 2, 3, 4] and len(report.grids) == 3
    assert samples.shape == (2, 64, 64, 3) and report.grids[0].shape == (64, 128, 3)


def test_running_again_returns_at_once_and_more_steps_continue(backbone, tmp_path):
    first, _, samples = a_run().learn(backbone, tmp_path, Recorder())
    again = Recorder()
    second, _, same_samples = a_run().learn(backbone, tmp_path, again)
    assert again.steps == [] and torch.equal(vectors(first), vectors(second)) and torch.equal(samples, same_samples)
    more = Recorder()
    longer, _, _ = a_run(6).learn(backbone, tmp_path, more)
    whole, _, _ = a_run(6).learn(backbone, tmp_path / "elsewhere", Recorder())
    assert more.steps == [5, 6] and torch.equal(vectors(longer), vectors(whole))


def test_a_cancelled_run_resumes_bit_for_bit(backbone, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        a_run().learn(backbone, tmp_path, Recorder(cancel_at=3))
    rest = Recorder()
    resumed, state, _ = a_run().learn(backbone, tmp_path, rest)
    whole, whole_state, _ = a_run().learn(backbone, tmp_path / "elsewhere", Recorder())
    assert rest.steps == [4] and torch.equal(vectors(resumed), vectors(whole)) and state.losses == whole_state.losses


def test_stop_and_keep_ends_well_and_is_kept(backbone, tmp_path):
    stopped, state, _ = a_run().learn(backbone, tmp_path, Recorder(stop_at=2))
    assert state.step == 2 and stopped.metadata["steps"] == "2"
    again = Recorder()
    kept, _, _ = a_run().learn(backbone, tmp_path, again)
    assert again.steps == [] and torch.equal(vectors(stopped), vectors(kept))
    more = Recorder()
    a_run(5).learn(backbone, tmp_path, more)
    assert more.steps == [3, 4, 5]


def test_a_run_kept_short_goes_on_to_fewer_steps_than_it_was_to_have(backbone, tmp_path):
    a_run(10).learn(backbone, tmp_path, Recorder(stop_at=2))
    fewer = Recorder()
    a_run(4).learn(backbone, tmp_path, fewer)
    assert fewer.steps == [3, 4]


def test_starting_fresh_forgets(backbone, tmp_path):
    a_run().learn(backbone, tmp_path, Recorder())
    report = Recorder()
    a_run().learn(backbone, tmp_path, report, start_fresh=True)
    assert report.steps == [1, 2, 3, 4]


@pytest.mark.parametrize("damaged", ["state", "samples"])
def test_a_damaged_file_of_a_run_is_named_and_forgotten_by_starting_fresh(backbone, tmp_path, damaged):
    a_run().learn(backbone, tmp_path, Recorder())
    (file,) = tmp_path.rglob(f"{damaged}.safetensors")
    file.write_bytes(b"")
    with pytest.raises(ValueError, match=rf"{damaged}\.safetensors is damaged .*: turn start_fresh on, or delete"):
        a_run().learn(backbone, tmp_path, Recorder())
    report = Recorder()
    a_run().learn(backbone, tmp_path, report, start_fresh=True)
    assert report.steps == [1, 2, 3, 4] and len(report.grids) == 3


@pytest.mark.parametrize(
    "change",
    [
        {"init_word": "stands"},
        {"layout": Layout("prompt")},
        {"rule": MaskedTriples(GradientMask(beta=0.5))},
        {"settings": TrainingSettings(steps=4, learning_rate=1e-3)},
        {"exemplars": a_run().exemplars[::-1]},
        {"loss_terms": (AnchorLoss(0.5),)},
        {"rule": PlainGradient(), "weights": WeightPlan(KEY_AND_VALUE)},
        {"layout": Layout("block", generated=True)},
    ],
)
def test_whatever_decides_the_result_names_the_run(backbone, change):
    assert a_run(**change).fingerprint(backbone) != a_run().fingerprint(backbone)
    assert a_run(99).fingerprint(backbone) == a_run().fingerprint(backbone)


def change_weights(backbone):
    backbone.unet.conv_in.weight.data += 0.01


def change_prediction(backbone):
    backbone.prediction_type = "v_prediction"


def change_schedule(backbone):
    backbone.schedule = NoiseSchedule.scaled_linear(beta_end=0.013)


@pytest.mark.parametrize("change", [change_weights, change_prediction, change_schedule])
def test_another_model_is_another_run(backbone, change):
    other = DiffusersBackbone.from_toy(load_toy(random_weights=True))
    assert a_run().fingerprint(other) == a_run().fingerprint(backbone)
    change(other)
    assert a_run().fingerprint(other) != a_run().fingerprint(backbone)


def test_a_state_of_another_format_is_another_run(backbone, monkeypatch):
    name = a_run().fingerprint(backbone)
    monkeypatch.setattr(concept_run, "FORMAT_VERSION", concept_run.FORMAT_VERSION + 1)
    assert a_run().fingerprint(backbone) != name


def test_fewer_steps_than_a_run_has_are_refused(backbone, tmp_path):
    longer, _, _ = a_run().learn(backbone, tmp_path, Recorder())
    with pytest.raises(ValueError, match="already has 4 steps: raise steps above 3, or turn start_fresh on"):
        a_run(3).learn(backbone, tmp_path, Recorder())
    kept, _, _ = a_run().learn(backbone, tmp_path, Recorder())
    assert torch.equal(vectors(kept), vectors(longer))
    shorter, state, _ = a_run(3).learn(backbone, tmp_path, Recorder(), start_fresh=True)
    assert state.step == 3 and shorter.metadata["steps"] == "3"


def test_nothing_is_written_of_a_run_that_has_not_begun(backbone, tmp_path, monkeypatch):
    a_run().learn(backbone, tmp_path, Recorder())
    [state_file] = tmp_path.rglob("state.safetensors")
    monkeypatch.setattr(concept_run, "train", lambda *_: pytest.fail("cancelled"))
    with pytest.raises(pytest.fail.Exception):
        a_run().learn(backbone, tmp_path, Recorder(), start_fresh=True)
    assert not state_file.exists()  # forgotten, and no state of step 0 in its place


def test_what_cannot_be_learned_is_refused_before_any_work(backbone, tmp_path):
    with pytest.raises(ValueError, match="init word"):
        a_run(init_word="raises both arms").learn(backbone, tmp_path, Recorder())
    with pytest.raises(ValueError, match='name "my act"'):
        a_run(name="my act")
    with pytest.raises(ValueError, match=r"name has 101 letters, .* at most 100"):
        a_run(name="a" * 101)
    with pytest.raises(ValueError, match="set stages in Token Layout to the number of sampling steps"):
        a_run(rule=PlainGradient(), settings=TrainingSettings(steps=4, steps_each_stage=2))
    with pytest.raises(ValueError, match="mask of exemplar 2 is empty"):
        first, second, *_ = a_run().exemplars
        a_run(exemplars=(first, replace(second, mask=torch.zeros(64, 64))))
    with pytest.raises(ValueError, match="<other>"):
        a_run(samples=SamplePlan(("a cat <other>",)))
    with pytest.raises(ValueError, match="no exemplars"):
        a_run(exemplars=())
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_named_before_training(backbone, tmp_path):
    (tmp_path / "runs").write_text("a file, not a folder")
    report = Recorder()
    with pytest.raises(ValueError, match="runs"):
        a_run().learn(backbone, tmp_path / "runs", report)
    assert report.steps == []


def test_a_concept_survives_its_file(backbone, tmp_path):
    concept, _, _ = a_run(2).learn(backbone, tmp_path, Recorder())
    save_concept(tmp_path / "act.safetensors", concept, {"workflow": "{}"})
    loaded = load_concept(tmp_path / "act.safetensors")
    assert torch.equal(vectors(loaded), vectors(concept))
    assert (loaded.name, loaded.layout, loaded.family, loaded.layers) == (
        "act",
        Layout("block"),
        "toy",
        backbone.layers,
    )
    assert loaded.metadata == concept.metadata


def test_a_concept_is_refused_where_it_does_not_fit(backbone, tmp_path):
    concept, _, _ = a_run(1).learn(backbone, tmp_path, Recorder())
    concept.check_fits("toy", {"l": 128}, backbone.layers)
    with pytest.raises(ValueError, match=r"learned on toy.*this sd1 model"):
        concept.check_fits("sd1", {"l": 768})
    with pytest.raises(ValueError, match="7 cross-attention layers"):
        concept.check_fits("toy", {"l": 128}, backbone.layers[:5])


@pytest.mark.parametrize("content", [b"", b"not a safetensors file at all, but long enough to have a header"])
def test_damaged_concept_files_are_named(tmp_path: Path, content):
    file = tmp_path / "broken.safetensors"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"broken\.safetensors is damaged"):
        load_concept(file)
    with pytest.raises(ValueError, match=r"no file .*missing"):
        load_concept(tmp_path / "missing.safetensors")
