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
        )
        for index in range(count)
    ]


def other_action_scenes(scene: Scene, count: int, seed: int) -> list[Scene]:
    """The scene's subject, colour, background and object, each time doing another action that the model knows."""
    rng = random.Random(seed)
    known = [action for action in ACTIONS if action != scene.action and (scene.subject, action) not in HELD_OUT_PAIRS]
    actions = rng.sample(known, len(known))
    scenes = []
    for index in range(count):
        drawn = draw_scene(
            rng,
            subject=scene.subject,
            action=actions[index % len(actions)],
            background=scene.background,
            object=scene.object,
            side=scene.side,
            color=scene.color,
        )
        # The scene's own seed and place keep everything but the pose as it is.
        scenes.append(replace(drawn, seed=scene.seed, x=scene.x, ground=scene.ground, scale=scene.scale))
    return scenes
