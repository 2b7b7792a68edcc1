"""The five words of a verdict, when each is said, and what a result of an older format says in them."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from prunelens.study.store import Run

SAFE, UNDECIDED, DEGRADED, BROKEN, NOT_MEASURED = "safe", "undecided", "degraded", "broken", "not measured"
ORDER = (SAFE, UNDECIDED, DEGRADED, BROKEN)
"""From the best to the worst; a class takes the worst of its numbers."""
OUT_OF_REACH = 1000
"""Times as many items as there were, beyond which nothing is said about how many more would decide."""
OLD_WORD = "at risk"
_RULE = re.compile(r"safe (?P<sign>[≥≤]) (?P<safe>[\d.e-]+)(?P<share> %)?, broken [<>] (?P<broken>[\d.e-]+)(?: %)?")


@dataclass(frozen=True)
class Limits:
    """Where safe ends and broken begins, for a number that is better when `higher`, or when lower."""

    safe: float
    broken: float
    higher: bool = True
    share: bool = True

    @property
    def rule(self) -> str:
        """In words."""
        safe, broken = (f"{100 * end:g} %" if self.share else f"{end:g}" for end in (self.safe, self.broken))
        return f"safe ≥ {safe}, broken < {broken}" if self.higher else f"safe ≤ {safe}, broken > {broken}"

    def word(self, low: float, high: float) -> str:
        """What an interval says: the whole of it on one side of a threshold, or undecided."""
        if not self.higher:
            low, high = -high, -low
        safe, broken = (self.safe, self.broken) if self.higher else (-self.safe, -self.broken)
        if low >= safe:
            return SAFE
        return BROKEN if high < broken else DEGRADED if high < safe else UNDECIDED

    def severity(self, value: float) -> float:
        """0 where safe ends, 1 where broken begins."""
        return (value - self.safe) / (self.broken - self.safe)

    def times_as_many(self, value: float, low: float, high: float) -> float | None:
        """How many times as many items would move the end of the interval to where safe ends.

        Intervals shrink with the square root of the items. None where the value lies on the threshold, or nearly.
        """
        apart = abs(value - self.safe)
        end = value - low if (value >= self.safe) else high - value
        if not apart or not math.isfinite(end):
            return None
        found = (end / apart) ** 2
        return found if found <= OUT_OF_REACH else None


def about(count: float) -> int:
    """A number of items rounded up to two digits, as an estimate is said: 163 → 170."""
    if count <= 10:
        return max(1, math.ceil(count))
    step = 10 ** (math.floor(math.log10(count)) - 1)
    return int(math.ceil(count / step) * step)


def in_five_words(line: Mapping[str, Any]) -> dict[str, Any]:
    """A stored verdict in today's words: `at risk` by its interval and rule, a prediction as not measured."""
    found = dict(line)
    if line.get("source") == "predicted":
        reason = "no task of this class was run; an older version predicted it from a comparison"
        ends = dict.fromkeys(("value", "low", "high"))
        return found | ends | {"verdict": NOT_MEASURED, "number": "", "rule": "", "source": "", "reason": reason}
    if line["verdict"] != OLD_WORD:
        return found
    rule = _RULE.fullmatch(line["rule"] or "")
    if rule is None or line["low"] is None or line["high"] is None:
        return found | {"verdict": UNDECIDED}
    unit = 100.0 if rule["share"] else 1.0
    limits = Limits(float(rule["safe"]) / unit, float(rule["broken"]) / unit, rule["sign"] == "≥")
    return found | {"verdict": limits.word(line["low"], line["high"])}


def renewed(run: Run) -> Run:
    """A stored result with every verdict in today's words."""
    info = dict(run.info)
    if "verdicts" in info:
        info["verdicts"] = [in_five_words(line) for line in info["verdicts"]]
    if "summary" in info:
        info["summary"] = [
            record | {"verdicts": [in_five_words(line) for line in record["verdicts"]]} for record in info["summary"]
        ]
    tables = dict(run.tables)
    if "verdicts" in tables:
        rows = [in_five_words(line) for line in tables["verdicts"].to_pylist()]
        tables["verdicts"] = pa.Table.from_pylist(rows, tables["verdicts"].schema)
    return Run(tables, info)
