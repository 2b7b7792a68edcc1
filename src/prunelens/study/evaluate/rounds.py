"""Items of tasks in an order that a seed fixes, in rounds that hold the same share of every task."""

import hashlib
from collections.abc import Sequence

ROUND_ITEMS = 12
"""Items of a task in a round, on average over the tasks."""


def num_rounds(sizes: Sequence[int]) -> int:
    """In how many rounds tasks of these sizes are run: each holds an item of the smallest one."""
    return max(1, min(round(sum(sizes) / len(sizes) / ROUND_ITEMS), *sizes)) if sizes else 1


def items_order(places: Sequence[int], seed: int, task: str) -> list[int]:
    """The places of a task's items in an order that the seed fixes; two items stand alike whatever others there are."""
    return sorted(places, key=lambda place: hashlib.sha256(f"{seed}\0{task}\0{place}".encode()).digest())


def share_of(order: Sequence[int], rounds: int, start: int, stop: int | None = None) -> list[int]:
    """The items of one round or of several, ascending; all rounds together hold every item once.

    Args:
        order: what `items_order` gives.
        rounds: how many there are.
        start: the first one, counted from 0.
        stop: the one behind the last; None for one round.
    """
    count, stop = len(order), start + 1 if stop is None else stop
    return sorted(order[count * start // rounds : count * stop // rounds])
