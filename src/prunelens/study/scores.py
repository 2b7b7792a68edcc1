"""From item scores to rows: dense, compressed, difference and share kept, each with its interval, and what it means."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from prunelens.spaces.paired import flips, kept_share, mean_interval, paired_difference, sign_test
from prunelens.spaces.survival import Interval
from prunelens.tasks.suite import Metric, Scored

Values = np.ndarray


def score_rows(dense: Sequence[Scored], compressed: Sequence[Scored]) -> list[dict[str, Any]]:
    """One record for each metric: the dense score and its chance level first, then what became of it.

    Items that only one of the models has (a text too short for a ratio) are left out on both sides, and a metric with
    no item that both have is left out. A metric of
    both models together (the overlap of neighbours) has no dense score of its own: there it is 1.
    """
    own = {(scored.metric.task, scored.metric.name): scored for scored in compressed}
    found = []
    for scored in dense:
        other = own.get((scored.metric.task, scored.metric.name))
        if other is None:
            continue
        sides = paired_values(scored.values, other.values)
        if len(sides[0]):
            found.append(_row(scored.metric, *sides))
    return found


def paired_values(dense: Mapping[str, float], compressed: Mapping[str, float]) -> tuple[Values, Values]:
    """Values of the items that both have, in the dense order."""
    keys = [key for key in dense if key in compressed]
    return np.array([dense[key] for key in keys], float), np.array([compressed[key] for key in keys], float)


def _row(metric: Metric, dense: Values, compressed: Values) -> dict[str, Any]:
    reference, own = mean_interval(dense), mean_interval(compressed)
    difference = paired_difference(dense, compressed)
    kept = kept_share([(dense, compressed)]) if metric.better == "higher" else None
    lost, gained = _flips(metric, dense, compressed)
    return {
        "task": metric.task,
        "metric": metric.name,
        "use": metric.use,
        "decides": metric.decides,
        "better": metric.better,
        "items": len(dense),
        "chance": metric.chance,
        "dense": as_dict(reference),
        "at_chance": metric.decides == "kept" and reference.low <= metric.chance,
        "compressed": as_dict(own),
        "difference": as_dict(difference),
        "kept": as_dict(kept) if kept else None,
        "lost": lost,
        "gained": gained,
        "sign_test": sign_test(lost, gained) if lost is not None and gained is not None else None,
        "tie": difference.low <= 0 <= difference.high,
    }


def _flips(metric: Metric, dense: Values, compressed: Values) -> tuple[int | None, int | None]:
    """(lost, gained) items, where a metric is yes or no and one of both is better."""
    if metric.better is None or not _is_binary(dense, compressed):
        return None, None
    return flips(dense, compressed) if metric.better == "higher" else flips(compressed, dense)


def _is_binary(*sides: Values) -> bool:
    return all(bool(np.isin(side, (0, 1)).all()) for side in sides)


def as_dict(interval: Interval) -> dict[str, float]:
    """`mean`, `low` and `high`."""
    return {"mean": interval.value, "low": interval.low, "high": interval.high}
