"""Tasks in one run: a model against itself, recipes against the same thing made by hand, the tables, and refusals."""

import copy
import json
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import processors

import mask_oracle
import prunelens.study.evaluate.evaluate as module
from conftest import text_model, text_network, text_tokenizer
from oracle import zeroed
from prunelens.api import evaluate
from prunelens.errors import PrunelensError
from prunelens.models.model import Model
from prunelens.models.opening.loading import wrap
from prunelens.report.pages.rerender import render_again
from prunelens.results import Evaluation
from prunelens.study.evaluate.measure import TaskRunner, TaskSettings
from prunelens.study.evaluate.measurement import Measurement
from prunelens.study.evaluate.verdict import Thresholds
from prunelens.tasks.corpora import Corpus
from prunelens.tasks.harness import Harness
from prunelens.tasks.retrieval import score
from prunelens.tasks.retrieval_scores import _guessed_ndcg, _guessed_recall
from prunelens.tasks.suite import parse_tasks, suite_folder
from prunelens.tracing.generate import uniforms

TASKS = ("core_choice", "core_facts", "core_long", "core_retrieval")
LONG_METRICS = ["excess_nll", "atypical", "loops", "nll_dense", "cut_by_limit", "distinct_3", "length"]
NEIGHBOURS = ["ndcg_at_10", "recall_at_10", "overlap_at_10", "neighbour_correlation"]
COLUMNS = {
    "tasks": {
        "model": "string",
        "task": "string",
        "metric": "string",
        "item_id": "string",
        "value": "double",
        "answer": "string",
        "target": "string",
    },
    "texts": {
        "model": "string",
        "prompt_id": "string",
        "kind": "string",
        "prompt": "string",
        "text": "string",
        "num_tokens": "int32",
        "ended": "bool",
        "nll_dense": "double",
        "entropy_dense": "double",
        "sampling": "string",
        "repeat": "int32",
        "atypical": "bool",
        "loops": "bool",
    },
}
"""What other people's scripts read; columns may be added, any other change is one of the format's version."""
HOSTILE = "<script>alert(1)</script>&\"'\u202e\x1b[31m"


def items(name: str) -> list[dict[str, Any]]:
    path = suite_folder() / "core" / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def other(name: str = "other", network: Any = None) -> Model:
    return wrap(network if network is not None else text_network(), text_tokenizer(), name=name)


def values(found: Evaluation, model: str) -> dict[tuple[str, str], dict[str, float]]:
    """Values by task and metric, and in them by item."""
    by_metric: dict[tuple[str, str], dict[str, float]] = {}
    for row in found.tables["tasks"].to_pylist():
        if row["model"] == model:
            by_metric.setdefault((row["task"], row["metric"]), {})[row["item_id"]] = row["value"]
    return by_metric


def texts(found: Evaluation, model: str) -> list[dict[str, Any]]:
    return [row | {"model": ""} for row in found.tables["texts"].to_pylist() if row["model"] == model]


@pytest.fixture(scope="module")
def dense() -> Model:
    return text_model()


@pytest.fixture(scope="module")
def itself(dense: Model) -> Evaluation:
    torch.manual_seed(0)
    return evaluate(dense, other(), tasks=TASKS, limit=4, long_tokens=8)


@pytest.fixture(scope="module")
def dropped_and_masked(dense: Model) -> Evaluation:
    torch.manual_seed(0)
    tasks = ("core_letters", "core_long")
    return evaluate(dense, "drop-attention@0+drop-mlp@2", "magnitude:0.5", tasks=tasks, limit=6, long_tokens=12)


# --------------------------------------------------------------------------- a model against itself


def test_a_model_against_itself(itself: Evaluation) -> None:
    (record,) = itself.summary
    assert record["compressed"] == "other"
    assert [row["task"] for row in record["scores"]] == [
        "core_choice",
        "core_facts",
        *["core_long"] * len(LONG_METRICS),
        *[TASKS[3]] * 4,
    ]
    assert [row["metric"] for row in record["scores"]] == ["acc", "exact_match", *LONG_METRICS, *NEIGHBOURS]
    assert values(itself, "dense") == values(itself, "other")
    assert texts(itself, "dense") == texts(itself, "other") != []
    for row in record["scores"]:
        assert row["items"] == 4
        assert row["dense"] == row["compressed"]
        assert row["difference"]["mean"] == 0
        assert row["difference"]["low"] < 0 < row["difference"]["high"]  # four items show little
        assert row["tie"] is True
        if row["kept"] is not None:
            assert (row["kept"]["mean"], row["kept"]["high"]) == (1, 1)
            assert row["kept"]["low"] < 0.5
        if row["lost"] is not None:
            assert (row["lost"], row["gained"], row["sign_test"]) == (0, 0, 1)
    kept = {row["metric"]: row["kept"] for row in record["scores"]}
    assert kept["overlap_at_10"]["mean"] == 1
    assert kept["excess_nll"] is None
    assert kept["exact_match"] is None  # the random model knows nothing
    assert {line["verdict"] for line in record["verdicts"]} == {"undecided", "not measured"}  # four items prove nothing
    assert {line["use"]: line["verdict"] for line in record["verdicts"]}["long-generation"] == "undecided"
    assert itself.verdict == {"other": record["verdicts"]}


def test_answers_stand_beside_what_was_expected(itself: Evaluation) -> None:
    rows = {row["item_id"]: row for row in itself.tables["tasks"].to_pylist() if row["model"] == "other"}
    for item in items("core_choice")[:4]:
        row = rows[item["id"]]
        assert row["target"] == str(item["answer"])
        assert row["value"] == float(row["answer"] == row["target"])
    for item in items("core_facts")[:4]:
        assert rows[item["id"]]["target"] == item["answers"][0]
    assert {row["answer"] for row in rows.values() if row["task"] in TASKS[2:]} == {None}


def test_long_texts_are_drawn_and_read_by_the_dense_model(dense: Model, dropped_and_masked: Evaluation) -> None:
    tokenizer, exact = text_tokenizer(), copy.deepcopy(dense.network).double()
    writers = {"dense": exact, "drop-attention@0+drop-mlp@2": zeroed(exact, attention=[0], mlp=[2])}
    for label, writer in writers.items():
        rows = [row for row in dropped_and_masked.tables["texts"].to_pylist() if row["model"] == label]
        assert [row["prompt_id"] for row in rows] == [item["id"] for item in items("core_long")[:6]]
        for row, item in zip(rows[:3], items("core_long"), strict=False):
            assert (row["prompt"], row["kind"]) == (item["prompt"], item["kind"])
            ids = tokenizer(item["prompt"])["input_ids"]
            start = len(ids)
            for number in uniforms(0, "long texts, plain, own", ids, 0, 12)[: row["num_tokens"]]:
                with torch.inference_mode():
                    chances = torch.softmax(writer(input_ids=torch.tensor([ids])).logits[0, -1], dim=-1)
                ids.append(int((torch.cumsum(chances, 0) > number).nonzero()[0, 0]))
            assert row["ended"] == (ids[-1] == tokenizer.eos_token_id)
            assert row["num_tokens"] == 12 or row["ended"]
            assert row["text"] == tokenizer.decode(ids[start : len(ids) - row["ended"]])
            with torch.inference_mode():
                steps = torch.log_softmax(exact(input_ids=torch.tensor([ids])).logits[0, start - 1 : -1], -1)
            costs = -steps[range(len(steps)), ids[start:]]
            assert row["nll_dense"] == pytest.approx(costs.mean().item(), rel=1e-4)
            entropies = torch.special.entr(steps.exp()).sum(-1)
            assert row["entropy_dense"] == pytest.approx(entropies.mean().item(), rel=1e-4)
            assert (row["sampling"], row["repeat"], row["loops"]) == ("plain", 0, False)


def test_the_dense_model_beside_itself_is_stored(dropped_and_masked: Evaluation) -> None:
    rows = {row["metric"]: row for row in dropped_and_masked.info["null"]}
    assert list(rows) == LONG_METRICS
    for name in ("excess_nll", "nll_dense"):
        assert rows[name]["difference"]["mean"] != 0
        shown = dropped_and_masked.summary[0]["scores"]
        assert rows[name]["dense"] == next(row["dense"] for row in shown if row["metric"] == name)
    assert all(row["task"] == "core_long" and row["items"] == 6 for row in rows.values())
    assert dropped_and_masked.info["decoding"]["core_long"] == {"plain": {}}


def test_several_texts_of_a_prompt_are_one_item(dense: Model) -> None:
    network = copy.deepcopy(dense.network)
    network.generation_config.update(do_sample=True, temperature=0.3, top_k=40)
    settings = {"tasks": "core_long", "limit": 3, "long_tokens": 6, "long_samples": 2, "seed": 5}
    found = evaluate(other("sharp", network), "drop-mlp@1", **settings)
    rows = [row for row in found.tables["texts"].to_pylist() if row["model"] == "drop-mlp@1"]
    assert [(row["sampling"], row["repeat"]) for row in rows] == 3 * [
        ("plain", 0),
        ("plain", 1),
        ("own", 0),
        ("own", 1),
    ]
    assert len({row["text"] for row in rows}) == 12
    by_item = values(found, "drop-mlp@1")["core_long", "nll_dense"]
    for item, value in by_item.items():
        assert value == pytest.approx(sum(row["nll_dense"] for row in rows if row["prompt_id"] == item) / 4)
    assert list(by_item) == [item["id"] for item in items("core_long")[:3]]
    assert found.info["decoding"]["core_long"] == {"plain": {}, "own": {"temperature": 0.3, "top_k": 40}}
    assert {row["items"] for row in found.summary[0]["scores"]} == {3}
    again = evaluate(other("sharp", network), "drop-mlp@1", **settings | {"seed": 6})
    assert again.tables["texts"]["text"] != found.tables["texts"]["text"]


# --------------------------------------------------------------------------- recipes


def test_recipes_equal_the_same_made_by_hand(dense: Model, dropped_and_masked: Evaluation) -> None:
    network = zeroed(dense.network, attention=[0], mlp=[2])
    masked = mask_oracle.sequential(dense.network, [[5, 9, 33]], "magnitude", 0.5)
    tasks = ("core_letters", "core_long")
    models = [other("dropped", network), other("masked", masked)]
    by_hand = evaluate(dense, *models, tasks=tasks, limit=6, long_tokens=12)
    first, second = (record["compressed"] for record in dropped_and_masked.summary)
    assert (first, second) == ("drop-attention@0+drop-mlp@2", "magnitude:0.5")
    for label, name in ((first, "dropped"), (second, "masked")):
        assert values(dropped_and_masked, label) == values(by_hand, name)
        assert texts(dropped_and_masked, label) == texts(by_hand, name)
        assert values(dropped_and_masked, label) != values(by_hand, "dense")
    assert values(dropped_and_masked, "dense") == values(by_hand, "dense")
    for record, same in zip(dropped_and_masked.summary, by_hand.summary, strict=True):
        assert record["scores"] == same["scores"]
        assert record["verdicts"] == same["verdicts"]


def test_a_count_is_chosen_by_the_calibration(dense: Model, tmp_path: Path) -> None:
    from prunelens.pruning.redundancy import rank_redundancy

    text = "Birds sang in the garden."
    (tmp_path / "text.txt").write_text(text + "\n", encoding="utf-8")
    ranking = rank_redundancy(dense, [text_tokenizer()(text)["input_ids"]])
    (_, layer_idx), *_ = ranking.ordered("mlp")
    counted = evaluate(
        dense, "drop-mlp:1", tasks="core_long", limit=3, long_tokens=6, calibration=tmp_path / "text.txt"
    )
    named = evaluate(dense, f"drop-mlp@{layer_idx}", tasks="core_long", limit=3, long_tokens=6)
    assert values(counted, "drop-mlp:1") == values(named, f"drop-mlp@{layer_idx}")


def test_no_repair_is_fitted_on_what_the_tasks_ask(dense: Model, tmp_path: Path) -> None:
    """Items of every kind of task, also those that a limit passes over."""
    recipe, clean = "drop-attention@1+repair:linear", ["Birds sang in the garden.", "The ship left at dawn."]
    queries = (beir(tmp_path / "mine") / "queries.jsonl").read_text(encoding="utf-8").splitlines()
    asked = [items("core_facts")[5]["question"], items("core_choice")[7]["question"], json.loads(queries[-1])["text"]]
    found = []
    for name, lines in (("clean", clean), ("held", [*clean, *(f"Then: {text} Yes." for text in asked)])):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(json.dumps({"text": line}) for line in lines), encoding="utf-8")
        tasks = ("core_facts", "core_choice", str(tmp_path / "mine"))
        found.append(evaluate(dense, recipe, "drop-mlp:1", tasks=tasks, limit=2, calibration=path))
    assert values(found[0], recipe) == values(found[1], recipe)
    told = f"{recipe}: repair:linear: 3 of 5 calibration texts hold what is reported on and were left out of the fit"
    assert [note for note in found[1].info["notes"] if "hold" in note] == [told.removeprefix(f"{recipe}: ")]
    assert not any("hold" in note for note in found[0].info["notes"])


def test_texts_that_all_hold_a_question_are_refused(dense: Model, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(items("core_long")[3]["prompt"], encoding="utf-8")
    with pytest.raises(PrunelensError, match="each holds one of them; give another --calibration"):
        evaluate(dense, "drop-mlp@1+repair:bias", tasks="core_long", limit=2, calibration=tmp_path / "text.txt")


def test_without_a_repair_nobody_asks_for_the_questions(dense: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(self: Harness) -> list[str]:
        raise AssertionError("all items were read for nothing")

    monkeypatch.setattr(Harness, "questions", forbidden)
    assert evaluate(dense, "drop-mlp@1", tasks="core_facts", limit=2).summary
    with pytest.raises(AssertionError, match="for nothing"):
        evaluate(dense, "drop-mlp@1+repair:bias", tasks="core_facts", limit=2)


def test_questions_come_without_the_words_around_them(dense: Model, tmp_path: Path) -> None:
    name = str(beir(tmp_path / "mine"))
    runner = TaskRunner(dense, parse_tasks(("core_facts", "core_arithmetic", "core_long", name)), TaskSettings(limit=2))
    found = runner.questions
    passages = [item["prompt"] for item in items("core_long")]
    assert set(found) >= {*passages, *(item["question"] for item in items("core_facts") if len(item["question"]) >= 24)}
    assert all(len(text) >= 24 for text in found)


def test_thresholds_decide(dense: Model) -> None:
    strict = Thresholds(safe_nll=0, broken_nll=1e-9)
    generous = Thresholds(safe_nll=1e6, broken_nll=1e7, safe_loops=0.9, broken_loops=1)
    verdicts = []
    for thresholds in (strict, generous):
        found = evaluate(dense, "drop-block@0,3", tasks="core_long", limit=24, long_tokens=4, thresholds=thresholds)
        assert found.info["thresholds"] == thresholds.model_dump()
        verdicts.append({line["use"]: line["verdict"] for line in found.summary[0]["verdicts"]}["long-generation"])
    assert verdicts[1] == "safe"
    assert verdicts[0] != "safe"


# --------------------------------------------------------------------------- tables and pages


def test_columns_are_a_contract(itself: Evaluation, tmp_path: Path) -> None:
    page = itself.report(tmp_path / "tasks")
    assert page == tmp_path / "tasks" / "report.html"
    assert {path.name for path in (tmp_path / "tasks").iterdir()} == {
        "tasks.parquet",
        "texts.parquet",
        "run.json",
        "report.html",
    }
    for name, columns in COLUMNS.items():
        table = pq.read_table(tmp_path / "tasks" / f"{name}.parquet")
        assert dict(zip(table.column_names, map(str, table.schema.types), strict=True)) == columns
    rows = pq.read_table(tmp_path / "tasks" / "tasks.parquet").to_pylist()
    keys = [(row["model"], row["task"], row["metric"], row["item_id"]) for row in rows]
    assert len(set(keys)) == len(keys) == 2 * 4 * (2 + len(LONG_METRICS) + 4)
    means: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        if row["model"] == "dense":
            means.setdefault((row["task"], row["metric"]), []).append(row["value"])
    info = json.loads((tmp_path / "tasks" / "run.json").read_text(encoding="utf-8"))
    assert (info["format"], info["format_version"]) == ("prunelens-evaluation", 1)
    assert info["tasks"] == list(TASKS)
    for row in info["summary"][0]["scores"]:
        assert row["dense"]["mean"] == pytest.approx(np.mean(means[row["task"], row["metric"]]))
    assert info["settings"] == {
        "limit": 4,
        "subset": "all",
        "batch_size": 40,
        "chat_template": False,
        "long_tokens": 8,
        "long_samples": 1,
        "pooling": "mean",
        "seed": 0,
        "allow_code": False,
        "all_items": False,
    }


def test_a_stored_evaluation_opens_again(itself: Evaluation, tmp_path: Path) -> None:
    page = itself.report(tmp_path / "tasks")
    found = Evaluation.open(tmp_path / "tasks")
    assert found.tables == itself.tables
    assert found.info == json.loads(json.dumps(itself.info))
    assert found.summary == json.loads(json.dumps(itself.summary))
    assert found.verdict.keys() == {"other"}
    assert found._repr_html_() == itself._repr_html_()
    assert render_again(tmp_path / "tasks") == page.read_text(encoding="utf-8")
    assert itself.report(tmp_path / "tasks") == page  # its own result may be replaced
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(PrunelensError, match="mine"):
        itself.report(tmp_path / "mine")
    with pytest.raises(PrunelensError, match=r"expected an? evaluation"):
        Evaluation.open(tmp_path / "mine")
    assert (tmp_path / "mine" / "notes.txt").read_text(encoding="utf-8") == "mine"


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """(notebook fragment, page) of models and a task with hostile names."""
    folder = tmp_path_factory.mktemp("hostile")
    name = str(beir(folder / "<img src=x onerror=alert(2)>"))
    dense = wrap(text_network(), text_tokenizer(), name="<b>dense</b>" + HOSTILE)
    found = evaluate(dense, other(HOSTILE), tasks=[name, "core_long"], limit=2, long_tokens=4)
    return found._repr_html_(), found.report(folder / "run").read_text(encoding="utf-8")


def test_hostile_names_are_escaped(hostile: tuple[str, str]) -> None:
    for text in hostile:
        assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
        assert "<script>alert(1)" not in text
        assert "<img src=x" not in text
        assert "<b>dense" not in text
    assert "\u202e" not in hostile[0]
    assert "\x1b" not in hostile[0]


def test_names_cannot_steer_the_page(hostile: tuple[str, str]) -> None:
    assert "\u202e" not in hostile[1]
    assert "\x1b" not in hostile[1]


# --------------------------------------------------------------------------- classes, subsets, retrieval


def test_tasks_by_class_set_the_class(dense: Model) -> None:
    given = {"short-generation": ["core_choice"], "multiple-choice": ["core_long"]}
    found = evaluate(dense, "drop-mlp@1", tasks=given, limit=3, long_tokens=4)
    assert found.info["tasks"] == ["core_choice", "core_long"]
    uses = {row["task"]: row["use"] for row in found.summary[0]["scores"]}
    assert uses == {"core_choice": "short-generation", "core_long": "multiple-choice"}
    verdicts = {line["use"]: line for line in found.summary[0]["verdicts"]}
    assert verdicts["multiple-choice"]["source"] == "measured"
    assert "core_long" in verdicts["multiple-choice"]["number"]
    assert verdicts["long-generation"]["verdict"] == verdicts["retrieval"]["verdict"] == "not measured"


def test_subsets_choose_items_of_every_task(dense: Model, tmp_path: Path) -> None:
    name = str(beir(tmp_path / "mine"))
    tasks = ("core_choice", "core_long", name)
    found = evaluate(dense, "drop-mlp@1", tasks=tasks, limit=2, long_tokens=4, subset="held-out")
    expected = {task: [item["id"] for item in items(task)[1:4:2]] for task in tasks[:2]} | {name: ["q1"]}
    for model in ("dense", "drop-mlp@1"):
        own = values(found, model)
        assert {task for task, _ in own} == set(tasks)
        assert all(list(by_item) == expected[task] for (task, _), by_item in own.items())
    searched = evaluate(dense, "drop-mlp@1", tasks=name, subset="search")
    assert list(values(searched, "dense")[name, "ndcg_at_10"]) == ["q0", "q2"]


def beir(folder: Path) -> Path:
    """12 passages, 3 queries that repeat one of them each, and grades."""
    (folder / "qrels").mkdir(parents=True)
    passages = [
        json.dumps({"_id": f"p{place}", "text": item["prompt"]}) for place, item in enumerate(items("core_long")[:12])
    ]
    asked = [json.dumps({"_id": f"q{place}", "text": items("core_long")[place]["prompt"]}) for place in range(3)]
    (folder / "corpus.jsonl").write_text("\n".join(passages), encoding="utf-8")
    (folder / "queries.jsonl").write_text("\n".join(asked), encoding="utf-8")
    grades = "query-id\tcorpus-id\tscore\nq0\tp0\t2\nq0\tp5\t1\nq1\tp1\t1\nq2\tp9\t1\n"
    (folder / "qrels" / "test.tsv").write_text(grades, encoding="utf-8")
    return folder


def embedding(network: Any, text: str) -> np.ndarray:
    """The mean of the states that enter the head, of length 1."""
    ids = torch.tensor([text_tokenizer()(text)["input_ids"]])
    with torch.inference_mode():
        found = network.model(input_ids=ids).last_hidden_state[0].double().mean(dim=0).numpy()
    return found / np.linalg.norm(found)


def test_a_beir_folder_is_a_task(dense: Model, tmp_path: Path) -> None:
    name = str(beir(tmp_path / "mine"))
    found = evaluate(dense, "drop-attention@1,2+drop-mlp@0", tasks=name)
    compressed = zeroed(dense.network, attention=[1, 2], mlp=[0])
    prompts = [item["prompt"] for item in items("core_long")[:12]]
    orders = []
    for network in (dense.network, compressed):
        vectors = np.array([embedding(network, prompt) for prompt in prompts])
        orders.append(np.argsort(-(vectors[:3] @ vectors.T), axis=1, kind="stable"))
    relevant: list[dict[int, float]] = [{0: 2, 5: 1}, {1: 1}, {9: 1}]
    for label, order in zip(("dense", "drop-attention@1,2+drop-mlp@0"), orders, strict=True):
        own = values(found, label)
        assert list(own) == [(name, metric) for metric in NEIGHBOURS]
        for place, grades in enumerate(relevant):
            gains = [grades.get(int(index), 0) for index in order[place][:10]]
            ideal = sorted(grades.values(), reverse=True)
            weights = [1 / np.log2(rank + 2) for rank in range(10)]
            ndcg = np.dot(gains, weights) / np.dot(ideal, weights[: len(ideal)])
            assert own[name, "ndcg_at_10"][f"q{place}"] == pytest.approx(ndcg)
            assert own[name, "recall_at_10"][f"q{place}"] == sum(gain > 0 for gain in gains) / len(grades)
            same = len(set(order[place][:10]) & set(orders[0][place][:10])) / 10
            assert own[name, "overlap_at_10"][f"q{place}"] == same
    rows = {row["metric"]: row for row in found.summary[0]["scores"]}
    assert {row["use"] for row in rows.values()} == {"retrieval"}
    assert rows["overlap_at_10"]["dense"]["mean"] == rows["overlap_at_10"]["dense"]["high"] == 1
    assert rows["overlap_at_10"]["chance"] == rows["recall_at_10"]["chance"] == 10 / 12
    assert [name for name, row in rows.items() if row["decides"]] == ["ndcg_at_10", "overlap_at_10"]


def numbered(folder: Path, num_passages: int, qrels: str, queries: Sequence[str]) -> Path:
    (folder / "qrels").mkdir(parents=True)
    passages = [
        {"_id": f"p{index}", "text": f"passage number {index * 7 % 13} of {index}"} for index in range(num_passages)
    ]
    asked = [{"_id": name, "text": f"who asks for {name}"} for name in queries]
    for name, rows in (("corpus.jsonl", passages), ("queries.jsonl", asked)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "qrels" / "test.tsv").write_text(qrels)
    return folder


@pytest.mark.parametrize(
    ("num_passages", "queries", "chance"),
    [
        (10, ("q", "r"), None),
        (11, ("q", "p3"), None),
        (4, ("q", "r"), None),
        (11, ("q", "r"), 10 / 11),
        (20, ("p3", "p4"), 10 / 19),
        (20, ("q", "p4"), (10 / 20 + 10 / 19) / 2),
    ],
)
def test_overlap_decides_only_where_there_is_an_order_to_keep(
    tmp_path: Path, num_passages: int, queries: tuple[str, str], chance: float | None
) -> None:
    folder = numbered(tmp_path / "mine", num_passages, f"{queries[0]}\tp1\t1\n{queries[1]}\tp2\t1\n", queries)
    found = evaluate(text_model(), "drop-attention@1", tasks=str(folder))
    rows = {row["metric"]: row for row in found.info["summary"][0]["scores"]}
    overlap = rows["overlap_at_10"]
    told = [note for note in found.info["notes"] if "overlap_at_10 decides nothing" in note]
    if chance is None:
        assert (overlap["decides"], len(told)) == (None, 1)
        for line in found.info["summary"][0]["verdicts"]:
            assert "neighbours stay" not in line["number"]
    else:
        assert (overlap["decides"], told) == ("agreement", [])
        assert overlap["chance"] == pytest.approx(chance)
        assert rows["recall_at_10"]["chance"] == pytest.approx(chance)


def test_what_a_data_set_leaves_out_is_told_in_the_result(tmp_path: Path) -> None:
    folder = numbered(tmp_path / "mine", 12, "q\tp1\t1\nq\tgone\t1\nr\tp3\t0\n", ("q", "r"))
    found = evaluate(text_model(), "drop-attention@1", tasks=str(folder))
    assert found.info["notes"] == [
        "mine: 1 qrels name passages that are not in corpus.jsonl (the first is 'gone') and were left out",
        "mine: 1 judged queries have no relevant passage in corpus.jsonl and were left out",
    ]


def test_prompts_and_tokenizer_are_told_in_the_result(tmp_path: Path) -> None:
    model = text_model()
    model.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", 2)]
    )
    model.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<eos>{% endfor %}"
    folder = numbered(tmp_path / "mine", 12, "q\tp1\t1\n", ("q",))
    found = evaluate(model, "drop-attention@1", tasks=f"core_long,{folder}", limit=2, long_tokens=4)
    assert len(found.info["notes"]) == 2
    assert "'<eos>' to every text" in found.info["notes"][0]
    assert "the chat template of text-llama opens no answer" in found.info["notes"][1]


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("num_passages", [2, 5, 10, 11, 40])
def test_guessed_values_are_those_of_random_orders(num_passages: int, own: bool) -> None:
    generator = np.random.default_rng(0)
    grades = [{0: 1.0}, {0: 3.0, 1: 1.0}, {place: 1.0 + place % 3 for place in range(min(12, num_passages))}]
    relevant = {f"q{row}": {f"p{place}": grade for place, grade in found.items()} for row, found in enumerate(grades)}
    passages = {f"p{place}": "" for place in range(num_passages)}
    orders = generator.random((4000, num_passages), np.float32)
    if own:  # the last query is the second passage, which is graded and never found
        passages = {"q2" if name == "p1" else name: text for name, text in passages.items()}
        relevant = {
            query: {"q2" if n == "p1" else n: grade for n, grade in found.items()} for query, found in relevant.items()
        }
    corpus = Corpus("random", passages, dict.fromkeys(relevant, ""), relevant)
    drawn = [score(orders, [found] * len(orders)) for found in grades[:2]]
    if own:
        orders[:, 1] = np.nan
    drawn.append(score(orders, [grades[2]] * len(orders)))
    for guessed, one in ((_guessed_ndcg(corpus), 0), (_guessed_recall(corpus), 1)):
        means = np.mean([found[one] for found in drawn], axis=0)
        assert guessed == pytest.approx(means.mean(), abs=5 * means.std() / np.sqrt(len(means)) + 1e-9)


def test_pooling_is_passed_on(dense: Model, tmp_path: Path) -> None:
    name = str(beir(tmp_path / "mine"))
    mean, last = (evaluate(dense, "drop-mlp@0", tasks=name, pooling=pooling) for pooling in ("mean", "lasttoken"))
    key = (name, "neighbour_correlation")
    assert values(mean, "drop-mlp@0")[key] != values(last, "drop-mlp@0")[key]


# --------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"limit": 1}, "--limit of at least 2, found 1"),
        ({"limit": 0}, "--limit of at least 2"),
        ({"batch_size": 0}, "--batch-size"),
        ({"long_tokens": 0}, "--long-tokens"),
        ({"subset": "odd"}, "all, search, held-out, found 'odd'"),
        ({"pooling": "max"}, "--pooling of mean, lasttoken, found 'max'"),
        ({"tasks": "core_chioce"}, r"did you mean core_choice\?"),
        ({"tasks": {"retrieval": []}}, "retrieval has no task"),
    ],
)
def test_settings_without_meaning_are_refused_before_a_model_opens(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(PrunelensError, match=words):
        evaluate("there is no such model", "drop-mlp@1", **settings)


def test_what_cannot_be_compared_is_refused(dense: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(*args: Any) -> None:
        raise AssertionError("something was computed")

    monkeypatch.setattr(Measurement, "run", nothing)
    for compressed, words in (
        ((), "at least one compressed model"),
        (("drop-mlp@1", "drop-mlp@1"), "given twice"),
        (("drop-mlp@9",), "from 0 to 3"),
        (("drop-mpl:1",), "did you mean drop-mlp"),
    ):
        with pytest.raises(PrunelensError, match=words):
            evaluate(dense, *compressed, tasks="core_choice")


def test_a_model_without_a_tokenizer_is_refused() -> None:
    with pytest.raises(PrunelensError, match="bare has no tokenizer"):
        evaluate(wrap(text_network(), name="bare"), "drop-mlp@1", tasks="core_long")


def test_long_texts_need_no_harness(dense: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_harness(name: str) -> str:
        if name.replace("_", "-") == "lm-eval":
            raise PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(module, "version", without_harness)
    found = evaluate(dense, "drop-mlp@1", tasks="core_long", limit=2, long_tokens=4)
    assert "lm_eval" not in found.info["versions"]
    assert {"prunelens", "torch", "transformers"} <= found.info["versions"].keys()


def test_a_metric_that_no_item_has_is_left_out(dense: Model) -> None:
    found = evaluate(dense, "drop-mlp@1", tasks="core_long", limit=2, long_tokens=2)
    metrics = [row["metric"] for row in found.summary[0]["scores"]]
    assert metrics == [name for name in LONG_METRICS if name != "distinct_3"]  # two tokens hold no three


def test_progress_reaches_its_total(dense: Model, tmp_path: Path) -> None:
    totals: dict[str, int] = {}
    finished: dict[str, list[int]] = {}

    def reporter(stage: str, total: int) -> Any:
        totals[stage] = total
        finished[stage] = []
        return finished[stage].append

    name = str(beir(tmp_path / "mine"))
    evaluate(dense, "drop-mlp@1", tasks=["core_choice", "core_long", name], limit=2, long_tokens=4, reporter=reporter)
    for label in ("dense", "drop-mlp@1"):
        assert totals[f"{label}: core_choice"] == sum(finished[f"{label}: core_choice"]) == 8
        assert totals[f"{label}: core_long"] == sum(finished[f"{label}: core_long"]) == 8
        assert totals[f"{label}: {name}"] == sum(finished[f"{label}: {name}"]) == 15
    assert totals["dense, other numbers: core_long"] == sum(finished["dense, other numbers: core_long"]) == 8
    assert len(totals) == 7
