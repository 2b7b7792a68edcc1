"""What the run.json of an evaluation holds, for each compressed model and in all."""

from pydantic import Field, StrictBool, StrictFloat, StrictStr

from prunelens.study.record import Count, Dense, Interval, Made, Number, Part, Size, Texts


class Line(Part):
    """A verdict for one class of use, the number that decided it, and why."""

    use: StrictStr
    verdict: StrictStr
    number: StrictStr
    value: Number
    low: Number
    high: Number
    rule: StrictStr
    source: StrictStr
    reason: StrictStr
    used: Size = 0
    there: Size = 0
    more: Size | None = None
    stopped_early: StrictBool = False


class Score(Part):
    """One metric of one task: both models, their difference, and items lost and gained."""

    task: StrictStr
    metric: StrictStr
    decides: StrictStr | None
    items: Size
    there: Size | None = None
    chance: Number
    dense: Interval
    compressed: Interval
    difference: Interval
    at_chance: StrictBool
    tie: StrictBool
    lost: Size | None
    gained: Size | None
    sign_test: Number


class Judged(Part):
    """One compressed model: its scores and its verdicts."""

    compressed: StrictStr
    scores: list[Score]
    verdicts: list[Line]


class Thresholds(Part):
    """Where safe ends and broken begins."""

    safe: StrictFloat
    broken: StrictFloat
    safe_nll: StrictFloat
    broken_nll: StrictFloat
    safe_loops: StrictFloat
    broken_loops: StrictFloat


class TaskSettings(Part):
    """The settings that the page names."""

    long_tokens: Count


class EvaluationInfo(Part):
    """Of an evaluation."""

    created: StrictStr
    dense: Dense
    compressed: list[Made] = Field(min_length=1)
    tasks: Texts
    settings: TaskSettings
    thresholds: Thresholds
    notes: Texts
    seconds: StrictFloat
    versions: dict[StrictStr, StrictStr]
    summary: list[Judged] = Field(min_length=1)
    null: list[Score] = Field(default_factory=list)
