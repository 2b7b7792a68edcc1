"""Scores by each task's own aggregation against lm_eval itself; directions, chance levels, and early refusals."""

import json
import math
import os
from pathlib import Path
from typing import Any

import lm_eval.tasks
import numpy as np
import pytest
from lm_eval import evaluator
from lm_eval.models.huggingface import HFLM

import prunelens.tasks.runner  # before the fixtures replace what it imports
from conftest import text_model, text_network, text_tokenizer
from prunelens.api import evaluate
from prunelens.errors import PrunelensError
from prunelens.models.model import Model
from prunelens.models.opening.loading import wrap
from prunelens.progress import silent
from prunelens.results import Evaluation
from prunelens.study.evaluate.measure import TaskSettings, open_harness
from prunelens.study.evaluate.scores import score_rows
from prunelens.tasks import suite
from prunelens.tasks.harness import Harness
from prunelens.tasks.suite import MetricScores, parse_tasks, suite_folder

TaskManager = lm_eval.tasks.TaskManager
WORDS = ("Rome", "Oslo", "Bern", "Riga", "Lima", "Cairo", "Quito", "Paris", "Delhi", "Tokyo")
HELPERS = """
def second(references, predictions, **kwargs):
    return float(predictions[0][:1] == references[0][:1])

def shift(items):
    return 7.0

def broken(items):
    raise RuntimeError("no score")

def mass(doc, results):
    import math
    shares = [math.exp(nats - max(r[0] for r in results)) for nats, _ in results]
    right = sum(share for share, label in zip(shares, doc["labels"]) if label)
    return {"acc": right / sum(shares), "odds": -abs(results[0][0]), "half": (results[0][0], 1)}

def ranks(doc, results):
    nats = [r[0] for r in results]
    place = sorted(nats, reverse=True).index(nats[doc["right"]])
    both = sorted(range(len(nats)), key=lambda at: -nats[at])[:2]
    return {"mrr": 1 / (place + 1), "top_two": float(place < 2), "pair": float(set(both) == {0, 1})}

def partly(doc, results):
    return {"em": 1.0} | ({"bonus": 0.5} if doc["at"] % 2 else {})

def nothing(doc, results):
    return {"em": float("nan"), "acc": 1.0}
"""
CHOICE = {"output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}"}
WRITTEN = {"output_type": "generate_until", "doc_to_text": "{{question}}", "doc_to_target": "{{answer}}"}


def metric(name: str, **more: Any) -> dict[str, Any]:
    return {"metric": name} | more


TASKS: dict[str, dict[str, Any]] = {
    "mine_choice": CHOICE
    | {
        "doc_to_target": "{{right}}",
        "metric_list": [metric(name) for name in ("acc", "acc_norm", "mcc", "f1", "brier_score", "acc_mutual_info")],
    },
    "mine_exact": CHOICE | {"doc_to_target": "{{right}}", "metric_list": [metric("exact_match"), metric("acc_bytes")]},
    "mine_lower": CHOICE
    | {
        "doc_to_target": "{{right}}",
        "process_results": "!function helpers.mass",
        "metric_list": [
            metric("half", aggregation="weighted_perplexity", higher_is_better=False),
            metric("acc", aggregation="mean", higher_is_better=True),
        ],
    },
    "mine_ranks": CHOICE
    | {
        "doc_to_target": "{{right}}",
        "doc_to_choice": ["Rome", "Oslo", "Bern", "Riga"],
        "process_results": "!function helpers.ranks",
        "metric_list": [metric(name, aggregation="mean", higher_is_better=True) for name in ("mrr", "top_two", "pair")],
    },
    "mine_mass": CHOICE
    | {
        "doc_to_target": 0,
        "process_results": "!function helpers.mass",
        "metric_list": [metric("acc", aggregation="mean", higher_is_better=True)],
    },
    "mine_words": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{question}}",
        "doc_to_target": " {{answer}}",
        "metric_list": [metric("perplexity"), metric("acc")],
    },
    "mine_rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}}",
        "metric_list": [metric(name) for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
    },
    "mine_text": WRITTEN
    | {
        "generation_kwargs": {"until": ["\n"], "max_new_tokens": 6},
        "metric_list": [metric("bleu"), metric("chrf"), metric("ter"), metric("exact_match")],
    },
    "mine_function": WRITTEN
    | {
        "generation_kwargs": {"until": ["\n"], "max_tokens": 40},
        "metric_list": [metric("!function helpers.second", aggregation="mean", higher_is_better=True)],
    },
    "mine_silent": WRITTEN
    | {
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4, "max_new_tokens": 99},
        "process_results": "!function helpers.partly",
        "metric_list": [metric("em", aggregation="mean", higher_is_better=None)],
    },
    "mine_own": WRITTEN
    | {
        "generation_kwargs": {"until": ["\n"], "max_completion_tokens": 3},
        "process_results": "!function helpers.partly",
        "metric_list": [
            metric("em", aggregation="!function helpers.shift", higher_is_better=True),
            metric("bonus", aggregation="!function helpers.broken", higher_is_better=True),
        ],
    },
    "mine_nan": WRITTEN
    | {
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 2},
        "process_results": "!function helpers.nothing",
        "metric_list": [metric("em", aggregation="mean", higher_is_better=True)],
    },
    "mine_letters": WRITTEN
    | {
        "doc_to_target": "{{'AB'[right]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 2},
        "metric_list": [metric("exact_match")],
    },
    "mine_code": WRITTEN | {"unsafe_code": True, "metric_list": [metric("exact_match")]},
    "mine_bypass": WRITTEN | {"metric_list": [metric("bypass")]},
    "mine_limit": WRITTEN | {"generation_kwargs": {"max_gen_toks": "many"}, "metric_list": [metric("exact_match")]},
    "mine_empty": WRITTEN | {"metric_list": [metric("exact_match")]},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Task files and their items."""
    path = tmp_path_factory.mktemp("their tasks")
    (path / "helpers.py").write_text(HELPERS, encoding="utf-8")
    rows = [
        {
            "at": at,
            "question": f"Which of these towns is number {at}, {word[::-1]}?",
            "answer": word,
            "choices": [word, WORDS[at - 3]],
            "labels": [1, 0],
            "right": at % 3 == 0,
        }
        for at, word in enumerate(WORDS)
    ]
    many = [
        row | {"choices": [*WORDS[: 2 + row["at"] % 3]], "labels": [1, 1, 0, 0][: 2 + row["at"] % 3]} for row in rows
    ]
    for name, items in (("two", [row | {"right": int(row["right"])} for row in rows]), ("many", many), ("none", [])):
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in items), encoding="utf-8")
    for name, config in TASKS.items():
        data = "many" if name == "mine_mass" else "none" if name == "mine_empty" else "two"
        whole = {"task": name, "dataset_path": "json", "test_split": "test", "num_fewshot": 0} | config
        whole["dataset_kwargs"] = {"data_files": {"test": str(path / f"{data}.jsonl")}}
        text = json.dumps(whole, indent=1)  # JSON is YAML, but for tags
        for function in ("second", "shift", "broken", "mass", "ranks", "partly", "nothing"):
            text = text.replace(f'"!function helpers.{function}"', f"!function helpers.{function}")
        (path / f"{name}.yaml").write_text(text, encoding="utf-8")
    group = "group: mine_group\ntask: [mine_choice, mine_exact]\naggregate_metric_list: [{metric: acc}]\n"
    (path / "group.yaml").write_text(group, encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def known(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness finds these tasks beside the core suite, and no others."""
    paths = [str(suite_folder() / "core"), str(folder)]

    def manager(**given: Any) -> Any:
        return TaskManager(include_path=paths, include_defaults=False)

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", manager)
    names = frozenset([*TASKS, "mine_group"])
    monkeypatch.setattr(suite, "harness_names", lambda: names)


@pytest.fixture(scope="module")
def model() -> Model:
    return text_model()


def scores(model: Model, name: str, **given: Any) -> dict[str, MetricScores]:
    return {one.metric.name: one for one in Harness([name]).run(model, name, silent, **given)}


def theirs(folder: Path, model: Model, name: str) -> dict[str, float]:
    """What lm_eval itself prints."""
    found = evaluator.simple_evaluate(
        model=HFLM(pretrained=model.network, tokenizer=text_tokenizer(), batch_size=40, backend="causal"),
        tasks=[name],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
    )
    return {key.removesuffix(",none"): value for key, value in found["results"][name].items() if key.endswith(",none")}


# --------------------------------------------------------------------------- scores


@pytest.mark.parametrize(
    "name", ["mine_choice", "mine_exact", "mine_lower", "mine_words", "mine_rolling", "mine_text", "mine_function"]
)
def test_every_dense_score_is_the_one_that_lm_eval_prints(folder: Path, model: Model, name: str) -> None:
    expected = {key: value for key, value in theirs(folder, model, name).items() if not key.endswith("_stderr")}
    dense = list(scores(model, name).values())
    rows = {row["metric"]: row for row in score_rows(dense, dense)}
    assert len(expected) == len(TASKS[name]["metric_list"]) + (name == "mine_lower")
    # contexts are read from a cache, so sums of logarithms differ by rounding, and perplexity is their exponential
    assert {key: rows[key]["dense"]["mean"] for key in expected} == pytest.approx(expected, rel=1e-4, abs=1e-12)


def test_a_score_that_is_no_mean_has_an_interval_of_resampled_items(model: Model) -> None:
    """Perplexity by hand: exp of minus the mean log-likelihood, resampled by index."""
    other = text_model(seed=5)
    dense, own = scores(model, "mine_words")["perplexity"], scores(other, "mine_words")["perplexity"]
    (row,) = score_rows([dense], [own])
    nats = np.array([list(side.values.values()) for side in (dense, own)], dtype=float)
    assert (nats < 0).all()
    assert (row["decides"], row["better"], row["kept"], row["chance"]) == (None, "lower", None, None)
    assert row["aggregation"] == "perplexity"
    generator = np.random.Generator(np.random.MT19937(5))
    chosen = generator.integers(0, nats.shape[1], size=(20_000, nats.shape[1]))
    draws = np.exp(-nats[:, chosen].mean(axis=2))
    for name, expected, whole in (
        ("dense", draws[0], math.exp(-nats[0].mean())),
        ("compressed", draws[1], math.exp(-nats[1].mean())),
        ("difference", draws[1] - draws[0], math.exp(-nats[1].mean()) - math.exp(-nats[0].mean())),
    ):
        assert row[name]["mean"] == pytest.approx(whole)
        low, high = np.quantile(expected, [0.025, 0.975])
        assert (row[name]["low"], row[name]["high"]) == pytest.approx((low, high), abs=0.25 * float(expected.std()))


def test_the_order_of_items_changes_no_score_by_aggregation(model: Model) -> None:
    for name, metric_name in (("mine_words", "perplexity"), ("mine_choice", "mcc"), ("mine_text", "chrf")):
        dense, own = scores(model, name)[metric_name], scores(text_model("gpt2"), name)[metric_name]
        (row,) = score_rows([dense], [own])
        turned = MetricScores(dense.metric, dict(reversed(dense.values.items())), parts=dense.parts)
        (other,) = score_rows([turned], [own])
        ends = [(found["difference"]["low"], found["difference"]["high"]) for found in (row, other)]
        assert ends[0] == ends[1]


def test_directions_come_from_the_task(model: Model) -> None:
    found = {name: scores(model, name) for name in ("mine_choice", "mine_text", "mine_words", "mine_silent")}
    better = {key: one.metric.better for metrics in found.values() for key, one in metrics.items()}
    lower = {"brier_score", "ter", "perplexity"}
    assert {key for key, value in better.items() if value == "lower"} == lower
    assert {key for key, value in better.items() if value is None} == {"em", "bonus"}
    assert [one.metric.decides for one in found["mine_silent"].values()] == [None, None]
    assert found["mine_silent"]["em"].metric.reason == "em does not say whether higher is better"


def test_a_lower_score_gives_way_to_one_with_a_share(model: Model) -> None:
    found = scores(model, "mine_lower")
    assert {name: one.metric.decides for name, one in found.items()} == {"half": None, "acc": "kept", "odds": None}
    assert {one.metric.reason for one in found.values()} == {""}


# --------------------------------------------------------------------------- chance


def test_chance_is_known_or_said_to_be_unknown(model: Model) -> None:
    chances = {key: one.metric.chance for key, one in scores(model, "mine_choice").items()}
    assert chances == {
        **dict.fromkeys(("acc", "acc_norm", "acc_mutual_info"), 0.5),
        "mcc": 0.0,
        "f1": None,
        "brier_score": None,
    }
    assert {key: one.metric.chance for key, one in scores(model, "mine_exact").items()} == {
        "exact_match": None,
        "acc_bytes": 0.5,
    }


def test_chance_of_a_mass_on_the_right_options(model: Model) -> None:
    """Right are two of two, two of three and two of four options; uniform choice gives the mean of the shares."""
    found = scores(model, "mine_mass")
    expected = np.mean([2 / (2 + at % 3) for at in range(len(WORDS))])
    assert found["acc"].metric.chance == pytest.approx(float(expected))
    assert scores(model, "mine_lower")["acc"].metric.chance == pytest.approx(0.5)


def test_chance_of_a_score_by_rank(model: Model) -> None:
    """Of four options in any order the right one has rank 1 to 4 equally often; of two together nothing is claimed."""
    found = {name: one.metric.chance for name, one in scores(model, "mine_ranks").items()}
    assert found["mrr"] == pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 4) / 4)
    assert found["top_two"] == pytest.approx(1 / 2)
    assert found["pair"] is None


def test_written_answers_from_a_small_set_can_be_guessed(model: Model) -> None:
    assert scores(model, "mine_text")["exact_match"].metric.chance == 0
    found = scores(model, "mine_letters")["exact_match"].metric
    assert (found.chance, found.decides) == (None, "kept")


# --------------------------------------------------------------------------- functions, limits, odd values


def test_a_function_decides_where_its_task_says_how(folder: Path, model: Model) -> None:
    found = scores(model, "mine_function")
    assert list(found) == ["second"]
    assert found["second"].metric.decides == "kept"
    assert set(found["second"].values.values()) <= {0.0, 1.0}


@pytest.mark.parametrize(
    ("name", "tokens", "use"),
    [
        ("mine_text", 6, "short-generation"),
        ("mine_function", 40, "long-generation"),
        ("mine_silent", 4, "short-generation"),
        ("mine_own", 3, "short-generation"),
    ],
)
def test_every_name_of_the_limit_is_read(name: str, tokens: int, use: str) -> None:
    (found,) = Harness([name]).all_tasks
    assert (found.max_tokens, found.use) == (tokens, use)


def test_items_without_a_metric_and_aggregations_of_others(model: Model) -> None:
    found = scores(model, "mine_own")
    assert len(found["em"].values) == 10
    assert list(found["bonus"].values) == ["1", "3", "5", "7", "9"]
    rows = {row["metric"]: row for row in score_rows(list(found.values()), list(found.values()))}
    assert rows["em"]["dense"] == {"mean": 7.0, "low": None, "high": None}  # the same of all resamples
    assert rows["bonus"]["dense"]["mean"] is None
    assert "no score" in rows["bonus"]["reason"]


def test_items_that_are_no_number_are_null_with_a_reason(model: Model, tmp_path: Path) -> None:
    found = evaluate(model, text_model("gpt2"), tasks="mine_nan,mine_words", limit=3)
    row = found.summary[0]["scores"][0]
    assert row["dense"] == row["difference"] == {"mean": None, "low": None, "high": None}
    assert row["reason"] == "3 of 3 items of em have no finite number"
    (line,) = [line for line in found.summary[0]["verdicts"] if line["use"] == "short-generation"]
    assert line["verdict"] == "not measured"
    assert "no finite number" in line["reason"]
    page = found.report(tmp_path / "out").read_text(encoding="utf-8")
    assert "3 of 3 items of em have no finite number" in page
    again = Evaluation.open(tmp_path / "out")
    assert again.summary == json.loads(json.dumps(found.summary))


def test_a_perplexity_beyond_all_numbers_is_null(model: Model) -> None:
    dense = scores(model, "mine_words")["perplexity"]
    own = MetricScores(dense.metric, dict.fromkeys(dense.values, -1e5))
    (row,) = score_rows([dense], [own])
    assert row["dense"]["mean"] is not None
    assert row["compressed"]["mean"] is None
    assert row["reason"] == "perplexity gives no compressed score that is a finite number"


@pytest.mark.parametrize("value", [0.0, float("nan"), 1e30])
def test_a_degenerate_model_loses_no_work(model: Model, tmp_path: Path, value: float) -> None:
    broken = text_model()
    for weight in broken.network.parameters():
        weight.data.fill_(value)
    found = evaluate(model, broken, tasks="mine_choice,mine_words,mine_rolling,mine_text")
    rows = {(row["task"], row["metric"]): row for row in found.summary[0]["scores"]}
    assert len(rows) == 6 + 2 + 3 + 4
    assert all(row["dense"]["mean"] is not None for row in rows.values())
    assert all(row["reason"] for row in rows.values() if row["compressed"]["mean"] is None)
    if np.isnan(value):
        assert rows["mine_words", "perplexity"]["compressed"]["mean"] is None
    assert "safe" not in {line["verdict"] for line in found.summary[0]["verdicts"]}
    assert found.report(tmp_path / "out").is_file()


def test_a_group_is_judged_by_its_tasks(model: Model) -> None:
    found = evaluate(model, text_model("gpt2"), tasks="mine_group")
    assert {row["task"] for row in found.summary[0]["scores"]} == {"mine_choice", "mine_exact"}


# --------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mine_code", "runs code that the model writes, .*--allow-code"),
        ("mine_bypass", "has no score"),
        ("mine_empty", "mine_empty"),
        ("mine_limit", "mine_limit cannot be run"),
    ],
)
def test_what_cannot_run_is_refused_before_a_model_opens(name: str, words: str) -> None:
    with pytest.raises(PrunelensError, match=words) as error:
        evaluate("/no such model", "drop-attention:1", tasks=name)
    assert "\n" not in str(error.value)


def test_code_runs_where_it_is_allowed(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    found = evaluate(model, text_model("gpt2"), tasks="mine_code", limit=2, allow_code=True)
    assert found.info["settings"]["allow_code"] is True
    assert [row["metric"] for row in found.summary[0]["scores"]] == ["exact_match"]
    assert "HF_ALLOW_CODE_EVAL" not in os.environ


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_answers_longer_than_the_context_are_refused_before_anything_runs(folder: Path, family: str) -> None:
    opened = text_model(family)
    text = (folder / "mine_function.yaml").read_text(encoding="utf-8")
    try:
        (folder / "mine_function.yaml").write_text(text.replace('"max_tokens": 40', '"max_tokens": 1024'), "utf-8")
        with pytest.raises(PrunelensError, match=f"write 1024 tokens, and text-{family} has a context of 1024"):
            evaluate(opened, "drop-attention:1", tasks="mine_choice,mine_function")
    finally:
        (folder / "mine_function.yaml").write_text(text, encoding="utf-8")


def test_a_task_that_fails_is_named(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*given: Any) -> Any:
        raise KeyError("no such\ncolumn")

    monkeypatch.setattr(prunelens.tasks.runner, "respond", failing)
    with pytest.raises(PrunelensError, match=r"mine_choice cannot be run on text-llama \(KeyError") as error:
        scores(model, "mine_choice")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("subset", ["search", "held-out"])
def test_a_subset_without_items_is_refused(folder: Path, subset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = (folder / "two.jsonl").read_text(encoding="utf-8").splitlines()[:1]
    (folder / "one.jsonl").write_text(lines[0] + "\n", encoding="utf-8")
    text = (folder / "mine_exact.yaml").read_text(encoding="utf-8").replace("two.jsonl", "one.jsonl")
    (folder / "one.yaml").write_text(text.replace("mine_exact", "mine_one"), encoding="utf-8")
    monkeypatch.setattr(suite, "harness_names", lambda: frozenset(["mine_one"]))
    chosen = parse_tasks("mine_one")
    if subset == "search":
        assert open_harness(chosen, TaskSettings(subset=subset)) is not None
        return
    with pytest.raises(PrunelensError, match="subset held-out of the task mine_one, found none"):
        open_harness(chosen, TaskSettings(subset=subset))


# --------------------------------------------------------------------------- decoding


def test_own_generation_settings_shape_answers_and_are_said(folder: Path, tmp_path: Path) -> None:
    own = wrap(text_network(), text_tokenizer(), name="own")
    own.network.generation_config.repetition_penalty = 8.0
    own.network.generation_config.do_sample = True
    own.network.generation_config.temperature = 0.7
    expected = theirs(folder, own, "mine_text")
    found = evaluate(own, text_model("gpt2"), tasks="mine_text,core_long", limit=10, long_tokens=2)
    rows = {row["metric"]: row for row in found.summary[0]["scores"]}
    assert rows["chrf"]["dense"]["mean"] == pytest.approx(expected["chrf"])
    assert found.info["decoding"]["harness"] == {"dense": {"repetition_penalty": 8.0}, "text-gpt2": {}}
    (note,) = [note for note in found.info["notes"] if "generation settings" in note]
    assert "repetition_penalty 8.0" in note
    assert "core_long" in note
    page = found.report(tmp_path / "out").read_text(encoding="utf-8")
    assert "repetition_penalty 8.0" in page
    assert "as lm_eval itself does" in page


def test_without_written_answers_nothing_is_said_of_decoding(model: Model) -> None:
    found = evaluate(model, text_model("gpt2"), tasks="mine_choice", limit=2)
    assert set(found.info["decoding"]["harness"].values()) == {None}
    assert not [note for note in found.info["notes"] if "generation settings" in note]


def test_sampling_settings_are_read_where_a_task_samples() -> None:
    from prunelens.tasks.decoding import own_settings

    own = wrap(text_network(), text_tokenizer(), name="own")
    own.network.generation_config.top_k = 3
    own.network.generation_config.no_repeat_ngram_size = 2
    assert own_settings(own) == {"no_repeat_ngram_size": 2}
    assert own_settings(own, samples=True) == {"top_k": 3, "no_repeat_ngram_size": 2}
