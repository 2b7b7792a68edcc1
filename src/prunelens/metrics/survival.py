"""From one step to a whole generation: survival and agreement (S1-S6) with intervals over prompts.

Every curve is the mean over prompts of a row of length N, one value for n = 1 … N; a row keeps its last value
after the dense model's EOS, since both texts have ended.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from prunelens.metrics.intervals import Interval, in_order, share_ends


def survival_rows(
    acceptance: Sequence[Float[np.ndarray, " _"]], tv: Sequence[Float[np.ndarray, " _"]], horizon: int
) -> Float[np.ndarray, "P N"]:
    """S2 for each sampled trajectory: Π_{t<n} a_t · (1 - TV_n), the form with the smaller variance.

    Args:
        acceptance: min(1, p'/p) of each token of each trajectory.
        tv: total variation at each step.
        horizon: N.
    """
    rows = np.ones((len(acceptance), horizon))
    for row, accepted, distance in zip(rows, acceptance, tv, strict=True):
        steps = len(accepted)
        before = np.concatenate([[1.0], np.cumprod(accepted)])
        row[:steps] = before[:-1] * (1 - distance)
        row[steps:] = before[-1]
    return rows


def bound_rows(log_ratio: Sequence[Float[np.ndarray, " _"]], horizon: int) -> Float[np.ndarray, "P N"]:
    """S2' for each sampled trajectory: min(1, Π_{t≤n} p'/p), whose mean is 1 - TV of texts of n tokens.

    Args:
        log_ratio: log p' - log p of each token, nats.
        horizon: N.
    """
    rows = np.ones((len(log_ratio), horizon))
    for row, ratios in zip(rows, log_ratio, strict=True):
        total = np.minimum(np.cumsum(ratios), 0)
        row[: len(ratios)] = np.exp(total)
        row[len(ratios) :] = np.exp(total[-1]) if len(ratios) else 1.0
    return rows


def agreement_rows(lengths: Sequence[int], horizon: int) -> Float[np.ndarray, "P N"]:
    """1 where the first n tokens agree, from the number of agreed tokens of each prompt (S3, S3')."""
    return (np.arange(1, horizon + 1) <= np.asarray(lengths)[:, None]).astype(float)


def agreed_length(same: Sequence[bool], horizon: int) -> int:
    """Tokens before the first difference; `horizon` if there is none (both texts are then the same)."""
    return next((step for step, equal in enumerate(same) if not equal), horizon)


def common_prefix(left: Sequence[int], right: Sequence[int], horizon: int) -> int:
    """Tokens two texts have in common from the start; `horizon` for equal texts."""
    if list(left) == list(right):
        return horizon
    pairs = zip(left, right, strict=False)
    return next((step for step, (one, other) in enumerate(pairs) if one != other), min(len(left), len(right)))


def mean_curve(rows: Float[np.ndarray, "P N"]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(mean, low, high), each of length N: the mean over prompts of shares in [0, 1] with its 95 % interval."""
    rows = in_order(rows)
    mean = rows.mean(axis=0)
    low, high = share_ends(mean, rows - mean)
    return mean, low, high


def faithful_length(curve: Float[np.ndarray, " N"]) -> int:
    """S4: the largest n with S(n) ≥ ½; 0 if there is none, N if the curve never falls below."""
    below = np.nonzero(curve < 0.5)[0]
    return int(below[0]) if len(below) else len(curve)


def expected_agreed(rows: Float[np.ndarray, "P N"]) -> Interval:
    """S4: expected agreed tokens Σ_{n≤N} S(n), with its 95 % interval over prompts."""
    horizon = rows.shape[1]
    mean, low, high = (float(end[0]) * horizon for end in mean_curve(rows.mean(axis=1, keepdims=True)))
    return Interval(mean, low, high)


def draft_speedup(acceptance: float, cost_ratio: float, num_drafted: int) -> float:
    """S5: predicted speed-up of speculative decoding (Leviathan et al., 2023, Theorem 3.8).

    Args:
        acceptance: mean acceptance rate ā = 1 - mean TV, in [0, 1].
        cost_ratio: cost of one draft step over one dense step, c.
        num_drafted: tokens drafted per dense step, γ.
    """
    expected = sum(acceptance**count for count in range(num_drafted + 1))
    return expected / (num_drafted * cost_ratio + 1)
