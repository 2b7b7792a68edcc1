"""How the harness makes a score of items: each metric's own aggregation, by name, and its resamples."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Float

MEAN = "mean"
QUICK = ("perplexity", "weighted_perplexity", "bits_per_byte", "median", "nanmean", "brier_score")
"""Aggregations that are resampled as often as means are."""
FEW_RESAMPLES = 200
"""Of all others, which may take a second each (TER, BLEU)."""

Aggregation = Callable[[Sequence[Any]], float]
_known: dict[str, Aggregation] = {}


def name_of(function: Aggregation | None) -> str:
    """The name of an aggregation, under which `score_of` finds it again; the harness takes the mean where none is."""
    from lm_eval.api.registry import AGGREGATION_REGISTRY

    if function is None:
        return MEAN
    for name, own in AGGREGATION_REGISTRY.items():
        if own is function:
            return str(name)
    if isinstance(function, partial):  # made anew whenever a task is asked; its arguments say which it is
        name = f"{_label(function.func)}{function.args}{function.keywords}"
        _known[name] = function
        return name
    name = _label(function)
    while _known.setdefault(name, function) is not function:  # another function of this name
        name += "'"
    return name


def score_of(aggregation: str, items: Sequence[Any]) -> float | None:
    """The score of items; None where the aggregation fails or gives no finite number."""
    try:
        found = float(_find(aggregation)(items))
    except Exception:  # it is somebody else's code, and what was computed must not be lost by it
        return None
    return found if math.isfinite(found) else None


def resampled(
    aggregation: str, sides: Sequence[Sequence[Any]], count: int, seed: int = 0
) -> Float[np.ndarray, "sides draws"]:
    """Scores of resampled items, all sides together; draws in which one of them has no score are left out.

    Args:
        aggregation: its name.
        sides: for each model what the aggregation takes of each item, in the same order.
        count: resamples, fewer for aggregations that are slow.
        seed: of the draws.
    """
    rows = sorted(zip(*sides, strict=True), key=repr)
    if aggregation not in QUICK:
        count = min(count, FEW_RESAMPLES)
    generator = np.random.default_rng(seed)
    found = []
    for chosen in generator.integers(0, len(rows), size=(count, len(rows))):
        scores = [score_of(aggregation, [rows[place][side] for place in chosen]) for side in range(len(sides))]
        if None not in scores:
            found.append(scores)
    return np.array(found, dtype=float).reshape(-1, len(sides)).T


def _label(function: Callable[..., Any]) -> str:
    return f"{getattr(function, '__module__', '')}:{getattr(function, '__qualname__', type(function).__name__)}"


def _find(aggregation: str) -> Aggregation:
    from lm_eval.api.registry import get_aggregation

    found = _known.get(aggregation) or get_aggregation(aggregation)
    if found is None:
        raise KeyError(aggregation)
    function: Aggregation = found
    return function
