"""The five words: how results of an older format are read, and estimates as they are said."""

import shutil
from pathlib import Path

import pyarrow as pa
import pytest

from prunelens.report.pages.rerender import render_again
from prunelens.results import Advice, Evaluation, Sweep
from prunelens.study.evaluate.words import NOT_MEASURED, ORDER, Limits, about, in_five_words, renewed
from prunelens.study.store import Run

STORED = Path(__file__).parents[2] / "stored"
WORDS = {*ORDER, NOT_MEASURED}


def old(low: float, high: float, rule: str = "safe ≥ 95 %, broken < 80 %", word: str = "at risk") -> dict[str, object]:
    return {
        "use": "retrieval",
        "verdict": word,
        "number": "kept",
        "value": (low + high) / 2,
        "low": low,
        "high": high,
    } | {
        "rule": rule,
        "source": "measured",
        "reason": "",
    }


@pytest.mark.parametrize(
    ("line", "word"),
    [
        (old(0.7, 0.97), "undecided"),
        (old(0.82, 0.94), "degraded"),
        (old(0.7, 0.82), "degraded"),
        (old(0.02, 0.2, "safe ≤ 0.1, broken > 0.5"), "undecided"),
        (old(0.2, 0.6, "safe ≤ 0.1, broken > 0.5"), "degraded"),
        (old(0.1, 0.2, "safe ≤ 5 %, broken > 25 %"), "degraded"),
        (old(0.7, 0.82, "another rule"), "undecided"),
        (old(0.99, 1.0, word="safe"), "safe"),
        (old(0.1, 0.2, word="broken"), "broken"),
    ],
)
def test_what_was_at_risk_is_judged_by_its_interval(line: dict[str, object], word: str) -> None:
    assert in_five_words(line) == line | {"verdict": word}


def test_a_prediction_is_no_verdict_any_more() -> None:
    found = in_five_words(old(0.96, 0.99, word="safe") | {"source": "predicted"})
    assert (found["verdict"], found["value"], found["rule"]) == (NOT_MEASURED, None, "")
    assert "predicted it" in str(found["reason"])


def test_every_verdict_of_a_stored_result_is_renewed() -> None:
    rows = [{"verdict": "at risk", "low": 0.7, "high": 0.9, "rule": "safe ≥ 95 %, broken < 80 %", "source": "measured"}]
    run = Run({"verdicts": pa.Table.from_pylist(rows)}, {"summary": [{"verdicts": rows}], "verdicts": rows, "other": 1})
    found = renewed(run)
    assert found.tables["verdicts"]["verdict"].to_pylist() == ["degraded"]
    assert found.info["verdicts"][0]["verdict"] == found.info["summary"][0]["verdicts"][0]["verdict"] == "degraded"
    assert run.info["verdicts"][0]["verdict"] == "at risk"


@pytest.mark.parametrize(("kind", "opened"), [("evaluate", Evaluation), ("sweep", Sweep), ("advise", Advice)])
def test_stored_results_open_with_todays_words(kind: str, opened: type, tmp_path: Path) -> None:
    shutil.copytree(STORED / kind, tmp_path / kind)
    found = opened.open(tmp_path / kind)
    lines = found.info.get("verdicts") or [line for record in found.info["summary"] for line in record["verdicts"]]
    assert {line["verdict"] for line in lines} <= WORDS
    page = render_again(tmp_path / kind)
    assert "at risk" not in page
    assert 'class="verdict v-' in page


def test_estimates_have_two_digits() -> None:
    assert [about(count) for count in (0.2, 1.0, 9.5, 44.0, 163.0, 160.0, 1234.0)] == [1, 1, 10, 44, 170, 160, 1300]


def test_how_many_times_as_many() -> None:
    limits = Limits(0.95, 0.80)
    assert limits.times_as_many(0.98, 0.92, 1.0) == pytest.approx(4)
    assert limits.times_as_many(0.9, 0.8, 1.0) == pytest.approx(4)
    assert limits.times_as_many(0.95, 0.9, 1.0) is None
    assert limits.times_as_many(0.9501, 0.9, 1.0) is None
    assert Limits(0.1, 0.5, higher=False, share=False).times_as_many(0.2, 0.05, 0.35) == pytest.approx(2.25)
