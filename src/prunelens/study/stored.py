"""What a stored run.json must hold so that pages can be drawn and findings copied from it, for each kind of result."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StrictStr, ValidationError

from prunelens.errors import PrunelensError, cut, one_line, shown
from prunelens.study.settings import MOST_TOKENS
from prunelens.study.store import RUN, Kind, Run, read_run

Number = StrictFloat | None
"""A measured number; null where it could not be computed."""
Count = Annotated[StrictInt, Field(ge=0, le=MOST_TOKENS)]
Size = Annotated[StrictInt, Field(ge=0, le=10**18)]
Share = Annotated[StrictFloat, Field(ge=0, le=1)]
Texts = list[StrictStr]
NEEDED_ROWS = {"prunelens-run": ("prompts", "steps", "survival", "continuations"), "prunelens-evaluation": ("tasks",)}
"""Tables that a finished result cannot have empty."""


class _Part(BaseModel):
    """An object in run.json: what is named here is checked, more may stand beside it."""

    model_config = ConfigDict(extra="allow", frozen=True)


class _Interval(_Part):
    mean: Number
    low: Number
    high: Number


class _Model(_Part):
    name: StrictStr
    fingerprint: StrictStr
    family: StrictStr
    dtype: StrictStr
    device: StrictStr
    num_layers: Count
    hidden_size: Size
    vocab_size: Size


class _Sized(_Part):
    parameters: Size
    bytes: Size
    zeros: Number


class _Dense(_Model, _Sized):
    pass


class _Made(_Sized):
    label: StrictStr
    recipe: StrictStr | None = None
    dropped: dict[StrictStr, list[Count] | dict[StrictStr, list[Count]]] = {}
    notes: Texts = []


class _Ranked(_Part):
    kind: StrictStr
    layer_idx: Count
    score: StrictFloat


class _Ranking(_Part):
    score: StrictStr
    calibration: StrictStr
    num_tokens: Size
    order: list[_Ranked]


class _RunSettings(_Part):
    max_new_tokens: Annotated[StrictInt, Field(ge=1, le=MOST_TOKENS)]
    temperature: StrictFloat
    seed: StrictInt
    chat_template: StrictBool
    calibration: StrictStr | None = None


class _Lens(_Part):
    lens: StrictStr
    parallel: StrictBool = False


class _Spread(_Part):
    mean: Number


class _Saved(_Part):
    bytes: Size
    saved: Number
    zeros: Number
    kl_per_percent: Number


class _Quantiles(_Interval):
    median: Number
    p95: Number
    max: Number


class _Survival(_Part):
    value: Number
    low: Number
    high: Number
    bound: Number


class _Faithful(_Part):
    median: Count
    beyond_horizon: StrictBool
    horizon: Count
    expected: _Interval


class _Divergent(_Part):
    median: Number
    never: Count
    prompts: Count


class _Coupling(_Part):
    measured: Number
    predicted: _Interval


class _Case(_Part):
    prompt_id: StrictStr


class _GreedyCheck(_Part):
    prompts: Count
    ties: list[_Case]
    unexplained: list[_Case]


class _Drafted(_Part):
    speedup: dict[StrictStr, Number]


class _Draft(_Part):
    acceptance: Number
    num_drafted: Count
    cost_ratio: Number
    speedup: Number
    measured: _Drafted | None = None


class _Options(_Part):
    prompts: Count
    same_choice: Count


class _Correlation(_Part):
    rho: Number
    n: Count


class _Attributed(_Part):
    sublayer: StrictStr
    layer_idx: Count | None
    changed: StrictBool
    kl: _Interval
    tv: _Interval
    kl_all_but: _Interval | None
    redundancy: Number


class _Attribution(_Part):
    kl_all: Number
    sum_alone: Number
    additivity: Number
    parts: list[_Attributed]
    rank_correlation: dict[StrictStr, _Correlation]


class _Compared(_Part):
    compressed: StrictStr
    parameters: Size
    parameters_saved: Number
    size: _Saved
    kl: _Quantiles
    tv: _Interval
    excess_nll: _Interval
    same_top1: _Interval
    cosines: dict[StrictStr, Number]
    survival: dict[StrictStr, _Survival]
    faithful_length: _Faithful
    first_divergent_token: _Divergent
    coupling: _Coupling
    greedy_check: _GreedyCheck
    accumulation: dict[StrictStr, Number]
    draft: _Draft
    options: _Options | None
    attribution: _Attribution | None


class RunInfo(_Part):
    """Of a comparison."""

    created: StrictStr
    dense: _Dense
    compressed: list[_Made] = Field(min_length=1)
    ranking: _Ranking | None
    settings: _RunSettings
    nulls: dict[StrictStr, StrictStr]
    notes: Texts
    seconds: dict[StrictStr, StrictFloat]
    versions: dict[StrictStr, StrictStr]
    lens: _Lens | None
    noise: dict[StrictStr, dict[StrictStr, _Spread | None]] | None
    summary: list[_Compared] = Field(min_length=1)


class _Line(_Part):
    use: StrictStr
    verdict: StrictStr
    number: StrictStr
    value: Number
    low: Number
    high: Number
    rule: StrictStr
    source: StrictStr
    reason: StrictStr


class _Score(_Part):
    task: StrictStr
    metric: StrictStr
    decides: StrictStr | None
    items: Size
    chance: Number
    dense: _Interval
    compressed: _Interval
    difference: _Interval
    at_chance: StrictBool
    tie: StrictBool
    lost: Size | None
    gained: Size | None
    sign_test: Number


class _Judged(_Part):
    compressed: StrictStr
    scores: list[_Score]
    verdicts: list[_Line]


class _Thresholds(_Part):
    safe: StrictFloat
    broken: StrictFloat
    safe_nll: StrictFloat
    broken_nll: StrictFloat
    safe_loops: StrictFloat
    broken_loops: StrictFloat


class _TaskSettings(_Part):
    long_tokens: Count


class EvaluationInfo(_Part):
    """Of an evaluation."""

    created: StrictStr
    dense: _Dense
    compressed: list[_Made] = Field(min_length=1)
    tasks: Texts
    settings: _TaskSettings
    thresholds: _Thresholds
    notes: Texts
    seconds: StrictFloat
    versions: dict[StrictStr, StrictStr]
    summary: list[_Judged] = Field(min_length=1)


class _Studied(_Part):
    model: StrictStr
    seeds: list[StrictInt]
    thresholds: _Thresholds


class _Cells(_Part):
    done: Size
    all: Size


class _Cell(_Part):
    recipe: StrictStr
    seed: StrictInt
    status: StrictStr
    error: StrictStr | None
    compressed: StrictStr
    bytes_saved: Number = None
    zeros: Number = None
    kl: Number = None
    verdicts: list[_Line]


class _Forecast(_Part):
    use: StrictStr
    name: StrictStr
    rho: Number
    n: Count
    points: list[dict[StrictStr, Any]]


class _Alike(_Part):
    recipe: StrictStr
    choice: Number
    choice_dense: Number
    short_kept: Number
    loops: Number
    excess_nll: Number
    survival_8: Number
    kl: Number


class SweepInfo(_Part):
    """Of a sweep."""

    study: _Studied
    cells: _Cells
    summary: list[_Cell]
    calibration: list[_Forecast]
    alike: list[_Alike]


class _Aim(_Part):
    use: StrictStr
    keep: Share
    tasks: Texts


class _Tried(_Part):
    recipe: StrictStr
    number: StrictStr
    bytes_saved: Number
    zeros: Number
    loads: StrictStr


class _KL(_Interval):
    role: StrictStr
    recipe: StrictStr


class _Pair(_Part):
    left: StrictStr
    right: StrictStr
    difference: _Interval
    better: StrictStr | None


class _HeldOut(_Part):
    kl: list[_KL]
    against_cosine: _Pair | None = None
    against_random: _Pair | None = None
    against_unrepaired: _Pair | None = None


class _Used(_Part):
    role: StrictStr
    recipe: StrictStr
    loss: Number
    number: StrictStr


class _Ratio(_Part):
    median: StrictFloat
    low: StrictFloat
    high: StrictFloat


class _Speed(_Part):
    recipe: StrictStr
    decode_ratio: _Ratio | None
    decode_tokens_per_second: Number
    kv_bytes_per_token: StrictFloat
    device: StrictStr


class _Named(_Part):
    name: StrictStr


class AdviceInfo(_Part):
    """Of advice."""

    dense: _Named
    aim: _Aim
    chosen: _Tried | None
    runner_up: _Tried | None
    closest: _Tried | None
    held_out: _HeldOut
    verdicts: list[_Line]
    held_out_use: list[_Used]
    speeds: list[_Speed]
    notes: Texts


INFO: dict[str, type[BaseModel]] = {
    "prunelens-run": RunInfo,
    "prunelens-evaluation": EvaluationInfo,
    "prunelens-sweep": SweepInfo,
    "prunelens-advice": AdviceInfo,
}


def open_run(folder: Path, kind: Kind = RUN) -> Run:
    """Read a result back, and see that a page can be drawn from it.

    Raises:
        PrunelensError: as `read_run`; a field of run.json that is missing or of another type; a table without rows.
    """
    found = read_run(folder, kind)
    again = f"run {kind.command} again"
    try:
        INFO[kind.format].model_validate(found.info)
    except ValidationError as error:
        raise PrunelensError(f"the {kind.what} is damaged: {folder}/run.json: {_fault(error)}; {again}") from error
    for name in NEEDED_ROWS.get(kind.format, ()):
        if found.tables[name].num_rows == 0:
            raise PrunelensError(f"the {kind.what} is damaged: {folder}/{name}.parquet has no rows; {again}")
    return found


def _fault(error: ValidationError) -> str:
    fault = error.errors(include_url=False)[0]
    where = cut(one_line(".".join(map(str, fault["loc"]))), 120)
    if fault["type"] == "missing":
        return f"the field {where} is missing"
    return f"the field {where}: {fault['msg']}, found {shown(fault['input'])}"
