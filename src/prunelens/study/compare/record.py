"""What the run.json of a comparison holds, for each compressed model and in all."""

from typing import Annotated, Any

from pydantic import Field, StrictBool, StrictFloat, StrictInt, StrictStr

from prunelens.study.record import MOST_TOKENS, Count, Dense, Interval, Made, Number, Part, Size, Texts


class Ranked(Part):
    """One sublayer or block and its score."""

    kind: StrictStr
    layer_idx: Count
    score: StrictFloat


class Ranking(Part):
    """Sublayers and blocks, the most redundant first."""

    score: StrictStr
    calibration: StrictStr
    num_tokens: Size
    order: list[Ranked]


class RunSettings(Part):
    """The settings that the page names."""

    max_new_tokens: Annotated[StrictInt, Field(ge=1, le=MOST_TOKENS)]
    temperature: StrictFloat
    seed: StrictInt
    chat_template: StrictBool
    calibration: StrictStr | None = None


class Lens(Part):
    """Which lens read the layers."""

    lens: StrictStr
    parallel: StrictBool = False


class Spread(Part):
    """A mean over rows."""

    mean: Number


class Saved(Part):
    """Bytes, the share of them saved, the share of zeros, and KL for each percent saved."""

    bytes: Size
    saved: Number
    zeros: Number
    kl_per_percent: Number


class NoiseSample(Part):
    """At how many of all positions, in how many of all texts, the noise floor was measured."""

    positions: Size
    of: Size
    texts: Size
    of_texts: Size


class Quantiles(Interval):
    """A mean with its interval, and quantiles."""

    median: Number
    p95: Number
    max: Number


class Survival(Part):
    """S(n): the probability that a sampled text agrees for n tokens, its 95 % interval, and its bound (S1, S2)."""

    value: Number
    low: Number
    high: Number
    bound: Number


class Faithful(Part):
    """How many tokens a text stays faithful (S3)."""

    median: Count
    beyond_horizon: StrictBool
    horizon: Count
    expected: Interval


class Divergent(Part):
    """Where greedy texts diverge from the dense ones (S4)."""

    median: Number
    never: Count
    prompts: Count


class Coupling(Part):
    """Agreement of coupled sampling, measured and predicted."""

    measured: Number
    predicted: Interval


class Case(Part):
    """A prompt by its id."""

    prompt_id: StrictStr


class GreedyCheck(Part):
    """Whether greedy texts diverge where the traces say."""

    prompts: Count
    ties: list[Case]
    unexplained: list[Case]


class Drafted(Part):
    """Speed-up as a draft, by number of tokens drafted."""

    speedup: dict[StrictStr, Number]


class Draft(Part):
    """What the compressed model is worth as a draft (S5)."""

    acceptance: Number
    num_drafted: Count
    cost_ratio: Number
    speedup: Number
    measured: Drafted | None = None


class Options(Part):
    """Choices among options that stay the same."""

    prompts: Count
    same_choice: Count


class Correlation(Part):
    """Spearman's ρ over n pairs."""

    rho: Number
    n: Count


class Attributed(Part):
    """One sublayer, and the KL of its compression alone and of all others (D1)."""

    sublayer: StrictStr
    layer_idx: Count | None
    changed: StrictBool
    kl: Interval
    tv: Interval
    kl_all_but: Interval | None
    redundancy: Number


class Attribution(Part):
    """Which sublayers the KL comes from (D1)."""

    kl_all: Number
    sum_alone: Number
    additivity: Number
    parts: list[Attributed]
    rank_correlation: dict[StrictStr, Correlation]


class ExpectedLoss(Part):
    """What a forecast expects of one class of use (F1): the loss with its 90 % interval, or why there is none."""

    use: StrictStr
    bounded: StrictBool
    cells: Size
    predictor: StrictStr
    value: Number = None
    low: Number = None
    high: Number = None
    refused: StrictStr


class Compared(Part):
    """One compressed model beside the dense one. KL in nats; cosines and shares from 0 to 1; lengths in tokens."""

    compressed: StrictStr
    parameters: Size
    parameters_saved: Number
    size: Saved
    kl: Quantiles
    tv: Interval
    excess_nll: Interval
    same_top1: Interval
    cosines: dict[StrictStr, Number]
    survival: dict[StrictStr, Survival]
    faithful_length: Faithful
    first_divergent_token: Divergent
    coupling: Coupling
    greedy_check: GreedyCheck
    accumulation: dict[StrictStr, Number]
    draft: Draft
    options: Options | None
    attribution: Attribution | None
    expected: list[ExpectedLoss] = Field(default_factory=list)


class ComparedModel(Compared):
    """One compressed model of a comparison; `survival[n]` is S(n) for every n up to the horizon (S1, S2).

    KL, TV and excess NLL are means per token (nats, 1, nats) with 95 % intervals; lengths are in tokens.
    """

    survival: dict[int, Survival]  # type: ignore[assignment]


class AnchorSurvival(Part):
    """S(n) of an anchor with its interval."""

    value: Number
    low: Number
    high: Number


class AnchorRecord(Part):
    """The dense model with its weights rounded: the numbers of a compressed model, or why there are none."""

    anchor: StrictStr
    meant: StrictStr
    reason: StrictStr = ""
    prompts: Count | None = None
    kl: Interval | None = None
    tv: Interval | None = None
    same_top1: Interval | None = None
    survival: dict[StrictStr, AnchorSurvival] = Field(default_factory=dict)
    curve: list[Number] = Field(default_factory=list)
    faithful_length: dict[StrictStr, Any] | None = None


class RunInfo(Part):
    """Of a comparison."""

    created: StrictStr
    dense: Dense
    compressed: list[Made] = Field(min_length=1)
    ranking: Ranking | None
    settings: RunSettings
    nulls: dict[StrictStr, StrictStr]
    notes: Texts
    seconds: dict[StrictStr, StrictFloat]
    versions: dict[StrictStr, StrictStr]
    lens: Lens | None
    noise: dict[StrictStr, dict[StrictStr, Spread | None]] | None
    noise_sample: NoiseSample | None = None
    anchors: list[AnchorRecord] = Field(default_factory=list)
    summary: list[Compared] = Field(min_length=1)
