"""Exemplars, triples, token layouts and gradient rules: what goes in, what comes out, and every refusal."""

import shutil

import comfy.model_management
import comfy.utils
import folder_paths
import pytest
import torch
from comfy_extras.nodes_dataset import LoadImageTextDataSetFromFolderNode
from concept_atelier.kernels.context_model import ContextSettings, paint_other_actions
from concept_atelier.kernels.diffusers_backbone import DiffusersBackbone
from concept_atelier.kernels.exemplars import Exemplar
from concept_atelier.kernels.gradient_mask import GradientMask
from concept_atelier.kernels.layouts import Layout
from concept_atelier.nodes.data import AtelierExemplars
from concept_atelier.nodes.gradient import AtelierGradientMask
from concept_atelier.nodes.native import context_pictures
from concept_atelier.nodes.native import toy as native
from concept_atelier.nodes.native.pictures import contact_sheet, cover, opaque
from concept_atelier.nodes.tokens import AtelierTokenLayout
from concept_atelier.nodes.triples import AtelierTriples
from concept_atelier.toyworld import model as toyworld
from PIL import Image

CAPTION = "a man {} on grass"
QUICK = {
    "other_actions": "stands\nsits\n\nkicks",
    "pictures_per_exemplar": 2,
    "context_steps": 2,
    "context_rank": 2,
    "context_learning_rate": 1e-3,
    "sampling_steps": 2,
    "cfg": 2.0,
    "seed": 0,
    "sampling_eta": 0.0,
}


def pictures(count: int, height: int = 64, width: int = 64, channels: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, height, width, channels, generator=torch.Generator().manual_seed(seed))


def exemplars(images, captions=(CAPTION,), size=0, masks=None):
    output = AtelierExemplars.execute(images=list(images), captions=list(captions), size=[size], masks=masks)
    return output.args[0], output.ui.as_dict()["text"][0]


@pytest.fixture(autouse=True)
def output_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path / "temp"))
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    return tmp_path / "output"


@pytest.fixture(scope="module")
def diffusers_toy() -> toyworld.ToyModel:
    return toyworld.load_toy(random_weights=True)


@pytest.fixture(scope="module")
def toy(diffusers_toy) -> native.ToyParts:
    text_encoder = toyworld.text_encoder_state(diffusers_toy.text_encoder)
    with torch.inference_mode():
        return native.build_toy(diffusers_toy.unet.state_dict(), text_encoder, diffusers_toy.autoencoder.state_dict())


class TestExemplars:
    def test_a_batch_with_one_caption_for_all(self):
        batch = pictures(3)
        made, note = exemplars([batch])
        assert [e.caption for e in made] == [CAPTION] * 3
        assert all(torch.equal(e.image, image) for e, image in zip(made, batch))
        assert all(e.mask is None and e.other_actions == () for e in made)
        assert note == "3 exemplars of 64 x 64."

    def test_a_caption_a_line(self):
        made, _ = exemplars([pictures(2)], ["a man {} on grass\n\n  a cat {} \n"])
        assert [e.caption for e in made] == ["a man {} on grass", "a cat {}"]

    def test_blank_lines_do_not_count(self):
        made, _ = exemplars([pictures(2)], ["a man {} on grass\n\n"])
        assert [e.caption for e in made] == ["a man {} on grass"] * 2

    def test_a_list_with_a_text_for_each(self):
        made, _ = exemplars([pictures(1), pictures(1, seed=1)], ["a man {}\non grass", "a cat {}"])
        assert [e.caption for e in made] == ["a man {} on grass", "a cat {}"]

    def test_what_core_dataset_nodes_load(self, tmp_path, monkeypatch):
        folder = tmp_path / "input" / "salute"
        folder.mkdir(parents=True)
        for name, size in (("a", (64, 64)), ("b", (96, 64))):
            Image.new("RGB", size, "teal").save(folder / f"{name}.png")
            (folder / f"{name}.txt").write_text(f"{name} {{}} on grass")
        monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path / "input"))
        images, texts = LoadImageTextDataSetFromFolderNode.execute("salute").args
        made, _ = exemplars(images, texts)
        assert sorted(e.caption for e in made) == ["a {} on grass", "b {} on grass"]
        assert len({e.image.shape for e in made}) == 1

    def test_pictures_of_unequal_size_are_cut_to_the_first_and_it_is_said(self):
        made, note = exemplars([pictures(1, 64, 48), pictures(2, 100, 200)])
        assert all(e.image.shape == (64, 48, 3) for e in made)
        assert note == "3 exemplars of 48 x 64.\n2 of 200 x 100 resized to cover 48 x 64, the middle kept."

    def test_sizes_become_multiples_of_eight_and_it_is_said(self):
        made, note = exemplars([pictures(1, 67, 70)])
        assert made[0].image.shape == (64, 64, 3)
        assert "1 of 70 x 67 resized to cover 64 x 64" in note and "multiples of 8" in note

    def test_a_size_of_ones_own(self):
        made, _ = exemplars([pictures(1, 64, 48)], size=32)
        assert made[0].image.shape == (32, 32, 3)

    def test_what_is_cut_off_is_the_border(self):
        wide = torch.zeros(1, 64, 128, 3)
        wide[:, :, 32:96] = 1
        assert cover(wide, 64, 64).min() > 0.99

    def test_transparent_becomes_white(self):
        image = pictures(1, channels=4)
        image[..., 3] = 0
        image[:, :8, :, 3] = 1
        solid = opaque(image)
        assert torch.equal(solid[:, :8], image[:, :8, :, :3]) and (solid[:, 8:] == 1).all()
        made, _ = exemplars([image])
        assert torch.equal(made[0].image, solid[0])

    def test_grey_pictures_become_coloured(self):
        image = pictures(1, channels=1)
        assert torch.equal(opaque(image), image.repeat(1, 1, 1, 3))

    def test_a_mask_is_cut_like_its_picture(self):
        wide, mask = torch.zeros(1, 64, 128, 3), torch.zeros(1, 64, 128)
        wide[:, 16:48, 48:80] = 1
        mask[:, 16:48, 48:80] = 1
        made, note = exemplars([wide], size=32, masks=[mask])
        assert made[0].mask.shape == (32, 32)
        assert (made[0].mask - made[0].image[..., 0]).abs().mean() < 0.05
        assert note.startswith("1 exemplar of 32 x 32, with masks.")

    def test_a_mask_that_masks_nothing_is_told(self):
        _, note = exemplars([pictures(2)], masks=[torch.stack([torch.eye(64), torch.ones(64, 64)])])
        assert "inside of mask 2, which therefore masks nothing" in note and "resized" not in note

    def test_a_mask_of_another_size_is_fitted_to_its_picture(self):
        mask = torch.zeros(32, 32)
        mask[:16] = 1
        made, note = exemplars([pictures(1)], masks=[mask])
        assert made[0].mask.shape == (64, 64) and "1 of the masks resized" in note
        assert made[0].mask[:30].min() > 0.9 and made[0].mask[34:].max() < 0.1

    @pytest.mark.parametrize(
        "images, captions, masks, sentence",
        [
            ([pictures(2)], ["a man {}\na cat on grass"], None, 'Caption 2 on "captions", "a cat on grass", has 0'),
            ([pictures(1)], ["a {} man {}"], None, "has 2 blanks: put exactly one {}"),
            ([pictures(2)], ["a {}", ""], None, 'Caption 2 on "captions", "", has 0 blanks'),
            ([pictures(3)], ["a {}\nb {}"], None, '3 pictures on "images" but 2 captions on "captions": write one'),
            ([pictures(3)], [""], None, "but 0 captions"),
            ([pictures(0)], [CAPTION], None, 'no picture on "images": connect'),
            ([pictures(2)], [CAPTION], [torch.ones(1, 64, 64)], '2 pictures on "images" but 1 masks on "masks"'),
            ([pictures(2)], [CAPTION], [torch.ones(1, 8, 8), torch.zeros(1, 8, 8)], 'Mask 2 on "masks" is empty'),
        ],
    )
    def test_bad_input_gives_a_sentence(self, images, captions, masks, sentence):
        with pytest.raises(ValueError) as error:
            exemplars(images, captions, masks=masks)
        assert sentence in str(error.value)


def run_triples(made, other_action_pictures=None, **inputs):
    """Run Triples as the executor does: every input is a list."""
    lists = {name: [value] for name, value in inputs.items()}
    return AtelierTriples.execute(other_action_pictures, exemplars=[made], **lists)


class TestTriplesOfOnesOwnPictures:
    def test_they_are_shared_out_in_order(self):
        made, _ = exemplars([pictures(2)])
        own = pictures(6, 80, 80, seed=3)
        triples, sheet = run_triples(made, [own], **QUICK).args
        assert [len(e.other_actions) for e in triples] == [3, 3]
        assert torch.equal(triples[1].other_actions[0], cover(own, 64, 64)[3])
        assert [e.caption for e in triples] == [CAPTION] * 2
        assert sheet.shape[0] == 1 and sheet.shape[3] == 3

    def test_a_list_of_any_sizes_is_a_batch_in_its_order(self):
        made, _ = exemplars([pictures(2)])
        own = [pictures(1, 80, 80, seed=3), pictures(2, 64, 96, channels=4, seed=4), pictures(1, seed=5)]
        triples, _ = run_triples(made, own, **QUICK).args
        assert [len(e.other_actions) for e in triples] == [2, 2]
        assert torch.equal(triples[0].other_actions[0], cover(own[0], 64, 64)[0])
        assert torch.equal(triples[1].other_actions[1], own[2][0])

    def test_one_exemplar_is_refused(self):
        made, _ = exemplars([pictures(1)])
        with pytest.raises(ValueError, match=r"There is one picture .* connect at least two"):
            run_triples(made, [pictures(4)], **QUICK)

    @pytest.mark.parametrize("count", [5, 1, 0])
    def test_a_number_that_cannot_be_shared_out_is_refused(self, count):
        made, _ = exemplars([pictures(2)])
        with pytest.raises(ValueError, match=f'The {count} pictures on "other_action_pictures" cannot be shared out'):
            run_triples(made, [pictures(count)], **QUICK)

    def test_nothing_to_paint_with_is_refused(self):
        made, _ = exemplars([pictures(2)])
        with pytest.raises(ValueError, match=r"Connect your own pictures .* not connected: model, clip, vae"):
            run_triples(made, **QUICK)

    def test_no_action_to_paint_is_refused(self, toy):
        made, _ = exemplars([pictures(2)])
        with pytest.raises(ValueError, match='"other_actions" is empty'):
            run_triples(made, **{**QUICK, **toy._asdict(), "other_actions": " \n"})


class TestPaintedTriples:
    """As the executor runs them: in inference mode."""

    @torch.inference_mode()
    def test_each_exemplar_gets_its_pictures_and_no_weight_changes(self, toy):
        made, _ = exemplars([pictures(2)])
        modules = (toy.model.model.diffusion_model, toy.clip.cond_stage_model, toy.vae.first_stage_model)
        hashes = [all_bytes(module) for module in modules]
        triples, _ = run_triples(made, **QUICK, **toy._asdict()).args
        assert [[p.shape for p in e.other_actions] for e in triples] == [[(64, 64, 3)] * 2] * 2
        assert [all_bytes(module) for module in modules] == hashes
        assert torch.is_inference_mode_enabled()

    @torch.inference_mode()
    def test_the_seed_decides(self, toy, output_folder):
        made, _ = exemplars([pictures(2)])

        def painted(seed: int) -> torch.Tensor:
            for file in output_folder.rglob("*.safetensors"):
                file.unlink()
            triples, _ = run_triples(made, **{**QUICK, "seed": seed}, **toy._asdict()).args
            return torch.stack([p for e in triples for p in e.other_actions])

        first = painted(1)
        assert torch.equal(painted(1), first)
        assert not torch.equal(painted(2), first)

    @torch.inference_mode()
    def test_they_outlive_comfyui_and_its_temp_folder(self, toy, output_folder, monkeypatch):
        made, _ = exemplars([pictures(2)])
        first, _ = run_triples(made, **QUICK, **toy._asdict()).args
        shutil.rmtree(folder_paths.get_temp_directory(), ignore_errors=True)
        monkeypatch.setattr(context_pictures, "paint_other_actions", None)  # painting again would fail
        again, _ = run_triples(made, **QUICK, **toy._asdict()).args
        for before, after in zip(first, again):
            assert all(map(torch.equal, before.other_actions, after.other_actions))

        file = next(output_folder.glob("concept_atelier_runs/triples/*.safetensors"))
        file.write_bytes(b"")
        with pytest.raises(ValueError, match=r"is damaged .*: delete it, and it will be painted again"):
            run_triples(made, **QUICK, **toy._asdict())

    @torch.inference_mode()
    def test_a_cancel_keeps_finished_exemplars(self, toy, monkeypatch):
        made, _ = exemplars([pictures(3)])
        painted = []
        paint = context_pictures.paint_other_actions

        def counting(backbone, exemplar, *rest):
            painted.append(exemplar)
            return paint(backbone, exemplar, *rest)

        def cancel_with_the_first_preview(value, total, preview, node_id):
            if preview is not None:
                comfy.model_management.interrupt_current_processing(True)

        monkeypatch.setattr(context_pictures, "paint_other_actions", counting)
        monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", cancel_with_the_first_preview)
        before = all_bytes(toy.model.model)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            run_triples(made, **QUICK, **toy._asdict())
        assert painted == [made[0], made[1]]
        assert all_bytes(toy.model.model) == before

        monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", None)
        triples, _ = run_triples(made, **QUICK, **toy._asdict()).args
        assert painted == [made[0], made[1], made[1], made[2]]
        assert [len(e.other_actions) for e in triples] == [2, 2, 2]

    @torch.inference_mode()
    def test_they_are_the_pictures_of_the_diffusers_backbone(self, toy, diffusers_toy):
        made, _ = exemplars([pictures(2)])
        triples, _ = run_triples(made, **QUICK, **toy._asdict()).args
        settings = ContextSettings(steps=2, rank=2, learning_rate=1e-3, sampling_steps=2, cfg=2.0, seed=0)
        backbone = DiffusersBackbone.from_toy(diffusers_toy)
        with torch.inference_mode(False):
            first = Exemplar(made[0].image.clone(), CAPTION)
            expected = paint_other_actions(backbone, first, ["stands", "sits"], settings)
        torch.testing.assert_close(torch.stack(triples[0].other_actions), torch.stack(expected), rtol=0, atol=1e-3)

    @torch.inference_mode()
    def test_sdxl_can_paint_too(self, tiny):
        made, _ = exemplars([pictures(2)])
        settings = {**QUICK, "pictures_per_exemplar": 1, "context_steps": 1, "sampling_steps": 1}
        triples, _ = run_triples(made, **settings, **tiny("sdxl")._asdict()).args
        assert all(e.other_actions[0].isfinite().all() for e in triples)

    @torch.inference_mode()
    def test_progress_counts_every_step_and_shows_pictures(self, toy, monkeypatch):
        made, _ = exemplars([pictures(2)])
        shown = []
        monkeypatch.setattr(
            comfy.utils,
            "PROGRESS_BAR_HOOK",
            lambda value, total, preview, node_id: shown.append((value, total, preview is not None)),
        )
        run_triples(made, **QUICK, **toy._asdict())
        each = QUICK["context_steps"] + 2 * QUICK["sampling_steps"]
        assert {total for _, total, _ in shown} == {2 * each}
        assert [value for value, _, preview in shown if preview] == [each, 2 * each]
        assert [value for value, _, _ in shown] == sorted(value for value, _, _ in shown)


def all_bytes(module: torch.nn.Module) -> int:
    return hash(b"".join(v.detach().cpu().numpy().tobytes() for v in module.state_dict().values()))


def test_a_contact_sheet_has_a_row_for_each_exemplar():
    red, green, blue = (torch.eye(3)[i].expand(16, 16, 3) for i in range(3))
    sheet = contact_sheet([[[red], [green, blue]], [[blue], [red]]], ["one", "two"])[0]
    assert torch.equal(sheet[20 + 64, 64], torch.tensor([1.0, 0, 0]))
    assert torch.equal(sheet[20 + 132 + 64, 64], torch.tensor([0, 0, 1.0]))
    assert torch.equal(sheet[20 + 64, 132 + 8 + 64], torch.tensor([0, 1.0, 0]))
    assert torch.equal(sheet[20 + 64, 132 + 8 + 132 + 64], torch.tensor([0, 0, 1.0]))


@pytest.mark.parametrize(
    "shown, granularity", [("one token", "prompt"), ("per block", "block"), ("per layer", "layer")]
)
def test_token_layouts(shown, granularity):
    assert AtelierTokenLayout.execute(shown, 2).args == (Layout(granularity=granularity, tokens=2),)


def test_the_gradient_rule_has_every_setting():
    rule = GradientMask(
        beta=0.3, merge="union", strategy="random", target="update", share_noise=False, share_timestep=False
    )
    assert AtelierGradientMask.execute(0.3, "union", "random", "update", False, False).args == (rule,)


def test_the_defaults_of_the_gradient_rule_are_the_papers():
    defaults = {i.id: i.default for i in AtelierGradientMask.define_schema().inputs}
    assert AtelierGradientMask.execute(**defaults).args == (GradientMask(),)
