"""Pairs of item scores: means, differences and shares kept against a bootstrap of its own, and the sign test."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunelens.spaces.paired import Pair, flips, kept_share, mean_interval, paired_difference, sign_test
from prunelens.spaces.survival import Interval

DRAWS = 20_000
# Scores of dense and compressed items with at least one dense item above 0.
ITEMS = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), min_size=1, max_size=20).filter(
    lambda items: any(dense for dense, _ in items)
)


def made(count: int, seed: int, binary: bool = False) -> Pair:
    """Correlated scores of two models: the compressed one is a little worse."""
    generator = np.random.default_rng(1000 + seed)
    dense = generator.random(count)
    compressed = np.clip(dense - 0.3 * generator.random(count), 0, 1)
    if binary:
        return (dense > 0.3).astype(float), (compressed > 0.35).astype(float)
    return dense, compressed


def as_pair(items: Sequence[tuple[int, int]]) -> Pair:
    dense, compressed = np.array(items, dtype=float).T / 8
    return dense, compressed


def redrawn(pairs: Sequence[Pair], seed: int = 99) -> np.ndarray:
    """(DRAWS, tasks, 2) means of items that were drawn by their indices, within each task, both sides together."""
    generator = np.random.Generator(np.random.MT19937(seed))
    found = []
    for dense, compressed in pairs:
        chosen = generator.integers(0, len(dense), size=(DRAWS, len(dense)))
        found.append(np.stack([dense[chosen].mean(axis=1), compressed[chosen].mean(axis=1)], axis=1))
    return np.stack(found, axis=1)


def assert_interval(found: Interval, draws: np.ndarray, step: float = 0.0) -> None:
    """Both ends lie within 0.2 standard errors of the oracle's: 3 times the noise of a quantile of 2000 draws.

    Or within one `step` of means that take few values.
    """
    tolerance = max(0.2 * float(draws.std()), step + 1e-12)
    low, high = np.quantile(draws, [0.025, 0.975])
    assert found.low == pytest.approx(low, abs=tolerance)
    assert found.high == pytest.approx(high, abs=tolerance)
    assert found.low < found.value < found.high


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("binary", [False, True])
def test_mean_and_difference_against_a_bootstrap_over_indices(seed: int, binary: bool) -> None:
    dense, compressed = made(60, seed, binary)
    draws = redrawn([(dense, compressed)])[:, 0]
    step = 1 / 60 if binary else 0.0
    mean = mean_interval(dense, seed)
    assert mean.value == float(np.sum(dense)) / 60
    assert_interval(mean, draws[:, 0], step)
    difference = paired_difference(dense, compressed, seed)
    assert difference.value == float(np.sum(compressed - dense)) / 60 < 0
    assert_interval(difference, draws[:, 1] - draws[:, 0], step)


def test_what_both_sides_share_cancels() -> None:
    """Unpaired sides would give an interval for a difference that is the same on every item."""
    dense, _ = made(60, 0)
    found = paired_difference(dense, dense - 0.125)
    assert [found.low, found.value, found.high] == pytest.approx([-0.125] * 3, abs=1e-12)
    kept = kept_share([(dense, dense / 2)])
    assert kept is not None
    assert [kept.low, kept.value, kept.high] == pytest.approx([0.5] * 3, abs=1e-12)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("sizes", [(80,), (20, 90), (15, 40, 120)])
def test_kept_share_against_a_bootstrap_within_tasks(seed: int, sizes: tuple[int, ...]) -> None:
    pairs = [made(size, seed * 10 + place) for place, size in enumerate(sizes)]
    kept = kept_share(pairs, seed)
    assert kept is not None
    dense, compressed = (sum(float(np.mean(pair[side])) for pair in pairs) for side in (0, 1))
    assert kept.value == compressed / dense
    totals = redrawn(pairs).sum(axis=1)
    assert_interval(kept, totals[:, 1] / totals[:, 0])


def test_tasks_weigh_the_same_however_many_items_they_have() -> None:
    small = np.array([1.0, 1.0]), np.array([0.0, 1.0])
    large = np.ones(100), np.ones(100)
    kept = kept_share([small, large])
    assert kept is not None
    assert kept.value == (0.5 + 1) / 2  # pooled items would give 101 / 102
    weak = np.full(10, 0.25), np.zeros(10)
    kept = kept_share([weak, large])
    assert kept is not None
    assert kept.value == 1 / 1.25  # the ratio of sums, not the mean of the ratios 0 and 1


def test_each_task_has_draws_of_its_own() -> None:
    """Two tasks of the same scores: the variance of their mean is half of that of one."""
    pair = made(100, 3)
    one, both = kept_share([pair]), kept_share([pair, pair])
    assert one is not None
    assert both is not None
    assert both.value == one.value
    assert (both.high - both.low) / (one.high - one.low) == pytest.approx(0.5**0.5, rel=0.08)


@settings(deadline=None)
@given(tasks=st.lists(ITEMS, min_size=1, max_size=3), seed=st.integers(0, 2**32 - 1))
def test_a_model_beside_itself(tasks: list[list[tuple[int, int]]], seed: int) -> None:
    pairs = [(dense, dense.copy()) for dense, _ in map(as_pair, tasks)]
    assert kept_share(pairs, seed) == Interval(1.0, 1.0, 1.0)
    for dense, same in pairs:
        assert paired_difference(dense, same, seed) == Interval(0.0, 0.0, 0.0)
        assert flips(dense, same) == (0, 0)


@settings(deadline=None)
@given(tasks=st.lists(ITEMS, min_size=1, max_size=3))
def test_an_interval_holds_its_value_and_stays_in_range(tasks: list[list[tuple[int, int]]]) -> None:
    pairs = [as_pair(items) for items in tasks]
    kept = kept_share(pairs)
    assert kept is not None
    assert 0 <= kept.low <= kept.value <= kept.high
    for dense, compressed in pairs:
        difference = paired_difference(dense, compressed)
        lowest, highest = (compressed - dense).min(), (compressed - dense).max()
        assert lowest - 1e-12 <= difference.low <= difference.high <= highest + 1e-12
        turned = paired_difference(compressed, dense)
        assert turned.value == -difference.value
        assert turned.low == pytest.approx(-difference.high, abs=1e-12)


def test_the_mean_of_equal_values_lies_in_its_interval() -> None:
    found = mean_interval(np.full(50, 0.3))
    assert found.low <= found.value <= found.high


def test_the_seed_alone_decides_the_draws() -> None:
    dense, compressed = made(30, 0)
    assert paired_difference(dense, compressed, 5) == paired_difference(dense, compressed, 5)
    assert kept_share([(dense, compressed)], 5) == kept_share([(dense, compressed)], 5)
    one, other = (paired_difference(dense, compressed, seed) for seed in (0, 1))
    assert one.value == other.value
    assert (one.low, one.high) != (other.low, other.high)
    assert kept_share([(dense, compressed)], 0) != kept_share([(dense, compressed)], 1)


def test_no_share_of_nothing() -> None:
    nothing = np.zeros(5), np.ones(5)
    assert kept_share([nothing]) is None
    assert kept_share([nothing, nothing]) is None
    kept = kept_share([nothing, (np.ones(4), np.zeros(4))])
    assert kept == Interval(1.0, 1.0, 1.0)


def test_draws_without_a_dense_score_are_left_out() -> None:
    """Of two items one is 0: a quarter of all draws has no dense score at all."""
    kept = kept_share([(np.array([0.0, 1.0]), np.array([0.0, 0.5]))])
    assert kept == Interval(0.5, 0.5, 0.5)
    assert kept_share([(np.array([0.0, 1.0]), np.array([1.0, 0.0]))]) == Interval(1.0, 0.0, 1.0)


@settings(deadline=None)
@given(items=st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_flips_count_both_ways(items: list[tuple[bool, bool]]) -> None:
    dense, compressed = (np.array(side, dtype=float) for side in zip(*items, strict=True))
    expected = items.count((True, False)), items.count((False, True))
    assert flips(dense, compressed) == expected
    assert flips(compressed, dense) == expected[::-1]


def test_sign_test_is_the_binomial_test() -> None:
    from scipy.stats import binomtest

    for lost in range(25):
        for gained in range(25):
            if lost + gained:
                expected = binomtest(lost, lost + gained, 0.5).pvalue
                assert sign_test(lost, gained) == pytest.approx(expected, rel=1e-12), (lost, gained)
    for lost, gained in ((0, 200), (700, 650), (3000, 3100)):  # numbers beyond any float on the way
        assert sign_test(lost, gained) == pytest.approx(binomtest(lost, lost + gained, 0.5).pvalue, rel=1e-9)


def test_sign_test_by_hand() -> None:
    assert sign_test(0, 0) == 1
    assert sign_test(1, 0) == 1
    assert sign_test(4, 4) == 1
    assert sign_test(5, 0) == sign_test(0, 5) == 2 / 2**5
    assert sign_test(1, 7) == 2 * (1 + 8) / 2**8
