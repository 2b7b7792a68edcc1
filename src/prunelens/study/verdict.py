"""For which uses a compressed model keeps what the dense model does: safe, at risk, broken, or not measured."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, StrictFloat, model_validator

from prunelens.spaces.paired import kept_share
from prunelens.study.scores import as_dict, paired_values
from prunelens.tasks.suite import USES, Scored

SAFE, AT_RISK, BROKEN, UNKNOWN = "safe", "at risk", "broken", "not measured"
ORDER = (SAFE, AT_RISK, BROKEN)
MIN_OPTIONS = 8
"""Fewest prompts with options from which a choice is predicted."""
SHORT_STEPS = "8"

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
    dense: Sequence[Scored],
    compressed: Sequence[Scored],
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
    use: str, dense: Sequence[Scored], compressed: Sequence[Scored], rows: list[Record], limits: Thresholds
) -> Verdict:
    """The worst of the class's deciding numbers."""
    lines = [_cost(use, row, limits) for row in rows if row["decides"] in ("nll", "loops")]
    usable = [row for row in rows if row["decides"] == "kept" and not row["at_chance"]]
    if usable:
        lines.append(_kept(use, dense, compressed, usable, limits))
    elif not lines:
        lines = [_agreement(use, row, limits) for row in rows if row["decides"] == "agreement"]
    chance = sorted(row["task"] for row in rows if row["at_chance"])
    note = f"the dense model is at chance on {', '.join(chance)}" if chance else ""
    if not lines:
        return Verdict(use, UNKNOWN, reason=note or "no task of this class was run")
    worst = max(lines, key=lambda line: (ORDER.index(line.verdict), line.severity))
    return Verdict(**(asdict(worst) | {"reason": f"left out: {note}" if note else ""}))


def _kept(
    use: str, dense: Sequence[Scored], compressed: Sequence[Scored], rows: list[Record], limits: Thresholds
) -> Verdict:
    wanted = {(row["task"], row["metric"]) for row in rows}
    sides = [
        {(scored.metric.task, scored.metric.name): scored.values for scored in side} for side in (dense, compressed)
    ]
    pairs = [paired_values(sides[0][key], sides[1][key]) for key in sorted(wanted)]
    kept = kept_share(pairs)
    assert kept is not None  # a dense score of 0 is at chance
    names = ", ".join(sorted(task for task, _ in wanted))
    return _share(use, f"of the dense score kept ({names})", as_dict(kept), limits, "measured")


def _agreement(use: str, row: Record, limits: Thresholds) -> Verdict:
    return _share(use, f"of the 10 nearest neighbours stay ({row['task']})", row["compressed"], limits, "measured")


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
    return _excess(
        use, f"{name} ({row['task']})", row["difference"], safe, broken, "measured", row["decides"] == "loops"
    )


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
        _excess(
            "long-generation",
            "nats per token of excess NLL on the dense model's texts",
            compared["excess_nll"],
            limits.safe_nll,
            limits.broken_nll,
            "predicted",
        ),
    ]


def _predicted_choice(compared: Record, limits: Thresholds) -> Verdict:
    options = compared["options"]
    if options is None or options["prompts"] < MIN_OPTIONS:
        count = options["prompts"] if options else 0
        reason = f"{count} prompts with options, expected at least {MIN_OPTIONS}"
        return Verdict("multiple-choice", UNKNOWN, reason=reason)
    share = _wilson(options["same_choice"], options["prompts"])
    return _share("multiple-choice", "of the choices among options stay", share, limits, "predicted")


def _predicted_short(compared: Record, limits: Thresholds) -> Verdict:
    found = compared["survival"].get(SHORT_STEPS)
    if found is None:
        return Verdict("short-generation", UNKNOWN, reason=f"fewer than {SHORT_STEPS} tokens were read")
    share = {"mean": found["value"], "low": found["low"], "high": found["high"]}
    return _share(
        "short-generation",
        f"of sampled texts agree for {SHORT_STEPS} tokens, S({SHORT_STEPS})",
        share,
        limits,
        "predicted",
    )


def _wilson(count: int, total: int) -> dict[str, float]:
    """A share with its 95 % Wilson interval."""
    z, share = 1.959963984540054, count / total
    middle = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * float(np.sqrt(share * (1 - share) / total + z * z / (4 * total * total)))
    return {"mean": share, "low": max(0.0, middle - half), "high": min(1.0, middle + half)}
