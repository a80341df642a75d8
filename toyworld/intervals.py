"""Shares with their uncertainty."""

import math
from collections.abc import Sequence

Z = 1.96


def wilson(right: Sequence[bool]) -> str:
    """The share of a sample of independent answers with its 95 % Wilson interval, in per cent."""
    count, share = len(right), sum(right) / len(right)
    middle = (share + Z * Z / (2 * count)) / (1 + Z * Z / count)
    half = Z * math.sqrt(share * (1 - share) / count + Z * Z / (4 * count * count)) / (1 + Z * Z / count)
    return f"{share:6.1%} ({max(0.0, middle - half):.1%} to {min(1.0, middle + half):.1%})"
