"""Bets against an oracle written from the paper, their validity at every look, and how soon they decide."""

import math

import numpy as np
import pytest

from prunelens.metrics.betting import (
    ALPHA,
    CAP,
    PRIOR_VARIANCE,
    joint_capital,
    kept_sequence,
    log_capital,
    mean_sequence,
    rejects,
)


def capital(values: list[float], top: float) -> list[float]:
    """The capital after each value, one by one: aGRAPA bets with a prior that counts like one value."""
    wealth, found = 1.0, []
    total = squares = 0.0
    bet = 0.0
    for number, value in enumerate(values, 1):
        wealth *= 1 - bet * value
        found.append(wealth)
        total -= value
        mean = total / (number + 1)
        squares += (-value - mean) ** 2
        variance = (PRIOR_VARIANCE * top * top + squares) / (number + 1)
        bet = min(max(mean / (variance + mean * mean), 0.0), CAP / top)
    return found


def answers(keep: float, gain: float, count: int, models: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(count, models) right answers, of which `keep` are kept on balance and `gain` of all items are gained."""
    generator = np.random.default_rng(seed)
    dense = (generator.random((count, models)) < 0.75).astype(float)
    draws, loses = generator.random((count, models)), 1 - keep + gain / 0.75
    return dense, np.where(dense == 1, draws >= loses, draws < gain / 0.25).astype(float)


def first(values: np.ndarray, top: float = 1.0) -> np.ndarray:
    """After how many values each column is rejected; infinite for never."""
    above = log_capital(values, np.full(values.shape[1], top)) >= -math.log(ALPHA)
    return np.where(above.any(axis=0), above.argmax(axis=0) + 1.0, np.inf)


@pytest.mark.parametrize("top", [0.5, 1.0, 1.3])
def test_the_capital_is_that_of_the_paper(top: float) -> None:
    generator = np.random.default_rng(1)
    for shift in (-0.5, 0.0, 0.3):
        values = np.clip(generator.normal(shift, 0.5, 60), -2, top)
        found = log_capital(values[:, None], np.array([top]))[:, 0]
        assert np.exp(found) == pytest.approx(capital(values.tolist(), top), rel=1e-10)
        assert found[0] == 0  # nothing is bet on a value before any was seen
        expected = next((place for place, own in enumerate(capital(values.tolist(), top), 1) if own >= 40), None)
        assert rejects(values, top) == expected
    assert rejects(np.zeros(0), 1.0) is None


def test_a_bet_never_loses_everything() -> None:
    values = np.array([-1.0] * 50 + [1.0] * 50)
    assert np.isfinite(log_capital(values[:, None], np.array([1.0]))).all()


def test_the_future_does_not_change_the_past() -> None:
    values = np.random.default_rng(2).normal(size=(40, 1)).clip(-1, 1)
    whole = log_capital(values, np.ones(1))
    assert np.array_equal(log_capital(values[:25], np.ones(1)), whole[:25])


@pytest.mark.parametrize("gain", [0.0, 0.02, 0.08])
def test_a_true_claim_is_seldom_rejected_however_often_one_looks(gain: float) -> None:
    """600 models that keep 95 % exactly, looked at after each of 1,500 items: at most 2.5 %, with 2 standard errors."""
    dense, own = answers(0.95, gain, 1500, 600)
    assert np.mean(np.isfinite(first(own - 0.95 * dense))) <= ALPHA + 2 * math.sqrt(ALPHA / 600)
    dense, own = answers(0.80, gain, 1500, 600, seed=1)
    assert np.mean(np.isfinite(first(own - 0.80 * dense))) <= ALPHA + 2 * math.sqrt(ALPHA / 600)


@pytest.mark.parametrize(("keep", "degraded", "broken"), [(0.4, 26, 36), (0.7, 69, math.inf)])
def test_broken_models_are_known_after_few_items(keep: float, degraded: float, broken: float) -> None:
    dense, own = answers(keep, 0.02, 600, 400)
    assert np.median(first(own - 0.95 * dense)) <= degraded
    assert np.median(first(own - 0.80 * dense)) <= broken


def test_the_sequence_of_a_share_agrees_with_the_tests_of_its_ends() -> None:
    dense, own = answers(0.6, 0.02, 80, 20)
    for model in range(20):
        found = kept_sequence(dense[:, model], own[:, model])
        assert found.low <= found.value <= found.high
        below = rejects(own[:, model] - 0.95 * dense[:, model], 1.0) is not None
        assert (found.high <= 0.95) == below
        grid = found.high + 1 / 400
        if found.high < 1:
            assert rejects(own[:, model] - grid * dense[:, model], 1.0) is not None


def test_a_sequence_holds_the_truth_at_every_look() -> None:
    dense, own = answers(0.9, 0.02, 400, 120)
    missed = 0
    for model in range(120):
        found = kept_sequence(dense[:, model], own[:, model])  # the running intersection: as good as any look
        missed += not found.low <= 0.9 <= found.high
    assert missed <= 120 * 2 * ALPHA
    values = np.random.default_rng(3).choice([-1.0, 0.0, 1.0], size=(400, 120), p=[0.05, 0.85, 0.1])
    found = [mean_sequence(values[:, model], -1.0, 1.0) for model in range(120)]
    assert sum(not one.low <= 0.05 <= one.high for one in found) <= 120 * 2 * ALPHA
    assert np.mean([one.high - one.low for one in found]) < 0.4


def test_a_step_of_several_values_bets_once_on_each() -> None:
    values = np.random.default_rng(6).choice([-0.95, 0, 0.05, 1.0], (40, 3), p=[0.5, 0.2, 0.2, 0.1])
    capital, seen, squares, bet, expected = 1.0, 0.0, 0.0, 0.0, []
    for number, step in enumerate(values, 1):
        for value in step:
            capital *= 1 - bet * value
        seen -= sum(step)
        mean = seen / (3 * number + 1)
        squares += sum((-value - mean) ** 2 for value in step)
        variance = (PRIOR_VARIANCE + squares) / (3 * number + 1)
        bet = min(max(mean / (variance + mean**2), 0), CAP)
        expected.append(math.log(capital))
    assert joint_capital(values[:, :, None], np.ones(1))[:, 0] == pytest.approx(expected)


def test_means_that_add_up_to_nothing_are_seldom_rejected() -> None:
    """One task gains what the other loses: the claim is true, although each step holds a value below 0 on average."""
    generator = np.random.default_rng(8)
    wrong = 0
    for _ in range(400):
        lost = -0.95 * (generator.random(300) < 0.4)
        gained = (generator.random(300) < 0.38).astype(float)
        wrong += rejects(np.stack([lost, gained], axis=1), 1.0) is not None
    assert wrong <= 2 * ALPHA * 400
