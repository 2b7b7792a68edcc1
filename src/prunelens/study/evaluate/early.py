"""Whether a class may be called degraded or broken before its items end: looked at after every round of items.

`safe` is never said here: it takes all items and the interval of a fixed number of them (theory.md, V11).
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
    if limits.higher:
        return kept_sequence(dense, own, alpha=alpha)
    return mean_sequence((own - dense).mean(axis=1), -1.0, 1.0, alpha)


def _rejected(dense: np.ndarray, own: np.ndarray, limit: float, higher: bool, alpha: float) -> int | None:
    """After how many steps "at least `limit` is kept", or "at most `limit` more", may be rejected."""
    if higher:
        return rejects(own - limit * dense, 1.0, alpha)
    return rejects(limit - (own - dense).mean(axis=1), 1.0 + limit, alpha)


def _steps(rounds: Sequence[Round]) -> tuple[np.ndarray, np.ndarray]:
    """Dense and compressed scores (steps, tasks): each the mean over one step's items of a task.

    Tasks count alike however many items they have, so a step takes items of all of them: one of the smallest. A round
    that lacks a task has no step.
    """
    tasks = sorted({task for one in rounds for task in one})
    found = [step for one in rounds if len(one) == len(tasks) for step in _round_steps([one[task] for task in tasks])]
    if not found:
        return np.zeros((0, 1)), np.zeros((0, 1))
    dense, own = np.moveaxis(np.array(found, float), 2, 0)
    return dense, own


def _round_steps(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> Iterator[list[tuple[float, float]]]:
    """For each step the (dense, compressed) score of each task."""
    count = min((len(dense) for dense, _ in pairs), default=0)
    ends = [np.arange(count + 1) * len(dense) // max(count, 1) for dense, _ in pairs]
    for step in range(count):
        spans = [slice(own[step], own[step + 1]) for own in ends]
        yield [
            (float(np.mean(dense[span])), float(np.mean(own[span])))
            for (dense, own), span in zip(pairs, spans, strict=True)
        ]
