"""Intervals in closed form: quantiles, means of shares, amounts of one and of either sign."""

import numpy as np
import pytest
from scipy import stats

from prunelens.metrics.intervals import in_order, mean_interval, ratio_interval, share_ends, student


def test_students_quantile_is_scipys() -> None:
    for freedom in (*range(1, 40), 100, 1000):
        assert student(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=3e-3 if freedom < 6 else 1e-4)


def test_amounts_have_the_interval_of_their_logarithm() -> None:
    generator = np.random.default_rng(0)
    totals, counts = generator.lognormal(size=30), generator.integers(5, 60, 30).astype(float)
    found = ratio_interval(totals, counts)
    value = totals.sum() / counts.sum()
    residuals = (totals - value * counts) / counts.mean()
    error = residuals.std(ddof=1) / np.sqrt(30)
    further = np.sqrt((np.sum(residuals**2) + (2 * residuals.max()) ** 2) / 30 / 30)
    quantile = stats.t.ppf(0.975, 29)
    assert found.value == pytest.approx(value, rel=1e-12)
    assert found.low == pytest.approx(value * np.exp(-quantile * error / value), rel=1e-4)
    assert found.high == pytest.approx(value * np.exp(quantile * further / value), rel=1e-4)


def test_one_prompt_says_nearly_nothing() -> None:
    found = ratio_interval(np.array([3.0]), np.array([10.0]))
    assert found.value == pytest.approx(0.3)
    assert found.low < 1e-6
    assert found.high > 100
    share = ratio_interval(np.array([10.0]), np.array([10.0]), bounded=True)
    assert (share.value, share.high) == (1, 1)
    assert share.low < 0.05


def test_nothing_at_all_is_an_interval_too() -> None:
    found = ratio_interval(np.zeros(5), np.ones(5))
    assert (found.value, found.low, found.high) == (0, 0, 0)
    assert ratio_interval(np.zeros(5), np.ones(5), bounded=True).high > 0.4


def test_amounts_of_either_sign_reach_further_where_a_prompt_lies_far_out() -> None:
    values = np.array([0.0] * 20 + [5.0])
    found = mean_interval(values)
    mean = values.mean()
    assert found.high - mean > 1.3 * (mean - found.low)
    plain = stats.t.ppf(0.975, 20) * values.std(ddof=1) / np.sqrt(21)
    assert mean - found.low == pytest.approx(plain, rel=0.05)
    wider = mean_interval(values, spread=3.0)
    assert wider.low < found.low
    assert wider.high > found.high


def test_shares_of_yes_and_no_are_near_wilsons() -> None:
    for count, right in ((36, 30), (224, 200), (64, 32)):
        values = np.array([1.0] * right + [0.0] * (count - right))
        low, high = share_ends(np.array([right / count]), values[:, None] - right / count)
        expected = stats.binomtest(right, count).proportion_ci(0.95, method="wilson")
        assert low[0] == pytest.approx(expected.low, abs=0.025)
        assert high[0] == pytest.approx(expected.high, abs=0.02)
        assert low[0] < expected.low  # two more items than were seen
        assert high[0] > expected.high - 1e-3


def test_a_ratio_of_equal_lengths_is_a_mean() -> None:
    values = np.random.default_rng(1).random(50)
    mean, low, high = (end[0] for end in (values.mean(keepdims=True), *_ends(values)))
    found = ratio_interval(values * 7, np.full(50, 7.0), bounded=True)
    assert (found.value, found.low, found.high) == pytest.approx((mean, low, high))


def _ends(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    values = in_order(values)
    return share_ends(values.mean(keepdims=True), values[:, None] - values.mean())
