"""Forecasts of a class of use: fitted, tried by leaving recipes out, refused where they say nothing."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from prunelens.errors import PrunelensError
from prunelens.study.forecast import (
    FILE,
    MIN_CELLS,
    ClassForecast,
    Forecast,
    Point,
    check_forecast,
    expect,
    fit,
    predictors_of,
    prompts_hash,
    read_forecast,
)

SETTINGS = {"max_new_tokens": 32, "temperature": 1.0, "chat_template": True}


def points(count: int, seed: int = 0, useful: str = "kl") -> list[Point]:
    """Recipes whose loss follows one predictor, while the others are noise."""
    generator = np.random.default_rng(seed)
    found = []
    for number in range(count):
        damage = float(generator.exponential(0.5))
        truth = 1 - np.exp(-damage)
        loss = float(truth + 0.03 * generator.normal())
        noise = {name: float(generator.random()) for name in ("kl", "tv", "survival_8", "excess_nll", "options_kl")}
        found.append(Point(recipe=f"recipe-{number}", predictors=noise | {useful: damage}, loss=loss))
    return found


def summary(kl: float, **others: Any) -> dict[str, Any]:
    return {
        "kl": {"mean": kl},
        "tv": {"mean": 0.1},
        "survival": {"8": {"value": 0.7}},
        "excess_nll": {"mean": 0.2},
        "options": None,
    } | others


def forecast(*classes: ClassForecast) -> Forecast:
    return Forecast(
        dense="tiny", fingerprint="abc", settings=SETTINGS, prompts=prompts_hash(PROMPTS), classes=list(classes)
    )


PROMPTS = pa.table({"token_ids": pa.array([[1, 2], [3]], pa.list_(pa.int32()))})


@pytest.mark.parametrize("useful", ["kl", "survival_8", "tv"])
def test_the_predictor_that_says_most_is_chosen_and_covers(useful: str) -> None:
    found = fit("short-generation", points(30, useful=useful), bounded=True)
    assert found.predictor == useful
    assert found.coverage is not None
    assert 0.8 <= found.coverage <= 0.97 or found.withheld
    assert found.width is not None
    assert found.width < 0.5


def test_coverage_of_the_whole_procedure_by_simulation() -> None:
    covered = [fit("x", points(26, seed), True).coverage for seed in range(12)]
    assert 0.84 <= float(np.mean([value for value in covered if value is not None])) <= 0.97


def test_few_recipes_are_withheld() -> None:
    found = fit("multiple-choice", points(MIN_CELLS - 1), True)
    assert f"rests on {MIN_CELLS - 1} recipes" in found.withheld
    (expected,) = expect(forecast(found), summary(0.3))
    assert expected.refused == found.withheld
    assert expected.value is None


def test_a_forecast_is_read_from_its_curve_and_refused_outside_its_range() -> None:
    chosen = points(30)
    found = fit("short-generation", chosen, True).model_copy(update={"withheld": ""})
    inside, below, above = (expect(forecast(found), summary(kl))[0] for kl in (0.5, -1.0, 99.0))
    assert inside.value is not None
    assert inside.low is not None
    assert inside.high is not None
    assert inside.low <= inside.value <= inside.high
    assert abs(inside.value - (1 - np.exp(-0.5))) < 0.1
    assert inside.cells == 30
    for outside in (below, above):
        assert outside.value is None
        assert "outside the fitted range" in outside.refused


def test_a_number_that_is_not_there_is_said_to_be_missing() -> None:
    found = fit("multiple-choice", points(30, useful="options_kl"), True).model_copy(update={"withheld": ""})
    assert found.predictor == "options_kl"
    (expected,) = expect(forecast(found), summary(0.3))
    assert "no KL over the options" in expected.refused
    assert "options_kl" not in predictors_of(summary(0.3))
    assert predictors_of(summary(0.3, options={"kl_mean": 0.5}))["options_kl"] == 0.5
    assert "survival_8" not in predictors_of(summary(0.3, survival={}))


def test_a_forecast_is_written_and_read_again(tmp_path: Path) -> None:
    made = forecast(fit("retrieval", points(30), True))
    (tmp_path / FILE).write_text(made.model_dump_json())
    assert read_forecast(tmp_path) == made
    assert read_forecast(tmp_path / FILE) == made


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format_version": 99}, "does not read"),
        ({"classes": [{"use": "x", "predictor": "magic", "bounded": True, "points": []}]}, "does not read"),
        ({"fingerprint": 3}, "damaged"),
        ({"unknown": 1}, "damaged"),
        ({"classes": [{"use": "x"}]}, "damaged"),
    ],
)
def test_damaged_forecasts_are_refused(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    content = forecast(fit("retrieval", points(30), True)).model_dump()
    (tmp_path / FILE).write_text(json.dumps(content | change))
    with pytest.raises(PrunelensError, match=says):
        read_forecast(tmp_path)


def test_no_forecast_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PrunelensError, match="found none"):
        read_forecast(tmp_path)


@pytest.mark.parametrize(
    ("fingerprint", "settings", "prompts", "says"),
    [
        ("other", {}, None, "other weights"),
        ("abc", {"temperature": 0.7}, None, "temperature 1.0 as in the sweep"),
        ("abc", {"max_new_tokens": 64}, None, "max-new-tokens 32"),
        ("abc", {}, "other", "prompts of the sweep"),
    ],
)
def test_a_forecast_of_something_else_is_refused(
    fingerprint: str, settings: dict[str, Any], prompts: str | None, says: str
) -> None:
    made = forecast(fit("retrieval", points(30), True))
    with pytest.raises(PrunelensError, match=says):
        check_forecast(made, fingerprint, SETTINGS | settings, prompts or prompts_hash(PROMPTS))
    check_forecast(made, "abc", SETTINGS, prompts_hash(PROMPTS))
