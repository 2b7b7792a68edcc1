"""Two models on the same items: difference, share kept, changed answers, and rank correlations.

Every interval is guarded: equal answers on a few items give a bound, never an interval without width (theory.md, V1).
"""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from prunelens.metrics.intervals import (
    TAIL,
    Interval,
    Z,
    change_ends,
    exact_share,
    in_order,
    lower_bound,
    mean_interval,
    ratio_interval,
)

Values = Float[np.ndarray, " _"]
Pair = tuple[Values, Values]
"""Values of the dense and of the compressed model, item by item."""


def fewest_items(share: float) -> int | None:
    """Items that must all agree before a share of at least `share` is shown; None where no number is enough."""
    if share >= 1:
        return None
    if share <= 0:
        return 1
    return math.ceil(max(math.log(TAIL) / math.log(share), Z * Z * share / (1 - share)))


def score_interval(values: Values) -> Interval:
    """Mean score with its 95 % interval: exact for values of 0 and 1, Wilson's for as many as vary like other shares.

    Values beyond 0 and 1 have Student's interval, with two more items a standard deviation above and below.
    """
    if bool(np.isin(values, (0, 1)).all()):
        return exact_share(int(values.sum()), len(values))
    if _in_unit(values):
        return ratio_interval(values, np.ones(len(values)), bounded=True)
    return mean_interval(values, _spread(values))


def paired_difference(dense: Values, compressed: Values) -> Interval:
    """Mean of compressed minus dense over items, with Tango's score interval for scores between 0 and 1.

    Other values have Student's interval, with an item lost and an item gained by the standard deviation of the dense
    values; where no item changed, the ends are those of the exact bound on the share of items that change.
    """
    changes = in_order(compressed - dense)
    mean = float(changes.mean())
    if _in_unit(dense) and _in_unit(compressed):
        weights = np.ones(len(changes))
        low, high = _change_ends(changes, weights, changes - mean, float(len(changes)))
        return Interval(mean, max(-1.0, min(low, mean)), min(1.0, max(high, mean)))
    size = _spread(dense)
    if not changes.any():
        bound = size * (1 - lower_bound(len(changes)))
        return Interval(0.0, -bound, bound)
    return mean_interval(changes, size)


def kept_share(pairs: Sequence[Pair]) -> Interval | None:
    """Share of the dense score that the compressed model keeps, over one or several tasks of equal weight.

    The tasks' mean scores are added on both sides and divided; None where the dense scores are 0. The interval is
    Tango's for as many lost and gained items as the changes weigh, among as many as the dense score weighs; its low
    end lies no closer to 1 than the exact bound of the items that have a dense score, were all of them kept.
    """
    if not sum(float(dense.mean()) for dense, _ in pairs) > 0:
        return None
    scale = max(1.0, *(float(side.max()) for pair in pairs for side in pair))
    reference, kept = (sum(sorted(float(in_order(pair[side]).mean()) for pair in pairs)) for side in (0, 1))
    value = kept / reference
    columns = [_weighed(dense / scale, own / scale, value) for dense, own in pairs]
    rows = in_order(np.concatenate(columns))
    right, changes, weights, residuals = rows.T.copy()
    whole = reference / scale
    low, high = _change_ends(changes, weights, residuals, whole)
    bound = lower_bound(int(np.sum(right > 0)))
    low, high = min(1 + low, value, bound), max(1 + high, value, 1 - bound)
    return Interval(value, max(low, 0.0), max(min(high, len(pairs) / whole), value))


def _weighed(dense: Values, own: Values, value: float) -> Float[np.ndarray, "items 4"]:
    """Of each item of a task: dense score, change, weight, and how far it moves the share."""
    moved = own - value * dense
    weights = np.full(len(dense), 1 / len(dense))
    return np.stack([dense, own - dense, weights, moved - in_order(moved).mean()], axis=1)


def _change_ends(changes: Values, weights: Values, residuals: Values, whole: float) -> tuple[float, float]:
    """Tango's interval of Σ weight · change / whole, for as many changes of one weight as vary as much as these do.

    One change of 1 on the heaviest item is counted that was not seen. For yes-or-no items of one weight these are the
    items themselves.

    Args:
        changes: compressed minus dense, each between −1 and 1.
        weights: of the items.
        residuals: what makes the sum vary.
        whole: what could have been lost.
    """
    heaviest = float(weights.max())
    moved = np.abs(changes) * weights
    size = (float(np.sum(moved**2)) + heaviest**2) / (float(np.sum(moved)) + heaviest)
    gained, lost = (float(np.sum(moved[sign * changes > 0])) / size for sign in (1, -1))
    total = whole / size
    expected = max(gained + lost - (gained - lost) ** 2 / total, 0.0) * size**2
    scale = (expected + heaviest**2) / (float(np.sum((residuals * weights) ** 2)) + heaviest**2)
    low, high = change_ends(*(np.array([scale * number]) for number in (gained, lost, total)))
    return float(low[0]), float(high[0])


def guarded_share(whole: float, draws: Float[np.ndarray, " _"], count: int, seed: int = 0) -> Interval:
    """The interval of a share kept, from resampled shares and one kept and one lost pseudo-item beside `count` items.

    For scores that are no mean. In each resample the pseudo-items are drawn as often as chance has it; a kept one adds
    a share of 1, a lost one 0. Neither end lies closer to 1 or 0 than the exact bound of `count` items.
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


def _in_unit(values: Values) -> bool:
    return bool(np.all((values >= 0) & (values <= 1)))


def _spread(values: Values) -> float:
    """Standard deviation; where all values are equal their size, and 1 where they are 0."""
    return float(in_order(values).std()) or float(np.abs(values).max(initial=0.0)) or 1.0


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


def correlation_ends(rho: float | None, count: int) -> tuple[float, float] | None:
    """95 % interval of Spearman's ρ over `count` things: Fisher's z with the variance of Bonett and Wright (2000).

    From all of −1 to 1 for fewer than five; None where ρ is undefined.
    """
    if rho is None:
        return None
    if count < 5 or abs(rho) >= 1:
        return (-1.0, 1.0) if count < 5 else _certain_ends(rho, count)
    half = Z * math.sqrt((1 + rho * rho / 2) / (count - 3))
    return math.tanh(math.atanh(rho) - half), math.tanh(math.atanh(rho) + half)


def _certain_ends(rho: float, count: int) -> tuple[float, float]:
    """Of a perfect order: as if one neighbouring pair had been the other way round."""
    nearly = 1 - 12 / (count * (count * count - 1))
    found = correlation_ends(nearly, count)
    assert found is not None
    return (found[0], 1.0) if rho > 0 else (-1.0, -found[0])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[places]
