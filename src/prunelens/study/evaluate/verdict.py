"""For which uses a compressed model keeps what the dense model does: a word for each class, and what decided it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictFloat, model_validator

from prunelens.metrics.statistics import fewest_items, kept_share
from prunelens.study.evaluate.early import Stopped
from prunelens.study.evaluate.scores import as_dict, paired_values
from prunelens.study.evaluate.words import NOT_MEASURED, ORDER, SAFE, UNDECIDED, Limits, about
from prunelens.tasks.suite import USES, MetricScores

MIN_AMOUNTS = 20
"""Fewest texts from which an excess in nats, which has no bounds, is called safe (theory.md, V3)."""

Record = Mapping[str, Any]
Share = Annotated[StrictFloat, Field(ge=0, le=1, allow_inf_nan=False)]
Amount = Annotated[StrictFloat, Field(ge=0, allow_inf_nan=False)]


class Thresholds(BaseModel):
    """Where safe ends and broken begins (theory.md, task classes).

    `safe`, `broken`: shares of the dense score, or of agreement. `safe_nll`, `broken_nll`: excess nats per token.
    `safe_loops`, `broken_loops`: share of looping texts beyond the dense model's.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    safe: Share = 0.95
    broken: Share = 0.80
    safe_nll: Amount = 0.1
    broken_nll: Amount = 0.5
    safe_loops: Share = 0.05
    broken_loops: Share = 0.25

    @property
    def kept(self) -> Limits:
        """Of a share of the dense score, or of agreement."""
        return Limits(self.safe, self.broken)

    @property
    def nll(self) -> Limits:
        """Of excess nats per token."""
        return Limits(self.safe_nll, self.broken_nll, higher=False, share=False)

    @property
    def loops(self) -> Limits:
        """Of looping texts beyond the dense model's."""
        return Limits(self.safe_loops, self.broken_loops, higher=False)

    @model_validator(mode="after")
    def _in_order(self) -> "Thresholds":
        for low, high in (("broken", "safe"), ("safe_nll", "broken_nll"), ("safe_loops", "broken_loops")):
            if not getattr(self, low) < getattr(self, high):
                raise ValueError(f"expected {low} below {high}, found {getattr(self, low)} and {getattr(self, high)}")
        return self


@dataclass(frozen=True)
class Verdict:
    """One class of use of one compressed model.

    Attributes:
        use: the class.
        verdict: `safe` (the whole interval at or above the threshold), `degraded` (the whole of it below), `broken`
            (the whole of it below the lower threshold), `undecided` (it straddles the threshold) or `not measured`.
        number: what decided, in words; empty if nothing was measured.
        value, low, high: the deciding number with its 95 % interval.
        rule: the thresholds it was held against.
        source: `measured`, empty if nothing was.
        reason: why it is not measured or undecided, and what else a reader should know.
        used: items of the class that were run.
        there: items that there are.
        more: about how many more items would decide what is undecided; None where no number within reach would.
        stopped_early: whether the class was decided before its items ended.
        severity: 0 where safe ends, 1 where broken begins.
    """

    use: str
    verdict: str
    number: str = ""
    value: float | None = None
    low: float | None = None
    high: float | None = None
    rule: str = ""
    source: str = ""
    reason: str = ""
    used: int = 0
    there: int = 0
    more: int | None = None
    stopped_early: bool = False
    severity: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """All of it by name, but for the severity."""
        return {name: value for name, value in asdict(self).items() if name != "severity"}


def judge(
    dense: Sequence[MetricScores],
    compressed: Sequence[MetricScores],
    rows: Sequence[Record],
    thresholds: Thresholds | None = None,
    stopped: Mapping[str, Stopped] | None = None,
) -> list[Verdict]:
    """A verdict for every class: by the worst of its measured numbers, or not measured.

    Args:
        dense: item scores of the dense model.
        compressed: item scores of the compressed one.
        rows: what `score_rows` says of both.
        thresholds: where safe ends and broken begins.
        stopped: classes that were decided before their items ended, and by what.
    """
    limits = thresholds or Thresholds()
    found = []
    for use in USES:
        own = [row for row in rows if row["use"] == use]
        early = (stopped or {}).get(use)
        found.append(_stopped(use, early) if early else _measured(use, dense, compressed, own, limits))
    return found


def _stopped(use: str, early: Stopped) -> Verdict:
    reason = f"decided after {early.used} of {early.there} items"
    ends = early.interval
    return Verdict(
        use,
        early.verdict,
        early.number,
        ends.value,
        ends.low,
        ends.high,
        early.limits.rule,
        "measured",
        reason,
        early.used,
        early.there,
        stopped_early=True,
    )


def _measured(
    use: str, dense: Sequence[MetricScores], compressed: Sequence[MetricScores], rows: list[Record], limits: Thresholds
) -> Verdict:
    """The worst of the class's deciding numbers."""
    lines = [_cost(use, row, limits) for row in rows if row["decides"] in ("nll", "loops")]
    usable = [row for row in rows if row["decides"] == "kept" and not row["at_chance"]]
    added = [row for row in usable if row.get("adds", True)]
    if added:
        lines.append(_kept(use, dense, compressed, added, limits))
    lines += [_kept_alone(use, row, limits) for row in usable if row not in added and row["kept"]]
    if not lines:
        lines = [_agreement(use, row, limits) for row in rows if row["decides"] == "agreement" and row["kept"]]
    notes = _notes(rows)
    if not lines:
        return Verdict(use, NOT_MEASURED, reason="; ".join(notes) or _nothing(rows))
    worst = max(lines, key=lambda line: (ORDER.index(line.verdict), line.severity))
    left = f"left out: {'; '.join(notes)}" if notes else ""
    unknown = sorted({row["task"] for row in usable if row["chance"] is None})
    guess = f"chance is not known on {', '.join(unknown)}" if unknown else ""
    return replace(worst, reason="; ".join(filter(None, (worst.reason, left, guess))))


def _notes(rows: Sequence[Record]) -> list[str]:
    """Why tasks of the class do not count."""
    notes = []
    for known, words in ((True, "is at chance on"), (False, "may score nothing on")):
        tasks = sorted({row["task"] for row in rows if row["at_chance"] and (row.get("chance") is not None) == known})
        notes += [f"the dense model {words} {', '.join(tasks)}"] if tasks else []
    return notes + [f"{row['task']}: {row['reason']}" for row in rows if row.get("reason")]


def _nothing(rows: Sequence[Record]) -> str:
    if not rows:
        return "no task of this class was run"
    return f"no score of {', '.join(sorted({row['task'] for row in rows}))} says what is kept"


def _kept(
    use: str, dense: Sequence[MetricScores], compressed: Sequence[MetricScores], rows: list[Record], limits: Thresholds
) -> Verdict:
    wanted = {(row["task"], row["metric"]) for row in rows}
    sides = [
        {(scored.metric.task, scored.metric.name): scored.values for scored in side} for side in (dense, compressed)
    ]
    pairs = [paired_values(sides[0][key], sides[1][key]) for key in sorted(wanted)]
    kept = kept_share(pairs)
    assert kept is not None  # a dense score of 0 is at chance
    right = sum(row["right"] for row in rows)
    return _line(use, kept_words([task for task, _ in wanted]), as_dict(kept), limits.kept, rows, "items", right)


def kept_words(tasks: Sequence[str]) -> str:
    """What the share kept is called, over these tasks."""
    return f"of the dense score kept ({', '.join(sorted(tasks))})"


def _kept_alone(use: str, row: Record, limits: Thresholds) -> Verdict:
    """A score on a scale of its own, which is not added to others."""
    number = f"of the dense score kept ({row['task']}: {row['metric']})"
    return _line(use, number, row["kept"], limits.kept, [row], "items", row["right"])


def _agreement(use: str, row: Record, limits: Thresholds) -> Verdict:
    number = f"of the 10 nearest neighbours stay, beyond chance ({row['task']})"
    return _line(use, number, row["kept"], limits.kept, [row], "queries")


def _cost(use: str, row: Record, limits: Thresholds) -> Verdict:
    """Excess nats per token, or looping texts beyond the dense model's."""
    if row["decides"] == "loops":
        number = f"more of the texts loop than the dense model's ({row['task']})"
        return _line(use, number, row["difference"], limits.loops, [row], "texts")
    number = f"nats per token of excess NLL under the dense model ({row['task']})"
    found, texts = _line(use, number, row["difference"], limits.nll, [row], "texts"), row.get("items")
    if texts is None or texts >= MIN_AMOUNTS or found.verdict != SAFE:
        return found  # an excess has no bounds: the unlucky texts may not be among a few
    reason = f"{texts} texts, safe needs at least {MIN_AMOUNTS}"
    return replace(found, verdict=UNDECIDED, reason=reason, more=MIN_AMOUNTS - texts)


def _line(
    use: str,
    number: str,
    found: Record,
    limits: Limits,
    rows: Sequence[Record],
    what: str,
    right: int | None = None,
) -> Verdict:
    """The verdict of one number; `right` items have a dense score at all."""
    used = sum(row.get("items", 0) for row in rows)
    there = sum(row.get("there", row.get("items", 0)) for row in rows)
    value, low, high = found["mean"], found["low"], found["high"]
    word = limits.word(low, high)
    line = Verdict(use, word, number, value, low, high, limits.rule, "measured", "", used, there)
    line = replace(line, severity=limits.severity(value))
    return _undecided(line, limits, what, right if right is not None else used) if word == UNDECIDED else line


def _undecided(line: Verdict, limits: Limits, what: str, counted: int) -> Verdict:
    """With how many more items it would take, estimated from the width of the interval."""
    assert line.value is not None
    assert line.low is not None
    assert line.high is not None
    if limits.safe >= 1 and limits.higher:
        return replace(line, reason=f"no number of {what} shows 100 %")
    times = limits.times_as_many(line.value, line.low, line.high)
    if limits.higher and line.value == 1 and counted:
        fewest = fewest_items(limits.safe) or 1  # nothing was lost: the bound itself says how many it takes
        times = max(fewest / counted, 1.0) if times is None else min(times, max(fewest / counted, 1.0))
    if times is None:
        return replace(line, reason=f"the value is too close to the threshold for any number of {what} within reach")
    more = about(max((times - 1) * line.used, 1.0))
    return replace(line, more=more, reason=f"about {more} more {what} would decide")
