"""The metrics of core_long: by hand from made texts, prompt by prompt, and the dense model beside itself."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from conftest import tiny_model, words
from prunelens.metrics.repetition import distinct_share, is_loop
from prunelens.models.surgery.drop import Drop
from prunelens.models.surgery.variant import Variant
from prunelens.study.evaluate.scores import score_rows
from prunelens.tasks.encoding import encode
from prunelens.tasks.prompts import PromptText
from prunelens.tasks.suite import MetricScores
from prunelens.tracing.long_scores import held_against, score_long
from prunelens.tracing.long_texts import LongPlan, LongText, write_long

METRICS = ["excess_nll", "atypical", "loops", "nll_dense", "cut_by_limit", "distinct_3", "length"]


def made(
    token_ids: Sequence[int],
    prompt_id: str = "p",
    ended: bool = False,
    cost: float = 2.0,
    sampling: str = "plain",
    unclosed: bool | None = None,
) -> LongText:
    return LongText(
        prompt_id, "story", "asked", sampling, 0, tuple(token_ids), "", ended, cost, 1.5, unclosed, atypical=False
    )


def by_name(found: Sequence[MetricScores]) -> dict[str, dict[str, float | None]]:
    return {scored.metric.name: scored.values for scored in found}


def test_metrics_of_each_text() -> None:
    texts = [
        made(range(3, 63), "new", ended=True, cost=1.25),
        replace(made([7] * 60, "loop"), atypical=True),
        made([3, 4], "short", ended=True),
    ]
    assert by_name(score_long(texts)) == {
        "excess_nll": {"new": -0.25, "loop": 0.5, "short": 0.5},
        "atypical": {"new": 0, "loop": 1, "short": 0},
        "loops": {"new": 0, "loop": 1, "short": 0},
        "nll_dense": {"new": 1.25, "loop": 2, "short": 2},
        "cut_by_limit": {"new": 0, "loop": 1, "short": 0},
        "distinct_3": {"new": 1, "loop": 1 / 58},  # no 3-gram in a text of two tokens
        "length": {"new": 60, "loop": 60, "short": 2},
    }


def test_several_texts_of_a_prompt_are_one_item() -> None:
    texts = [made([7] * 60, "a"), made(range(60), "a", cost=4.0), made([3], "b"), made([4, 5, 6], "b", ended=True)]
    found = by_name(score_long(texts))
    assert found["loops"] == {"a": 0.5, "b": 0}
    assert found["nll_dense"] == {"a": 3, "b": 2}
    assert found["cut_by_limit"] == {"a": 1, "b": 0.5}
    assert found["distinct_3"] == {"a": (1 / 58 + 1) / 2, "b": 1}  # of the text that has a 3-gram
    assert found["length"] == {"a": 60, "b": 2}


def test_thinking_is_counted_where_the_template_knows_it() -> None:
    texts = [made([3], "a", unclosed=True), made([3], "a", unclosed=False), made([3], "b", unclosed=False)]
    assert by_name(score_long(texts))["unclosed_thinking"] == {"a": 0.5, "b": 0}
    assert list(by_name(score_long([made([3])]))) == METRICS


def test_what_decides_and_in_which_direction() -> None:
    metrics = {scored.metric.name: scored.metric for scored in score_long([made([3, 4, 5], unclosed=True)])}
    assert {metric.task for metric in metrics.values()} == {"core_long"}
    assert {metric.use for metric in metrics.values()} == {"long-generation"}
    assert {name: metric.decides for name, metric in metrics.items() if metric.decides} == {
        "excess_nll": "nll",
        "loops": "loops",
    }
    assert {name for name, metric in metrics.items() if metric.better == "lower"} == {
        "excess_nll",
        "atypical",
        "loops",
        "nll_dense",
        "unclosed_thinking",
    }


def test_each_way_of_drawing_has_its_own_band() -> None:
    """Costs that nobody finds strange among texts at T = 1 are strange among those at the model's own settings."""
    reference = [made([3], f"p{row}", cost=float(row)) for row in range(50)]
    reference += [made([3], f"p{row}", cost=100.0 + row, sampling="own") for row in range(50)]
    asked = [(25, "plain"), (25, "own"), (125, "plain"), (125, "own"), (1, "other")]
    texts = [made([3], "new", cost=float(cost), sampling=way) for cost, way in asked]
    found = held_against(reference, texts)
    assert [text.atypical for text in found] == [False, True, True, False, None]
    assert [replace(text, atypical=False) for text in found] == texts
    assert by_name(score_long(found))["atypical"] == {"new": 0.5}


def test_the_dense_model_beside_itself_differs_nowhere() -> None:
    model = tiny_model("llama", torch.float64)
    texts = [PromptText(f"p{row}", "story", ({"role": "user", "content": words(3 + row, 5, 9)},)) for row in range(30)]
    prompts, plan = encode(texts, model, False, 60), LongPlan(max_new_tokens=60, samples=2)
    dense = Variant(model)
    own, twice, null = (write_long(model, dense, prompts, one, 30) for one in (plan, plan, plan.null))
    scored = [score_long(held_against([*own, *null], one)) for one in (own, twice, null)]
    for row in score_rows(scored[0], scored[1]):
        assert row["difference"]["mean"] == 0
        assert row["difference"]["low"] < 0 < row["difference"]["high"]  # few texts tell little
        assert row["dense"] == row["compressed"]
    against = {row["metric"]: row for row in score_rows(scored[0], scored[2])}
    assert list(against) == METRICS
    assert against["excess_nll"]["difference"]["mean"] != 0
    assert against["excess_nll"]["difference"]["low"] < 0 < against["excess_nll"]["difference"]["high"]
    assert against["excess_nll"]["dense"]["low"] < 0 < against["excess_nll"]["dense"]["high"]
    for side in ("dense", "compressed"):
        assert against["atypical"][side]["low"] < 0.05 < against["atypical"][side]["high"]


def test_metrics_of_what_was_written() -> None:
    model = tiny_model("llama", torch.float64)
    prompts = encode([PromptText("p", "story", ({"role": "user", "content": words(5, 9)},))], model, False, 60)
    text = write_long(model, Variant(model, Drop(block=frozenset([1]))), prompts, LongPlan(max_new_tokens=60), 1)[0]
    found = {name: values.get("p") for name, values in by_name(score_long([text])).items()}
    assert found["excess_nll"] == text.nll_dense - text.entropy_dense
    assert found["loops"] == is_loop(text.token_ids)
    assert found["distinct_3"] == distinct_share(text.token_ids, 3)
    assert found["cut_by_limit"] == (len(text.token_ids) == 60)
