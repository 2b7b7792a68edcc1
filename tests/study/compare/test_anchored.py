"""Anchors: what rounding the dense weights does, as a second model with rounded weights shows it."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_compare import texts

from conftest import tiny_model, tiny_network, tiny_tokenizer
from prunelens.api import compare
from prunelens.errors import PrunelensError
from prunelens.metrics.survival import survival_rows
from prunelens.models.model import Model
from prunelens.models.opening.loading import wrap
from prunelens.pruning.anchors import round_rows
from prunelens.report.pages.compare import render_page
from prunelens.results import Comparison
from prunelens.study.compare import anchored
from prunelens.study.compare.schemas import STAT_COLUMNS
from prunelens.study.store import Run

SETTINGS = {"max_new_tokens": 8, "lens_steps": 0}
KEYS = ("prompt_id", "trace", "step", "position", "token_id")


def rounded(model: Model, kind: str) -> Model:
    """A second model with weights that were rounded in place."""
    network = copy.deepcopy(model.network)
    if kind == "bfloat16":
        for weight in network.parameters():
            weight.data = weight.data.to(torch.bfloat16).to(weight.dtype)
    else:
        for name, module in network.model.layers.named_modules():
            if isinstance(module, torch.nn.Linear):
                assert name
                module.weight.data = round_rows(module.weight.data, inputs_first=False)
    return wrap(network, tiny_tokenizer(), kind)


def rows_of(found: Comparison, table: str, **wanted: str) -> list[dict[str, Any]]:
    rows = found.tables[table].to_pylist()
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


@pytest.fixture(scope="module")
def case() -> tuple[Model, Comparison]:
    model = tiny_model("llama")
    return model, compare(model, "drop-mlp@1", prompts=texts(), **SETTINGS)


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_an_anchor_has_the_numbers_of_a_model_with_rounded_weights(kind: str, case: tuple[Model, Comparison]) -> None:
    model, found = case
    other = compare(model, rounded(model, kind), prompts=texts(), anchors=(), **SETTINGS)
    own = rows_of(found, "anchors", anchor=kind)
    steps = {tuple(row[key] for key in KEYS): row for row in other.tables["steps"].to_pylist()}
    assert len(own) == sum(row["trace"] != "free" for row in steps.values())
    for row in own:
        wanted = steps[tuple(row[key] for key in KEYS)]
        for name in STAT_COLUMNS:
            if name not in ("amplification", "amplification_estimate", "trust"):  # ratios of differences near zero
                assert row[name] == pytest.approx(wanted[name], rel=1e-3, abs=1e-5), name
    (record,) = [one for one in found.info["anchors"] if one["anchor"] == kind]
    (summary,) = other.summary
    for name in ("kl", "tv", "same_top1"):
        for end in ("mean", "low", "high"):
            assert record[name][end] == pytest.approx(summary[name][end], rel=1e-3, abs=1e-6)
    assert record["survival"]["8"]["value"] == pytest.approx(summary["survival"]["8"]["value"], abs=1e-5)
    assert record["survival"]["8"]["low"] == pytest.approx(summary["survival"]["8"]["low"], abs=1e-5)
    assert record["faithful_length"]["median"] == summary["faithful_length"]["median"]


def test_the_curve_is_the_mean_over_texts(case: tuple[Model, Comparison]) -> None:
    _, found = case
    for record in found.info["anchors"]:
        rows = rows_of(found, "anchors", anchor=record["anchor"], trace="sampled")
        names = dict.fromkeys(row["prompt_id"] for row in rows)
        sides = [
            [np.array([row[column] for row in rows if row["prompt_id"] == name]) for name in names]
            for column in ("acceptance", "tv")
        ]
        assert record["curve"] == pytest.approx(survival_rows(*sides, 8).mean(axis=0).tolist(), abs=1e-12)
        assert record["prompts"] == len(names) == len(texts())


def test_many_prompts_are_sampled_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(anchored, "MOST_PROMPTS", 2)
    found = compare(tiny_model("llama"), "drop-mlp@1", prompts=texts(), anchors=("int8",), **SETTINGS)
    names = [prompt.prompt_id for prompt in texts()]
    chosen = [names[0], names[len(names) // 2]]
    assert list(dict.fromkeys(row["prompt_id"] for row in rows_of(found, "anchors"))) == chosen
    assert found.info["anchors"][0]["prompts"] == 2


def test_nothing_else_changes_and_the_weights_stay(case: tuple[Model, Comparison]) -> None:
    model, found = case
    before = {name: weight.clone() for name, weight in model.network.named_parameters()}
    without = compare(model, "drop-mlp@1", prompts=texts(), anchors=(), **SETTINGS)
    assert without.info["anchors"] == []
    assert without.tables["anchors"].num_rows == 0
    for name, table in without.tables.items():
        if name != "anchors":
            assert found.tables[name].equals(table), name
    assert all(torch.equal(weight, before[name]) for name, weight in model.network.named_parameters())


def test_a_model_that_cannot_be_rounded_says_why() -> None:
    network = tiny_network("llama").to(torch.bfloat16).float()
    found = compare(wrap(network, tiny_tokenizer(), "stored"), "drop-mlp@1", prompts=texts(), **SETTINGS)
    first, second = found.info["anchors"]
    assert "bfloat16 number already" in first["reason"]
    assert "reason" not in second
    page = render_page(Run(found.tables, found.info))
    assert "No anchor bfloat16" in page
    assert "dense in int8" in page


def test_rows_and_curves_of_anchors_are_shown(case: tuple[Model, Comparison], capsys: Any, tmp_path: Path) -> None:
    from prunelens.report.terminal.compare import print_result

    _, found = case
    print_result(found.tables, found.info)
    shown = capsys.readouterr().out
    assert "dense in bfloat16" in shown
    assert "dense in int8" in shown
    assert "Dense in bfloat16, int8: its own weights rounded" in shown
    print_result(found.tables, found.info | {"anchors": []})
    assert "weights rounded" not in capsys.readouterr().out
    page = render_page(Run(found.tables, found.info))
    for kind in ("bfloat16", "int8"):
        assert page.count(f"dense in {kind}") >= 3  # the answer, more numbers, the curve
    found.report(tmp_path / "run")
    assert Comparison.open(tmp_path / "run").info["anchors"] == found.info["anchors"]


@pytest.mark.parametrize("given", [("int4",), ("int8", "int8"), "int8", ("",)])
def test_anchors_that_there_are_not(given: Any) -> None:
    with pytest.raises(PrunelensError, match="anchor"):
        compare(tiny_model("llama"), "drop-mlp@1", prompts=texts(), anchors=given, **SETTINGS)
