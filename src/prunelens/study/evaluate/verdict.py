"""For which uses a compressed model keeps what the dense model does: safe, at risk, broken, or not measured."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictFloat, model_validator

from prunelens.metrics.statistics import fewest_items, kept_share, lower_bound, wilson
from prunelens.study.evaluate.scores import as_dict, paired_values
from prunelens.tasks.suite import USES, MetricScores

SAFE, AT_RISK, BROKEN, UNKNOWN = "safe", "at risk", "broken", "not measured"
ORDER = (SAFE, AT_RISK, BROKEN)
MIN_OPTIONS = 8
"""Fewest prompts with options from which a choice is predicted."""
SHORT_STEPS = "8"
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
        verdict: safe, at risk, broken, or not measured.
        number: what decided, in words; empty if nothing was measured.
        value, low, high: the deciding number with its 95 % interval.
        rule: the thresholds it was held against.
        source: `measured` (tasks) or `predicted` (L3 and S of a comparison), empty if neither.
        reason: why it is not measured, and what else a reader should know.
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
    severity: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """All of it by name, but for the severity."""
        return {name: value for name, value in asdict(self).items() if name != "severity"}


def judge(
    dense: Sequence[MetricScores],
    compressed: Sequence[MetricScores],
    rows: Sequence[Record],
    compared: Record | None = None,
    thresholds: Thresholds | None = None,
) -> list[Verdict]:
    """A verdict for every class: from the measured tasks where any were run, else predicted, else not measured.

    Args:
        dense: item scores of the dense model.
        compressed: item scores of the compressed one.
        rows: what `score_rows` says of both.
        compared: the summary of a comparison of the same two models, for predictions.
        thresholds: where safe ends and broken begins.
    """
    limits = thresholds or Thresholds()
    predicted = {verdict.use: verdict for verdict in predict(compared, limits)} if compared is not None else {}
    found = []
    for use in USES:
        own = [row for row in rows if row["use"] == use]
        measured = _measured(use, dense, compressed, own, limits)
        other = predicted.get(use)
        found.append(other if not own and other and other.verdict != UNKNOWN else measured)
    return found


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
        return Verdict(use, UNKNOWN, reason="; ".join(notes) or _nothing(rows))
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
    names = ", ".join(sorted(task for task, _ in wanted))
    found = _share(use, f"of the dense score kept ({names})", as_dict(kept), limits, "measured")
    return _too_few(found, sum(row["right"] for row in rows), "items that the dense model gets right", limits)


def _kept_alone(use: str, row: Record, limits: Thresholds) -> Verdict:
    """A score on a scale of its own, which is not added to others."""
    number = f"of the dense score kept ({row['task']}: {row['metric']})"
    return _too_few(_share(use, number, row["kept"], limits, "measured"), row["right"], "items", limits)


def _too_few(found: Verdict, count: int | None, what: str, limits: Thresholds) -> Verdict:
    """Say so where even equal answers on all items could not be called safe."""
    fewest = fewest_items(limits.safe)
    if count is None or found.verdict != AT_RISK or (fewest is not None and count >= fewest):
        return found
    reason = f"{count} {what}, safe needs at least {fewest}" if fewest else f"no number of {what} shows 100 %"
    return replace(found, reason=reason)


def _agreement(use: str, row: Record, limits: Thresholds) -> Verdict:
    number = f"of the 10 nearest neighbours stay, beyond chance ({row['task']})"
    return _share(use, number, row["kept"], limits, "measured")


def _share(use: str, number: str, found: Record, limits: Thresholds, source: str) -> Verdict:
    """A share that is better when higher."""
    verdict = SAFE if found["low"] >= limits.safe else BROKEN if found["high"] < limits.broken else AT_RISK
    rule = f"safe ≥ {100 * limits.safe:g} %, broken < {100 * limits.broken:g} %"
    severity = (limits.safe - found["mean"]) / (limits.safe - limits.broken)
    return Verdict(use, verdict, number, found["mean"], found["low"], found["high"], rule, source, "", severity)


def _cost(use: str, row: Record, limits: Thresholds) -> Verdict:
    """Excess nats per token, or looping texts beyond the dense model's."""
    if row["decides"] == "nll":
        name, safe, broken = "nats per token of excess NLL under the dense model", limits.safe_nll, limits.broken_nll
    else:
        name, safe, broken = "more of the texts loop than the dense model's", limits.safe_loops, limits.broken_loops
    loops = row["decides"] == "loops"
    found = _excess(use, f"{name} ({row['task']})", row["difference"], safe, broken, "measured", loops)
    return found if loops else _amount(found, row.get("items"))


def _amount(found: Verdict, texts: int | None) -> Verdict:
    """An excess without bounds is safe only from enough texts: the unlucky ones may not be among a few."""
    if texts is None or texts >= MIN_AMOUNTS or found.verdict != SAFE:
        return found
    return replace(found, verdict=AT_RISK, reason=f"{texts} texts, safe needs at least {MIN_AMOUNTS}")


def _excess(
    use: str, number: str, found: Record, safe: float, broken: float, source: str, share: bool = False
) -> Verdict:
    """An amount that is better when lower."""
    verdict = SAFE if found["high"] <= safe else BROKEN if found["low"] > broken else AT_RISK
    shown = [f"{100 * limit:g} %" if share else f"{limit:g}" for limit in (safe, broken)]
    rule = f"safe ≤ {shown[0]}, broken > {shown[1]}"
    severity = (found["mean"] - safe) / (broken - safe)
    return Verdict(use, verdict, number, found["mean"], found["low"], found["high"], rule, source, "", severity)


def predict(compared: Record, thresholds: Thresholds | None = None) -> list[Verdict]:
    """What one teacher-forced comparison (L3, L5, S2) says of each class, where no task was run."""
    limits = thresholds or Thresholds()
    return [
        Verdict("retrieval", UNKNOWN, reason="a comparison of token probabilities says nothing of neighbours"),
        _predicted_choice(compared, limits),
        _predicted_short(compared, limits),
        _predicted_long(compared, limits),
    ]


def _predicted_long(compared: Record, limits: Thresholds) -> Verdict:
    number = "nats per token of excess NLL on the dense model's texts"
    limit = limits.safe_nll, limits.broken_nll
    found = _excess("long-generation", number, compared["excess_nll"], *limit, "predicted")
    return _amount(found, compared.get("num_prompts"))


def _predicted_choice(compared: Record, limits: Thresholds) -> Verdict:
    options = compared["options"]
    if options is None or options["prompts"] < MIN_OPTIONS:
        count = options["prompts"] if options else 0
        reason = f"{count} prompts with options, expected at least {MIN_OPTIONS}"
        return Verdict("multiple-choice", UNKNOWN, reason=reason)
    share = as_dict(wilson(options["same_choice"], options["prompts"]))
    return _share("multiple-choice", "of the choices among options stay", share, limits, "predicted")


def _predicted_short(compared: Record, limits: Thresholds) -> Verdict:
    found = compared["survival"].get(SHORT_STEPS)
    if found is None:
        return Verdict("short-generation", UNKNOWN, reason=f"fewer than {SHORT_STEPS} tokens were read")
    count = compared.get("num_prompts")
    bound = lower_bound(count) if count is not None else 1.0
    low, high = min(found["low"], bound), max(found["high"], 1 - bound)
    number = f"of sampled texts agree for {SHORT_STEPS} tokens, S({SHORT_STEPS})"
    share = {"mean": found["value"], "low": low, "high": high}
    return _too_few(_share("short-generation", number, share, limits, "predicted"), count, "prompts", limits)
