"""`compare` with a forecast: what is expected in each use, from a sweep of the same model, and nothing else."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_compare import texts

from conftest import tiny_model
from prunelens.api import compare
from prunelens.errors import PrunelensError
from prunelens.report.pages.compare import render_page
from prunelens.report.terminal.compare import print_result
from prunelens.study.compare.tables import prompts_table
from prunelens.study.evaluate.words import ORDER
from prunelens.study.forecast import FILE, SETTINGS, ClassForecast, Forecast, Point, expect, prompts_hash
from prunelens.study.store import Run
from prunelens.tasks.encoding import encode

CHOSEN: dict[str, Any] = {"max_new_tokens": 8, "lens_steps": 0, "anchors": ()}


def forecast(folder: Path, **changed: Any) -> Path:
    """A forecast of the tiny model on the test's prompts: the loss of short answers is half of the KL."""
    model = tiny_model("llama")
    points = [Point(recipe=f"r{at}", predictors={"kl": float(kl)}, loss=float(kl) / 2) for at, kl in enumerate(KLS)]
    short = ClassForecast(use="short-generation", predictor="kl", bounded=True, points=points, coverage=0.9, width=0.1)
    values: dict[str, Any] = {
        "dense": "tiny",
        "fingerprint": model.fingerprint,
        "settings": {"max_new_tokens": 8, "temperature": 1.0, "chat_template": True},
        "prompts": prompts_hash(prompts_table(encode(texts(), model, True, 8))),
        "classes": [
            short,
            short.model_copy(update={"use": "retrieval", "withheld": "it rests on 3 recipes; 24 are needed"}),
            short.model_copy(update={"use": "long-generation", "bounded": False}),
        ],
    }
    folder.mkdir(exist_ok=True)
    (folder / FILE).write_text(Forecast(**values | changed).model_dump_json())
    return folder


KLS = np.linspace(0, 2, 26)


def test_each_use_has_its_expectation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = forecast(tmp_path / "sweep")
    found = compare(tiny_model("llama"), "drop-mlp@1", prompts=texts(), forecast=str(folder), **CHOSEN)
    (record,) = found.summary
    short, retrieval, long = record["expected"]
    assert 0 < record["kl"]["mean"] < 2
    assert short["value"] == pytest.approx(record["kl"]["mean"] / 2, abs=0.03)
    assert short["low"] <= short["value"] <= short["high"]
    assert retrieval["refused"].startswith("it rests on 3")
    assert long["value"] == short["value"]
    wanted = [vars(one) for one in expect(Forecast.model_validate_json((folder / FILE).read_text()), record)]
    assert record["expected"] == wanted
    print_result(found.tables, found.info)
    page = render_page(Run(found.tables, found.info))
    for shown in (" ".join(capsys.readouterr().out.split()), page):
        assert f"short generation: expected to keep {100 * (1 - short['value']):.0f} %" in shown
        assert "forecast from mean KL, 26 recipes of this model" in shown
        assert "retrieval: no forecast, it rests on 3 recipes" in shown
        assert f"expected excess of {long['value']:+.2f} nats per token" in shown
    lines = [line for line in page.splitlines() if "expected to keep" in line]
    assert not any(f" {word} " in line.partition("<small>")[2] for line in lines for word in ORDER)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"fingerprint": "other"}, "other weights"),
        ({"settings": {"max_new_tokens": 16, "temperature": 1.0, "chat_template": True}}, "max-new-tokens 16"),
        ({"prompts": "other"}, "prompts of the sweep"),
    ],
)
def test_what_was_fitted_on_something_else_is_refused_before_anything_runs(
    changed: dict[str, Any], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prunelens.study.compare.compare.Stages", None)
    folder = forecast(tmp_path / "sweep", **changed)
    with pytest.raises(PrunelensError, match=says):
        compare(tiny_model("llama"), "drop-mlp@1", prompts=texts(), forecast=str(folder), **CHOSEN)


def test_without_a_forecast_nothing_is_expected() -> None:
    found = compare(tiny_model("llama"), "drop-mlp@1", prompts=texts(), **CHOSEN)
    assert "expected" not in found.summary[0]
    assert set(SETTINGS) <= set(found.info["settings"])


@pytest.mark.parametrize("given", [3, Path("x")])
def test_a_forecast_that_is_no_path(given: Any) -> None:
    with pytest.raises(PrunelensError, match="forecast"):
        compare(tiny_model("llama"), "drop-mlp@1", prompts=texts(), forecast=given, **CHOSEN)
