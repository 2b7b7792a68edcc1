"""What the run.json of a sweep holds."""

from typing import Any

from pydantic import StrictInt, StrictStr

from prunelens.study.evaluate.record import Line, Thresholds
from prunelens.study.record import Count, Number, Part, Size


class Studied(Part):
    """What the study asked for."""

    model: StrictStr
    seeds: list[StrictInt]
    thresholds: Thresholds


class Cells(Part):
    """How many cells are done, of how many."""

    done: Size
    all: Size


class Cell(Part):
    """One recipe with one seed."""

    recipe: StrictStr
    seed: StrictInt
    status: StrictStr
    error: StrictStr | None
    compressed: StrictStr
    bytes_saved: Number = None
    zeros: Number = None
    kl: Number = None
    verdicts: list[Line]


class Forecast(Part):
    """How well one quantity orders the models by what was measured."""

    use: StrictStr
    name: StrictStr
    rho: Number
    n: Count
    points: list[dict[StrictStr, Any]]


class Alike(Part):
    """A model among those that choose equally well."""

    recipe: StrictStr
    choice: Number
    choice_dense: Number
    short_kept: Number
    loops: Number
    excess_nll: Number
    survival_8: Number
    kl: Number


class ClassForecast(Part):
    """How well one class can be told from a comparison."""

    use: StrictStr
    predictor: StrictStr
    points: list[dict[StrictStr, Any]]
    coverage: Number = None
    width: Number = None
    withheld: StrictStr


class Forecasts(Part):
    """What forecast.json holds too."""

    classes: list[ClassForecast]


class SweepInfo(Part):
    """Of a sweep."""

    study: Studied
    cells: Cells
    summary: list[Cell]
    calibration: list[Forecast]
    alike: list[Alike]
    forecast: Forecasts | None = None
