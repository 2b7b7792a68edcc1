"""Whether a class may be called degraded or broken before its items end: looked at after every round of items.

`safe` is never said here: it takes all items and the interval of a fixed number of them (theory.md, V9).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from prunelens.metrics.betting import ALPHA, kept_sequence, mean_sequence, rejects
from prunelens.metrics.intervals import Interval
from prunelens.study.evaluate.words import BROKEN, DEGRADED, Limits

Round = Mapping[str, tuple[np.ndarray, np.ndarray]]
"""For each task of a class the dense and the compressed scores of the items of one round, in the order they were run.

Every task gives the same share of its items to every round.
"""
PATIENCE = 2
"""How many times the items that showed a class to be degraded may be run to see whether it is broken."""


@dataclass(frozen=True)
class Stopped:
    """A class that was decided before its items ended.

    Attributes:
        verdict: `degraded` or `broken`.
        interval: the deciding number with an interval that holds at every look.
        number: what decided, in words.
        limits: what it was held against.
        used: items that were run.
        there: items that there are.
    """

    verdict: str
    interval: Interval
    number: str
    limits: Limits
    used: int
    there: int


def decide(rounds: Sequence[Round], limits: Limits, alpha: float = ALPHA) -> str | None:
    """`degraded` or `broken` once the rounds so far show it, else None: run on.

    A class that is degraded is run on for a while where it may be broken: for as many items again.

    Args:
        rounds: all rounds so far, in order.
        limits: of a share kept; of a rate beyond the dense model's, both between 0 and 1, where lower is better.
        alpha: of each of the two tests. Neither is true where the first is not, so both may have it whole.
    """
    dense, own = _steps(rounds)
    worse = {limit: _rejected(dense, own, limit, limits.higher, alpha) for limit in (limits.safe, limits.broken)}
    if worse[limits.broken] is not None and worse[limits.safe] is not None:
        return BROKEN
    first = worse[limits.safe]
    if first is None:
        return None
    value = own.sum() / dense.sum() if limits.higher else own.mean() - dense.mean()
    may_be_broken = value < limits.broken if limits.higher else value > limits.broken
    return None if may_be_broken and len(dense) < PATIENCE * first else DEGRADED


def sequence_of(rounds: Sequence[Round], limits: Limits, alpha: float = ALPHA) -> Interval:
    """The deciding number over the rounds so far, with an interval that holds at every look."""
    dense, own = _steps(rounds)
    return kept_sequence(dense, own, alpha=alpha) if limits.higher else mean_sequence(own - dense, -1.0, 1.0, alpha)


def _rejected(dense: np.ndarray, own: np.ndarray, limit: float, higher: bool, alpha: float) -> int | None:
    """After how many steps "at least `limit` is kept", or "at most `limit` more", may be rejected."""
    if higher:
        return rejects(own - limit * dense, 1.0, alpha)
    return rejects(limit - (own - dense), 1.0 + limit, alpha)


def _steps(rounds: Sequence[Round]) -> tuple[np.ndarray, np.ndarray]:
    """Dense and compressed scores step by step, each the mean over the tasks of one step's items of each.

    Tasks count alike however many items they have, so a step takes items of all of them: one of the smallest.
    """
    found = [step for one in rounds for step in _round_steps(one)]
    if not found:
        return np.zeros(0), np.zeros(0)
    dense, own = np.array(found, float).T
    return dense, own


def _round_steps(one: Round) -> Iterator[tuple[float, float]]:
    pairs = [pair for pair in one.values() if len(pair[0])]
    count = min((len(dense) for dense, _ in pairs), default=0)
    parts = [[np.array_split(np.asarray(side, float), count) for side in pair] for pair in pairs] if count else []
    for step in range(count):
        dense, own = (float(np.mean([part[side][step].mean() for part in parts])) for side in (0, 1))
        yield dense, own
