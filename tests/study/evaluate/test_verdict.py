"""Rows and verdicts: the rules at, above and below each threshold, what decides, and what is said of the rest."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from prunelens.metrics.intervals import Interval, exact_share
from prunelens.study.evaluate.early import Stopped
from prunelens.study.evaluate.scores import paired_values, score_rows
from prunelens.study.evaluate.verdict import Thresholds, Verdict, judge
from prunelens.study.evaluate.words import BROKEN, DEGRADED, NOT_MEASURED, SAFE, UNDECIDED
from prunelens.tasks.suite import USES, Metric, MetricScores

CHOICE = Metric("choice", "acc", "multiple-choice", 0.25, decides="kept")
FACTS = Metric("facts", "exact_match", "short-generation", decides="kept")
NDCG = Metric("search", "ndcg_at_10", "retrieval", 0.125, decides="kept")
OVERLAP = Metric("search", "overlap_at_10", "retrieval", 0.125, decides="agreement")
NLL = Metric("long", "nll_dense", "long-generation", better="lower", decides="nll")
LOOPS = Metric("long", "loops", "long-generation", better="lower", decides="loops")
LENGTH = Metric("long", "length", "long-generation", better=None)
EVERY = (CHOICE, FACTS, NDCG, OVERLAP, NLL, LOOPS, LENGTH)
QUARTERS = Thresholds(safe=0.75, broken=0.5, safe_nll=0.5, broken_nll=1, safe_loops=0.25, broken_loops=0.5)
"""Far enough apart that the guard of 400 equal items, a bound 0.01 away, lies between none of them."""
BIT = 2**-10
MANY = 400


def scored(metric: Metric, *values: float) -> MetricScores:
    return MetricScores(metric, {f"item-{place}": float(value) for place, value in enumerate(values)})


def alike(metric: Metric, value: float) -> MetricScores:
    """Many items of one value."""
    return scored(metric, *[value] * MANY)


def judged(pairs: Mapping[Metric, tuple[float, float]], thresholds: Thresholds = QUARTERS) -> dict[str, Verdict]:
    """Verdicts by class, of items that all have the dense and the compressed value of their metric."""
    dense, own = ([alike(metric, values[side]) for metric, values in pairs.items()] for side in (0, 1))
    found = judge(dense, own, score_rows(dense, own), thresholds)
    assert [line.use for line in found] == list(USES)
    return {line.use: line for line in found}


def measured(metric: Metric, dense: float, own: float, thresholds: Thresholds = QUARTERS) -> Verdict:
    """The verdict of the metric's class; all others are not measured."""
    lines = judged({metric: (dense, own)}, thresholds)
    assert metric.use is not None
    line = lines.pop(metric.use)
    assert {other.verdict for other in lines.values()} == {NOT_MEASURED}
    assert {other.reason for other in lines.values()} == {"no task of this class was run"}
    return line


NATS = Thresholds(safe_nll=10.0, broken_nll=20.0)


def a_row(mean: float, low: float, high: float, items: int) -> dict[str, Any]:
    """A row of retrieval with this share kept."""
    interval = {"mean": mean, "low": low, "high": high}
    row = {"task": "t", "metric": "m", "use": "retrieval", "decides": "kept", "at_chance": False, "chance": 0.0}
    return row | {"adds": False, "right": items, "items": items, "kept": interval, "difference": interval}


def from_row(decides: str, mean: float, low: float, high: float, thresholds: Thresholds | None = None) -> Verdict:
    """The verdict for a row with this interval of the deciding number."""
    interval = {"mean": mean, "low": low, "high": high}
    use = "retrieval" if decides in ("agreement", "kept") else "long-generation"
    row = {"task": "t", "metric": "m", "use": use, "decides": decides, "at_chance": False, "chance": 0.0}
    row |= {"adds": False, "right": 10**6}
    found = judge([], [], [row | {"kept": interval, "difference": interval}], thresholds)
    (line,) = [line for line in found if line.use == use]
    assert (line.value, line.low, line.high, line.source) == (mean, low, high, "measured")
    return line


# --------------------------------------------------------------------------- thresholds


@pytest.mark.parametrize("decides", ["kept", "agreement"])
def test_shares_at_their_thresholds(decides: str) -> None:
    for share, expected in (
        (1.5, SAFE),
        (1.0, SAFE),
        (0.75 + BIT, SAFE),
        (0.75, SAFE),
        (0.75 - BIT, DEGRADED),
        (0.5 + BIT, DEGRADED),
        (0.5, DEGRADED),
        (0.5 - BIT, BROKEN),
        (0.0, BROKEN),
    ):
        found = from_row(decides, share, share, share, QUARTERS)
        assert found.verdict == expected, share
        assert found.rule == "safe ≥ 75 %, broken < 50 %"
        assert "(t" in found.number


@pytest.mark.parametrize("metric", [CHOICE, FACTS, NDCG])
def test_what_share_is_kept(metric: Metric) -> None:
    for share, expected in ((1.5, SAFE), (1.0, SAFE), (0.7, DEGRADED), (0.25, BROKEN)):
        found = measured(metric, 0.5, share * 0.5)
        assert (found.verdict, found.value) == (expected, pytest.approx(share))
        assert found.low is not None
        assert found.high is not None
        assert found.low < found.value <= found.high  # type: ignore[operator]
        assert (found.source, found.rule) == ("measured", "safe ≥ 75 %, broken < 50 %")
        assert metric.task in found.number


@pytest.mark.parametrize(
    ("decides", "safe", "broken", "rule"),
    [("nll", 0.5, 1.0, "safe ≤ 0.5, broken > 1"), ("loops", 0.25, 0.5, "safe ≤ 25 %, broken > 50 %")],
)
def test_costs_at_their_thresholds(decides: str, safe: float, broken: float, rule: str) -> None:
    for excess, expected in (
        (-0.125, SAFE),
        (0.0, SAFE),
        (safe, SAFE),
        (safe + BIT, DEGRADED),
        (broken, DEGRADED),
        (broken + BIT, BROKEN),
    ):
        found = from_row(decides, excess, excess, excess, QUARTERS)
        assert found.verdict == expected, excess
        assert found.rule == rule
        assert "(t)" in found.number


@pytest.mark.parametrize(
    ("decides", "safe", "broken"), [("agreement", 0.95, 0.80), ("nll", 0.1, 0.5), ("loops", 0.05, 0.25)]
)
def test_the_whole_interval_has_to_be_on_one_side(decides: str, safe: float, broken: float) -> None:
    """With the documented defaults; `inward` points from safe to broken."""
    inward = -1e-6 if decides == "agreement" else 1e-6

    def verdict(near_safe: float, near_broken: float) -> str:
        low, high = sorted((near_safe, near_broken))
        return from_row(decides, (low + high) / 2, low, high).verdict

    best = 1.0 if decides == "agreement" else 0.0
    worst = 0.0 if decides == "agreement" else 1.0
    assert verdict(best, safe) == SAFE
    assert verdict(best, safe + inward) == UNDECIDED  # straddles safe
    assert verdict(safe, broken + inward) == UNDECIDED  # touches safe from below
    assert verdict(safe + inward, broken) == DEGRADED  # between both
    assert verdict(broken, worst) == DEGRADED  # straddles broken
    assert verdict(best, worst) == UNDECIDED  # straddles both
    assert verdict(broken + inward, worst) == BROKEN


def test_a_share_whose_interval_straddles_is_undecided() -> None:
    """Half of the items are kept and half are lost: the mean alone would be safe, or degraded."""
    items = [1.0] * 100 + [0.0] * 100
    dense, own = [alike(FACTS, 1.0)], [scored(FACTS, *items)]
    rows = score_rows(dense, own)
    for limits in (Thresholds(safe=0.45, broken=0.05), Thresholds(safe=0.55, broken=0.05)):
        (found,) = [line for line in judge(dense, own, rows, limits) if line.use == "short-generation"]
        assert found.verdict == UNDECIDED
        assert found.value == 0.5
        assert found.low is not None
        assert found.high is not None
        assert found.low < 0.45 < 0.55 < found.high


@pytest.mark.parametrize(
    "values",
    [
        {"safe": 0.8},
        {"safe": 0.5},
        {"broken": 0.95},
        {"safe_nll": 0.5},
        {"broken_nll": 0.05},
        {"safe_loops": 0.3},
        {"broken_loops": 0.05},
        {"safe": 1.01},
        {"broken": -0.1},
        {"safe_nll": -0.1},
        {"broken_loops": 1.5},
        {"safe_nll": float("nan")},
        {"unsafe": 0.5},
    ],
)
def test_thresholds_out_of_order_or_range(values: dict[str, float]) -> None:
    with pytest.raises(ValidationError) as error:
        Thresholds(**values)
    assert len(error.value.errors()) == 1


def test_the_error_names_both_thresholds() -> None:
    with pytest.raises(ValidationError, match=r"expected safe_nll below broken_nll, found 0\.5 and 0\.5"):
        Thresholds(safe_nll=0.5)
    with pytest.raises(ValidationError, match=r"expected broken below safe, found 0\.8 and 0\.7"):
        Thresholds(safe=0.7)


# --------------------------------------------------------------------------- what decides


def test_the_same_item_scores_are_safe() -> None:
    generator = np.random.default_rng(0)
    sides = [scored(metric, *(generator.random(MANY) > 0.3).astype(float)) for metric in EVERY if metric != OVERLAP]
    sides.append(alike(OVERLAP, 1.0))
    found = judge(sides, sides, score_rows(sides, sides))
    assert [line.verdict for line in found] == [SAFE] * 4
    assert [line.value for line in found] == [1, 1, 1, 0]
    assert {line.reason for line in found} == {""}
    found = judge(sides, sides, score_rows(sides, sides), Thresholds(safe=1, safe_nll=0, safe_loops=0))
    assert [line.verdict for line in found] == [UNDECIDED] * 4  # no number of items shows that nothing is lost
    assert found[0].reason == "no number of items shows 100 %"


@pytest.mark.parametrize(
    ("nll", "loops", "expected", "decided"),
    [
        (0.75, 0.0, DEGRADED, 0.75),
        (0.0, 0.375, DEGRADED, 0.375),
        (0.75, 0.75, BROKEN, 0.75),
        (2.0, 0.375, BROKEN, 2),
        (2.0, 0.0, BROKEN, 2),
        (0.0, 1.0, BROKEN, 1),
        # of two of one verdict the one that is further on its way from safe to broken
        (0.5625, 0.375, DEGRADED, 0.375),
        (0.875, 0.3125, DEGRADED, 0.875),
        (1.25, 1.0, BROKEN, 1),
        (3.0, 0.625, BROKEN, 3),
        (0.25, 0.1875, SAFE, 0.1875),
        (0.375, 0.0, SAFE, 0.375),
    ],
)
def test_the_worst_number_decides(nll: float, loops: float, expected: str, decided: float) -> None:
    for order in ((NLL, LOOPS), (LOOPS, NLL)):
        values = {NLL: (1.0, 1.0 + nll), LOOPS: (0.0, loops)}
        found = judged({metric: values[metric] for metric in order})["long-generation"]
        assert (found.verdict, found.value) == (expected, decided)


def test_a_bad_verdict_outweighs_a_worse_mean() -> None:
    """A wide interval around a bad mean is undecided; a narrow one beyond its threshold is broken and decides."""
    texts = [*[4.0] * 8, *[0.0] * 8]  # its interval is wide: 2 nats in the mean, four times what breaks
    dense, own = [alike(NLL, 0), alike(LOOPS, 0)], [scored(NLL, *texts), alike(LOOPS, 0.75)]
    limits = Thresholds(safe_nll=0.25, broken_nll=1.25, safe_loops=0.25, broken_loops=0.5)
    (found,) = [line for line in judge(dense, own, score_rows(dense, own), limits) if line.value is not None]
    assert (found.verdict, found.value) == (BROKEN, 0.75)


def test_the_worst_of_a_score_and_a_cost() -> None:
    """A harness task of long texts stands beside the costs of core_long."""
    essays = Metric("essays", "exact_match", "long-generation", decides="kept")
    found = judged({NLL: (1, 1), LOOPS: (0, 0), essays: (1, 0.25)})["long-generation"]
    assert (found.verdict, found.value) == (BROKEN, 0.25)
    found = judged({NLL: (1, 3), LOOPS: (0, 0), essays: (1, 1)})["long-generation"]
    assert (found.verdict, found.value) == (BROKEN, 2)


def test_tasks_of_a_class_are_judged_together() -> None:
    more = Metric("more", "acc", "multiple-choice", 0.25, decides="kept")
    found = judged({CHOICE: (1.0, 0.5), more: (0.5, 0.5)})["multiple-choice"]
    assert found.value == 1 / 1.5
    assert found.verdict == DEGRADED
    assert "choice, more" in found.number


def test_what_does_not_decide_is_not_judged() -> None:
    recall = Metric("search", "recall_at_10", "retrieval", 0.1)
    norm = Metric("choice", "acc_norm", "multiple-choice", 0.25)
    lines = judged({recall: (1, 0), norm: (1, 0), LENGTH: (9, 1), NDCG: (1, 1)})
    assert lines["retrieval"].verdict == SAFE
    assert lines["multiple-choice"].verdict == lines["long-generation"].verdict == NOT_MEASURED


def test_agreement_decides_where_no_score_does() -> None:
    assert judged({NDCG: (1, 1), OVERLAP: (1, 0.25)})["retrieval"].verdict == SAFE
    found = judged({NDCG: (0.125, 0.125), OVERLAP: (1, 0.25)})["retrieval"]
    assert (found.verdict, found.value) == (BROKEN, pytest.approx((0.25 - 0.125) / 0.875))
    assert "search" in found.number
    assert found.reason == "left out: the dense model is at chance on search"
    assert judged({OVERLAP: (1, 0.75)})["retrieval"].verdict == DEGRADED  # 0.71 of what is beyond chance
    assert judged({OVERLAP: (1, 0.875)})["retrieval"].verdict == SAFE


# --------------------------------------------------------------------------- chance


def test_a_dense_model_at_chance_is_not_measured() -> None:
    for metric, level in ((CHOICE, 0.25), (CHOICE, 0.125), (FACTS, 0.0), (NDCG, 0.125)):
        found = measured(metric, level, 1.0)
        assert found.verdict == NOT_MEASURED
        assert found.reason == f"the dense model is at chance on {metric.task}"
        assert (found.value, found.number, found.source) == (None, "", "")
        above = level + 0.0625
        assert metric.chance is not None
        assert measured(metric, above, above).verdict == (NOT_MEASURED if above < metric.chance else SAFE)


def test_an_interval_that_reaches_chance_is_at_chance() -> None:
    """7 of 16 right: above chance, yet not by more than luck gives."""
    dense = [scored(CHOICE, *[1.0] * 7, *[0.0] * 9)]
    (row,) = score_rows(dense, dense)
    assert row["dense"]["low"] < 0.25 < row["dense"]["mean"]
    assert row["at_chance"]
    assert judge(dense, dense, [row])[1].verdict == NOT_MEASURED


def test_tasks_at_chance_are_left_out_of_their_class() -> None:
    hard = Metric("hard", "acc", "multiple-choice", 0.25, decides="kept")
    worse = Metric("also hard", "acc", "multiple-choice", 0.25, decides="kept")
    found = judged({hard: (0.25, 0), CHOICE: (1, 1), worse: (0.125, 0)})["multiple-choice"]
    assert (found.verdict, found.value) == (SAFE, 1)
    assert found.reason == "left out: the dense model is at chance on also hard, hard"
    found = judged({hard: (0.25, 0), worse: (0.125, 0)})["multiple-choice"]
    assert found.verdict == NOT_MEASURED
    assert found.reason == "the dense model is at chance on also hard, hard"


def test_costs_know_no_chance() -> None:
    found = judged({NLL: (0, 0), LOOPS: (0, 0)})["long-generation"]
    assert (found.verdict, found.reason) == (SAFE, "")


# --------------------------------------------------------------------------- undecided, not measured, stopped early


def test_what_was_not_run_is_not_measured() -> None:
    lines = judged({FACTS: (1, 0)}, Thresholds())
    assert lines["short-generation"].source == "measured"
    for use in set(USES) - {"short-generation"}:
        assert lines[use] == Verdict(use, NOT_MEASURED, reason="no task of this class was run")


def test_undecided_says_how_many_more_items() -> None:
    """80 % kept of 200 with a threshold of 75 %: twice as near, four times the items."""
    found = from_row("kept", 0.8, 0.7, 0.9, QUARTERS)
    line = judge([], [], [a_row(0.8, 0.7, 0.9, items=200)], QUARTERS)[0]
    assert found.verdict == line.verdict == UNDECIDED
    assert (line.used, line.there, line.more) == (200, 200, 600)
    assert line.reason == "about 600 more items would decide"
    line = judge([], [], [a_row(0.7, 0.6, 0.76, items=100)], QUARTERS)[0]
    assert line.more == 44  # its upper end is 0.06 away, the threshold 0.05: 1.44 times as many
    line = judge([], [], [a_row(0.75, 0.6, 0.9, items=100)], QUARTERS)[0]
    assert (line.verdict, line.more) == (UNDECIDED, None)
    assert "too close to the threshold" in line.reason


def test_where_nothing_was_lost_the_bound_says_how_many_more() -> None:
    sides = [scored(FACTS, *[1.0] * 36)]
    (line,) = [line for line in judge(sides, sides, score_rows(sides, sides)) if line.value is not None]
    assert (line.verdict, line.used, line.more) == (UNDECIDED, 36, 37)  # 73 in all
    sides = [scored(FACTS, *[1.0] * 73)]
    (line,) = [line for line in judge(sides, sides, score_rows(sides, sides)) if line.value is not None]
    assert (line.verdict, line.more) == (SAFE, None)


def test_few_texts_are_no_proof_of_an_excess() -> None:
    sides = [scored(NLL, *[2.0] * 12)]
    (line,) = [line for line in judge(sides, sides, score_rows(sides, sides), NATS) if line.value is not None]
    assert (line.verdict, line.more) == (UNDECIDED, 8)
    assert line.reason == "12 texts, safe needs at least 20"


def test_a_class_that_was_stopped_early_has_its_sequence() -> None:
    limits = Thresholds()
    early = Stopped(BROKEN, Interval(0.4, 0.2, 0.7), "of the dense score kept (facts)", limits.kept, 26, 224)
    lines = judge([], [], [], limits, {"short-generation": early})
    found = {line.use: line for line in lines}["short-generation"]
    assert (found.verdict, found.value, found.low, found.high) == (BROKEN, 0.4, 0.2, 0.7)
    assert (found.used, found.there, found.stopped_early, found.more) == (26, 224, True, None)
    assert found.reason == "decided after 26 of 224 items"
    assert found.rule == "safe ≥ 95 %, broken < 80 %"
    assert {line.verdict for line in lines if line.use != "short-generation"} == {NOT_MEASURED}


def test_the_exact_interval_is_scipys() -> None:
    from scipy.stats import binomtest

    for total in (1, 2, 8, 16, 100, 1000):
        for count in {0, 1, total // 3, total // 2, total - 1, total}:
            expected = binomtest(count, total).proportion_ci(0.95, method="exact")
            found = exact_share(count, total)
            assert found.value == count / total
            assert found.low == pytest.approx(expected.low, abs=1e-9)
            assert found.high == pytest.approx(expected.high, abs=1e-9)
            assert 0 <= found.low <= found.high <= 1


# --------------------------------------------------------------------------- rows


def test_rows_say_what_became_of_a_score() -> None:
    dense = [scored(CHOICE, 1, 1, 1, 1, 1, 1, 0, 0)]
    own = [scored(CHOICE, 1, 0, 0, 0, 1, 1, 1, 0)]
    (row,) = score_rows(dense, own)
    names = {"task": "choice", "metric": "acc", "use": "multiple-choice", "decides": "kept", "better": "higher"}
    assert names.items() <= row.items()
    assert (row["items"], row["chance"], row["lost"], row["gained"]) == (8, 0.25, 3, 1)
    assert row["sign_test"] == (1 + 4) * 2 / 16
    means = {name: row[name]["mean"] for name in ("dense", "compressed", "difference", "kept")}
    assert means == {"dense": 0.75, "compressed": 0.5, "difference": -0.25, "kept": 0.5 / 0.75}
    assert row["tie"]
    assert not score_rows([alike(CHOICE, 1)], [alike(CHOICE, 0.5)])[0]["tie"]


def test_rows_of_other_numbers() -> None:
    dense, own = [alike(NLL, 1), alike(LENGTH, 20)], [alike(NLL, 1.5), alike(LENGTH, 10)]
    for row in score_rows(dense, own):
        assert (row["kept"], row["lost"], row["gained"], row["sign_test"]) == (None,) * 4
        assert not row["at_chance"]
    (row,) = score_rows([alike(FACTS, 0)], [alike(FACTS, 1)])
    assert row["kept"] is None
    assert row["at_chance"]


def test_lost_is_what_became_worse() -> None:
    """A text that loops only after compression is lost, and one that loops only before is gained."""
    (row,) = score_rows([scored(LOOPS, 0, 0, 0, 1, 1)], [scored(LOOPS, 1, 1, 0, 1, 0)])
    assert (row["lost"], row["gained"], row["sign_test"]) == (2, 1, 1)
    cut = Metric("long", "cut_by_limit", "long-generation", better=None)
    (row,) = score_rows([scored(cut, 0, 1)], [scored(cut, 1, 1)])
    assert (row["lost"], row["gained"], row["sign_test"]) == (None, None, None)


def test_only_items_and_metrics_of_both_models_count() -> None:
    dense = [MetricScores(FACTS, {"a": 1.0, "b": 0.0, "c": 1.0}), alike(NLL, 1)]
    own = [alike(LOOPS, 0), MetricScores(FACTS, {"c": 0.5, "d": 9.0, "a": 1.0})]
    (row,) = score_rows(dense, own)
    assert (row["items"], row["dense"]["mean"], row["compressed"]["mean"]) == (2, 1, 0.75)
    left, right = paired_values(dense[0].values, own[1].values)
    assert (left.tolist(), right.tolist()) == ([1, 1], [1, 0.5])


def test_models_without_a_shared_item() -> None:
    """A model whose texts all end at once has no share of distinct 3-grams at all."""
    dense = [alike(FACTS, 1), alike(LENGTH, 20)]
    own = [alike(FACTS, 1), MetricScores(LENGTH, {})]
    assert "facts" in {row["task"] for row in score_rows(dense, own)}


# --------------------------------------------------------------------------- scores on other scales, few items


MCC = Metric("pairs", "mcc", "multiple-choice", 0.0, decides="kept", aggregation="matthews_corrcoef")
ROUGE = Metric("summaries", "rouge", "long-generation", None, decides="kept")


def pairs(count: int, wrong: int) -> MetricScores:
    """Answers beside targets, of which the first `wrong` are turned round."""
    keys = [f"item-{place}" for place in range(count)]
    found = {key: [place % 2, (place + (place < wrong)) % 2] for place, key in enumerate(keys)}
    return MetricScores(MCC, dict.fromkeys(keys), parts=found)


@pytest.mark.parametrize(
    ("count", "wrong", "expected"),
    [(300, 0, SAFE), (300, 3, SAFE), (300, 150, BROKEN), (8, 0, UNDECIDED), (71, 0, UNDECIDED)],
)
def test_a_score_by_another_aggregation_is_judged_by_itself(count: int, wrong: int, expected: str) -> None:
    from sklearn.metrics import matthews_corrcoef

    dense, own = [pairs(count, 0)], [pairs(count, wrong)]
    (row,) = score_rows(dense, own)
    whole = matthews_corrcoef(*zip(*own[0].parts.values(), strict=True))
    assert (row["dense"]["mean"], row["compressed"]["mean"]) == (1, pytest.approx(whole))
    found = judge(dense, own, [row])[1]
    assert (found.verdict, found.value) == (expected, pytest.approx(whole))
    assert "pairs: mcc" in found.number
    if count < 72:
        assert found.more == {8: 65, 71: 2}[count]  # 73 in all


def test_scores_on_different_scales_are_not_added() -> None:
    more = Metric("essays", "score", "long-generation", 0.0, decides="kept")
    dense = [alike(ROUGE, 40), alike(more, 0.5)]
    own = [alike(ROUGE, 40), alike(more, 0.25)]
    (found,) = [line for line in judge(dense, own, score_rows(dense, own)) if line.value is not None]
    assert (found.verdict, found.value) == (BROKEN, 0.5)  # added, 40.25 / 40.5 would be safe
    own = [alike(ROUGE, 20), alike(more, 0.5)]
    (found,) = [line for line in judge(dense, own, score_rows(dense, own)) if line.value is not None]
    assert (found.verdict, found.value) == (BROKEN, 0.5)
    assert found.reason == "chance is not known on summaries"


def test_a_mean_below_zero_has_no_share() -> None:
    comet = Metric("translated", "comet", "short-generation", None, decides="kept")
    sides = [scored(comet, *[0.5] * 100, -0.5)]
    (row,) = score_rows(sides, sides)
    assert (row["decides"], row["kept"], row["reason"]) == (None, None, "comet has values below 0")
    found = judge(sides, sides, [row])[2]
    assert (found.verdict, found.reason) == (NOT_MEASURED, "translated: comet has values below 0")


def test_what_was_stored_stands_where_no_parts_were_kept() -> None:
    (row,) = score_rows([pairs(80, 0)], [pairs(80, 1)])
    bare = [MetricScores(MCC, dict.fromkeys(pairs(80, 0).values))]
    assert score_rows(bare, bare, [row]) == [row]
    assert score_rows(bare, bare)[0]["dense"]["mean"] is None


@pytest.mark.parametrize("count", [1, 2, 8, 19, 36, 71])
def test_few_items_never_give_safe(count: int) -> None:
    for metric in (CHOICE, FACTS, NDCG, NLL, LOOPS, ROUGE, OVERLAP):
        sides = [scored(metric, *[1.0] * count)]
        found = [line.verdict for line in judge(sides, sides, score_rows(sides, sides)) if line.value is not None]
        assert SAFE not in found or (metric is NLL and count >= 20), metric


def test_many_equal_items_give_safe() -> None:
    for metric in (CHOICE, FACTS, NDCG, NLL, LOOPS, ROUGE, OVERLAP):
        sides = [scored(metric, *[1.0] * 224)]
        found = [line.verdict for line in judge(sides, sides, score_rows(sides, sides)) if line.value is not None]
        assert found == [SAFE], metric


def test_neighbours_among_ten_passages_decide_nothing() -> None:
    for chance in (1.0, None):
        overlap = Metric("small", "overlap_at_10", "retrieval", chance, decides="agreement")
        found = judged({overlap: (1, 1)})["retrieval"]
        assert (found.verdict, found.reason) == (NOT_MEASURED, "no score of small says what is kept")


@pytest.mark.parametrize("count", [7, 9, 12, 14, 18, 24, 400])
def test_a_dense_model_that_scores_nothing_has_no_share(count: int) -> None:
    none, some = [0.0] * count, [1.0] + [0.0] * (count - 1)
    dense, own = [scored(FACTS, *none)], [scored(FACTS, *some)]
    found = {line.use: line for line in judge(dense, own, score_rows(dense, own))}["short-generation"]
    assert (found.verdict, found.value) == (NOT_MEASURED, None)
    assert "facts" in found.reason
