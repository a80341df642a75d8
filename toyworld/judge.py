"""The judge: a small network that reads what a picture of the toy world shows."""

from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from .vocabulary import (
    ACTIONS,
    BACKGROUNDS,
    COLORS,
    HELD_OUT_ACTIONS,
    HELD_OUT_OBJECTS,
    HELD_OUT_SUBJECTS,
    NONE,
    OBJECTS,
    RANDOM_ACTION,
    SIDES,
    SUBJECTS,
    Scene,
)
from .weights import JUDGE, WEIGHTS, read_weights

OTHER = "other"
# "subject" is the only figure or the left one, "second" the right one. What is no picture of this world (noise, a
# blank sheet, pieces of several pictures) is "none" to every head, a place without a figure to the first three.
NAMES = {
    "action": (*ACTIONS, *HELD_OUT_ACTIONS, OTHER, NONE),
    "subject": (*SUBJECTS, *HELD_OUT_SUBJECTS, NONE),
    "second": (*SUBJECTS, *HELD_OUT_SUBJECTS, NONE),
    "color": (*COLORS, NONE),
    "object": (*OBJECTS, *HELD_OUT_OBJECTS, NONE),
    "background": (*BACKGROUNDS, NONE),
    "side": (*SIDES, NONE),
}
NOTHING = dict.fromkeys(NAMES, NONE)
_WIDTH = 16


def truth(scene: Scene) -> dict[str, str]:
    """What the judge should read from a picture of the scene."""
    first, *others = scene.from_left
    return {
        "action": OTHER if scene.action == RANDOM_ACTION else scene.action,
        "subject": first.subject,
        "second": others[0].subject if others else NONE,
        "color": first.color,
        "object": scene.object,
        "background": scene.background,
        "side": NONE if scene.object == NONE else scene.side,
    }


class Judge(nn.Module):
    """Reads the heads of `NAMES` from pictures (B, 3, 64, 64) in [0, 1]."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            _layer(3, 2 * _WIDTH, stride=2),
            _layer(2 * _WIDTH, 2 * _WIDTH),
            nn.MaxPool2d(2),
            _layer(2 * _WIDTH, 4 * _WIDTH),
            _layer(4 * _WIDTH, 4 * _WIDTH),
            nn.MaxPool2d(2),
            _layer(4 * _WIDTH, 6 * _WIDTH),
            _layer(6 * _WIDTH, 6 * _WIDTH),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
        )
        flat = 6 * _WIDTH * 16
        self.heads = nn.ModuleDict(
            {
                head: nn.Sequential(nn.Dropout(0.2), nn.Linear(flat, 64), nn.ReLU(), nn.Linear(64, len(names)))
                for head, names in NAMES.items()
            }
        )

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Logits by head."""
        features = self.features(images * 2 - 1)
        return {head: layers(features) for head, layers in self.heads.items()}

    @torch.no_grad()
    def probabilities(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Probabilities by head, (B, classes) in the order of `NAMES`."""
        return {head: F.softmax(logits, 1) for head, logits in self(images).items()}

    def read(self, images: torch.Tensor) -> dict[str, list[str]]:
        """The likeliest name by head, one for each picture."""
        return {
            head: [NAMES[head][index] for index in values.argmax(1).tolist()]
            for head, values in self.probabilities(images).items()
        }


def _layer(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


def load_judge(weights_dir: Path = WEIGHTS) -> Judge:
    """The trained judge in single precision, frozen."""
    judge = Judge()
    # The batch norms' step counters are not floating point and are not kept.
    state = judge.state_dict() | read_weights(Path(weights_dir) / JUDGE)
    judge.load_state_dict(state)
    return judge.eval().requires_grad_(False)
