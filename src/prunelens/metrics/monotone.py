"""A monotone curve through points, with an interval for the next point (F1): isotonic regression and jackknife+.

Barber et al., "Predictive inference with the jackknife+", 2021: each point is predicted by the curve of the others,
and the misses say how far a new point may lie from what the curves say of it.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from prunelens.metrics.survival import Interval

Values = Float[np.ndarray, " n"]
FLOOR = 0.1
"""The scale of misses where nothing is lost, as a share of the largest one."""


@dataclass(frozen=True)
class Curve:
    """An increasing curve: straight between its points, level beyond them.

    Attributes:
        x, y: (m,) its points, x strictly increasing, y not decreasing.
    """

    x: Values
    y: Values

    def __call__(self, x: float) -> float:
        """Its height at `x`."""
        return float(np.interp(x, self.x, self.y))


def isotonic(x: Values, y: Values) -> Curve:
    """The increasing curve with the least squared distance to the points (pool adjacent violators).

    Args:
        x: (n,) where the points lie; equal ones are one point at the mean of their heights.
        y: (n,) their heights.
    """
    places, index = np.unique(x, return_inverse=True)
    weights = np.bincount(index).astype(float)
    levels: list[list[float]] = []  # mean, weight and number of places of each level stretch
    for height, weight in zip(np.bincount(index, y) / weights, weights, strict=True):
        levels.append([float(height), float(weight), 1])
        while len(levels) > 1 and levels[-2][0] >= levels[-1][0]:
            high, low = levels.pop(), levels.pop()
            total = low[1] + high[1]
            levels.append([(low[0] * low[1] + high[0] * high[1]) / total, total, low[2] + high[2]])
    return Curve(places, np.repeat([level[0] for level in levels], [int(level[2]) for level in levels]))


def spread_at(height: float, bounded: bool) -> float:
    """How far points miss a curve of this height, up to a factor.

    A share that is lost is surest at 0 and at 1; an amount without bounds is the less sure the larger it is.
    """
    if bounded:
        share = min(max(height, 0.0), 1.0)
        return math.sqrt((FLOOR / 2) ** 2 + share * (1 - share))
    return FLOOR + abs(height)


def next_point(x: Values, y: Values, at: float, level: float, bounded: bool) -> Interval:
    """What the curve says of a new point, with its jackknife+ interval.

    Args:
        x: (n,) where the points lie, at least two different ones.
        y: (n,) their heights: shares that are lost if `bounded`, else amounts.
        at: where the new point lies.
        level: how often the interval shall cover, such as 0.9.
        bounded: as said.
    """
    lows, highs = [], []
    for others, miss in _left_out(x, y, bounded):
        height = others(at)
        reach = miss * spread_at(height, bounded)
        lows.append(height - reach)
        highs.append(height + reach)
    place = math.ceil(level * (len(x) + 1)) - 1
    value = isotonic(x, y)(at)
    if place >= len(x):
        return Interval(value, -math.inf, math.inf)
    low, high = np.sort(lows)[::-1][place], np.sort(highs)[place]
    return Interval(value, min(float(low), value), max(float(high), value))


def left_out_misses(x: Values, y: Values, bounded: bool) -> Values:
    """How far each point lies from the curve of the others, over the scale of misses there."""
    return np.array([miss for _, miss in _left_out(x, y, bounded)])


def _left_out(x: Values, y: Values, bounded: bool) -> Iterator[tuple[Curve, float]]:
    for at in range(len(x)):
        others = isotonic(np.delete(x, at), np.delete(y, at))
        own = others(float(x[at]))
        yield others, abs(float(y[at]) - own) / spread_at(own, bounded)
