"""95 % intervals in closed form: shares, amounts, means of any sign, and scores of two models on the same items.

How often each holds the truth is simulated in benchmarks/coverage.py (docs/coverage.md). All of them count something
that was not seen among few items, so that equal answers give a bound and never an interval without width (theory.md).
Values are sorted first, so that the order of items or prompts changes no bit.
"""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

LEVEL = 0.95
TAIL = (1 - LEVEL) / 2
Z = 1.959963984540054
BISECTIONS = 40
FAR = 2.0
"""How far an amount that was not seen may lie, in distances of the farthest one that was."""


@dataclass(frozen=True)
class Interval:
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float


def lower_bound(count: int) -> float:
    """Exact 95 % lower bound of a share that held on each of `count` items; 0 for none."""
    return float(TAIL ** (1 / count)) if count else 0.0


def in_order(rows: Float[np.ndarray, "P ..."]) -> Float[np.ndarray, "P ..."]:
    """Rows sorted by their values, first column first, so that sums do not depend on their order."""
    rows = np.ascontiguousarray(rows + 0.0)  # one kind of zero
    return np.sort(rows) if rows.ndim == 1 else np.ascontiguousarray(rows[np.lexsort(rows.T[::-1])])


def student(freedom: int) -> float:
    """The 97.5 % quantile of Student's t, to three digits; Fisher's expansion from three degrees of freedom on."""
    if freedom <= 2:
        return (12.706204736432095, 4.302652729911275)[max(freedom, 1) - 1]
    terms = (
        Z,
        (Z**3 + Z) / 4,
        (5 * Z**5 + 16 * Z**3 + 3 * Z) / 96,
        (3 * Z**7 + 19 * Z**5 + 17 * Z**3 - 15 * Z) / 384,
        (79 * Z**9 + 776 * Z**7 + 1482 * Z**5 - 1920 * Z**3 - 945 * Z) / 92160,
    )
    return sum(term / freedom**power for power, term in enumerate(terms))


def exact_share(count: int, total: int) -> Interval:
    """A share of yes-or-no items with its exact interval (Clopper and Pearson): no end is wrong in over 2.5 %."""
    low = 0.0 if count == 0 else 1 - _exact_high(total - count, total)
    high = 1.0 if count == total else _exact_high(count, total)
    return Interval(count / total, low, high)


def _exact_high(count: int, total: int) -> float:
    """The share with which at most `count` of `total` come about in 2.5 % of the samples."""
    ways = [math.lgamma(total + 1) - math.lgamma(k + 1) - math.lgamma(total - k + 1) for k in range(count + 1)]
    numbers, logs = np.arange(count + 1), np.array(ways)
    low, high = count / total, 1.0
    for _ in range(BISECTIONS):
        share = (low + high) / 2
        tail = float(np.sum(np.exp(logs + numbers * math.log(share) + (total - numbers) * math.log1p(-share))))
        low, high = (share, high) if tail > TAIL else (low, share)
    return high


def share_ends(
    mean: Float[np.ndarray, " N"], residuals: Float[np.ndarray, "P N"]
) -> tuple[Float[np.ndarray, " N"], Float[np.ndarray, " N"]]:
    """(low, high) of means in [0, 1]: Wilson's interval for as many yes-or-no items as vary so much.

    The variance counts two items more than were seen, one of yes or no and one as far from the mean as the farthest.

    Args:
        mean: (N,) means over prompts.
        residuals: (P, N) what each prompt adds to its mean, less the mean.
    """
    count = len(residuals)
    square = student(count - 1) ** 2
    binary = mean * (1 - mean)
    variance = (np.sum(residuals**2, axis=0) + np.max(residuals**2, axis=0) + binary) / count
    alike = variance <= 0
    items = count * np.where(alike, 1.0, binary / np.where(alike, 1.0, variance))
    items = np.maximum(items, 1e-9)
    middle = (mean + square / (2 * items)) / (1 + square / items)
    half = np.sqrt(square * (binary / items + square / (4 * items**2))) / (1 + square / items)
    return np.clip(middle - half, 0, mean), np.clip(middle + half, mean, 1)


def ratio_interval(totals: Float[np.ndarray, " P"], counts: Float[np.ndarray, " P"], bounded: bool = False) -> Interval:
    """Σ totals / Σ counts over prompts (a mean over tokens) with its 95 % interval.

    Amounts that are never negative have Student's interval of their logarithm; its upper end counts one more prompt,
    twice as far away as the farthest. Amounts of either sign have Student's interval with such a prompt, as far away
    as the farthest, on each side.

    Args:
        totals: (P,) sums over the tokens of each prompt.
        counts: (P,) tokens of each prompt.
        bounded: the amounts are shares between 0 and 1 (see `share_ends`).
    """
    totals, counts = in_order(np.stack([totals, counts], axis=1)).T.copy()
    value = float(totals.sum() / counts.sum())
    residuals = (totals - value * counts) / counts.mean()
    if bounded:
        low, high = share_ends(np.array([min(max(value, 0.0), 1.0)]), residuals[:, None])
        return Interval(value, min(float(low[0]), value), max(float(high[0]), value))
    if np.all(totals >= 0) and value > 0:
        return _log_interval(value, residuals)
    return Interval(value, *_signed_ends(value, residuals))


def _log_interval(value: float, residuals: Float[np.ndarray, " P"]) -> Interval:
    count = len(residuals)
    quantile, squares = student(count - 1), float(np.sum(residuals**2))
    unseen = FAR * max(float(residuals.max()), value if count == 1 else 0.0)
    seen = math.sqrt(squares / max(count - 1, 1) / count)
    further = math.sqrt((squares + unseen**2) / count / count)
    low = value * math.exp(-quantile * (seen if count > 1 else further) / value)
    return Interval(value, low, value * math.exp(min(quantile * further / value, 700.0)))


def _signed_ends(value: float, residuals: Float[np.ndarray, " P"], pseudo: float = 0.0) -> tuple[float, float]:
    """Student's interval; `pseudo` is the sum of squares of items that are added on both sides."""
    count = len(residuals)
    quantile, squares = student(count - 1), float(np.sum(residuals**2)) + pseudo
    below, above = (
        quantile * math.sqrt((squares + max(float(side.max()), 0.0) ** 2) / count / count)
        for side in (-residuals, residuals)
    )
    return value - below, value + above


def mean_interval(values: Float[np.ndarray, " P"], spread: float = 0.0) -> Interval:
    """Mean of amounts of either sign with Student's interval and one unseen item on each side.

    Args:
        values: (P,) one value for each item or prompt.
        spread: the distance of two more items, one above and one below.
    """
    values = in_order(values)
    mean = float(values.mean())
    return Interval(mean, *_signed_ends(mean, values - mean, 2 * spread**2))


def change_ends(
    gained: Float[np.ndarray, " N"], lost: Float[np.ndarray, " N"], total: Float[np.ndarray, " N"]
) -> tuple[Float[np.ndarray, " N"], Float[np.ndarray, " N"]]:
    """(low, high) of (gained − lost) / total: Tango's score interval for items that changed either way.

    Every difference is kept that a score test does not reject, with the variance it would have (Tango, 1998). Without
    gains the low end is that of Wilson's interval.

    Args:
        gained: items wrong before and right after, or as many as weigh the same.
        lost: the other way.
        total: items that could have changed.
    """
    gained, lost, total = (np.asarray(values, float) for values in (gained, lost, total))
    return -_change_end(lost, gained, total), _change_end(gained, lost, total)


def _change_end(
    more: Float[np.ndarray, " N"], fewer: Float[np.ndarray, " N"], total: Float[np.ndarray, " N"]
) -> Float[np.ndarray, " N"]:
    """The largest (more − fewer) / total that is not rejected, by bisection between what was found and 1."""
    found = more - fewer
    low, high = np.clip(found, -total, total), total + 0 * found
    for _ in range(BISECTIONS):
        change = (low + high) / 2
        share = change / total
        slope = 2 * change - more - fewer - found * share
        hidden = (np.sqrt(np.maximum(slope**2 + 8 * fewer * change * (1 - share), 0)) - slope) / 4
        variance = np.maximum(2 * hidden + change - change * share, 0)
        inside = (change - found) ** 2 <= Z * Z * variance
        low, high = np.where(inside, change, low), np.where(inside, high, change)
    return high / total
