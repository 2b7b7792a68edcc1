"""Survival, agreement and intervals (S1-S5) against the oracle and against full enumeration."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import oracle
from prunelens.metrics import survival
from prunelens.metrics.intervals import ratio_interval


def random_steps(generator: np.random.Generator, lengths: list[int]) -> list[list[dict[str, float]]]:
    prompts = []
    for length in lengths:
        steps = []
        for _ in range(length):
            p, q = generator.dirichlet(np.ones(6)), generator.dirichlet(np.ones(6))
            token = int(generator.integers(6))
            steps.append(
                {
                    "acceptance": min(1.0, q[token] / p[token]),
                    "tv": 0.5 * float(abs(p - q).sum()),
                    "same_top1": bool(p.argmax() == q.argmax()),
                    "p_token": float(p[token]),
                    "q_token": float(q[token]),
                }
            )
        prompts.append(steps)
    return prompts


def column(prompts: list[list[dict[str, float]]], name: str) -> list[np.ndarray]:
    return [np.array([step[name] for step in steps]) for steps in prompts]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_curves_equal_oracle(seed: int, lengths: list[int]) -> None:
    horizon = 9
    prompts = random_steps(np.random.default_rng(seed), lengths)
    expected = oracle.survival(prompts, horizon)
    log_ratio = [
        np.log(q) - np.log(p) for p, q in zip(column(prompts, "p_token"), column(prompts, "q_token"), strict=True)
    ]
    rows = survival.survival_rows(column(prompts, "acceptance"), column(prompts, "tv"), horizon)
    bound = survival.bound_rows(log_ratio, horizon)
    agreed = [survival.agreed_length([bool(same) for same in row], horizon) for row in column(prompts, "same_top1")]
    assert np.allclose(rows.mean(0), expected["sampled"], rtol=1e-12)
    assert np.allclose(bound.mean(0), expected["bound"], rtol=1e-12)
    assert np.allclose(survival.agreement_rows(agreed, horizon).mean(0), expected["greedy"])


def test_weighted_over_all_texts_it_is_the_exact_coupling() -> None:
    """S2 and S2' by enumeration of every text of three tokens over a vocabulary of three."""
    generator = np.random.default_rng(3)
    trees: list[dict[tuple[int, ...], np.ndarray]] = [{}, {}]
    for depth in range(3):
        for prefix in itertools.product(range(3), repeat=depth):
            for tree in trees:
                tree[prefix] = generator.dirichlet(np.ones(3))
    total, bound = np.zeros(3), np.zeros(3)
    for text in itertools.product(range(3), repeat=3):
        p = np.array([trees[0][text[:n]][text[n]] for n in range(3)])
        q = np.array([trees[1][text[:n]][text[n]] for n in range(3)])
        tv = np.array([0.5 * abs(trees[0][text[:n]] - trees[1][text[:n]]).sum() for n in range(3)])
        total += p.prod() * survival.survival_rows([np.minimum(1, q / p)], [tv], 3)[0]
        bound += p.prod() * survival.bound_rows([np.log(q / p)], 3)[0]
    exact = oracle.exact_survival(trees[0].__getitem__, trees[1].__getitem__, 3)
    assert np.allclose(total, exact, rtol=1e-12)
    assert np.allclose(bound, oracle.exact_bound(trees[0].__getitem__, trees[1].__getitem__, 3), rtol=1e-12)
    assert (total <= bound + 1e-15).all()


def test_after_the_end_the_product_stays() -> None:
    rows = survival.survival_rows([np.array([0.5, 0.8])], [np.array([0.3, 0.1])], 5)
    assert np.allclose(rows, [[0.7, 0.45, 0.4, 0.4, 0.4]])
    assert np.allclose(survival.bound_rows([np.log([0.5, 4.0])], 4), [[0.5, 1.0, 1.0, 1.0]])


def test_agreement_of_texts() -> None:
    assert survival.common_prefix([1, 2, 3], [1, 2, 4], 9) == 2
    assert survival.common_prefix([1, 2], [1, 2, 4], 9) == 2
    assert survival.common_prefix([1, 2], [1, 2], 9) == 9
    assert survival.agreed_length([True, False, True], 9) == 1
    assert survival.agreed_length([True, True], 9) == 9


def test_intervals_of_curves() -> None:
    rows = np.random.default_rng(0).random((40, 7))
    mean, low, high = survival.mean_curve(rows)
    assert np.allclose(mean, rows.mean(0))
    assert ((low < mean) & (mean < high)).all()
    spread = rows.std(0) / np.sqrt(40)
    assert np.allclose(high - low, 2 * 2.02 * spread, rtol=0.1)
    mean, low, high = survival.mean_curve(np.ones((8, 3)))  # eight prompts that all agree prove little
    assert (mean == 1).all()
    assert (high == 1).all()
    assert np.allclose(low, 8 / (8 + 2.3646**2), atol=1e-4)
    near = survival.mean_curve(np.full((8, 1), 0.999))[1][0]
    assert 0.85 < near < 0.999


def test_faithful_length() -> None:
    assert survival.faithful_length(np.array([0.9, 0.5, 0.4, 0.1])) == 2
    assert survival.faithful_length(np.array([0.4, 0.3])) == 0
    assert survival.faithful_length(np.array([0.9, 0.8])) == 2
    rows = np.array([[1.0, 0.5], [1.0, 0.5]])
    assert survival.expected_agreed(rows).value == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("acceptance", "cost", "drafted", "expected"),
    [(0.8, 0.05, 4, 3.3616 / 1.2), (1.0, 0.5, 3, 4 / 2.5), (0.0, 0.1, 2, 1 / 1.2)],
)
def test_draft_speedup(acceptance: float, cost: float, drafted: int, expected: float) -> None:
    assert survival.draft_speedup(acceptance, cost, drafted) == pytest.approx(expected)


@settings(deadline=None, max_examples=30)
@given(count=st.integers(1, 12), seed=st.integers(0, 2**16))
def test_the_order_of_prompts_changes_no_bit(count: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    rows = generator.integers(0, 4, (count, 5)) / 7  # ties between prompts
    totals, counts = generator.normal(size=count), generator.integers(1, 9, count).astype(float)
    order = generator.permutation(count)
    for one, other in zip(survival.mean_curve(rows), survival.mean_curve(rows[order]), strict=True):
        assert one.tobytes() == other.tobytes()
    assert ratio_interval(totals, counts) == ratio_interval(totals[order], counts[order])
    assert survival.expected_agreed(rows) == survival.expected_agreed(rows[order])
