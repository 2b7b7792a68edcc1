"""What the harness's tasks count: direction, aggregation and chance of each metric, and its value on each item."""

import math
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np

from prunelens.tasks.aggregation import MEAN, name_of
from prunelens.tasks.suite import CORE_HARNESS, Metric, MetricScores

SHORT_TOKENS = 32
"""Generation of at most so many tokens is short."""
DEFAULT_TOKENS = 256
TOKEN_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names of the limit on written tokens, in the order in which the harness prefers them."""
RIGHT_OPTION = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info")
"""Metrics that are 1 where the option that scores highest is a right one."""
CLOSED_SHARE = 0.1
"""Written answers of which one is the target of more items than this share can be guessed."""
MOST_TARGETS = 2000
SHOWN = 200
SURE = 1e6
"""Nats between one option and the next where chance is found from the task's own scoring."""
NUM_ORDERS = 4
"""Orders of the options that must agree on chance."""

Row = dict[str, Any]


@dataclass(frozen=True)
class HarnessTask:
    """One task, loaded.

    Attributes:
        name: its name.
        output_type: what the harness asks of a model.
        max_tokens: limit of a written answer.
        num_items: items that it has.
        task: the harness's own object.
        closed: whether its written answers are few enough to be guessed.
    """

    name: str
    output_type: str
    max_tokens: int
    num_items: int
    task: Any = field(compare=False, repr=False)
    closed: bool = False

    @property
    def use(self) -> str | None:
        """The class of use that it speaks of."""
        if self.output_type == "multiple_choice":
            return "multiple-choice"
        if self.output_type == "generate_until":
            return "short-generation" if self.max_tokens <= SHORT_TOKENS else "long-generation"
        return None

    @property
    def samples(self) -> bool:
        """Whether its answers are drawn at random."""
        return self.output_type == "generate_until" and bool(
            (self.task.config.generation_kwargs or {}).get("do_sample")
        )


def described(name: str, task: Any) -> HarnessTask:
    """What a loaded task of the harness says of itself.

    Raises:
        ValueError: it has no items, or the limit of its answers is no number.
    """
    count = len(task.eval_docs)
    if not count:
        raise ValueError("it has no items")
    kind = str(task.config.output_type or task.OUTPUT_TYPE)
    kwargs = task.config.generation_kwargs or {}
    limit = next((kwargs[key] for key in TOKEN_LIMITS if kwargs.get(key) is not None), DEFAULT_TOKENS)
    closed = kind != "multiple_choice" and _is_closed(task)
    return HarnessTask(name, kind, int(limit), count, task, closed)


def declared(task: Any) -> list[str]:
    """Names of the metrics that a task declares, in order; a function goes by its own name."""
    return [_name(metric) for metric in task.aggregation()]


def score_items(task: HarnessTask, samples: Sequence[Row]) -> list[MetricScores]:
    """One `MetricScores` for each metric and filter, in the order of the samples.

    The first metric of the first filter that has a share to keep decides; where none has one, the first says why.
    """
    by_filter: dict[str, list[Row]] = {}
    for sample in samples:
        by_filter.setdefault(sample["filter"], []).append(sample)
    found, decided = [], task.use is None
    for place, (filtered, rows) in enumerate(by_filter.items()):
        names = [name for name in _metrics(task, rows) if name != "bypass"]
        reasons = {name: _unfit(task, name, rows) for name in names}
        for name in names:
            shown = name if len(by_filter) == 1 else f"{name}/{filtered}"
            decides = not decided and place == 0 and not reasons[name]
            decided |= decides
            first = place == 0 and name == names[0] and task.use is not None and all(reasons.values())
            found.append(_one_metric(task, name, shown, rows, decides, reasons[name] if first else ""))
    return found


def _metrics(task: HarnessTask, rows: Sequence[Row]) -> list[str]:
    """All metrics of the rows: those that the task declares in its order, then those that it adds."""
    present = list(dict.fromkeys(str(name) for row in rows for name in row["metrics"]))
    known = [name for name in declared(task.task) if name in present]
    return known + [name for name in present if name not in known]


def _unfit(task: HarnessTask, metric: str, rows: Sequence[Row]) -> str:
    """Why no share of this metric can be kept; empty where one can."""
    better = _direction(task.task, metric)
    if better is None:
        return f"{metric} does not say whether higher is better"
    if better == "lower":
        return f"{metric} is better when lower, so that no share of it can be kept"
    values = [row[metric] for row in rows if metric in row["metrics"]]
    if _aggregation(task.task, metric) == MEAN and not all(map(_is_number, values)):
        return f"{metric} has items that are no numbers"
    return ""


def _one_metric(
    task: HarnessTask, metric: str, shown: str, rows: Sequence[Row], decides: bool, reason: str
) -> MetricScores:
    rows = [row for row in rows if metric in row["metrics"]]
    numbers = all(_is_number(row[metric]) for row in rows)
    about = Metric(
        task.name,
        shown,
        task.use,
        _chance(task, metric, rows),
        _direction(task.task, metric),
        "kept" if decides else None,
        _aggregation(task.task, metric),
        reason,
    )
    keys = [str(row["doc"]["id"] if task.name in CORE_HARNESS else row["doc_id"]) for row in rows]
    return MetricScores(
        about,
        {key: float(row[metric]) if numbers else None for key, row in zip(keys, rows, strict=True)},
        {key: _answer(task, row) for key, row in zip(keys, rows, strict=True)},
        {key: str(row["target"])[:SHOWN] for key, row in zip(keys, rows, strict=True)},
        {} if numbers else {key: _plain(row[metric]) for key, row in zip(keys, rows, strict=True)},
    )


def _name(metric: Any) -> str:
    return metric if isinstance(metric, str) else str(getattr(metric, "__name__", metric))


def _direction(task: Any, metric: str) -> str | None:
    found = {_name(key): value for key, value in task.higher_is_better().items()}.get(metric)
    return None if found is None else "higher" if found else "lower"


def _aggregation(task: Any, metric: str) -> str:
    return name_of({_name(key): value for key, value in task.aggregation().items()}.get(metric))


def _is_number(value: Any) -> bool:
    return isinstance(value, bool | int | float | np.number) or (hasattr(value, "item") and np.ndim(value) == 0)


def _plain(value: Any) -> Any:
    """A value of an item without arrays, so that it can be kept as JSON where that is possible."""
    if isinstance(value, str | bytes) or value is None:
        return value
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items()}
    if hasattr(value, "tolist"):
        return value.tolist()
    return [_plain(part) for part in value] if isinstance(value, Iterable) else value


# --------------------------------------------------------------------------- chance


def _chance(task: HarnessTask, metric: str, rows: Sequence[Row]) -> float | None:
    """The mean score of guessing; None where it is not known."""
    aggregation = _aggregation(task.task, metric)
    if aggregation == "matthews_corrcoef":
        return 0.0
    if aggregation not in (MEAN, "nanmean") or _direction(task.task, metric) != "higher":
        return None
    if task.output_type != "multiple_choice":
        binary = all(_is_number(row[metric]) and float(row[metric]) in (0, 1) for row in rows)
        return 0.0 if binary and not task.closed else None
    if callable(task.task.config.process_results):
        return _mean([_scored_chance(task.task, metric, row) for row in rows])
    return _mean([_right_share(task.task, row) for row in rows]) if metric in RIGHT_OPTION else None


def _right_share(task: Any, row: Row) -> float | None:
    """Share of an item's options that are right."""
    count = _num_options(task, row)
    target = row["target"]
    if getattr(task, "multiple_input", 0) or not isinstance(target, list):
        return 1 / count
    right = {place for place in target if isinstance(place, int) and place < count}
    return len(right) / count


def _num_options(task: Any, row: Row) -> int:
    count = len(row["filtered_resps"])
    plain = not callable(task.config.process_results)
    return count // 2 if plain and "acc_mutual_info" in declared(task) else count  # asked without the question too


def _scored_chance(task: Any, metric: str, row: Row) -> float | None:
    """What the task's own scoring gives on average if all orders of the options are as likely.

    Each option takes every place once in an order's rotations. None unless all orders agree, whether the options lie
    far apart or are nearly alike: then it counts more than the place of one option.
    """
    found = []
    with suppress(Exception):  # it is somebody else's code, made for answers of a model
        for rotations in _orders(len(row["filtered_resps"])):
            for start, step in ((0.0, SURE), (-1.0, 1e-9)):
                for greedy in (False, True):
                    cases = [[(start - step * place, greedy) for place in places] for places in rotations]
                    scores = [float(task.process_results(row["doc"], case)[metric]) for case in cases]
                    found.append(sum(scores) / len(scores))
        same = max(found) - min(found) < 1e-6 and 0 <= found[0] <= 1
        return found[0] if same else None
    return None


@cache
def _orders(count: int) -> list[list[list[int]]]:
    """Some orders of so many options, each with all its rotations: the place of each option, the best being 0."""
    generator = random.Random(0)
    orders = [list(range(count)), *(generator.sample(range(count), count) for _ in range(NUM_ORDERS - 1))]
    return [[order[shift:] + order[:shift] for shift in range(count)] for order in orders]


def _mean(shares: Sequence[float | None]) -> float | None:
    known = [share for share in shares if share is not None]
    return sum(known) / len(known) if known and len(known) == len(shares) else None


def _is_closed(task: Any) -> bool:
    """Whether written answers come from a small set (letters, yes and no), or are not known."""
    if task.config.doc_to_choice is not None:
        return True
    try:
        docs = task.eval_docs
        targets = [str(task.doc_to_target(docs[place])) for place in range(min(len(docs), MOST_TARGETS))]
    except Exception:  # somebody else's code again
        return True
    most = max(Counter(targets).values())
    return most > 1 and most > CLOSED_SHARE * len(targets)


def _answer(task: HarnessTask, row: Row) -> str:
    """The choice with the highest log-likelihood (from 0), or what was written."""
    if task.output_type == "multiple_choice":
        scores = [response[0] for response in row["filtered_resps"][: _num_options(task.task, row)]]
        return str(scores.index(max(scores, key=lambda score: -math.inf if math.isnan(score) else score)))
    return str(row["filtered_resps"][0])[:SHOWN]
