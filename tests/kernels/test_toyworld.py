"""The toy world: its pictures and sentences, what is held out, and the bundled weights."""

import random

import numpy as np
import pytest
import torch
from concept_atelier.toyworld.autoencoder import LATENT_CHANNELS, PatchAutoencoder
from concept_atelier.toyworld.dataset import PICTURES, draw_all, held_out_scenes, to_tensor, training_scenes
from concept_atelier.toyworld.evaluate import prompt_scenes, readings
from concept_atelier.toyworld.exemplars import exemplar_scenes, other_action_scenes
from concept_atelier.toyworld.judge import NAMES, load_judge, truth
from concept_atelier.toyworld.junk import KINDS, decoded_noise
from concept_atelier.toyworld.model import load_toy
from concept_atelier.toyworld.poses import HELD_OUT_POSES, POSES, Pose, alike
from concept_atelier.toyworld.render import figure_mask, render, render_empty
from concept_atelier.toyworld.sampling import sample
from concept_atelier.toyworld.tokenizer import TOKENS, world_words
from concept_atelier.toyworld.train_autoencoder import psnr
from concept_atelier.toyworld.train_judge import judge_scene
from concept_atelier.toyworld.vocabulary import (
    ACTIONS,
    HELD_OUT_ACTIONS,
    HELD_OUT_OBJECTS,
    HELD_OUT_PAIRS,
    HELD_OUT_SUBJECTS,
    NONE,
    OBJECTS,
    RANDOM_ACTION,
    SUBJECTS,
    caption,
    draw_pair_scene,
    draw_scene,
    draw_training_scene,
)
from concept_atelier.toyworld.weights import WEIGHTS


@pytest.fixture(scope="module")
def toy():
    return load_toy()


@pytest.fixture(scope="module")
def judge():
    return load_judge()


def test_the_same_seed_gives_the_same_picture():
    first, second = (draw_scene(random.Random(7)) for _ in range(2))
    assert first == second
    assert np.array_equal(render(first), render(second))
    assert render(first).shape == (64, 64, 3) and render(first).dtype == np.uint8
    assert not np.array_equal(render(first), render(draw_scene(random.Random(8))))


def test_the_mask_covers_the_figures_and_nothing_else():
    rng = random.Random(0)
    for _ in range(50):
        mask = figure_mask(draw_training_scene(rng))
        assert mask.shape == (64, 64) and mask.dtype == np.uint8
        assert 0.04 < (mask > 127).mean() < 0.5


def test_an_empty_scene_is_the_same_place():
    scene = draw_scene(random.Random(3), action="stands", object=NONE, background="on grass")
    outside = figure_mask(scene) == 0
    # The shadow is under the figure's feet and belongs to neither.
    above = np.arange(64)[:, None] < scene.characters[0].ground - 4
    picture, empty = render(scene), render_empty(scene)
    assert np.array_equal(picture[outside & above], empty[outside & above])
    assert not np.array_equal(picture, empty)


def test_what_is_given_stays_as_given():
    scene = draw_scene(
        random.Random(0), "man", "dab", "on pink", object="lamp", side="left", color="red", accessory=NONE
    )
    assert caption(scene) == "a man in red dab on pink with a lamp on the left"
    assert caption(scene, action_text="<new>", drop_background=True) == "a man in red <new> with a lamp on the left"


def test_every_sentence_fits_and_falls_into_whole_words(toy):
    captions = {caption(scene) for scene in training_scenes(3000)}
    for text in captions:
        ids = toy.tokenizer(text)["input_ids"]
        assert len(ids) == len(text.split()) + 2 <= TOKENS, text
    for word in world_words():
        assert len(toy.tokenizer(word)["input_ids"]) == 3, word


def test_any_prompt_tokenises_without_unknown_pieces(toy):
    pieces = toy.tokenizer.convert_ids_to_tokens(toy.tokenizer("a Zebra, juggling (quickly)!")["input_ids"])
    assert "<|endoftext|>" not in pieces[1:-1]


def test_nothing_held_out_is_in_a_training_caption_or_picture():
    held_out = {*HELD_OUT_SUBJECTS, *HELD_OUT_ACTIONS, *HELD_OUT_OBJECTS}
    # A picture is drawn from its scene alone: what no scene holds, no picture shows.
    for scene in training_scenes(PICTURES):
        assert not held_out & set(caption(scene).split())
        assert scene.action in (*ACTIONS, RANDOM_ACTION)
        assert scene.object in (*OBJECTS, NONE)
        for character in scene.characters:
            assert character.subject in SUBJECTS
            assert (character.subject, scene.action) not in HELD_OUT_PAIRS
            assert not any(alike(character.pose, pose) for pose in HELD_OUT_POSES.values())


def test_a_pose_is_alike_its_mirror_image_and_small_changes():
    dab = HELD_OUT_POSES["dab"]
    assert alike(Pose((*dab.arms[2:], *dab.arms[:2]), dab.legs), dab)
    assert alike(Pose(tuple(angle + 15 for angle in dab.arms), dab.legs), dab)
    assert not any(alike(POSES["stands"], pose) for pose in HELD_OUT_POSES.values())


def test_training_scenes_hold_pairs_and_random_poses_in_the_stated_shares():
    scenes = training_scenes(5000)
    pairs = [scene for scene in scenes if len(scene.characters) == 2]
    assert 0.17 < len(pairs) / len(scenes) < 0.23
    assert 0.25 < sum(scene.action == RANDOM_ACTION for scene in scenes) / len(scenes) < 0.31
    first_is_left = [scene.characters[0].x < scene.characters[1].x for scene in pairs]
    assert 0.4 < sum(first_is_left) / len(pairs) < 0.6
    assert all(scene.characters[0].subject != scene.characters[1].subject for scene in pairs)
    touching = [abs(s.object_x - s.characters[0].x) < 19 for s in scenes if s.object != NONE]
    assert 0.2 < sum(touching) / len(touching) < 0.6


def test_a_pair_is_described_in_its_own_order():
    scene = draw_pair_scene(random.Random(1), ("wizard", "panda"), "sits", "on grass")
    assert caption(scene) == "a wizard and a panda sits on grass"
    read = truth(scene)
    assert {read["subject"], read["second"]} == {"wizard", "panda"}
    assert read["subject"] == scene.from_left[0].subject


def test_exemplars_share_the_action_and_differ_in_context():
    scenes = exemplar_scenes("dab", 10, seed=3)
    assert scenes == exemplar_scenes("dab", 10, seed=3)
    assert {scene.action for scene in scenes} == {"dab"}
    assert len({(scene.subject, scene.color, scene.background, scene.object) for scene in scenes}) == 10


def test_other_actions_keep_the_context():
    scene = exemplar_scenes("dab", 1)[0]
    others = other_action_scenes(scene, 4, seed=0)
    assert len({other.action for other in others}) == 4
    for other in others:
        assert other.action in ACTIONS
        for field in ("subject", "color", "background", "object", "object_x", "side", "seed"):
            assert getattr(other, field) == getattr(scene, field)
        assert other.characters[0].x == scene.characters[0].x and other.characters[0].pose != scene.characters[0].pose


def test_the_autoencoder_reconstructs_pictures_it_has_not_seen(toy):
    images = to_tensor(draw_all(held_out_scenes(64, seed=5_000_000))[0])
    assert psnr(toy.autoencoder, images) >= 30
    latents = toy.autoencoder.encode(images)
    assert latents.shape == (64, LATENT_CHANNELS, 8, 8)
    assert abs(latents.mean()) < 0.1
    assert 0.8 < latents.square().mean().sqrt() < 1.2


@pytest.mark.parametrize("size", [(8, 8), (64, 96), (128, 40)])
def test_the_autoencoder_takes_any_multiple_of_eight(size):
    images = torch.rand(2, 3, *size) * 2 - 1
    autoencoder = PatchAutoencoder()
    latents = autoencoder.encode(images)
    assert latents.shape == (2, LATENT_CHANNELS, size[0] // 8, size[1] // 8)
    assert autoencoder.decode(latents).shape == images.shape


def test_the_judge_reads_renders(judge):
    rng = random.Random(6_000_000)
    scenes = [judge_scene(rng) for _ in range(200)]
    read = judge.read((to_tensor(draw_all(scenes)[0]) + 1) / 2)
    assert set(read) == set(NAMES)
    for head, names in read.items():
        right = [name == truth(scene)[head] for name, scene in zip(names, scenes)]
        assert sum(right) / len(right) >= 0.9, head


def test_the_judge_reads_nothing_from_junk(toy, judge):
    renders = draw_all(held_out_scenes(100, seed=7_000_000))[0]
    rng = np.random.default_rng(0)
    junk = {name: np.stack([maker(rng, renders) for _ in range(40)]) for name, maker in KINDS.items()}
    junk["decoded noise"] = decoded_noise(40, toy.autoencoder, torch.Generator().manual_seed(0))
    for name, pictures in junk.items():
        read = judge.read((to_tensor(pictures) + 1) / 2)
        refused = [action == subject == NONE for action, subject in zip(read["action"], read["subject"])]
        assert np.mean(refused) >= 0.9, name


def test_a_picture_of_something_else_does_not_pass(judge):
    scenes = prompt_scenes(100, 8_000_000)
    right = readings(judge, scenes, draw_all([*scenes[1:], scenes[0]])[0])
    assert np.mean(right["everything"]) <= 0.02
    assert np.mean(readings(judge, scenes, draw_all(scenes)[0])["everything"]) >= 0.9


def test_the_judge_sees_that_nobody_is_there(judge):
    pictures = np.stack([render_empty(scene) for scene in held_out_scenes(50, seed=9_000_000)])
    read = judge.read((to_tensor(pictures) + 1) / 2)
    assert np.mean([name == NONE for name in read["subject"]]) >= 0.9


def test_the_judges_probabilities_sum_to_one(judge):
    for head, values in judge.probabilities(torch.rand(3, 3, 64, 64)).items():
        assert values.shape == (3, len(NAMES[head]))
        assert torch.allclose(values.sum(1), torch.ones(3))


def test_random_weights_are_the_same_each_time():
    first, second = load_toy(random_weights=True), load_toy(random_weights=True)
    for part in ("unet", "text_encoder", "autoencoder"):
        for a, b in zip(getattr(first, part).parameters(), getattr(second, part).parameters()):
            assert torch.equal(a, b) and not a.requires_grad


def test_random_weights_leave_the_callers_random_numbers_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    load_toy(random_weights=True)
    assert torch.equal(torch.rand(1), expected)


def test_the_bundled_model_draws_a_picture_for_each_caption(toy):
    pictures = sample(toy, ["a panda sits on grass", "a robot flexes at night"], seed=0, steps=3)
    assert pictures.shape == (2, 64, 64, 3) and pictures.dtype == np.uint8
    assert pictures.std() > 10


def test_the_bundled_weights_are_small():
    assert sum(file.stat().st_size for file in WEIGHTS.rglob("*") if file.is_file()) < 25e6
