"""Bets against "the mean is at least 0": a test that may be looked at after every value (theory.md, V11).

After Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting", 2024. Somebody who doubts the
claim starts with a capital of 1 and bets on each value before it is seen; the capital is multiplied by 1 − λ · value.
If the claim is true it does not grow on average, and the probability that it ever reaches 1/α is at most α (Ville's
inequality), however often one looks.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from prunelens.metrics.intervals import Interval

CAP = 0.75
"""Largest share of the capital that one value can lose."""
ALPHA = 0.025
"""Of each test: with the interval at the end of the items, no more than 5 % in all."""
PRIOR_VARIANCE = 0.25
"""In squares of the range; counts like one value."""


def log_capital(values: Float[np.ndarray, "K M"], top: Float[np.ndarray, " M"]) -> Float[np.ndarray, "K M"]:
    """Logarithm of the capital after each of K values of M bettors, who bet that the mean is below 0.

    The bet on a value is chosen from those before it: λ = μ/(σ² + μ²), with μ and σ² the mean and variance so far of
    minus the value, between 0 and `CAP`/top (approximate GRAPA).

    Args:
        values: (K, M) bounded values, each at most its bettor's `top`.
        top: (M,) largest possible values, above 0.
    """
    return joint_capital(values[:, None], top)


def joint_capital(values: Float[np.ndarray, "K T M"], top: Float[np.ndarray, " M"]) -> Float[np.ndarray, "K M"]:
    """As `log_capital`, for steps of T independent values whose means add up: the bet is that their sum is below 0.

    All values of a step get the same bet, one after the other. The capital grows by Π(1 − λμ_t) on average, and that is
    at most (1 − λ · mean of the μ_t)^T: it does not grow where the means add up to 0 or more, whatever each of them is.

    Args:
        values: (K, T, M) bounded values, each at most its bettor's `top`.
        top: (M,) largest possible values, above 0.
    """
    counts = values.shape[1] * np.arange(1, len(values) + 1)[:, None] + 1
    means = np.cumsum(-values.sum(axis=1), axis=0) / counts
    squares = np.cumsum(((-values - means[:, None]) ** 2).sum(axis=1), axis=0)
    variances = (PRIOR_VARIANCE * top**2 + squares) / counts
    best = np.clip(means / (variances + means**2), 0, CAP / top)
    bets = np.concatenate([np.zeros((1, values.shape[2])), best])[: len(values)]
    return np.cumsum(np.log1p(-bets[:, None] * values).sum(axis=1), axis=0)


def rejects(values: Float[np.ndarray, "K ..."], top: float, alpha: float = ALPHA) -> int | None:
    """After how many steps the claim "the means of the T values add up to at least 0" may be rejected, or None.

    Args:
        values: (K, T) independent values, step by step, in the order they came; (K,) where a step is one value.
        top: the largest possible value, above 0.
        alpha: how often a true claim may be rejected, at all looks together.
    """
    if not len(values):
        return None
    steps = np.asarray(values, float).reshape(len(values), -1, 1)
    capital = joint_capital(steps, np.array([float(top)]))[:, 0]
    above = np.nonzero(capital >= -np.log(alpha))[0]
    return int(above[0]) + 1 if len(above) else None


def kept_sequence(
    dense: Sequence[float] | np.ndarray, own: Sequence[float] | np.ndarray, highest: float = 1.0, alpha: float = ALPHA
) -> Interval:
    """The share kept with an interval that holds at every look, 1 − 2·alpha of them.

    Args:
        dense: (K,) dense scores between 0 and 1, in the order they came; (K, T) for steps of T tasks, which add up.
        own: those of the compressed model.
        highest: the largest share that is asked about.
        alpha: of each end.
    """
    right, kept = (np.asarray(side, float).reshape(len(side), -1, 1) for side in (dense, own))
    shares = np.linspace(0, highest, 401)
    value = float(kept.sum() / right.sum()) if right.sum() > 0 else 1.0
    excess = kept - shares * right
    limit = -np.log(alpha)
    below = joint_capital(excess, np.ones(len(shares))).max(axis=0, initial=0.0) >= limit  # the share is less
    above = joint_capital(-excess, np.maximum(shares, 1e-3)).max(axis=0, initial=0.0) >= limit  # the share is more
    high = float(shares[below].min()) if below.any() else max(highest, value)
    low = float(shares[above].max()) if above.any() else 0.0
    return Interval(value, min(low, value), max(high, value))


def mean_sequence(values: Float[np.ndarray, " K"], low: float, high: float, alpha: float = ALPHA) -> Interval:
    """The mean of values between `low` and `high` with an interval that holds at every look, 1 − 2·alpha of them."""
    points = np.linspace(low, high, 401)
    value, limit = float(np.mean(values)), -np.log(alpha)
    apart = np.asarray(values, float)[:, None] - points
    less = log_capital(apart, np.maximum(high - points, 1e-3)).max(axis=0, initial=0.0) >= limit
    more = log_capital(-apart, np.maximum(points - low, 1e-3)).max(axis=0, initial=0.0) >= limit
    upper = float(points[less].min()) if less.any() else high
    lower = float(points[more].max()) if more.any() else low
    return Interval(value, min(lower, value), max(upper, value))
