"""Scenes for teaching a held-out action: exemplars of it, and the same contexts with known actions."""

import random
from dataclasses import replace

from .vocabulary import ACTIONS, BACKGROUNDS, HELD_OUT_PAIRS, NONE, OBJECTS, SIDES, Scene, draw_scene

EXEMPLAR_SUBJECTS = ("man", "woman", "ninja", "robot")


def exemplar_scenes(action: str, count: int = 10, seed: int = 0) -> list[Scene]:
    """Scenes of one action by several subjects in contexts that differ, always the same for a seed."""
    rng = random.Random(seed)
    backgrounds = rng.sample(BACKGROUNDS, len(BACKGROUNDS))
    objects = rng.sample((*OBJECTS, NONE, NONE), len(OBJECTS) + 2)
    return [
        draw_scene(
            rng,
            subject=EXEMPLAR_SUBJECTS[index % len(EXEMPLAR_SUBJECTS)],
            action=action,
            background=backgrounds[index % len(backgrounds)],
            object=objects[index % len(objects)],
            side=SIDES[rng.randrange(2)],
            accessory=NONE,
        )
        for index in range(count)
    ]


def other_action_scenes(scene: Scene, count: int, seed: int) -> list[Scene]:
    """The scene's subject, colour, background and object, each time doing another action that the model knows."""
    rng = random.Random(seed)
    known = [action for action in ACTIONS if action != scene.action and (scene.subject, action) not in HELD_OUT_PAIRS]
    actions = rng.sample(known, len(known))
    scenes = []
    kept = scene.characters[0]
    for index in range(count):
        drawn = draw_scene(rng, subject=scene.subject, action=actions[index % len(actions)], object=scene.object)
        # The rest of the scene stays, its seed as well, so that nothing but the pose changes.
        character = replace(kept, pose=drawn.characters[0].pose)
        scenes.append(replace(scene, characters=(character,), action=drawn.action, action_text=drawn.action_text))
    return scenes


def subject_scenes(subject: str, count: int, seed: int = 0) -> list[Scene]:
    """Scenes of one subject doing several known things in several places, always the same for a seed."""
    rng = random.Random(seed)
    backgrounds = rng.sample(BACKGROUNDS, len(BACKGROUNDS))
    actions = rng.sample(ACTIONS, len(ACTIONS))
    return [
        draw_scene(
            rng,
            subject,
            actions[index % len(actions)],
            background=backgrounds[index % len(backgrounds)],
            object=NONE,
            accessory=NONE,
        )
        for index in range(count)
    ]
