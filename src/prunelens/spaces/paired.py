"""Two models on the same items: difference, share kept, and changed answers, with bootstrap intervals over items."""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from prunelens.spaces.survival import LEVEL, RESAMPLES, Interval, ratio_interval

Values = Float[np.ndarray, " _"]
Pair = tuple[Values, Values]
"""Values of the dense and of the compressed model, item by item."""


def mean_interval(values: Values, seed: int = 0) -> Interval:
    """Mean over items with its 95 % bootstrap interval."""
    return ratio_interval(values, np.ones(len(values)), seed)


def paired_difference(dense: Values, compressed: Values, seed: int = 0) -> Interval:
    """Mean of compressed minus dense over items, both resampled together."""
    return mean_interval(compressed - dense, seed)


def kept_share(pairs: Sequence[Pair], seed: int = 0) -> Interval | None:
    """Share of the dense score that the compressed model keeps, over one or several tasks of equal weight.

    The tasks' mean scores are added on both sides and divided; items are resampled within each task, pair by pair.
    None where the dense scores are 0.
    """
    if not sum(float(dense.mean()) for dense, _ in pairs) > 0:
        return None
    totals = np.zeros((2, RESAMPLES + 1))
    generator = np.random.default_rng(seed)
    for dense, compressed in pairs:
        count = len(dense)
        weights = generator.multinomial(count, np.full(count, 1 / count), size=RESAMPLES) / count
        for side, values in enumerate((dense, compressed)):
            totals[side, 0] += values.mean()
            totals[side, 1:] += weights @ values
    whole = totals[1, 0] / totals[0, 0]
    dense_totals, own_totals = totals[:, 1:][:, totals[0, 1:] > 0]
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(own_totals / dense_totals, [tail, 1 - tail])
    return Interval(float(whole), float(min(low, whole)), float(max(high, whole)))


def flips(dense: Values, compressed: Values) -> tuple[int, int]:
    """(lost, gained): items right before and wrong after, and wrong before and right after."""
    return int(np.sum(dense > compressed)), int(np.sum(dense < compressed))


def sign_test(lost: int, gained: int) -> float:
    """Probability of a split at least as uneven if both ways were equally likely (two-sided, exact); 1 for none."""
    total, few = lost + gained, min(lost, gained)
    tail = sum(math.comb(total, count) for count in range(few + 1))
    return float(min(1.0, 2 * tail / 2**total)) if total else 1.0
