"""One process of a distributed training, in a module of its own so that spawned processes can import it."""

import os
from collections.abc import Sequence

import torch


def run_as_worker(rank: int, port: int, arguments: Sequence[str]) -> None:
    """Run the training script as one of two processes, with what torchrun sets for each."""
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    from concept_atelier.kernels.train_nulltext import main

    main(arguments)
