"""Train the toy world: `python -m concept_atelier.toyworld.train`, or one part of it.

Interrupted at any time, the same command goes on from the last checkpoint in runs/.
"""

import argparse
from pathlib import Path

import torch

from .train_autoencoder import train_autoencoder, train_decoder
from .train_judge import train_judge
from .train_model import train_model

TRAINERS = {
    "autoencoder": train_autoencoder,
    "decoder": train_decoder,
    "judge": train_judge,
    "model": train_model,
}
# How the time is divided: the model is limited by what it has seen, the others soon learn nothing more.
SHARES = {"autoencoder": 0.07, "decoder": 0.06, "judge": 0.12, "model": 0.75}


def main() -> None:
    """Parse the command line and train one part after the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=["all", *TRAINERS], nargs="?", default="all")
    parser.add_argument("--minutes", type=float, default=150, help="how long to train, earlier calls included")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--start-from", type=Path, metavar="FOLDER", help="weights of an earlier world (autoencoder and model)"
    )
    arguments = parser.parse_args()
    shares = SHARES if arguments.part == "all" else {arguments.part: 1.0}
    for part, share in shares.items():
        print(f"== {part} ==", flush=True)
        TRAINERS[part](share * arguments.minutes, arguments.seed, arguments.device, arguments.start_from)


if __name__ == "__main__":
    main()
