"""Train the toy world's parts: `python -m concept_atelier.toyworld.train autoencoder|decoder|judge|model`."""

import argparse

import torch

from .train_autoencoder import train_autoencoder, train_decoder
from .train_judge import train_judge
from .train_model import train_model


def main() -> None:
    """Parse the command line and train one part."""
    trainers = {
        "autoencoder": train_autoencoder,
        "decoder": train_decoder,
        "judge": train_judge,
        "model": train_model,
    }
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=list(trainers))
    parser.add_argument("--minutes", type=float, required=True, help="how long to train")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    trainers[arguments.part](arguments.minutes, arguments.seed, arguments.device)


if __name__ == "__main__":
    main()
