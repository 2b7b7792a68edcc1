"""Harness tasks against an oracle of their definition, against lm_eval's own command line, and what is refused."""

import copy
import importlib.util
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lm_eval.api.metrics import bleu, mean

from conftest import text_model, text_network, text_tokenizer, tiny_network
from oracle import zeroed
from prunelens.errors import PrunelensError
from prunelens.models.model import Model
from prunelens.models.opening.loading import wrap
from prunelens.models.surgery.drop import Drop, dropped
from prunelens.progress import silent
from prunelens.tasks.harness import Harness
from prunelens.tasks.harness_metrics import HarnessTask, score_items
from prunelens.tasks.suite import CORE_HARNESS, Metric, MetricScores, in_subset, suite_folder

CORE = suite_folder() / "core"
TAUGHT = 4
"""So many first items of core_facts and core_choice are taught; of each the last one wrongly."""
SHOTS = (
    "Question: Which bird is the largest living one?\nAnswer: ostrich\n"
    "Question: In which country is the city of Hamburg?\nAnswer: Germany\n"
    "Question: How many wheels does a bicycle have?\nAnswer: two\n"
)


def items(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (CORE / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def fact_prompt(item: dict[str, Any]) -> str:
    return f"{SHOTS}Question: {item['question']}\nAnswer:"


def choice_prompt(item: dict[str, Any]) -> str:
    return f"Question: {item['question']}\nAnswer:"


def lessons() -> list[tuple[str, str]]:
    """(prompt, answer) of what the taught network learns."""
    found = []
    for place, item in enumerate(items("core_facts")[:TAUGHT]):
        found.append((fact_prompt(item), f" {'wrong' if place == TAUGHT - 1 else item['answers'][0].lower()}.\n"))
    for place, item in enumerate(items("core_choice")[:TAUGHT]):
        found.append((choice_prompt(item), f" {item['choices'][item['answer'] - (place == TAUGHT - 1)]}\n"))
    return found


def taught_network() -> Any:
    """A tiny network that has learned a few answers by heart, so that scores are neither 0 nor 1."""
    tokenizer, network = text_tokenizer(), text_network()
    prompts = [tokenizer(prompt)["input_ids"] for prompt, _ in lessons()]
    rows = [tokenizer(prompt + answer)["input_ids"] for prompt, answer in lessons()]
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for place, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        ids[place, : len(row)] = torch.tensor(row)
        labels[place, len(prompt) : len(row)] = torch.tensor(row[len(prompt) :])
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    for _ in range(40):
        optimizer.zero_grad()
        network(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
    return network


@pytest.fixture(scope="module")
def taught() -> Model:
    torch.manual_seed(0)
    return wrap(taught_network(), text_tokenizer(), name="taught")


@pytest.fixture(scope="module")
def untaught() -> Model:
    return text_model()


@pytest.fixture(scope="module")
def harness() -> Harness:
    return Harness(CORE_HARNESS)


@pytest.fixture(scope="module")
def scoring() -> Any:
    spec = importlib.util.spec_from_file_location("scoring", CORE / "scoring.py")
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def only(found: list[MetricScores]) -> MetricScores:
    (scored,) = found
    return scored


# --------------------------------------------------------------------------- oracles


def likelihood(network: Any, prompt: str, continuation: str) -> float:
    """log p(continuation | prompt), nats, in float64."""
    tokenizer = text_tokenizer()
    before, after = tokenizer(prompt)["input_ids"], tokenizer(continuation)["input_ids"]
    with torch.inference_mode():
        logits = network(input_ids=torch.tensor([before + after])).logits[0].double()
    steps = torch.log_softmax(logits[len(before) - 1 : -1], dim=-1)
    return sum(float(steps[place, token]) for place, token in enumerate(after))


def most_likely(network: Any, prompt: str, continuations: list[str]) -> int:
    values = [likelihood(network, prompt, continuation) for continuation in continuations]
    return values.index(max(values))


def greedy_line(network: Any, prompt: str, max_tokens: int) -> str:
    """What greedy decoding writes before the first line end, from whole passes without a cache."""
    tokenizer = text_tokenizer()
    ids, start = tokenizer(prompt)["input_ids"], len(tokenizer(prompt)["input_ids"])
    while len(ids) < start + max_tokens:
        with torch.inference_mode():
            token = int(network(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        ids.append(token)
    return tokenizer.decode(ids[start:]).split("\n")[0]


def test_choices_equal_the_oracle(harness: Harness, taught: Model) -> None:
    exact = copy.deepcopy(taught.network).double()
    chosen = items("core_choice")[:8]
    answers = {
        item["id"]: most_likely(exact, choice_prompt(item), [f" {choice}" for choice in item["choices"]])
        for item in chosen
    }
    found = only(harness.run(taught, "core_choice", silent, limit=8))
    assert found.metric == Metric("core_choice", "acc", "multiple-choice", 0.25, "higher", "kept")
    assert found.answers == {name: str(answer) for name, answer in answers.items()}
    assert found.values == {item["id"]: float(answers[item["id"]] == item["answer"]) for item in chosen}
    assert found.targets == {item["id"]: str(item["answer"]) for item in chosen}
    assert list(found.values.values())[:TAUGHT] == [1, 1, 1, 0]


def test_letters_equal_the_oracle(harness: Harness, untaught: Model) -> None:
    exact = copy.deepcopy(untaught.network).double()
    chosen, answers = items("core_choice")[:4], {}
    for item in chosen:
        lines = [f"{letter}. {choice}\n" for letter, choice in zip("ABCD", item["choices"], strict=True)]
        prompt = f"Question: {item['question']}\n{''.join(lines)}Answer:"
        answers[item["id"]] = most_likely(exact, prompt, [" A", " B", " C", " D"])
    found = only(harness.run(untaught, "core_letters", silent, limit=4))
    assert found.metric == Metric("core_letters", "acc", "multiple-choice", 0.25, "higher", "kept")
    assert found.answers == {name: str(answer) for name, answer in answers.items()}
    assert found.values == {item["id"]: float(answers[item["id"]] == item["answer"]) for item in chosen}


@pytest.mark.parametrize("which", ["taught", "untaught"])
def test_facts_equal_the_oracle(harness: Harness, scoring: Any, which: str, request: pytest.FixtureRequest) -> None:
    model, chosen = request.getfixturevalue(which), items("core_facts")[:6]
    found = only(harness.run(model, "core_facts", silent, limit=6, batch_size=3))
    answers = {item["id"]: greedy_line(model.network, fact_prompt(item), 16) for item in chosen}
    assert found.metric == Metric("core_facts", "exact_match", "short-generation", 0.0, "higher", "kept")
    assert found.answers == answers
    assert found.values == {
        item["id"]: scoring.score_answer(item, [answers[item["id"]]])["exact_match"] for item in chosen
    }
    assert found.targets == {item["id"]: item["answers"][0] for item in chosen}
    if which == "taught":
        assert list(found.values.values())[:TAUGHT] == [1, 1, 1, 0]
        assert answers["fact-001"] == " paris."
    else:
        assert max(len(text_tokenizer()(answer)["input_ids"]) for answer in answers.values()) >= 16


@pytest.mark.parametrize(("task", "max_tokens"), [("core_arithmetic", 12), ("core_copy", 24)])
def test_texts_are_cut_where_the_task_says(harness: Harness, untaught: Model, task: str, max_tokens: int) -> None:
    described = harness.tasks[task][task]
    assert described.max_tokens == max_tokens
    assert described.use == "short-generation"
    found = only(harness.run(untaught, task, silent, limit=1))
    (item,) = items(task)[:1]
    if task == "core_copy":
        prompt = item["prompt"]
    else:
        shots = [
            ("What is 2 + 6?", 8),
            ("What is 9 - 4 + 1?", 6),
            ("Ida has 3 shells and finds 4 more. How many shells does she have now?", 7),
        ]
        asked = "".join(f"Question: {question}\nAnswer: {answer}\n" for question, answer in shots)
        prompt = f"{asked}Question: {item['question']}\nAnswer:"
    assert found.answers == {item["id"]: greedy_line(untaught.network, prompt, max_tokens)}


def test_the_chat_template_is_used_where_it_is_asked_for(harness: Harness) -> None:
    model = text_model()
    model.tokenizer.chat_template = "{% for message in messages %}<{{ message.content }}>{% endfor %}"
    exact = copy.deepcopy(model.network).double()
    chosen = items("core_facts")[:2]
    found = only(harness.run(model, "core_facts", silent, limit=2, chat_template=True))
    expected = {item["id"]: greedy_line(exact, f"<{fact_prompt(item)}>", 16) for item in chosen}
    assert found.answers == expected
    plain = only(harness.run(model, "core_facts", silent, limit=2))
    assert plain.answers == {item["id"]: greedy_line(exact, fact_prompt(item), 16) for item in chosen}
    assert plain.answers != expected


# --------------------------------------------------------------------------- items, drops, what stays


@pytest.mark.parametrize(
    ("subset", "limit", "places"),
    [("all", 3, [0, 1, 2]), ("search", 3, [0, 2, 4]), ("held-out", 2, [1, 3]), ("held-out", None, None)],
)
def test_subsets_and_limits(
    harness: Harness, untaught: Model, subset: str, limit: int | None, places: list[int] | None
) -> None:
    names = [item["id"] for item in items("core_copy")]
    places = list(range(1, len(names), 2)) if places is None else places
    assert in_subset(len(names), subset, limit) == places
    asked = harness.tasks["core_copy"]["core_copy"].num_items
    assert asked == len(names)
    found = only(harness.run(untaught, "core_copy", silent, subset, limit, batch_size=24))
    assert list(found.values) == list(found.answers) == list(found.targets) == [names[place] for place in places]


@pytest.mark.parametrize("task", ["core_choice", "core_facts"])
def test_a_dropped_sublayer_equals_a_zeroed_one(harness: Harness, taught: Model, task: str) -> None:
    other = wrap(zeroed(taught.network, attention=[0, 1], mlp=[0]), text_tokenizer())
    drop = Drop(attention=frozenset([0, 1]), mlp=frozenset([0]))
    with dropped(taught.anatomy, drop):
        found = harness.run(taught, task, silent, limit=6)
    assert found == harness.run(other, task, silent, limit=6)
    before = harness.run(taught, task, silent, limit=6)
    assert only(before).answers != only(found).answers


def test_the_model_is_left_as_it_was_and_nothing_is_printed(
    harness: Harness, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    model = text_model("gpt2")
    model.tokenizer.pad_token = None
    model.network.generation_config.max_new_tokens = 5
    remarks = [logging.getLogger(name) for name in ("lm_eval", "datasets", "transformers")]

    def state() -> list[Any]:
        return [
            model.network.generation_config.to_dict(),
            model.network.config.to_dict(),
            model.tokenizer.init_kwargs.copy(),
            model.tokenizer.special_tokens_map.copy(),
            model.tokenizer.padding_side,
            model.tokenizer.pad_token,
            model.tokenizer("a text")["input_ids"],
            [weight.sum().item() for weight in model.network.parameters()],
            logging.root.manager.disable,
            [logger.level for logger in remarks],
            os.environ.get("TOKENIZERS_PARALLELISM"),
        ]

    before, tokenizer, network = copy.deepcopy(state()), model.tokenizer, model.network
    Harness(("core_facts",))
    for task in ("core_choice", "core_facts"):
        only(harness.run(model, task, silent, limit=2))
    assert state() == before
    assert model.tokenizer is tokenizer
    assert model.network is network
    assert capfd.readouterr() == ("", "")
    assert [str(warning.message) for warning in recwarn] == []


def test_progress_reaches_its_total(harness: Harness, untaught: Model) -> None:
    totals: dict[str, int] = {}
    finished: dict[str, list[int]] = {}

    def reporter(stage: str, total: int) -> Callable[[int], None]:
        totals[stage] = total
        finished[stage] = []
        return finished[stage].append

    harness.run(untaught, "core_choice", reporter, limit=3, batch_size=2, label="dense")
    harness.run(untaught, "core_letters", reporter, limit=3, batch_size=2, label="dense")
    harness.run(untaught, "core_facts", reporter, limit=3, batch_size=2, label="small")
    assert totals == {"dense: core_choice": 12, "dense: core_letters": 12, "small: core_facts": 3}
    assert {stage: sum(done) for stage, done in finished.items()} == totals
    assert len([count for count in finished["dense: core_choice"] if count]) == 6


# --------------------------------------------------------------------------- lm_eval's own command line


def test_the_suite_equals_the_command_line(harness: Harness, taught: Model, tmp_path: Path) -> None:
    taught.network.save_pretrained(tmp_path / "model")
    taught.tokenizer.save_pretrained(tmp_path / "model")
    tasks = ("core_choice", "core_facts")
    asked = f"--model hf --model_args pretrained={tmp_path / 'model'},dtype=float32 --tasks {','.join(tasks)} "
    asked += f"--include_path {CORE} --limit 6 --batch_size 4 --device cpu --output_path {tmp_path / 'out'}"
    finished = subprocess.run(
        [sys.executable, "-m", "lm_eval", "run", *asked.split(), "--log_samples"],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr
    (results,) = (tmp_path / "out").rglob("results_*.json")
    scores = json.loads(results.read_text(encoding="utf-8"))["results"]
    for task in tasks:
        found = only(harness.run(taught, task, silent, limit=6, batch_size=4))
        mean = sum(found.values.values()) / len(found.values)
        assert mean == scores[task][f"{found.metric.name},none"]
        assert 0.5 <= mean < 1
        (samples,) = (tmp_path / "out").rglob(f"samples_{task}_*.jsonl")
        logged = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
        assert found.values == {row["doc"]["id"]: row[found.metric.name] for row in logged}
        if task == "core_facts":
            assert found.answers == {row["doc"]["id"]: row["filtered_resps"][0] for row in logged}


# --------------------------------------------------------------------------- what is refused


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(PrunelensError, match=r"lm-evaluation-harness.*pip install 'prunelens\[tasks\]'"):
        Harness(("core_choice",))


def test_a_model_without_a_tokenizer(harness: Harness) -> None:
    with pytest.raises(PrunelensError, match="bare has no tokenizer"):
        harness.run(wrap(tiny_network("llama"), name="bare"), "core_choice", silent)


def test_names_that_cannot_be_run(monkeypatch: pytest.MonkeyPatch) -> None:
    import lm_eval.tasks

    asked: list[dict[str, Any]] = []
    few = [str(CORE), str(Path(lm_eval.tasks.__file__).parent / "arc")]  # all of them take long to find
    known = lm_eval.tasks.TaskManager(include_path=few, include_defaults=False)

    def manager(**given: Any) -> Any:
        asked.append(given)
        return known

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", manager)
    with pytest.raises(PrunelensError, match=r"no task 'arc_easyy' .*did you mean arc_easy\?"):
        Harness(("core_choice", "arc_easyy"))
    with pytest.raises(PrunelensError) as error:  # nothing comes from the hub in the tests
        Harness(("arc_easy",))
    assert "the data of the task arc_easy cannot be loaded" in str(error.value)
    assert "\n" not in str(error.value)
    assert asked == [{"include_path": str(CORE), "include_defaults": True}] * 2


def test_a_group_runs_all_its_tasks(harness: Harness, untaught: Model, tmp_path: Path) -> None:
    from lm_eval.tasks import TaskManager

    (tmp_path / "both.yaml").write_text("group: both\ntask: [core_letters, core_copy]\n", encoding="utf-8")
    grouped = Harness(("core_copy",))
    grouped._manager = TaskManager(include_path=[str(CORE), str(tmp_path)], include_defaults=False)
    grouped.tasks["both"] = grouped._load("both")
    found = grouped.run(untaught, "both", silent, limit=2)
    alone = [only(harness.run(untaught, task, silent, limit=2)) for task in ("core_letters", "core_copy")]
    assert found == alone


def sample(filtered: str = "none", doc_id: int = 0, responses: Any = (" yes",), **values: Any) -> dict[str, Any]:
    return {
        "filter": filtered,
        "doc_id": doc_id,
        "doc": {},
        "target": "yes",
        "filtered_resps": responses,
        "metrics": list(values),
        **values,
    }


def described(name: str = "theirs", output_type: str = "generate_until", max_tokens: int = 32, **metrics: Any) -> Any:
    """A task that declares metrics by name: (whether higher is better, aggregation)."""
    declared = metrics or {"em": (True, mean)}
    task = SimpleNamespace(
        config=SimpleNamespace(process_results=None, doc_to_choice=None, generation_kwargs={}),
        aggregation=lambda: {metric: how for metric, (_, how) in declared.items()},
        higher_is_better=lambda: {metric: higher for metric, (higher, _) in declared.items()},
    )
    return HarnessTask(name, output_type, max_tokens, 2, task)


@pytest.mark.parametrize("value", [(-3.5, 7), "yes", ["a", "b"], None, {"a": 1}])
def test_a_mean_of_what_is_no_number_never_decides(value: Any) -> None:
    (found,) = score_items(described(), [sample(em=value), sample(doc_id=1, em=1.0)])
    assert (found.metric.decides, found.metric.reason) == (None, "em has items that are not numbers")
    assert found.values == {"0": None, "1": None}


def test_metrics_with_numbers_are_kept_and_the_first_decides() -> None:
    rows = [
        sample(filtered, doc_id, f1=torch.tensor(0.5 + doc_id), em=doc_id == 1, bleu=("a", "b"))
        for filtered in ("strict", "flexible")
        for doc_id in (0, 1)
    ]
    found = score_items(described(em=(True, mean), f1=(True, mean), bleu=(True, bleu)), rows)
    assert [(one.metric.name, one.metric.decides, one.metric.aggregation) for one in found] == [
        ("em/strict", "kept", "mean"),
        ("f1/strict", None, "mean"),
        ("bleu/strict", None, "bleu"),
        ("em/flexible", None, "mean"),
        ("f1/flexible", None, "mean"),
        ("bleu/flexible", None, "bleu"),
    ]
    assert found[0].values == {"0": 0.0, "1": 1.0}
    assert found[1].values == {"0": 0.5, "1": 1.5}
    assert (found[2].values, found[2].parts) == ({"0": None, "1": None}, {"0": ["a", "b"], "1": ["a", "b"]})
    assert {one.metric.use for one in found} == {"short-generation"}
    assert found[0].answers == {"0": " yes", "1": " yes"}


def test_chance_is_the_mean_over_items_with_their_own_number_of_choices() -> None:
    two, four = [(-1.0, False), (-2.0, False)], [(-3.0, False), (-2.0, False), (-1.0, False), (-4.0, False)]
    rows = [sample(responses=two, acc=1.0, brier=0.5), sample(doc_id=1, responses=four, acc=0.0, brier=0.5)]
    task = described("theirs", "multiple_choice", acc=(True, mean), brier=(False, mean))
    accuracy, brier = score_items(task, rows)
    assert accuracy.metric == Metric("theirs", "acc", "multiple-choice", 0.375, "higher", "kept")
    assert (brier.metric.chance, brier.metric.better, brier.metric.decides) == (None, "lower", None)
    assert accuracy.answers == {"0": "0", "1": "2"}


def test_what_a_task_says_of_its_use() -> None:
    assert described(max_tokens=33).use == "long-generation"
    assert described(max_tokens=32).use == "short-generation"
    assert described(output_type="loglikelihood").use is None
    (scored,) = score_items(described(output_type="loglikelihood"), [sample(em=1.0)])
    assert scored.metric.decides is None


# --------------------------------------------------------------------------- scoring


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ""),
        (" \t\n", ""),
        ("The Eiffel Tower", "eiffel tower"),
        ("a cat and an owl", "cat and owl"),
        ("Theatre, analysis, anna", "theatre analysis anna"),
        ("U.S.A.", "usa"),
        ("  many   blanks\there ", "many blanks here"),
        ("(The) 'a' \"an\"!?", ""),
        ("ÉCOLE", "école"),
        ("rock-and-roll", "rockandroll"),
        ("1,000", "1000"),
    ],
)
def test_normalise(scoring: Any, text: str, expected: str) -> None:
    assert scoring.normalise(text) == expected
    assert scoring.normalise(expected) == expected


@pytest.mark.parametrize(
    ("written", "right"),
    [
        (" Rome", 1),
        ("rome", 1),
        (" ROMA.\nQuestion: what", 1),
        ("\n The Rome!\nno", 1),
        (" the city of Rome", 1),
        (" Rome, Italy", 0),
        (" Romes", 0),
        (" no\nRome", 0),
        ("", 0),
        ("\n\n", 0),
        (" .", 0),
    ],
)
def test_score_answer(scoring: Any, written: str, right: int) -> None:
    doc = {"answers": ["Rome", "Roma", "a city of the Rome"]}
    assert scoring.score_answer(doc, [written]) == {"exact_match": float(right)}


@pytest.mark.parametrize(
    ("answer", "written", "right"),
    [
        (7, " 7", 1),
        (7, "7.", 1),
        (7, " 3 + 4 = 7 shells", 1),
        (7, " 7 = 3 + 4", 0),
        (7, " 17", 0),
        (7, " 70", 0),
        (7, " -7", 0),
        (-7, " -7", 1),
        (7, " 07", 1),
        (1200, " 1,200", 1),
        (1200, " 1200 of them\nQuestion: 3", 1),
        (200, " 1,200", 0),
        (7, " no\n7", 0),
        (7, "\n 7\nQuestion: What is 3?", 1),
        (7, " seven", 0),
        (0, "", 0),
        (0, " 0", 1),
        ("7", " 7", 1),
    ],
)
def test_score_number(scoring: Any, answer: Any, written: str, right: int) -> None:
    assert scoring.score_number({"answer": answer}, [written]) == {"exact_match": float(right)}


@pytest.mark.parametrize(
    ("written", "right"),
    [
        (" The boy ran.", 1),
        ("The  boy\tran. ", 1),
        ("\nThe boy ran.\nmore", 1),
        (" the boy ran.", 0),
        (" The boy ran", 0),
        (" The boy ran. Away", 0),
        (" no\nThe boy ran.", 0),
        ("", 0),
    ],
)
def test_score_copy(scoring: Any, written: str, right: int) -> None:
    assert scoring.score_copy({"answer": "The boy ran."}, [written]) == {"exact_match": float(right)}


def test_items_are_read_as_they_are_written(scoring: Any) -> None:
    split = scoring.load_items("core_facts.jsonl", more="not read")
    assert list(split) == ["test"]
    assert [row["answers"] for row in split["test"]] == [item["answers"] for item in items("core_facts")]
