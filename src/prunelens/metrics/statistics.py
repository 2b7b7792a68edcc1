"""Two models on the same items: difference, share kept, and changed answers, with guarded intervals over items.

Every interval is guarded: equal answers on a few items give a bound, never an interval without width (theory.md, V1).
"""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from prunelens.metrics.survival import LEVEL, RESAMPLES, Interval, in_order, ratio_interval

Values = Float[np.ndarray, " _"]
Pair = tuple[Values, Values]
"""Values of the dense and of the compressed model, item by item."""
TAIL = (1 - LEVEL) / 2


def lower_bound(count: int) -> float:
    """Exact 95 % lower bound of a share that held on each of `count` items; 0 for none."""
    return float(TAIL ** (1 / count)) if count else 0.0


def fewest_items(share: float) -> int | None:
    """Items that must all agree before a share of at least `share` is shown; None where no number is enough."""
    return math.ceil(math.log(TAIL) / math.log(share)) if 0 < share < 1 else None if share >= 1 else 1


def wilson(count: int | float, total: int) -> Interval:
    """A share with its 95 % Wilson interval."""
    z, share = 1.959963984540054, count / total
    middle = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    low = 0.0 if count == 0 else max(0.0, middle - half)  # exactly: rounding would leave 1e-17, which is above chance
    high = 1.0 if count == total else min(1.0, middle + half)
    return Interval(share, low, high)


def mean_interval(values: Values, seed: int = 0) -> Interval:
    """Mean over items with its 95 % bootstrap interval, unguarded: for amounts that have no bounds."""
    return ratio_interval(values, np.ones(len(values)), seed)


def score_interval(values: Values, seed: int = 0) -> Interval:
    """Mean score with its 95 % interval: Wilson's for values of 0 and 1, else a bootstrap with two pseudo-items.

    The pseudo-items lie at 0 and 1 where all values do, else one standard deviation to either side of the mean.
    """
    if bool(np.isin(values, (0, 1)).all()):
        return wilson(float(values.sum()), len(values))
    mean = float(in_order(values).mean())
    if _in_unit(values):
        return _with_pseudo_items(values, (0.0, 1.0), seed)
    spread = _spread(values)
    return _with_pseudo_items(values, (mean - spread, mean + spread), seed)


def paired_difference(dense: Values, compressed: Values, seed: int = 0) -> Interval:
    """Mean of compressed minus dense over items, both resampled together with an item lost and an item gained.

    Lost and gained are 1 where all values lie between 0 and 1, else the standard deviation of the dense values. Where
    no item changed, the ends are those of the exact bound on the share of items that change.
    """
    changes = compressed - dense
    size = 1.0 if _in_unit(dense) and _in_unit(compressed) else _spread(dense)
    if not changes.any():
        bound = size * (1 - lower_bound(len(changes)))
        return Interval(0.0, -bound, bound)
    return _with_pseudo_items(changes, (-size, size), seed)


def kept_share(pairs: Sequence[Pair], seed: int = 0) -> Interval | None:
    """Share of the dense score that the compressed model keeps, over one or several tasks of equal weight.

    The tasks' mean scores are added on both sides and divided; items are resampled within each task, pair by pair.
    None where the dense scores are 0. Guarded by the number of items that have a dense score at all.
    """
    if not sum(float(dense.mean()) for dense, _ in pairs) > 0:
        return None
    totals = np.zeros((2, RESAMPLES + 1))
    generator = np.random.default_rng(seed)
    for dense, compressed in sorted((_sorted_pair(pair) for pair in pairs), key=_order):
        count = len(dense)
        weights = generator.multinomial(count, np.full(count, 1 / count), size=RESAMPLES) / count
        for side, values in enumerate((dense, compressed)):
            totals[side, 0] += values.mean()
            totals[side, 1:] += weights @ values
    whole = float(totals[1, 0] / totals[0, 0])
    dense_totals, own_totals = totals[:, 1:][:, totals[0, 1:] > 0]
    return guarded_share(whole, own_totals / dense_totals, sum(int(np.sum(dense > 0)) for dense, _ in pairs), seed)


def guarded_share(whole: float, draws: Float[np.ndarray, " _"], count: int, seed: int = 0) -> Interval:
    """The interval of a share kept, from resampled shares and one kept and one lost pseudo-item beside `count` items.

    In each resample the pseudo-items are drawn as often as chance has it; a kept one adds a share of 1, a lost one 0.
    Neither end lies closer to 1 or 0 than the exact bound of `count` items that are all kept, or all lost.
    """
    drawn = np.random.default_rng(seed + 1).multinomial(
        count + 2, np.array([count, 1, 1]) / (count + 2), size=len(draws)
    )
    mixed = (drawn[:, 0] * draws + drawn[:, 1]) / (count + 2)
    low, high = np.quantile(mixed, [TAIL, 1 - TAIL])
    bound = lower_bound(count)
    return Interval(whole, float(min(low, whole, bound)), float(max(high, whole, 1 - bound)))


def flips(dense: Values, compressed: Values) -> tuple[int, int]:
    """(lost, gained): items right before and wrong after, and wrong before and right after."""
    return int(np.sum(dense > compressed)), int(np.sum(dense < compressed))


def sign_test(lost: int, gained: int) -> float:
    """Probability of a split at least as uneven if both ways were equally likely (two-sided, exact); 1 for none."""
    total, few = lost + gained, min(lost, gained)
    tail = sum(math.comb(total, count) for count in range(few + 1))
    return float(min(1.0, 2 * tail / 2**total)) if total else 1.0


def _with_pseudo_items(values: Values, pseudo: tuple[float, float], seed: int) -> Interval:
    """The mean of the values; its interval is that of a bootstrap over them and two pseudo-items."""
    mean = float(in_order(values).mean())
    found = mean_interval(np.concatenate([values, pseudo]), seed)
    return Interval(mean, min(found.low, mean), max(found.high, mean))


def _in_unit(values: Values) -> bool:
    return bool(np.all((values >= 0) & (values <= 1)))


def _spread(values: Values) -> float:
    """Standard deviation; where all values are equal their size, and 1 where they are 0."""
    return float(in_order(values).std()) or float(np.abs(values).max(initial=0.0)) or 1.0


def _sorted_pair(pair: Pair) -> Pair:
    rows = in_order(np.stack(pair, axis=1))
    return rows[:, 0].copy(), rows[:, 1].copy()


def _order(pair: Pair) -> tuple[int, bytes, bytes]:
    return len(pair[0]), pair[0].tobytes(), pair[1].tobytes()


def rank_correlation(left: Float[np.ndarray, " n"], right: Float[np.ndarray, " n"]) -> float | None:
    """Spearman's ρ, ties sharing their mean rank; None where it is undefined (fewer than 3, or all equal).

    Args:
        left: (n,) scores.
        right: (n,) scores of the same things.
    """
    if len(left) < 3:
        return None
    x, y = (_ranks(values) - (len(values) + 1) / 2 for values in (left, right))
    size = float(np.sqrt(np.sum(x * x) * np.sum(y * y)))
    return float(np.sum(x * y)) / size if size > 0 else None


def _ranks(values: np.ndarray) -> np.ndarray:
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[places]
