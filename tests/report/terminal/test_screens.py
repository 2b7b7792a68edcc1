"""What commands print: one screen at 80 columns, the answer first, nothing cut."""

import copy
from pathlib import Path
from typing import Any

import pytest
from test_page import SETTINGS, asked

import prunelens.report.terminal.screen as screen_module
from conftest import tiny_model
from prunelens import Comparison, compare
from prunelens.report.task_words import null_lines
from prunelens.report.terminal.compare import print_result
from prunelens.report.terminal.evaluate import print_evaluation
from prunelens.report.terminal.sweep import print_sweep

LONG = "drop-attention:1+repair:linear+wanda:2:4+quantize:int8-a-folder-with-a-long-name"
NEXT = "prunelens evaluate model drop-attention:1"


@pytest.fixture(scope="module")
def found() -> Comparison:
    prompts = [asked(5, 6, 7, name="a"), asked(8, 9, options=("w7", "w8"), name="b"), asked(11, 4, name="c")]
    return compare(tiny_model(), "drop-attention:1", "drop-mlp:1", "drop-block:1", prompts=prompts, **SETTINGS)


@pytest.fixture(autouse=True)
def eighty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def screen(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines that were printed, none of them wider than the terminal."""
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert all(len(line) <= 80 for line in lines), [line for line in lines if len(line) > 80]
    return lines


def test_a_comparison_is_one_screen(found: Comparison, capsys: pytest.CaptureFixture[str]) -> None:
    print_result(found.tables, found.info, Path("run/report.html"), 93.0, NEXT)
    lines = screen(capsys)
    assert len(lines) <= 40
    assert lines[0] == f"{found.info['dense']['name']} against 3 compressed models, 3 prompts"
    text = "\n".join(lines)
    best = min(found.info["summary"], key=lambda record: record["size"]["kl_per_percent"])
    rows = [line for line in lines if line.startswith("drop-") and "%" in line]
    assert rows[0].split()[0] == best["compressed"]
    assert f"{best['kl']['mean']:.2g}" in rows[0].split()
    assert f"{100 * best['same_top1']['mean']:.1f}" in rows[0].split()
    assert lines[-1] == f"Next: {NEXT}"
    assert lines.index("The page: run/report.html") < lines.index("Took 93 s.")
    assert not any(word in text for word in ("safe", "degraded", "broken", "undecided", "predicted"))


def test_the_first_prompt_that_diverges_is_shown(found: Comparison, capsys: pytest.CaptureFixture[str]) -> None:
    tables = dict(found.tables)
    rows = tables["continuations"].to_pylist()
    dense = {row["prompt_id"]: row for row in rows if row["model"] == "dense" and row["trace"] == "greedy"}
    for row in rows:  # on the first prompt all write what the dense model writes
        if row["prompt_id"] == "a" and row["trace"] == "greedy":
            row |= {name: dense["a"][name] for name in ("token_ids", "tokens", "ended")}
        elif row["prompt_id"] == "b" and row["model"] == "drop-mlp:1" and row["trace"] == "greedy":
            first = dense["b"]["tokens"][:2]
            row |= {"token_ids": [*dense["b"]["token_ids"][:2], 3], "tokens": [*first, " else"], "ended": False}
    tables["continuations"] = type(tables["continuations"]).from_pylist(rows, tables["continuations"].schema)
    print_result(tables, found.info)
    lines = screen(capsys)
    prompts = {row["prompt_id"]: row["text"] for row in tables["prompts"].to_pylist()}
    assert any(line.startswith("greedy") and prompts["b"].split("\n")[0] in line for line in lines)
    shown = next(line for line in lines if "⟂ else" in line)
    assert shown.startswith("drop-mlp:1")
    assert shown.endswith("".join(dense["b"]["tokens"][:2]) + "⟂ else …")


def test_texts_that_never_diverge_are_said_to_be_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    same = compare(tiny_model(), "drop-block@3+quantize:int8", prompts=[asked(5, 6)], **SETTINGS)
    tables = dict(same.tables)
    rows = tables["continuations"].to_pylist()
    dense = next(row for row in rows if row["model"] == "dense" and row["trace"] == "greedy")
    for row in rows:
        if row["trace"] == "greedy":
            row |= {name: dense[name] for name in ("token_ids", "tokens", "ended")}
    tables["continuations"] = type(tables["continuations"]).from_pylist(rows, tables["continuations"].schema)
    print_result(tables, same.info)
    assert "Greedy texts: the same on every prompt." in screen(capsys)


def test_nothing_is_cut_however_long_and_large(found: Comparison, capsys: pytest.CaptureFixture[str]) -> None:
    info = copy.deepcopy(found.info)
    record = info["summary"][0]
    record["kl"] |= {"mean": 1234.5, "low": 1.234e-7, "high": 98765.4}
    print_result(found.tables, info)
    assert "[1.2e-07, 9.9e+04]" in "\n".join(screen(capsys))


@pytest.mark.parametrize("full", [False, True])
def test_a_comparison_in_full_has_every_number(
    found: Comparison, capsys: pytest.CaptureFixture[str], full: bool
) -> None:
    print_result(found.tables, found.info, full=full)
    text = "\n".join(screen(capsys))
    assert all((said in text) == full for said in ("KL per 1 %", "expected agreed tokens", "draft speed-up"))


def verdict(use: str, value: float | None, rule: str, said: str = "safe") -> dict[str, Any]:
    ends = {"low": None, "high": None} if value is None else {"low": value - 0.1, "high": value + 0.1}
    return {
        "use": use,
        "verdict": said,
        "number": "kept",
        "value": value,
        "rule": rule,
        "source": "",
        "reason": "",
    } | ends


def evaluation(label: str) -> dict[str, Any]:
    shares = "safe ≥ 95 %, broken < 80 %"
    verdicts = [
        verdict("retrieval", 1.05, shares),
        verdict("multiple-choice", 0.5, shares, "broken"),
        verdict("short-generation", None, "", "not measured"),
        verdict("long-generation", 0.084, "safe ≤ 0.1, broken > 0.5", "undecided") | {"more": 1300},
    ]
    large = {"mean": 123456789.123, "low": None, "high": None}
    row = {
        "task": "wikitext-with-a-name",
        "metric": "word_perplexity",
        "items": 62,
        "chance": None,
        "better": "lower",
        "dense": large,
        "compressed": large,
        "at_chance": False,
        "tie": False,
        "lost": None,
        "gained": None,
        "difference": {"mean": -98765432.1, "low": -198765432.1, "high": 98765432.1},
    }
    cut = row | {"task": "core_long", "metric": "cut_by_limit", "items": 36, "chance": 0.25, "lost": 3, "gained": 12}
    cut |= {side: {"mean": 0.5, "low": None, "high": None} for side in ("dense", "compressed")}
    cut |= {"difference": {"mean": -0.123, "low": -0.456, "high": 0.789}, "sign_test": 0.0001}
    return {"compressed": label, "verdicts": verdicts, "scores": [row, cut]}


@pytest.mark.parametrize("full", [False, True])
def test_an_evaluation_is_one_screen_and_cuts_no_number(capsys: pytest.CaptureFixture[str], full: bool) -> None:
    info = {"dense": {"name": "smollm2"}, "tasks": [], "notes": [], "settings": {"long_tokens": 256}}
    labels = ["drop-attention:4", LONG, "wanda:2:4", "quantize:int8"]
    print_evaluation(info | {"summary": list(map(evaluation, labels))}, Path("run/report.html"), 3.0, NEXT, full)
    lines = screen(capsys)
    assert full or len(lines) <= 40
    text = "\n".join(lines)
    assert LONG in text.replace("\n", "").replace(" ", "") or LONG[:16] in text
    assert "105 %" in text
    assert "[95, 115]" in text
    assert "+0.084 nats" in text
    assert "≈ 1,300 more" in text
    assert "cut 50 % of the dense model's texts" in " ".join(text.split())
    if full:
        assert "1.23e+08" in text
        assert "[−1.99e+08, 9.88e+07]" in text
        assert "[−45.6, 78.9]" in text
        assert "3 / 12 (p 0.0001)" in text


def test_a_sweep_is_one_screen(capsys: pytest.CaptureFixture[str]) -> None:
    verdicts = evaluation("")["verdicts"]
    cell = {"status": "done", "bytes_saved": 0.052, "zeros": 0.0, "kl": 12.3456, "verdicts": verdicts, "error": ""}
    failed = cell | {"recipe": "drop-block:9", "seed": 1, "status": "failed", "error": "no such block"}
    cells = [cell | {"recipe": LONG if number == 1 else f"drop-attention:{number}", "seed": 0} for number in range(30)]
    info = {"study": {"model": "smollm2", "seeds": [0, 1]}, "cells": {"done": 30, "all": 31}, "calibration": []}
    print_sweep(info | {"summary": [failed, *cells], "notes": []}, Path("page.html"), 61.0)
    lines = screen(capsys)
    assert len(lines) <= 40
    text = "\n".join(lines)
    assert "… and 11 more" in text
    assert "drop-block:9 failed: no such block" in text
    assert "12.3" in text
    print_sweep(info | {"summary": [failed, *cells]}, full=True)
    assert "drop-attention:29" in "\n".join(screen(capsys))


@pytest.mark.parametrize("installed", [True, False])
def test_what_the_next_command_needs_is_said(
    found: Comparison, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, installed: bool
) -> None:
    monkeypatch.setattr(screen_module, "find_spec", lambda name: object() if installed else None)
    print_result(found.tables, found.info, Path("run/report.html"), 93.0, "prunelens evaluate tiny drop-mlp:1")
    last = screen(capsys)[-1]
    assert (last == "Next: prunelens evaluate tiny drop-mlp:1") == installed
    assert ("pip install 'prunelens[tasks]'" in last) != installed


def test_the_dense_model_against_itself_is_one_line() -> None:
    ends = {"mean": -0.021, "low": -0.11, "high": 0.07}
    rows = [{"metric": name, "difference": ends} for name in ("excess_nll", "atypical", "distinct_3")]
    rows.append({"metric": "length", "difference": {"mean": None, "low": None, "high": None}})
    (line,) = null_lines({"null": rows})
    assert "excess_nll −0.021 [−0.110, 0.070], atypical −2.1 % [−11.0, 7.0]" in line
    assert "distinct" not in line
    assert "length" not in line
    assert null_lines({}) == null_lines({"null": []}) == []  # results of earlier versions, and without long texts
