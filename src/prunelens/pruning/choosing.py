"""Which parts a count takes out of what is left, by their scores."""

from collections.abc import Iterable

from prunelens.errors import PrunelensError
from prunelens.models.surgery.drop import Drop
from prunelens.pruning.redundancy import Key, Ranking


def drop_of(parts: Iterable[Key]) -> Drop:
    """The parts as what is out of a model."""
    found = Drop()
    for kind, layer_idx in parts:
        found |= Drop(**{kind: frozenset([layer_idx])})
    return found


def most_redundant(ranking: Ranking, kinds: tuple[str, ...], count: int, drop: Drop, step: str) -> list[Key]:
    """The `count` parts of some kinds with the highest scores that are not out yet.

    Args:
        ranking: the scores.
        kinds: attention and mlp, or one of attention, mlp, block.
        count: how many.
        drop: what is out.
        step: the step, for messages.

    Raises:
        PrunelensError: fewer are left.
    """
    left = [key for key in ranking.ordered(*kinds) if not _touches(key, drop)]
    if len(left) < count:
        raise PrunelensError(f"recipe {step!r}: only {len(left)} parts are left to take out")
    return left[:count]


def best_run(ranking: Ranking, count: int, num_blocks: int, drop: Drop) -> list[Key]:
    """The run of blocks with the highest mean score, of those that nothing is out of.

    Raises:
        PrunelensError: no run of that length is left.
    """
    runs = [
        [("block", layer_idx) for layer_idx in range(start, start + count)] for start in range(num_blocks - count + 1)
    ]
    free = [run for run in runs if not any(_touches(key, drop) for key in run)]
    if not free:
        raise PrunelensError(f"no run of {count} consecutive blocks is left to take out")
    return max(free, key=lambda run: sum(ranking.scores[key] for key in run))


def _touches(key: Key, drop: Drop) -> bool:
    kind, layer_idx = key
    if kind == "block":
        return layer_idx in drop.block | drop.attention | drop.mlp
    return layer_idx in getattr(drop, kind) | drop.block
