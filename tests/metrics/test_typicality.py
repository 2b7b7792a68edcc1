"""Texts outside the central 95 % of a reference: against counting by hand, and its rate by construction."""

import numpy as np
import pytest

from prunelens.metrics.typicality import atypical


def by_counting(cost: float, others: list[float]) -> bool | None:
    """Fewer than k of the others lie below, or above; k of m + 1 places is 2.5 % of them."""
    if len(others) < 2:
        return None
    k = max(1, round(0.025 * (len(others) + 1)))
    below, above = sum(other <= cost for other in others), sum(other >= cost for other in others)
    return below < k or above < k


@pytest.mark.parametrize("count", [1, 2, 3, 5, 39, 40, 60, 100, 143])
def test_against_counting(count: int) -> None:
    draws = np.random.default_rng(count)
    reference = np.round(draws.normal(size=count), 1)  # with ties
    owners = [f"p{place // 2}" for place in range(count)]
    costs = np.round(1.5 * draws.normal(size=30), 1)
    asked = [f"p{place}" for place in range(30)]
    for cost, owner, found in zip(costs, asked, atypical(costs, asked, reference, owners), strict=True):
        others = [float(one) for one, whose in zip(reference, owners, strict=True) if whose != owner]
        assert found is by_counting(float(cost), others)


def test_both_ends_count_and_the_ends_themselves_do_not() -> None:
    reference = np.arange(39.0)
    owners = [str(place) for place in range(39)]
    found = atypical(np.array([-0.1, 0, 20, 38, 38.1]), ["new"] * 5, reference, owners)
    assert found == [True, False, False, False, True]


def test_the_reference_is_left_out_of_its_own_band() -> None:
    """The largest of 40 lies outside the other 39, and inside a band that holds it."""
    reference = np.arange(40.0)
    owners = [str(place) for place in range(40)]
    found = atypical(reference, owners, reference, owners)
    assert [place for place, one in enumerate(found) if one] == [0, 39]
    assert atypical(reference[-1:], ["new"], reference, owners) == [False]


@pytest.mark.parametrize("count", [40, 80, 200])
def test_a_reference_finds_a_twentieth_of_itself_atypical(count: int) -> None:
    """Exactly, without ties, where 0.025 of them is a whole number: by construction."""
    for seed in range(5):
        costs = np.random.default_rng(seed).gamma(2.0, size=count)
        owners = [str(place) for place in range(count)]
        found = atypical(costs, owners, costs, owners)
        assert sum(map(bool, found)) == pytest.approx(0.05 * count)


def test_new_texts_of_the_same_kind_are_atypical_as_often() -> None:
    """2k/(m + 1) on average over references, two texts a prompt, prompts that differ; within binomial bounds."""
    draws, hits, total = np.random.default_rng(0), 0, 0
    for _ in range(300):
        level = np.repeat(draws.normal(size=48), 2)
        owners = [f"p{place // 2}" for place in range(96)]
        reference, new = (level + draws.exponential(size=96) for _ in range(2))
        found = atypical(new, owners, reference, owners)
        hits, total = hits + sum(map(bool, found)), total + 96
    expected = 2 * round(0.025 * 95) / 95
    assert abs(hits / total - expected) < 0.006


def test_nothing_to_hold_a_text_against() -> None:
    assert atypical(np.array([1.0]), ["p"], np.array([]), []) == [None]
    assert atypical(np.array([1.0]), ["p"], np.array([1.0, 2.0, 3.0]), ["p", "p", "other"]) == [None]
    assert atypical(np.array([]), [], np.array([1.0, 2.0]), ["a", "b"]) == []
