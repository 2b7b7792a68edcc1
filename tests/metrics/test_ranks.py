"""Spearman's ρ: by hand, with ties, under monotone transforms, and where it is undefined."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunelens.metrics.statistics import correlation_ends, rank_correlation

# Whole numbers, so that the transforms below keep every order and every tie exactly.
SCORES = st.lists(st.tuples(st.integers(-9, 9), st.integers(-9, 9)), min_size=3, max_size=12)


def rho(left: list[float], right: list[float]) -> float | None:
    return rank_correlation(np.array(left, dtype=float), np.array(right, dtype=float))


def naive(left: list[float], right: list[float]) -> float | None:
    """Pearson's correlation of mean ranks, with ranks from sorting."""

    def ranks(values: list[float]) -> list[float]:
        places: dict[float, list[int]] = {}
        for place, value in enumerate(sorted(values)):
            places.setdefault(value, []).append(place)
        return [float(np.mean(places[value])) for value in values]

    x, y = ranks(left), ranks(right)
    if len(set(x)) == 1 or len(set(y)) == 1:
        return None
    return float(np.corrcoef(x, y)[0, 1])


def test_known_values() -> None:
    assert rho([1, 2, 3], [10, 20, 30]) == 1
    assert rho([1, 2, 3], [3, 2, 1]) == -1
    # no ties: 1 - 6 Σ d² / (n (n² - 1)) with d = (1, -1, -1, 1)
    assert rho([1, 2, 3, 4], [2, 1, 4, 3]) == pytest.approx(1 - 6 * 4 / 60)
    # ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4
    assert rho([0, 7, 7, 9], [1, 2, 3, 4]) == pytest.approx(4.5 / np.sqrt(4.5 * 5))
    # all ties at one end against all at the other
    assert rho([0, 0, 1], [0, 1, 1]) == pytest.approx(0.5)
    assert rho([1, 2, 1, 2], [1, 1, 2, 2]) == 0


@pytest.mark.parametrize("length", [0, 1, 2])
def test_fewer_than_three_is_undefined(length: int) -> None:
    assert rho(list(range(length)), list(range(length))) is None


def test_a_constant_is_undefined() -> None:
    assert rho([5, 5, 5, 5], [1, 2, 3, 4]) is None
    assert rho([1, 2, 3, 4], [0.1, 0.1, 0.1, 0.1]) is None
    assert rho([2, 2, 2], [2, 2, 2]) is None


def test_one_outlier_counts_as_one_rank() -> None:
    assert rho([1, 2, 3, 4], [1, 2, 3, 1e300]) == 1
    assert rho([1, 2, 3, float("inf")], [1e-300, 2e-300, 3e-300, 1]) == 1


@settings(deadline=None)
@given(pairs=SCORES)
def test_equals_correlation_of_mean_ranks(pairs: list[tuple[int, int]]) -> None:
    left, right = map(list, zip(*pairs, strict=True))
    found, expected = rho(left, right), naive(left, right)
    if expected is None:
        assert found is None
    else:
        assert found == pytest.approx(expected, abs=1e-12)
        assert -1 - 1e-12 <= found <= 1 + 1e-12


@settings(deadline=None)
@given(
    pairs=SCORES,
    transform=st.sampled_from([lambda x: 3 * x - 7, lambda x: x**3, np.exp, np.arctan, lambda x: x + 1e6]),
)
def test_monotone_transforms_change_nothing(
    pairs: list[tuple[int, int]], transform: Callable[[np.ndarray], np.ndarray]
) -> None:
    left, right = np.array(pairs, dtype=float).T
    found = rank_correlation(left, right)
    assert rank_correlation(transform(left), right) == found
    assert rank_correlation(left, transform(right)) == found
    turned = rank_correlation(-transform(left), right)
    assert turned == (None if found is None else pytest.approx(-found, abs=1e-15))


@settings(deadline=None)
@given(pairs=SCORES, order=st.randoms(use_true_random=False))
def test_symmetric_and_blind_to_the_order_of_items(pairs: list[tuple[int, int]], order: object) -> None:
    left, right = np.array(pairs, dtype=float).T
    found = rank_correlation(left, right)
    assert rank_correlation(right, left) == found
    order.shuffle(pairs)  # type: ignore[attr-defined]
    left, right = np.array(pairs, dtype=float).T
    assert rank_correlation(left, right) == (None if found is None else pytest.approx(found, abs=1e-12))


@settings(deadline=None)
@given(values=st.lists(st.integers(-9, 9), min_size=3, max_size=12).filter(lambda found: len(set(found)) > 1))
def test_a_score_agrees_with_itself(values: list[int]) -> None:
    assert rho(values, values) == pytest.approx(1, abs=1e-12)
    assert rho(values, [-value for value in values]) == pytest.approx(-1, abs=1e-12)


@settings(deadline=None)
@given(pairs=SCORES)
def test_equals_scipy(pairs: list[tuple[int, int]]) -> None:
    from scipy.stats import spearmanr

    left, right = np.array(pairs, dtype=float).T
    found = rank_correlation(left, right)
    if found is None:  # scipy warns of a constant and gives NaN
        assert len(set(left)) == 1 or len(set(right)) == 1
    else:
        assert found == pytest.approx(float(spearmanr(left, right).statistic), abs=1e-12)


@pytest.mark.parametrize("levels", [2, 5, 100, 10**9])
def test_equals_scipy_on_many_scores(levels: int) -> None:
    """From nearly all tied to no ties."""
    from scipy.stats import spearmanr

    generator = np.random.default_rng(levels)
    left = generator.integers(0, levels, 500).astype(float)
    right = left + generator.integers(-levels, levels, 500)
    found = rank_correlation(left, right)
    assert found == pytest.approx(float(spearmanr(left, right).statistic), abs=1e-12)
    assert found is not None
    assert 0.3 < found < 0.95


def test_a_correlation_over_few_things_is_hardly_known() -> None:
    assert correlation_ends(None, 9) is None
    assert correlation_ends(0.8, 4) == (-1, 1)
    low, high = correlation_ends(0.8, 5) or (0.0, 0.0)
    assert low < 0 < 0.97 < high
    low, high = correlation_ends(0.8, 100) or (0.0, 0.0)
    assert (low, high) == pytest.approx((0.70, 0.87), abs=0.01)
    assert correlation_ends(1.0, 12) == pytest.approx((0.95, 1.0), abs=0.05)
    assert correlation_ends(-1.0, 12) == pytest.approx((-1.0, -0.95), abs=0.05)


def test_the_interval_of_a_correlation_covers() -> None:
    generator = np.random.default_rng(0)
    for count in (6, 12, 30):
        inside = 0
        for _ in range(400):
            left = generator.normal(size=count)
            right = 0.7 * left + 0.714 * generator.normal(size=count)
            found = correlation_ends(rank_correlation(left, right), count)
            assert found is not None
            inside += found[0] <= 0.68 <= found[1]  # Spearman's for a Pearson's of 0.7
        assert inside >= 0.92 * 400
