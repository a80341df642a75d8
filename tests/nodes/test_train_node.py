"""AtelierTrain on real ComfyUI objects: only vectors change, cancel and resume are exact, bad input is named."""

import comfy.model_management
import folder_paths
import pytest
import torch
from cancelling import after_each_step, cancel_at_step
from comparing import digest
from concept_atelier.kernels.exemplars import Exemplar
from concept_atelier.kernels.gradient_mask import GradientMask
from concept_atelier.kernels.layouts import Layout
from concept_atelier.kernels.losses import NullTextPrior
from concept_atelier.nodes.native.live import stop_requests
from concept_atelier.nodes.native.payload import WORDS
from concept_atelier.nodes.native.text import token_vectors
from concept_atelier.nodes.prior import AtelierNullTextPrior
from concept_atelier.nodes.tokens import AtelierTokenLayout
from prompting import encode
from train_node import NODE_ID, run_train

pytestmark = pytest.mark.usefixtures("as_in_a_prompt")


def exemplars(captions: str = "a man {} here", count: int = 2) -> tuple[Exemplar, ...]:
    images = torch.rand(2 * count, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    return tuple(Exemplar(images[i], captions, None, (images[count + i],)) for i in range(count))


def train(parts, **changes):
    values = {
        "exemplars": exemplars(),
        "layout": Layout("block"),
        "gradient_rule": GradientMask(),
        "name": "act",
        "init_word": "action",
    }
    return run_train(parts, **values | changes)


def test_only_the_vectors_change(any_tiny):
    before = digest(any_tiny)
    concept, _, loss_map = train(any_tiny, steps=1).args
    assert digest(any_tiny) == before
    assert len(loss_map["loss"]) == 1
    for tower, start in token_vectors(any_tiny.clip, "action").items():
        vectors = concept.vectors[tower]
        assert vectors.shape[0] == (11 if concept.family == "sdxl" else 16)
        moved = (vectors != start).double().mean().item()
        assert 0.02 < moved < 0.4  # the mask lets about an eighth through at beta 0.6


def test_cancel_keeps_the_work_and_resuming_is_exact(tiny, monkeypatch, tmp_path):
    whole = train(tiny("sd1"), steps=4).args
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "other"))
    with monkeypatch.context() as patch:
        cancel_at_step(patch, 2)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            train(tiny("sd1"), steps=4)
    resumed = train(tiny("sd1"), steps=4).args
    assert resumed[2]["loss"] == whole[2]["loss"]
    assert torch.equal(resumed[0].vectors["l"], whole[0].vectors["l"])


def test_stop_and_keep_ends_the_run(tiny, monkeypatch):
    after_each_step(monkeypatch, lambda _: stop_requests.add(NODE_ID))
    concept, _, loss_map = train(tiny("sd1"), steps=50).args
    assert len(loss_map["loss"]) == 1 and concept.metadata["steps"] == "1"


def test_samples_are_painted_and_shown(tiny):
    output = train(tiny("sd1"), sample_prompts="a cat {}\na dog", sample_every=2)
    samples = output.args[1]
    assert samples.shape == (2, 64, 64, 3) and samples.min() >= 0 and samples.max() <= 1
    assert output.ui.as_dict()["images"]


def test_without_sample_prompts_what_is_connected_to_samples_is_told(tiny):
    assert "sample_prompts" in train(tiny("sd1"), steps=1).args[1].message


def test_a_finished_run_returns_at_once(tiny, monkeypatch):
    first = train(tiny("sd1")).args[0]
    monkeypatch.setattr("concept_atelier.kernels.concept_run.train", None)  # training again would fail
    assert torch.equal(train(tiny("sd1")).args[0].vectors["l"], first.vectors["l"])


def test_one_token_on_sdxl_learns_in_both_towers(tiny):
    concept = train(tiny("sdxl"), layout=Layout("prompt"), gradient_rule=None).args[0]
    assert {tower: v.shape for tower, v in concept.vectors.items()} == {"l": (1, 1, 24), "g": (1, 1, 40)}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"exemplars": exemplars("a man sits")}, "exactly one blank"),
        ({"exemplars": exemplars(count=1)}, "at least two exemplars"),
        ({"init_word": "antidisestablishmentarianism"}, "init word .* pieces"),
        ({"name": "my act"}, 'name "my act"'),
        ({"exemplars": (*exemplars(), *exemplars("{}" + " very" * 80)), "batch_size": 4}, "more than 75 tokens"),
        ({"sample_prompts": "a cat <dog>"}, "<dog>.*<act>"),
        ({"learning_rate": 1e30, "steps": 5}, "not finite at step 2; the vectors of step 1 are kept"),
    ],
)
def test_bad_input_gets_one_sentence(tiny, change, sentence):
    with pytest.raises(ValueError, match=sentence):
        train(tiny("sd1"), **change)


def test_an_unwritable_output_folder_is_named(tiny, monkeypatch, tmp_path):
    (tmp_path / "full").write_text("no folder")
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "full"))
    with pytest.raises(ValueError, match="full"):
        train(tiny("sd1"))


def test_the_node_learns_shared_then_stage_by_stage(tiny):
    layout = AtelierTokenLayout.execute("one token", 2, stages=4, place="tail rows, added")[0]
    prior = AtelierNullTextPrior.execute(1e-3)[0]
    assert prior == NullTextPrior(1e-3)
    changes = {"layout": layout, "gradient_rule": None, "init_word": "brown dog"}
    concept, _, loss_map = train(
        tiny("sd1"), steps=2, steps_each_stage=1, loss_terms={"loss_term0": prior}, **changes
    ).args
    assert len(loss_map["loss"]) == 2 + 4 and concept.metadata["steps"] == "6"
    stages = concept.vectors["l"]
    assert stages.shape == (4, 2, 64) and len({v.sum().item() for v in stages}) == 4
    words = encode(tiny("sd1").clip, "a <act> here", concept)[0][1][WORDS]
    assert words[1:5] == ("a", "brown", "dog", "here")
