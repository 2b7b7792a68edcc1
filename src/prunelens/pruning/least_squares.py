"""Ridge regression from sums alone: what a map is fitted on is never kept per token (theory R1-R4).

All sums and solutions are float64. Weighed sums serve every objective: a weight per token is all that it takes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

STRENGTHS = tuple(10.0**exponent for exponent in (-8, -7, -6, -5, -4, -3.5, -3, -2.5, -2, -1.5, -1, -0.5, 0, 1, 2))
"""Ridge strengths that are tried, in units of the mean variance of the inputs."""

ROUNDING = 1e-14
"""Variance below this share of the mean square is what float64 sums leave of none."""


@dataclass(frozen=True)
class Moments:
    """Weighed sums over tokens of inputs x and targets y; those of two sets of tokens add up.

    Attributes:
        weight: Σw.
        x, y: Σwx (d,) and Σwy (k,).
        xx, xy: Σw·xxᵀ (d, d) and Σw·xyᵀ (d, k).
        yy: Σw‖y‖².
    """

    weight: Float64[Tensor, ""]
    x: Float64[Tensor, " d"]
    y: Float64[Tensor, " k"]
    xx: Float64[Tensor, "d d"]
    xy: Float64[Tensor, "d k"]
    yy: Float64[Tensor, ""]

    @classmethod
    def of(cls, inputs: Tensor, targets: Tensor, weights: Tensor) -> "Moments":
        """The sums over some tokens.

        Args:
            inputs: x, (tokens, d), any floating dtype.
            targets: y, (tokens, k).
            weights: w, (tokens,).
        """
        x, y, w = inputs.double(), targets.double(), weights.double().unsqueeze(1)
        weighed = x * w
        return cls(w.sum(), weighed.sum(0), (y * w).sum(0), weighed.T @ x, weighed.T @ y, (y * y * w).sum())

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(*(own + more for own, more in zip(vars(self).values(), vars(other).values(), strict=True)))

    def is_finite(self) -> bool:
        """Whether no token had a NaN or an infinite value (their squares are finite in float64)."""
        return bool(torch.isfinite(self.xx.diagonal()).all() & torch.isfinite(self.yy))

    def mean(self) -> Float64[Tensor, " k"]:
        """The mean target (R1)."""
        return self.y / self.weight

    def centred(self, with_bias: bool) -> tuple[Float64[Tensor, "d d"], Float64[Tensor, "d k"]]:
        """Second moments of x, and of x with y, about their means, or about 0 for a map without a bias."""
        xx, xy = self.xx / self.weight, self.xy / self.weight
        if not with_bias:
            return xx, xy
        mean = self.x / self.weight
        return xx - torch.outer(mean, mean), xy - torch.outer(mean, self.mean())


@dataclass(frozen=True)
class Affine:
    """y ≈ xW + b, with W of shape (d, k); b is zero for a map without a bias."""

    weight: Float64[Tensor, "d k"]
    bias: Float64[Tensor, " k"]


def solve(moments: Moments, strength: float, with_bias: bool = True) -> Affine:
    """The map with the least Σw‖y − xW − b‖² / Σw + λ‖W‖², where λ = strength · mean variance of x (R2)."""
    xx, xy = moments.centred(with_bias)
    variance = xx.diagonal().mean()
    ridge = strength * variance
    rounding = ROUNDING * (moments.xx / moments.weight).diagonal().mean()
    if not variance > rounding:  # the inputs are all the same, so that no map can do more than the mean
        return _with_bias(moments, torch.zeros_like(xy), with_bias)
    eye = torch.eye(len(xx), dtype=xx.dtype, device=xx.device)
    return _with_bias(moments, torch.linalg.solve(xx + ridge * eye, xy), with_bias)


def limit_rank(
    moments: Moments, full: Affine, strength: float, rank: int, metric: Float64[Tensor, "k k"] | None = None
) -> tuple[Float64[Tensor, "d r"], Float64[Tensor, "r k"], Float64[Tensor, " k"]]:
    """The map of at most this rank with the least squares, as (down, up, bias) with W = down · up (R3).

    The full solution, projected onto the leading directions of what it predicts.

    Args:
        moments: what `full` was fitted on.
        full: the solution of `solve`.
        strength: its ridge.
        rank: r.
        metric: M, where the residual is measured as rᵀMr instead of ‖r‖² (R4); positive semidefinite.
    """
    xx, _ = moments.centred(True)
    ridge = strength * xx.diagonal().mean()
    predicted = full.weight.T @ (xx @ full.weight) + ridge * full.weight.T @ full.weight
    root, inverse = _roots(metric) if metric is not None else (None, None)
    if root is not None:
        predicted = root @ predicted @ root
    leading = torch.linalg.eigh(predicted).eigenvectors[:, -rank:]
    down = full.weight @ (leading if root is None else root @ leading)
    up = leading.T if inverse is None else leading.T @ inverse
    return down, up, _with_bias(moments, down @ up, True).bias


def squared_error(moments: Moments, fitted: Affine) -> float:
    """Σw‖y − xW − b‖² / Σw on the tokens of `moments`."""
    weight, bias = fitted.weight, fitted.bias
    squares = moments.yy - 2 * (weight * moments.xy).sum() + (weight * (moments.xx @ weight)).sum()
    squares = squares - 2 * bias @ moments.y + 2 * bias @ (moments.x @ weight) + moments.weight * (bias @ bias)
    return float(squares / moments.weight)


def choose_strength(
    fit: Moments, held_out: Moments, with_bias: bool = True, strengths: Sequence[float] = STRENGTHS
) -> tuple[float, float]:
    """The ridge strength with the least error on tokens that the fit has not seen, and that error."""
    errors = [(squared_error(held_out, solve(fit, strength, with_bias)), strength) for strength in strengths]
    error, strength = min(errors, key=lambda one: (one[0], -one[1]))
    return strength, error


def _with_bias(moments: Moments, weight: Tensor, with_bias: bool) -> Affine:
    if not with_bias:
        return Affine(weight, torch.zeros_like(moments.y))
    return Affine(weight, moments.mean() - (moments.x / moments.weight) @ weight)


def _roots(metric: Tensor) -> tuple[Tensor, Tensor]:
    """M^½ and M^-½; directions that the metric hardly sees count a little, so that both exist."""
    values, vectors = torch.linalg.eigh(metric)
    values = values.clamp_min(1e-6 * values.max())
    return (vectors * values.sqrt()) @ vectors.T, (vectors * values.rsqrt()) @ vectors.T
