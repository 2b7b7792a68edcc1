"""What evaluations say on the page and in the terminal: foreign characters, missing numbers, and results of before."""

import copy
import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest

import prunelens.report.terminal.evaluate as terminal
from conftest import text_model
from prunelens.api import evaluate
from prunelens.report.pages.evaluate import render_evaluation, render_evaluation_summary
from prunelens.report.pages.rerender import render_again
from prunelens.report.task_words import amount, chance_words, remark
from prunelens.report.terminal.evaluate import print_evaluation
from prunelens.report.terminal.screen import console
from prunelens.results import Evaluation
from prunelens.study.store import Run

HOSTILE = "<script>alert(1)</script>\x1b[31m\nnew\u202eline\u200b\t"
NEW_ROW = ("aggregation", "right", "adds", "reason")
EMPTY = {"mean": None, "low": None, "high": None}


@pytest.fixture(scope="module")
def found() -> Evaluation:
    return evaluate(text_model(), text_model("gpt2"), tasks="core_choice,core_facts", limit=4)


def with_info(found: Evaluation, info: dict[str, Any]) -> Run:
    return Run(found.tables, info)


def printed(info: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", "400")
    screen = console()
    monkeypatch.setattr(terminal, "console", lambda: screen)
    with screen.capture() as captured:
        print_evaluation(info, full=True)
    return captured.get()


def hostile(info: dict[str, Any]) -> dict[str, Any]:
    """The same with foreign characters in every name and sentence."""
    info = copy.deepcopy(info)
    info["notes"] = [HOSTILE]
    for record in info["summary"]:
        record["compressed"] = HOSTILE
        for row in record["scores"]:
            row |= {"task": f"task {HOSTILE}", "metric": f"metric {HOSTILE}", "reason": f"reason {HOSTILE}"}
        for line in record["verdicts"]:
            line |= {"number": f"number {HOSTILE}", "reason": f"reason {HOSTILE}", "use": f"use {HOSTILE}"}
    info["summary"][0]["verdicts"][0] |= {"value": 0.5, "low": 0.25, "high": 0.75, "verdict": HOSTILE}
    return info


def test_nothing_foreign_reaches_the_page(found: Evaluation) -> None:
    run = with_info(found, hostile(found.info))
    for page in (render_evaluation(run), render_evaluation_summary(run)):
        assert "<script>alert" not in page
        assert "&lt;script&gt;alert(1)" in page
        assert not set("\x1b\u202e\u200b") & set(page)


def test_nothing_foreign_steers_the_terminal(found: Evaluation, monkeypatch: pytest.MonkeyPatch) -> None:
    text = printed(hostile(found.info), monkeypatch)
    assert "alert(1)" in text
    assert {letter for letter in text if unicodedata.category(letter) in ("Cc", "Cf")} <= {"\n"}
    assert not [line for line in text.splitlines() if line.startswith("new")]
    rows = [line for line in text.splitlines() if "metric <script>" in line]
    assert len(rows) == len(found.summary[0]["scores"])  # a line end in a name breaks no row


def test_markup_of_the_terminal_is_shown_as_it_is(found: Evaluation, monkeypatch: pytest.MonkeyPatch) -> None:
    info = copy.deepcopy(found.info)
    info["summary"][0]["scores"][0] |= {"metric": "[bold red]acc[/]", "task": "[link=x]task[/link]"}
    text = printed(info, monkeypatch)
    assert "[bold red]acc[/]" in text
    assert "[link=x]task[/link]" in text


def test_missing_numbers_are_dashes(found: Evaluation, monkeypatch: pytest.MonkeyPatch) -> None:
    info = copy.deepcopy(found.info)
    row = info["summary"][0]["scores"][0]
    row |= {"dense": EMPTY, "difference": EMPTY, "decides": None, "kept": None, "reason": "no finite number"}
    assert "no finite number" in printed(info, monkeypatch)
    assert "no finite number" in render_evaluation(with_info(found, info))
    assert amount(EMPTY, True) == amount(EMPTY, False) == "—"
    assert amount({"mean": 2.5, "low": None, "high": None}, False) == "2.500"
    assert amount({"mean": -0.5, "low": -0.75, "high": 0.25}, True) == "−50.0 % [−75.0, 25.0]"
    assert amount({"mean": 123456.7, "low": 1234.5, "high": 2.5e9}, False) == "123,457 [1,234, 2.5e+09]"


def test_an_unknown_chance_is_said() -> None:
    row = {"chance": None, "better": "higher", "metric": "acc", "at_chance": False, "tie": False}
    assert chance_words(row) == "unknown"
    assert chance_words(row | {"better": "lower"}) == ""
    assert chance_words(row | {"chance": 0.25}) == "25.0 %"
    assert chance_words(row | {"chance": 0.0}) == ""
    assert remark(row | {"aggregation": "perplexity", "tie": True}) == "tie; by perplexity"
    assert remark(row | {"at_chance": True}) == "dense may be 0"


def test_a_result_of_an_older_version_opens(found: Evaluation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found.report(tmp_path / "old")
    path = tmp_path / "old" / "run.json"
    info = json.loads(path.read_text(encoding="utf-8"))
    del info["decoding"], info["settings"]["allow_code"]
    for row in info["summary"][0]["scores"]:
        for name in NEW_ROW:
            del row[name]
    path.write_text(json.dumps(info), encoding="utf-8")
    again = Evaluation.open(tmp_path / "old")
    assert "core_choice" in render_again(tmp_path / "old")
    assert "core_choice" in printed(again.info, monkeypatch)
    assert again._repr_html_()
