"""The monotone curve against brute force, and the coverage of its interval by simulation."""

import numpy as np
import pytest

from prunelens.metrics.monotone import isotonic, next_point


def min_max_oracle(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Isotonic regression by its min-max formula: at i, the max over a ≤ i of the min over b ≥ i of the mean of a…b."""
    places = np.unique(x)
    groups = [y[x == place] for place in places]
    found = []
    for i in range(len(places)):
        best = max(min(np.concatenate(groups[a : b + 1]).mean() for b in range(i, len(places))) for a in range(i + 1))
        found.append(best)
    return places, np.array(found)


@pytest.mark.parametrize("seed", range(8))
def test_isotonic_equals_the_min_max_formula(seed: int) -> None:
    generator = np.random.default_rng(seed)
    x = generator.integers(0, 9, size=14).astype(float)
    y = np.sin(x) + generator.normal(size=14)
    curve = isotonic(x, y)
    places, heights = min_max_oracle(x, y)
    assert np.array_equal(curve.x, places)
    assert np.allclose(curve.y, heights, atol=1e-12)
    assert np.all(np.diff(curve.y) >= 0)


def test_a_curve_is_straight_between_its_points_and_level_beyond() -> None:
    curve = isotonic(np.array([0.0, 1.0, 3.0]), np.array([0.0, 2.0, 3.0]))
    assert [curve(at) for at in (-5.0, 0.5, 2.0, 9.0)] == [0, 1, 2.5, 3]
    assert isotonic(np.array([0.0, 1.0]), np.array([4.0, 2.0])).y.tolist() == [3, 3]


@pytest.mark.parametrize("bounded", [True, False])
def test_the_interval_covers_as_often_as_it_says(bounded: bool) -> None:
    generator = np.random.default_rng(1)
    covered = []
    for _ in range(300):
        x = generator.exponential(0.5, size=26)
        truth = 1 - np.exp(-x) if bounded else 3 * x**2
        noise = np.sqrt(0.001 + 0.1 * truth * (1 - truth)) if bounded else 0.05 + 0.2 * truth
        y = truth + noise * generator.normal(size=26)
        inside = next_point(x[1:], y[1:], float(x[0]), 0.9, bounded)
        covered.append(inside.low <= y[0] <= inside.high)
    assert 0.86 <= np.mean(covered) <= 0.96


def test_too_few_points_bound_nothing() -> None:
    x, y = np.arange(8.0), np.arange(8.0) / 8
    found = next_point(x, y, 2.5, 0.9, True)
    assert found.low == -np.inf
    assert found.high == np.inf
    assert np.isfinite(next_point(np.arange(9.0), np.arange(9.0) / 9, 2.5, 0.9, True).high)
