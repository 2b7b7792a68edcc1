"""The compressed models as drafts of the dense one (S5): what was forecast beside what was measured."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prunelens.report.wording import DASH, interval, number, percent
from prunelens.study.store import Run


@dataclass(frozen=True)
class Compared:
    """One quantity, forecast and measured."""

    predicted: str
    measured: str
    below: str = ""


@dataclass(frozen=True)
class DraftRow:
    """One compressed model; `sentence` says where forecast and measurement part, or why nothing was measured."""

    model: int
    acceptance: Compared
    tokens: Compared
    drafting: Compared
    checking: Compared
    speedup: Compared
    sentence: str


def draft_rows(run: Run) -> list[DraftRow]:
    """One row per compressed model."""
    return [_row(run, index, record["draft"]) for index, record in enumerate(run.info["summary"])]


def draft_how(run: Run) -> str:
    """What the table is about, in plain words."""
    num_drafted = run.info["summary"][0]["draft"]["num_drafted"]
    measured = next((found for record in run.info["summary"] if (found := record["draft"].get("measured"))), None)
    text = (
        f"In speculative decoding the compressed model drafts {num_drafted} tokens, and the dense model judges them in "
        "one pass, so that the text is distributed as the dense model's own. The forecast takes 1 − TV as the share "
        "that is accepted and the share of parameters as the cost of a drafted token. A speed-up below 1 is slower "
        "than the dense model alone."
    )
    if measured is None:
        return text
    return (
        f"{text} Measured on {_count(measured['prompts'], 'prompt')}, one text at a time; "
        f"the range of the speed-up is that of the prompts."
    )


def _row(run: Run, index: int, found: Mapping[str, Any]) -> DraftRow:
    measured = found.get("measured")
    label = run.info["compressed"][index]["label"]
    expected = sum(found["acceptance"] ** count for count in range(found["num_drafted"] + 1))
    known = measured or {}
    judged = f"{known['accepted']} of {known['examined']}" if measured else ""
    speed = known.get("speedup")
    return DraftRow(
        index,
        Compared(percent(found["acceptance"]), percent(known.get("acceptance")), judged),
        Compared(number(expected), number(known.get("tokens_per_dense_call"))),
        Compared(number(found["cost_ratio"]), number(known.get("cost_ratio"))),
        Compared("1", number(known.get("check_ratio"))),
        Compared(number(found["speedup"]), number(speed["value"]), interval(speed))
        if speed
        else Compared(number(found["speedup"]), DASH),
        _explained(found, measured, expected) if measured else _unmeasured(run, label),
    )


def _explained(found: Mapping[str, Any], measured: Mapping[str, Any], expected: float) -> str:
    """Why the forecast and the measurement differ: tokens of a round, and what a round costs."""
    drafted = found["num_drafted"]
    speeds = (
        f"{number(measured['assisted_tokens_per_second'])} tokens a second with the draft, "
        f"{number(measured['plain_tokens_per_second'])} without"
    )
    cost, check = measured["cost_ratio"], measured["check_ratio"]
    if cost is None or check is None:
        return f"{speeds}. The texts are too short to tell what a drafted token costs."
    return (
        f"{speeds}. A round was forecast to give {number(expected)} tokens for the time of "
        f"{number(drafted * found['cost_ratio'] + 1)} dense tokens; it gave "
        f"{number(measured['tokens_per_dense_call'])} for {number(drafted * cost + check)}: {drafted} times "
        f"{number(cost)} to draft, and {number(check)} to judge {drafted + 1} positions at once."
    )


def _unmeasured(run: Run, label: str) -> str:
    nulls = run.info["nulls"]
    reason = nulls.get(f"draft.measured.{label}")
    return f"Not measured: {reason}." if reason else "Not measured: prunelens compare … --draft adds it."


def _count(value: int, unit: str) -> str:
    return f"{value} {unit}{'s' if value != 1 else ''}"
