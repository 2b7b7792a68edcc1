"""Classes that are decided before their items end: rounds of one and of several tasks, patience, and costs."""

import numpy as np
import pytest

from prunelens.study.evaluate.early import PATIENCE, decide, sequence_of
from prunelens.study.evaluate.words import BROKEN, DEGRADED, Limits

KEPT = Limits(0.95, 0.80)
LOOPS = Limits(0.05, 0.25, higher=False)


def rounds_of(keep: float, sizes: dict[str, int], rounds: int, seed: int = 0) -> list[dict[str, tuple]]:
    """Rounds with so many items of each task, of which the dense model gets three quarters right."""
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(rounds):
        one = {}
        for task, size in sizes.items():
            dense = (generator.random(size) < 0.75).astype(float)
            one[task] = dense, dense * (generator.random(size) < keep)
        found.append(one)
    return found


def ends_after(rounds: list[dict[str, tuple]], limits: Limits = KEPT) -> tuple[str | None, int]:
    """(the word, after how many rounds)."""
    for count in range(1, len(rounds) + 1):
        word = decide(rounds[:count], limits)
        if word is not None:
            return word, count
    return None, len(rounds)


@pytest.mark.parametrize("sizes", [{"one": 8}, {"one": 8, "two": 8}, {"one": 4, "two": 12}])
def test_a_broken_model_is_known_after_a_few_rounds(sizes: dict[str, int]) -> None:
    for seed in range(5):
        word, count = ends_after(rounds_of(0.1, sizes, 40, seed))
        assert (word, count <= 8) == (BROKEN, True)


def test_an_equal_model_is_never_decided_early() -> None:
    rounds = rounds_of(1.0, {"one": 8, "two": 16}, 60)
    assert ends_after(rounds) == (None, 60)
    found = sequence_of(rounds, KEPT)
    assert (found.value, found.high) == (1, 1)
    assert found.low > 0.9


def test_nothing_is_said_of_nothing() -> None:
    assert decide([], KEPT) is None
    assert decide([{"one": (np.zeros(0), np.zeros(0))}], KEPT) is None


def test_a_degraded_model_is_run_on_only_where_it_may_be_broken() -> None:
    """At 87 % kept `degraded` ends it; at 78 % it is run for at most as many items again."""
    word, count = ends_after(rounds_of(0.87, {"one": 10}, 300))
    assert word == DEGRADED
    assert count < 300
    patient = 0
    for seed in range(6):
        rounds = rounds_of(0.74, {"one": 1}, 600, seed)
        word, count = ends_after(rounds)
        first = next(number for number in range(1, 600) if _is_rejected(rounds[:number]))
        assert word in (DEGRADED, BROKEN)
        assert first <= count <= PATIENCE * first
        patient += count > first
    assert patient


def _is_rejected(rounds: list[dict[str, tuple]]) -> bool:
    return decide(rounds, Limits(0.95, 0.01)) is not None


def test_tasks_count_alike_however_many_items_they_have() -> None:
    """The small task loses everything, the large one nothing: half is kept, although nine items of ten are."""
    right = np.ones
    rounds = [{"small": (right(2), np.zeros(2)), "large": (right(18), right(18))} for _ in range(30)]
    assert decide(rounds, KEPT) == BROKEN
    assert sequence_of(rounds, KEPT).value == 0.5


def test_rates_of_loops_are_decided_the_same_way() -> None:
    generator = np.random.default_rng(4)
    many = [{"long": (np.zeros(8), (generator.random(8) < 0.8).astype(float))} for _ in range(30)]
    none = [{"long": (np.zeros(8), np.zeros(8))} for _ in range(30)]
    word, count = ends_after(many, LOOPS)
    assert (word, count < 8) == (BROKEN, True)
    assert ends_after(none, LOOPS) == (None, 30)
    found = sequence_of(many, LOOPS)
    assert found.low > 0.25
    assert 0.7 < found.value < 0.9


def test_a_true_claim_over_two_tasks_is_seldom_rejected() -> None:
    wrong = sum(ends_after(rounds_of(0.95, {"one": 6, "two": 12}, 30, seed))[0] is not None for seed in range(60))
    assert wrong <= 3
