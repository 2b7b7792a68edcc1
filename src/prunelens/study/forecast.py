"""Forecasts of what a compressed model loses in each use, from one comparison (F1).

Fitted on the cells of a sweep, in which both were measured; good for the same dense model, prompts and settings, and
only inside the range of what was fitted. A class whose intervals do not cover when cells are left out is withheld.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, StrictBool, StrictFloat, StrictInt, StrictStr, ValidationError

from prunelens.documents import read_json
from prunelens.errors import PrunelensError, shown
from prunelens.metrics.monotone import left_out_misses, next_point
from prunelens.metrics.survival import Interval

FILE = "forecast.json"
FORMAT = ("prunelens-forecast", 1)
LEVEL = 0.9
COVERS = (0.80, 0.97)
"""Shares of left-out cells inside their 90 % intervals between which a forecast is given."""
MIN_CELLS = 24
SETTINGS = ("max_new_tokens", "temperature", "chat_template")
"""Settings of a comparison that its numbers depend on."""

Summary = Mapping[str, Any]


@dataclass(frozen=True)
class Predictor:
    """A number of a comparison that grows with the damage."""

    words: str
    read: Callable[[Summary], float | None]


def _survival_lost(summary: Summary) -> float | None:
    found = summary["survival"].get("8")
    return None if found is None else 1 - found["value"]


def _options_kl(summary: Summary) -> float | None:
    return summary["options"]["kl_mean"] if summary["options"] else None


PREDICTORS = {
    "kl": Predictor("mean KL", lambda summary: summary["kl"]["mean"]),
    "tv": Predictor("mean total variation", lambda summary: summary["tv"]["mean"]),
    "survival_8": Predictor("1 − S(8)", _survival_lost),
    "excess_nll": Predictor("excess NLL of the next token", lambda summary: summary["excess_nll"]["mean"]),
    "options_kl": Predictor("KL over the options", _options_kl),
}


class Point(BaseModel):
    """One recipe of the sweep: its predictors, and what it lost."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    recipe: StrictStr
    predictors: dict[StrictStr, StrictFloat]
    loss: StrictFloat


class ClassForecast(BaseModel):
    """One class of use.

    Attributes:
        use: the class.
        predictor: the number that the loss is read from.
        bounded: whether the loss is a share of the dense score.
        points: the recipes it is fitted on.
        coverage: share of recipes inside the 90 % interval that the others give.
        width: median width of those intervals.
        withheld: why it is not given; empty if it is.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    use: StrictStr
    predictor: StrictStr
    bounded: StrictBool
    points: list[Point]
    coverage: StrictFloat | None = None
    width: StrictFloat | None = None
    withheld: StrictStr = ""


class Forecast(BaseModel):
    """What a sweep of one dense model says of models that were only compared with it."""

    model_config = ConfigDict(extra="forbid")
    format: StrictStr = FORMAT[0]
    format_version: StrictInt = FORMAT[1]
    dense: StrictStr
    fingerprint: StrictStr
    settings: dict[StrictStr, Any]
    prompts: StrictStr
    classes: list[ClassForecast]


@dataclass(frozen=True)
class Expected:
    """What is expected of one compressed model in one class.

    Attributes:
        use: the class.
        value, low, high: loss with its 90 % interval: 1 - share kept, or an amount where it is not `bounded`.
        cells: recipes it was fitted on.
        predictor: what it was read from, in words.
        refused: why there is none.
    """

    use: str
    bounded: bool
    cells: int
    predictor: str = ""
    value: float | None = None
    low: float | None = None
    high: float | None = None
    refused: str = ""


def fit(use: str, points: Sequence[Point], bounded: bool) -> ClassForecast:
    """Choose the predictor that misses left-out recipes the least, and see how often its 90 % intervals cover them.

    The coverage is that of the whole procedure: for each recipe the predictor is chosen anew without it.
    """
    if len(points) < MIN_CELLS:
        few = f"it rests on {len(points)} recipes; {MIN_CELLS} are needed"
        return ClassForecast(use=use, predictor="", bounded=bounded, points=list(points), withheld=few)
    best = _choose(points, bounded)
    intervals = []
    for index, point in enumerate(points):
        others = [*points[:index], *points[index + 1 :]]
        intervals.append((_interval(others, point, _choose(others, bounded), bounded), point.loss))
    coverage = float(np.mean([found.low <= loss <= found.high for found, loss in intervals]))
    width = float(np.median([found.high - found.low for found, _ in intervals]))
    low, high = COVERS
    outside = not low <= coverage <= high
    reason = f"{coverage:.0%} of left-out recipes lie in their 90 % intervals, not {low:.0%} to {high:.0%}"
    return ClassForecast(
        use=use,
        predictor=best,
        bounded=bounded,
        points=list(points),
        coverage=coverage,
        width=width,
        withheld=reason.replace("%", " %") if outside else "",
    )


def _choose(points: Sequence[Point], bounded: bool) -> str:
    """The predictor whose curve misses recipes that it was not fitted on the least, in the median."""
    usable = [name for name in PREDICTORS if all(name in point.predictors for point in points)]
    return min(usable, key=lambda name: float(np.median(left_out_misses(*_sides(points, name), bounded))))


def _sides(points: Sequence[Point], name: str) -> tuple[np.ndarray, np.ndarray]:
    return np.array([point.predictors[name] for point in points]), np.array([point.loss for point in points])


def _interval(points: Sequence[Point], new: Point, name: str, bounded: bool) -> Interval:
    return next_point(*_sides(points, name), new.predictors[name], LEVEL, bounded)


def predictors_of(summary: Summary) -> dict[str, float]:
    """What a comparison's summary of one model says, by name."""
    found = {name: predictor.read(summary) for name, predictor in PREDICTORS.items()}
    return {name: float(value) for name, value in found.items() if value is not None}


def prompts_hash(prompts: pa.Table) -> str:
    """A hash of the tokens of the prompts that a comparison read."""
    return hashlib.sha256(json.dumps(prompts["token_ids"].to_pylist()).encode()).hexdigest()


def expect(forecast: Forecast, summary: Summary) -> list[Expected]:
    """What each class is expected to lose; refused where it was withheld or lies outside the fitted range."""
    return [_expect(one, predictors_of(summary)) for one in forecast.classes]


def _expect(one: ClassForecast, found: Mapping[str, float]) -> Expected:
    start = Expected(one.use, one.bounded, len(one.points))
    if one.withheld:
        return Expected(**asdict(start) | {"refused": one.withheld})
    values = [point.predictors[one.predictor] for point in one.points]
    words, value = PREDICTORS[one.predictor].words, found.get(one.predictor)
    if value is None:
        return Expected(**asdict(start) | {"refused": f"this comparison has no {words}"})
    if not min(values) <= value <= max(values):
        outside = f"its {words} of {value:.3g} lies outside the fitted range, {min(values):.3g} to {max(values):.3g}"
        return Expected(**asdict(start) | {"refused": outside})
    new = Point(recipe="", predictors={one.predictor: value}, loss=0.0)
    interval = _interval(one.points, new, one.predictor, one.bounded)
    ends = {"value": interval.value, "low": interval.low, "high": interval.high}
    return Expected(**asdict(start) | {"predictor": words} | ends)


def read_forecast(folder: Path) -> Forecast:
    """The forecast in the folder of a sweep.

    Raises:
        PrunelensError: there is none, or it is damaged.
    """
    path = folder / FILE if folder.is_dir() else folder
    expected = f"expected the folder of a sweep with a {FILE} at {folder}"
    if not path.is_file():
        raise PrunelensError(f"{expected}, found none; a sweep that compares and measures tasks writes one")
    content = read_json(path, "a forecast")
    try:
        found = Forecast.model_validate(content)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        where = ".".join(map(str, fault["loc"]))
        raise PrunelensError(f"{expected}, found one that is damaged ({where}: {fault['msg']}); sweep again") from error
    unknown = [one.predictor for one in found.classes if not one.withheld and one.predictor not in PREDICTORS]
    if (found.format, found.format_version) != FORMAT or unknown:
        raise PrunelensError(f"{expected}, found one that this version does not read; sweep again")
    return found


def check_forecast(forecast: Forecast, fingerprint: str, settings: Mapping[str, Any], prompts: str) -> None:
    """Refuse a forecast that was fitted on another model, other prompts or other settings, before anything runs.

    Raises:
        PrunelensError: as said.
    """
    if forecast.fingerprint != fingerprint:
        raise PrunelensError(
            f"expected a forecast that was fitted on this dense model, found one of {shown(forecast.dense)} with other "
            "weights; sweep this model, or leave out --forecast"
        )
    for name in SETTINGS:
        if forecast.settings.get(name) != settings.get(name):
            option = name.replace("_", "-")
            raise PrunelensError(
                f"expected {option} {shown(forecast.settings.get(name))} as in the sweep that the forecast was fitted "
                f"on, found {shown(settings.get(name))}; compare with the same, or leave out --forecast"
            )
    if forecast.prompts != prompts:
        raise PrunelensError(
            "expected the prompts of the sweep that the forecast was fitted on, found others; compare on the same "
            "prompts, or leave out --forecast"
        )
