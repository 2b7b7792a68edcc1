"""Pairs of item scores: differences and shares kept against a score test of its own and a bootstrap; the sign test."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunelens.metrics.intervals import Interval, change_ends, lower_bound, mean_interval
from prunelens.metrics.statistics import (
    Pair,
    fewest_items,
    flips,
    kept_share,
    paired_difference,
    score_interval,
    sign_test,
)

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


def assert_interval(found: Interval, draws: np.ndarray, tolerance: float = 0.2) -> None:
    """Both ends lie within so many standard errors of the bootstrap's."""
    low, high = np.quantile(draws, [0.025, 0.975])
    assert found.low == pytest.approx(low, abs=tolerance * float(draws.std()))
    assert found.high == pytest.approx(high, abs=tolerance * float(draws.std()))
    assert found.low < found.value < found.high


def is_kept_by_the_score_test(gained: int, lost: int, total: int, difference: float) -> bool:
    """Whether a true difference is not rejected: the score test with the likeliest probabilities, found on a grid."""
    down = np.linspace(max(0.0, -difference), (1 - difference) / 2, 20_001)
    up, rest = down + difference, 1 - 2 * down - difference
    with np.errstate(divide="ignore", invalid="ignore"):
        parts = [
            np.where(np.full(len(down), count) > 0, count * np.log(np.maximum(share, 0)), 0.0)
            for count, share in ((gained, up), (lost, down), (total - gained - lost, rest))
        ]
    likely = down[np.argmax(sum(parts))]
    variance = total * (2 * likely + difference - difference**2)
    return (gained - lost - total * difference) ** 2 <= 1.959964**2 * variance + 1e-9


@pytest.mark.parametrize(
    ("gained", "lost", "total"),
    [
        (0, 0, 8),
        (0, 0, 72),
        (1, 0, 8),
        (0, 1, 36),
        (2, 5, 36),
        (3, 3, 64),
        (0, 20, 64),
        (9, 30, 224),
        (8, 0, 8),
        (0, 8, 8),
    ],
)
def test_a_difference_has_the_ends_of_a_score_test(gained: int, lost: int, total: int) -> None:
    dense = np.array([0.0] * gained + [1.0] * (total - gained))
    own = np.array([1.0] * gained + [0.0] * lost + [1.0] * (total - gained - lost))
    found = paired_difference(dense, own)
    assert found.value == pytest.approx((gained - lost) / total, abs=1e-12)
    step = 2e-3
    if found.high < 1:
        assert is_kept_by_the_score_test(gained, lost, total, found.high - step)
        assert not is_kept_by_the_score_test(gained, lost, total, found.high + step)
    if found.low > -1:
        assert is_kept_by_the_score_test(lost, gained, total, -found.low - step)
        assert not is_kept_by_the_score_test(lost, gained, total, -found.low + step)


def test_many_differences_have_the_ends_of_one() -> None:
    counts = np.array([[2.0, 5.0, 36.0], [0.0, 0.0, 8.0], [9.0, 30.0, 224.0]]).T
    low, high = change_ends(*counts)
    for place in range(3):
        one = change_ends(*counts[:, [place]])
        assert (low[place], high[place]) == (one[0][0], one[1][0])


@pytest.mark.parametrize("seed", range(4))
def test_other_differences_are_near_a_bootstrap(seed: int) -> None:
    dense, compressed = made(400, seed)
    draws = redrawn([(dense, compressed)])[:, 0]
    assert_interval(paired_difference(dense, compressed), draws[:, 1] - draws[:, 0], 0.5)
    far = paired_difference(10 * dense, 10 * compressed)
    assert_interval(far, 10 * (draws[:, 1] - draws[:, 0]), 0.5)
    assert_interval(score_interval(dense), draws[:, 0], 0.25)


def test_shares_of_right_answers_are_exact() -> None:
    from scipy.stats import binomtest

    dense, _ = made(60, 1, binary=True)
    expected = binomtest(int(dense.sum()), 60).proportion_ci(0.95, method="exact")
    found = score_interval(dense)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-9)
    own = dense * (np.arange(60) % 5 > 0)  # nothing gained: lost of the right ones
    lost = binomtest(int(own.sum()), int(dense.sum())).proportion_ci(0.95, method="wilson")
    kept = kept_share([(dense, own)])
    assert kept is not None
    assert kept.low == pytest.approx(lost.low, abs=0.01)


def test_what_both_sides_share_cancels() -> None:
    """Unpaired sides would give a wide interval for a difference that is nearly the same on every item."""
    dense, _ = made(600, 0)
    found = paired_difference(dense, dense - 0.125)
    assert (found.low, found.high) == pytest.approx((-0.125, -0.125), abs=0.008)
    kept = kept_share([(dense, dense / 2)])
    assert kept is not None
    assert (kept.low, kept.high) == pytest.approx((0.5, 0.5), abs=0.008)


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("sizes", [(800,), (400, 600), (300, 400, 500)])
def test_kept_share_is_near_a_bootstrap_within_tasks(sizes: tuple[int, ...], binary: bool) -> None:
    pairs = [made(size, place, binary) for place, size in enumerate(sizes)]
    kept = kept_share(pairs)
    assert kept is not None
    dense, compressed = (sum(float(np.mean(pair[side])) for pair in pairs) for side in (0, 1))
    assert kept.value == pytest.approx(compressed / dense, rel=1e-12)
    totals = redrawn(pairs).sum(axis=1)
    assert_interval(kept, totals[:, 1] / totals[:, 0], 0.5)


@pytest.mark.parametrize("count", [1, 2, 8, 36, 71, 72, 73, 224, 1000])
def test_equal_answers_give_a_bound(count: int) -> None:
    """All of n kept: no further from 1 than the share p for which p ** n = 0.025."""
    right = np.ones(count)
    kept = kept_share([(right, right)])
    assert kept is not None
    assert (kept.value, kept.high) == (1, 1)
    assert kept.low**count <= 0.025 + 1e-12
    assert (kept.low >= 0.95) == (count >= 73)
    difference = paired_difference(right, right)
    assert difference.high == pytest.approx(1.959964**2 / (count + 1.959964**2), abs=1e-6)  # Tango's without changes
    assert difference.low == -difference.high
    lost = kept_share([(right, np.zeros(count))])
    assert lost is not None
    assert (lost.value, lost.low) == (0, 0)
    assert (1 - lost.high) ** count <= 0.025 + 1e-12
    assert score_interval(right).low < 1


def test_the_fewest_items_are_those_of_the_bound() -> None:
    assert fewest_items(0.95) == 73
    assert fewest_items(0.9) == 36  # 0.9 ** 35 = 0.02503, 0.9 ** 36 = 0.0225
    assert (fewest_items(0.0), lower_bound(0)) == (1, 0)
    assert fewest_items(1.0) is None
    for share in (0.5, 0.8, 0.95, 0.99):
        fewest = fewest_items(share)
        assert fewest is not None
        lows = [kept.low for count in (fewest, fewest - 1) if (kept := kept_share([(np.ones(count), np.ones(count))]))]
        assert lows[0] >= share
        assert not lows[1:] or lows[1] < share


@pytest.mark.parametrize("count", [1, 2, 8, 16, 36, 64, 112, 224])
@pytest.mark.parametrize("gains", [0.0, 0.04])
def test_a_model_that_keeps_94_percent_is_seldom_called_safe(count: int, gains: float) -> None:
    """400 samples of a model that truly keeps 94 %; a bound of 95 % should be wrong in 2.5 % of them, at most 5."""
    generator = np.random.default_rng(count)
    wrong = 0
    for _ in range(400):
        draws = generator.random(count)
        dense = (generator.random(count) < 0.8).astype(float)
        loses, wins = 0.06 + gains, gains * 0.8 / 0.2
        compressed = np.where(dense == 1, draws >= loses, draws < wins).astype(float)
        kept = kept_share([(dense, compressed)])
        wrong += kept is not None and kept.low >= 0.95
    assert wrong <= (0 if count <= 64 else 0.05 * 400)


def test_equal_models_are_safe_from_enough_items() -> None:
    """Flips of 1 % each way among 1,500 items still show that 95 % are kept."""
    generator = np.random.default_rng(0)
    dense = (generator.random(1500) < 0.7).astype(float)
    flipped = generator.random(1500) < 0.01
    kept = kept_share([(dense, np.where(flipped, 1 - dense, dense))])
    assert kept is not None
    assert kept.low >= 0.95


@settings(deadline=None, max_examples=30)
@given(tasks=st.lists(ITEMS, min_size=1, max_size=3), seed=st.integers(0, 2**16))
def test_the_order_of_items_and_tasks_changes_no_bit(tasks: list[list[tuple[int, int]]], seed: int) -> None:
    pairs = [(dense / 3, compressed / 7) for dense, compressed in map(as_pair, tasks)]
    generator = np.random.default_rng(seed)
    mixed = []
    for dense, compressed in pairs:
        order = generator.permutation(len(dense))
        mixed.append((dense[order], compressed[order]))
    assert kept_share(pairs) == kept_share(mixed[::-1])
    for pair, other in zip(pairs, mixed, strict=True):
        assert paired_difference(*pair) == paired_difference(*other)
        assert score_interval(pair[0]) == score_interval(other[0])
        assert mean_interval(pair[1]) == mean_interval(other[1])


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
    assert 0.5 < (both.high - both.low) / (one.high - one.low) < 0.5**0.5 + 0.06  # the guard shrinks by half


@settings(deadline=None)
@given(tasks=st.lists(ITEMS, min_size=1, max_size=3))
def test_a_model_beside_itself(tasks: list[list[tuple[int, int]]]) -> None:
    pairs = [(dense, dense.copy()) for dense, _ in map(as_pair, tasks)]
    kept = kept_share(pairs)
    assert kept is not None
    assert kept.value == 1
    assert kept.low < 1 <= kept.high
    for dense, same in pairs:
        difference = paired_difference(dense, same)
        assert difference.value == 0
        assert difference.low < 0 < difference.high
        assert flips(dense, same) == (0, 0)


@settings(deadline=None)
@given(tasks=st.lists(ITEMS, min_size=1, max_size=3))
def test_an_interval_holds_its_value_and_stays_in_range(tasks: list[list[tuple[int, int]]]) -> None:
    pairs = [as_pair(items) for items in tasks]
    kept = kept_share(pairs)
    assert kept is not None
    assert 0 <= kept.low <= kept.value <= kept.high
    assert kept.low < kept.high
    for dense, compressed in pairs:
        difference = paired_difference(dense, compressed)
        assert -1 <= difference.low <= difference.value <= difference.high <= 1
        assert difference.low < difference.high
        score = score_interval(dense)
        assert 0 <= score.low <= score.value <= score.high <= 1
        assert score.low < score.high


def test_the_mean_of_equal_values_lies_in_its_interval() -> None:
    found = mean_interval(np.full(50, 0.3))
    assert found.low <= found.value <= found.high


def test_no_share_of_nothing() -> None:
    nothing = np.zeros(5), np.ones(5)
    assert kept_share([nothing]) is None
    assert kept_share([nothing, nothing]) is None
    kept = kept_share([nothing, (np.ones(4), np.zeros(4))])
    assert kept is not None
    assert kept.value == 1
    assert kept.low < 0.6
    assert 1.4 < kept.high <= 2  # all that there is to get, of a dense score of 1


def test_items_without_a_dense_score() -> None:
    kept = kept_share([(np.array([0.0, 1.0]), np.array([0.0, 0.5]))])
    assert kept is not None
    assert kept.value == 0.5
    assert np.isfinite([kept.low, kept.high]).all()
    turned = kept_share([(np.array([0.0, 1.0]), np.array([1.0, 0.0]))])
    assert turned is not None
    assert turned.value == 1
    assert turned.low < 0.1
    assert 1.9 < turned.high <= 2


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


def test_nothing_and_everything_right_have_ends_without_rounding() -> None:
    for count in range(1, 300):
        none, whole = score_interval(np.zeros(count)), score_interval(np.ones(count))
        assert (none.value, none.low) == (0, 0)
        assert (whole.value, whole.high) == (1, 1)
