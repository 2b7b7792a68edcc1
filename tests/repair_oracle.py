"""A naive oracle for repairs: means, ridge regressions, maps of limited rank, all solved on explicit data.

Written from the definitions in numpy float64: least squares on the tokens themselves by `lstsq` and SVD, never by
sums over tokens. No code is shared with the package it judges. Inputs are x (tokens, d), targets y (tokens, k),
weights w (tokens,); a map is W (d, k) and b (k,), and predicts xW + b.
"""

from __future__ import annotations

import numpy as np

Array = np.ndarray


def _shares(tokens: int, weights: Array | None) -> Array:
    w = np.ones(tokens) if weights is None else np.asarray(weights, dtype=np.float64)
    return np.asarray(w / w.sum())


def bias(targets: Array, weights: Array | None = None) -> Array:
    """The weighted mean of y."""
    y = np.asarray(targets, dtype=np.float64)
    total = np.zeros(y.shape[1])
    for share, token in zip(_shares(len(y), weights), y, strict=True):
        total += share * token
    return total


def penalty(inputs: Array, weights: Array | None, strength: float, with_bias: bool = True) -> float:
    """λ: strength times the mean over coordinates of the weighted variance (second moment, without a bias) of x."""
    x = np.asarray(inputs, dtype=np.float64)
    centre = bias(x, weights) if with_bias else np.zeros(x.shape[1])
    total = sum(share * (token - centre) ** 2 for share, token in zip(_shares(len(x), weights), x, strict=True))
    return strength * float(np.mean(total))


def _augmented(
    inputs: Array, targets: Array, weights: Array | None, strength: float, with_bias: bool
) -> tuple[Array, Array, Array, Array]:
    """Rows whose plain least squares are the ridge, with the means that were taken out of x and y."""
    x, y = np.asarray(inputs, dtype=np.float64), np.asarray(targets, dtype=np.float64)
    x_mean = bias(x, weights) if with_bias else np.zeros(x.shape[1])
    y_mean = bias(y, weights) if with_bias else np.zeros(y.shape[1])
    root = np.sqrt(_shares(len(x), weights))[:, None]
    ridge = np.sqrt(penalty(x, weights, strength, with_bias)) * np.eye(x.shape[1])
    rows = np.vstack([root * (x - x_mean), ridge])
    wanted = np.vstack([root * (y - y_mean), np.zeros((x.shape[1], y.shape[1]))])
    return rows, wanted, x_mean, y_mean


def ridge(
    inputs: Array, targets: Array, weights: Array | None, strength: float, with_bias: bool = True
) -> tuple[Array, Array]:
    """W and b with the least Σw‖y − xW − b‖²/Σw + λ‖W‖²."""
    rows, wanted, x_mean, y_mean = _augmented(inputs, targets, weights, strength, with_bias)
    solution = np.linalg.lstsq(rows, wanted, rcond=None)[0]
    return solution, y_mean - x_mean @ solution


def reduced_rank(
    inputs: Array, targets: Array, weights: Array | None, strength: float, rank: int, metric: Array | None = None
) -> tuple[Array, Array]:
    """W of at most this rank and b with the least Σw rᵀMr/Σw + λ tr(WMWᵀ), where r is a token's residual."""
    y = np.asarray(targets, dtype=np.float64)
    values, vectors = np.linalg.eigh(np.eye(y.shape[1]) if metric is None else np.asarray(metric, dtype=np.float64))
    root = (vectors * np.sqrt(values)) @ vectors.T
    inverse = (vectors / np.sqrt(values)) @ vectors.T
    rows, wanted, x_mean, y_mean = _augmented(inputs, y @ root, weights, strength, with_bias=True)
    full = np.linalg.lstsq(rows, wanted, rcond=None)[0]
    leading = np.linalg.svd(rows @ full, full_matrices=False)[2][:rank]
    limited = full @ leading.T @ leading
    return limited @ inverse, (y_mean - x_mean @ limited) @ inverse


def squared_error(inputs: Array, targets: Array, weights: Array | None, solution: Array, shift: Array) -> float:
    """Σw‖y − xW − b‖²/Σw, token by token."""
    x, y = np.asarray(inputs, dtype=np.float64), np.asarray(targets, dtype=np.float64)
    return float(
        sum(
            share * np.sum((target - token @ solution - shift) ** 2)
            for share, token, target in zip(_shares(len(x), weights), x, y, strict=True)
        )
    )


def objective(
    inputs: Array,
    targets: Array,
    weights: Array | None,
    strength: float,
    solution: Array,
    shift: Array,
    metric: Array | None = None,
) -> float:
    """What `ridge` and `reduced_rank` make small, for any map."""
    x, y = np.asarray(inputs, dtype=np.float64), np.asarray(targets, dtype=np.float64)
    m = np.eye(y.shape[1]) if metric is None else np.asarray(metric, dtype=np.float64)
    residuals = y - x @ solution - shift
    error = sum(share * r @ m @ r for share, r in zip(_shares(len(x), weights), residuals, strict=True))
    return float(error + penalty(x, weights, strength) * np.trace(solution @ m @ solution.T))
