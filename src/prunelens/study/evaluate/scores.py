"""From item scores to rows: dense, compressed, difference and share kept, each with its interval, and what it means."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from prunelens.metrics.intervals import TAIL, Interval
from prunelens.metrics.statistics import (
    flips,
    guarded_share,
    kept_share,
    paired_difference,
    score_interval,
    sign_test,
)
from prunelens.tasks.aggregation import MEAN, resampled, score_of
from prunelens.tasks.suite import Metric, MetricScores

Values = np.ndarray
RESAMPLES = 2000
"""Of a score that is no mean."""
NO_NUMBER: dict[str, float | None] = {"mean": None, "low": None, "high": None}


def score_rows(
    dense: Sequence[MetricScores], compressed: Sequence[MetricScores], stored: Sequence[Mapping[str, Any]] = ()
) -> list[dict[str, Any]]:
    """One record for each metric: the dense score and its chance level first, then what became of it.

    Items that only one of the models has (a text too short for a ratio) are left out on both sides, and a metric with
    no item that both have is left out. A metric of both models together (the overlap of neighbours) has no dense score
    of its own: there it is 1. Scores that are no finite number are None, with a reason.

    Args:
        dense: item scores of the dense model.
        compressed: item scores of the compressed one.
        stored: records made before, for metrics of which no parts were kept to make them anew.
    """
    own = {(scored.metric.task, scored.metric.name): scored for scored in compressed}
    made = {(row["task"], row["metric"]): dict(row) for row in stored}
    found = []
    for scored in dense:
        name = scored.metric.task, scored.metric.name
        other = own.get(name)
        if other is None:
            continue
        keys = [key for key in scored.values if key in other.values]
        if not keys:
            continue
        if scored.metric.aggregation == MEAN:
            found.append(_mean_row(scored.metric, *paired_values(scored.values, other.values)))
        elif name in made:
            found.append(made[name])
        else:
            found.append(_aggregated_row(scored.metric, *(_parts(side, keys) for side in (scored, other))))
    return found


def paired_values(dense: Mapping[str, float | None], compressed: Mapping[str, float | None]) -> tuple[Values, Values]:
    """Values of the items that both have, in the dense order; NaN where an item has no number."""
    keys = [key for key in dense if key in compressed]
    return np.array([dense[key] for key in keys], float), np.array([compressed[key] for key in keys], float)


def is_share(*sides: Values) -> bool:
    """Whether all values lie between 0 and 1, so that tasks of such scores can be added."""
    return all(bool(np.all((side >= 0) & (side <= 1))) for side in sides)


def _mean_row(metric: Metric, dense: Values, compressed: Values) -> dict[str, Any]:
    missing = ~(np.isfinite(dense) & np.isfinite(compressed))
    if missing.any():
        reason = f"{int(missing.sum())} of {len(dense)} items of {metric.name} have no finite number"
        return _record(metric, len(dense)) | {
            "dense": as_dict(score_interval(dense)) if np.isfinite(dense).all() else NO_NUMBER,
            "compressed": as_dict(score_interval(compressed)) if np.isfinite(compressed).all() else NO_NUMBER,
            "decides": None,
            "reason": reason,
        }
    reference, own = score_interval(dense), score_interval(compressed)
    difference = paired_difference(dense, compressed)
    lost, gained = _flips(metric, dense, compressed)
    found = _record(metric, len(dense)) | {
        "dense": as_dict(reference),
        "at_chance": _at_chance(metric, reference.low),
        "compressed": as_dict(own),
        "difference": as_dict(difference),
        "kept": as_dict(kept) if (kept := _kept(metric, dense, compressed, own)) else None,
        "right": int(np.sum(dense > 0)),
        "adds": is_share(dense, compressed),
        "lost": lost,
        "gained": gained,
        "sign_test": sign_test(lost, gained) if lost is not None and gained is not None else None,
        "tie": difference.low <= 0 <= difference.high,
    }
    if metric.decides == "kept" and bool((dense < 0).any() or (compressed < 0).any()):
        found |= {"decides": None, "at_chance": False, "kept": None, "reason": f"{metric.name} has values below 0"}
    return found


def _record(metric: Metric, items: int) -> dict[str, Any]:
    """What is known without any number."""
    return {
        "task": metric.task,
        "metric": metric.name,
        "use": metric.use,
        "decides": metric.decides,
        "better": metric.better,
        "items": items,
        "chance": metric.chance,
        "aggregation": metric.aggregation,
        "dense": NO_NUMBER,
        "at_chance": False,
        "compressed": NO_NUMBER,
        "difference": NO_NUMBER,
        "kept": None,
        "right": items,
        "adds": False,
        "lost": None,
        "gained": None,
        "sign_test": None,
        "tie": False,
        "reason": metric.reason,
    }


def _at_chance(metric: Metric, low: float) -> bool:
    """Whether the dense score may be guessed; where chance is not known, whether it may be nothing at all."""
    return metric.decides == "kept" and low <= (metric.chance or 0.0)


def _kept(metric: Metric, dense: Values, compressed: Values, own: Interval) -> Interval | None:
    if metric.decides == "agreement":
        return beyond_chance(own, metric.chance)
    return kept_share([(dense, compressed)]) if metric.better == "higher" else None


def beyond_chance(share: Interval, chance: float | None) -> Interval | None:
    """An agreement beyond what a random order gives, (o − c)/(1 − c); None where that is everything or not known."""
    if chance is None or chance >= 1:
        return None
    low, value, high = ((end - chance) / (1 - chance) for end in (share.low, share.value, share.high))
    return Interval(value, low, high)


def _flips(metric: Metric, dense: Values, compressed: Values) -> tuple[int | None, int | None]:
    """(lost, gained) items, where a metric is yes or no and one of both is better."""
    if metric.better is None or not _is_binary(dense, compressed):
        return None, None
    return flips(dense, compressed) if metric.better == "higher" else flips(compressed, dense)


def _is_binary(*sides: Values) -> bool:
    return all(bool(np.isin(side, (0, 1)).all()) for side in sides)


# --------------------------------------------------------------------------- scores that are no mean


def _parts(scored: MetricScores, keys: Sequence[str]) -> list[Any]:
    return [scored.parts.get(key, scored.values[key]) for key in keys]


def _aggregated_row(metric: Metric, dense: list[Any], compressed: list[Any]) -> dict[str, Any]:
    """A score by the task's own aggregation; its intervals come from resampled items, both models together."""
    found = _record(metric, len(dense))
    scores = [score_of(metric.aggregation, side) for side in (dense, compressed)]
    if None in scores:
        which = "no score" if scores == [None, None] else f"no {'dense' if scores[0] is None else 'compressed'} score"
        shown = [NO_NUMBER if score is None else NO_NUMBER | {"mean": score} for score in scores]
        reason = f"{metric.name} gives {which} that is a finite number"
        return found | {"dense": shown[0], "compressed": shown[1], "decides": None, "reason": reason}
    reference, own = (float(score) for score in scores if score is not None)
    draws = resampled(metric.aggregation, (dense, compressed), RESAMPLES)
    difference = _ends(own - reference, draws[1] - draws[0])
    kept = _aggregated_share(metric, reference, own, draws, len(dense))
    ends = _ends(reference, draws[0])
    low, high = difference["low"], difference["high"]
    return found | {
        "dense": ends,
        "at_chance": _at_chance(metric, reference if ends["low"] is None else ends["low"]),
        "compressed": _ends(own, draws[1]),
        "difference": difference,
        "kept": as_dict(kept) if kept else None,
        "tie": low is not None and high is not None and low <= 0 <= high,
    }


def _ends(value: float, draws: Values) -> dict[str, float | None]:
    """A value with the middle 95 % of its resamples; without ends where all resamples are the same."""
    if not len(draws) or draws.min() == draws.max():
        return NO_NUMBER | {"mean": value}
    low, high = np.quantile(draws, [TAIL, 1 - TAIL])
    return {"mean": value, "low": min(float(low), value), "high": max(float(high), value)}


def _aggregated_share(metric: Metric, dense: float, own: float, draws: Values, items: int) -> Interval | None:
    if metric.better != "higher" or dense <= 0:
        return None
    usable = draws[:, draws[0] > 0] if len(draws[0]) else draws
    return guarded_share(own / dense, usable[1] / usable[0], items) if usable.shape[1] else None


def as_dict(interval: Interval) -> dict[str, float]:
    """`mean`, `low` and `high`."""
    return {"mean": interval.value, "low": interval.low, "high": interval.high}
