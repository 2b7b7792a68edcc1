"""Figures of many steps: the quantile curves are numpy's, and the points do not grow with the run."""

import json

import numpy as np
import pytest

from conftest import tiny_model
from prunelens import compare
from prunelens.report.figures import points
from prunelens.report.figures.curves import QUANTILES
from prunelens.report.figures.points import NUM_BINS, SMALLEST_BIN, binned_quantiles, estimates_figure
from prunelens.study.store import Run
from prunelens.tasks.prompts import PromptText


def test_quantiles_of_bins_are_numpys() -> None:
    draw = np.random.default_rng(0)
    truth = 10 ** draw.normal(-2, 1, 5000)
    estimate = truth * 10 ** draw.normal(0, 0.3, 5000)
    middles, found = binned_quantiles(truth, estimate)
    width = (np.log10(truth.max()) - np.log10(truth.min())) / NUM_BINS
    checked = 0
    for number in range(NUM_BINS):
        low = np.log10(truth.min()) + number * width
        inside = (np.log10(truth) >= low) & ((np.log10(truth) < low + width) | (number == NUM_BINS - 1))
        if inside.sum() < SMALLEST_BIN:
            continue
        at = int(np.argmin(np.abs(np.log10(middles) - (low + width / 2))))
        assert np.log10(middles[at]) == pytest.approx(low + width / 2)
        assert found[:, at] == pytest.approx(np.quantile(estimate[inside], QUANTILES))
        checked += 1
    assert checked == len(middles) > NUM_BINS / 2


def test_equal_truths_are_one_bin() -> None:
    middles, found = binned_quantiles(np.full(100, 0.25), np.arange(100.0))
    assert middles == pytest.approx([0.25])
    assert found[:, 0] == pytest.approx(np.quantile(np.arange(100.0), QUANTILES))


def test_many_steps_are_curves_and_few_points(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(points, "SMALLEST_BIN", 2)
    asked = [
        PromptText(f"p{number}", "text", ({"role": "user", "content": f"w{number + 3} w7"},)) for number in range(9)
    ]
    found = compare(tiny_model(), "drop-block:1", prompts=asked, max_new_tokens=6, chat_template=False)
    run = Run(found.tables, found.info)
    few = [json.loads(panel.spec)["data"] for panel in estimates_figure(run, 0).panels]
    assert all(len(traces) == 3 for traces in few)
    monkeypatch.setattr(points, "BINNED_FROM", 20)
    monkeypatch.setattr(points, "BINNED_POINTS", 10)
    figure = estimates_figure(run, 0)
    for panel in figure.panels:
        traces = json.loads(panel.spec)["data"]
        assert [trace["name"] for trace in traces[:3]] == ["5–95 %", "25–75 %", "median"]
        assert sum(len(trace["text"]) for trace in traces if trace["mode"] == "markers") == 10
    assert "10 of" in figure.notes[1]
    assert "Curve and bands are of all steps" in figure.how
