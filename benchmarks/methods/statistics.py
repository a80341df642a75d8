"""Means over runs, with intervals that know that pictures of one run are no independent evidence."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RESAMPLES = 2000


def bootstrap(runs: Sequence[Sequence[bool]], seed: int = 0) -> tuple[float, float, float]:
    """(mean, lower, upper): the mean of the runs' shares with its 95 % percentile interval.

    runs: the answers of each trained concept. Runs are drawn anew with replacement, and within each its answers:
    one token that came out well answers all its questions well, so that pictures alone would count for too much.
    """
    generator = np.random.default_rng(seed)
    shares = [np.asarray(run, float) for run in runs]
    means = np.empty(RESAMPLES)
    for index in range(RESAMPLES):
        chosen = generator.integers(0, len(shares), len(shares))
        means[index] = np.mean([generator.choice(shares[run], len(shares[run])).mean() for run in chosen])
    low, high = np.percentile(means, (2.5, 97.5))
    return float(np.mean([run.mean() for run in shares])), float(low), float(high)
