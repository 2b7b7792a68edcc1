"""The core suite: what its files hold and whether its answers are right; and tasks by name, class and subset."""

import importlib.util
import json
import re
from collections import Counter
from itertools import combinations, pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from prunelens.errors import PrunelensError
from prunelens.tasks.suite import (
    CORE_HARNESS,
    CORE_TASKS,
    SUBSETS,
    USES,
    in_subset,
    is_retrieval,
    long_items,
    parse_tasks,
    retrieval_folder,
    suite_folder,
)

CORE = suite_folder() / "core"
RETRIEVAL = suite_folder() / "core_retrieval"
SCRIPT = Path(__file__).parents[2] / "scripts" / "make_core_arithmetic.py"
FEWEST = {"core_choice": 200, "core_facts": 100, "core_arithmetic": 60, "core_copy": 40, "core_long": 128}
SUM = re.compile(r"What is ([0-9 +-]+)\?")
WORD_PROBLEMS = {
    r"\w+ has (\d+) (\w+) and gets (\d+) more\. How many \2 does \w+ have now\?": lambda has, gets: has + gets,
    r"\w+ has (\d+) (\w+) and gives away (\d+)\. How many \2 are left\?": lambda has, gives: has - gives,
    r"\w+ has (\d+) boxes with (\d+) (\w+) in each\. How many \3 are there in all\?": lambda boxes, each: boxes * each,
}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def items(task: str) -> list[dict[str, Any]]:
    return lines(CORE / f"{task}.jsonl")


def module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


class Loader(yaml.SafeLoader):
    """Reads the harness's task files; its functions become their names."""


Loader.add_constructor("!function", lambda loader, node: node.value)


def task_file(task: str) -> dict[str, Any]:
    return yaml.load((CORE / f"{task}.yaml").read_text(encoding="utf-8"), Loader)


def examples(prompt: str) -> list[str]:
    """The questions of the worked examples in a prompt."""
    found = re.findall(r"Question: (.*)\nAnswer:", prompt)
    assert found[-1] == "{{question}}"
    return found[:-1]


def same(text: str) -> str:
    """A text as a reader compares it."""
    return " ".join(text.casefold().split())


# --------------------------------------------------------------------------- the files


@pytest.mark.parametrize("task", FEWEST)
def test_every_item_is_its_own(task: str) -> None:
    found = items(task)
    assert len(found) >= FEWEST[task]
    asked = [item.get("question") or item["prompt"] for item in found]
    assert all(text == text.strip() for text in asked)
    assert len({item["id"] for item in found}) == len({same(text) for text in asked}) == len(found)


@pytest.mark.parametrize("task", CORE_HARNESS)
def test_task_files_name_themselves_and_their_items(task: str) -> None:
    described = task_file(task)
    assert described["task"] == task
    assert items(Path(described["dataset_kwargs"]["file"]).stem)
    assert described["num_fewshot"] == 0


def test_choices() -> None:
    found = items("core_choice")
    for item in found:
        assert len(item["choices"]) == 4
        assert len({same(choice) for choice in item["choices"]} - {""}) == 4, item["id"]
        assert item["answer"] in range(4)
        assert all(choice == choice.strip() for choice in item["choices"])
    for part in (found, found[::2], found[1::2]):  # all, and each subset
        places = Counter(item["answer"] for item in part)
        assert all(0.2 <= places[place] / len(part) <= 0.3 for place in range(4)), places


def test_length_does_not_give_the_answer_away() -> None:
    found = items("core_choice")
    longest = shortest = 0
    for item in found:
        lengths = [len(choice) for choice in item["choices"]]
        longest += lengths[item["answer"]] == max(lengths)
        shortest += lengths[item["answer"]] == min(lengths)
    assert longest <= 0.4 * len(found)
    assert shortest <= 0.4 * len(found)


def test_facts_have_answers_that_score() -> None:
    scoring = module(CORE / "scoring.py")
    for item in items("core_facts"):
        assert item["answers"]
        for answer in item["answers"]:
            assert scoring.normalise(answer), item["id"]
            assert "\n" not in answer
            assert scoring.score_answer(item, [f" {answer.upper()}.\nQuestion:"]) == {"exact_match": 1}
        assert scoring.score_answer(item, [" something else"]) == {"exact_match": 0}
        assert scoring.score_answer(item, [""]) == {"exact_match": 0}


def test_no_answer_repeats_its_question() -> None:
    for item in items("core_facts"):
        words = set(re.findall(r"\w+", same(item["question"])))
        assert not words & {same(answer) for answer in item["answers"]}, item["id"]


@pytest.mark.parametrize("task", ["core_facts", "core_arithmetic"])
def test_worked_examples_are_no_items(task: str) -> None:
    shown = examples(task_file(task)["doc_to_text"])
    assert len(shown) >= 2
    asked = {same(item["question"]) for item in items(task)}
    assert not asked & {same(question) for question in shown}


def test_sums_are_those_of_the_script() -> None:
    assert (CORE / "core_arithmetic.jsonl").read_text(encoding="utf-8") == module(SCRIPT).text()


def worked_out(question: str) -> int:
    """The answer to a question of core_arithmetic, from its text alone."""
    found = SUM.fullmatch(question)
    if found is not None:
        return int(eval(found[1], {"__builtins__": {}}))
    (answer,) = [
        rule(*(int(part) for part in match.groups() if part.isdigit()))
        for pattern, rule in WORD_PROBLEMS.items()
        if (match := re.fullmatch(pattern, question))
    ]
    return answer


def test_sums_are_right() -> None:
    scoring = module(CORE / "scoring.py")
    found = items("core_arithmetic")
    for item in found:
        assert item["answer"] == worked_out(item["question"]) >= 0, item
        assert (SUM.fullmatch(item["question"]) is None) == (item["kind"] == "words")
        assert scoring.score_number(item, [f" {item['answer']}\nQuestion: 1"]) == {"exact_match": 1}
        assert scoring.score_number(item, [f" {item['answer'] + 1}"]) == {"exact_match": 0}
    assert set(Counter(item["kind"] for item in found).values()) == {len(found) // 3}


def test_worked_examples_are_right() -> None:
    text = task_file("core_arithmetic")["doc_to_text"]
    (first, second, third) = re.findall(r"Question: (.*)\nAnswer: (\d+)", text)
    for question, answer in (first, second):
        assert worked_out(question) == int(answer)
    has, finds = map(int, re.findall(r"\d+", third[0]))
    assert has + finds == int(third[1])


# --------------------------------------------------------------------------- copying


def turns(prompt: str) -> tuple[list[tuple[str, str]], str]:
    """(worked examples, what is asked) of a prompt of core_copy: after one line of instruction, `Name: text` lines."""
    _, *written = prompt.split("\n")
    texts = [line.partition(":")[2].strip() for line in written]
    assert len(written) % 2 == 0
    assert texts[-1] == ""
    names = {line.partition(":")[0] for line in written[::2]}, {line.partition(":")[0] for line in written[1::2]}
    assert [len(name) for name in names] == [1, 1]
    return list(zip(texts[:-2:2], texts[1:-2:2], strict=True)), texts[-2]


def reversed_words(text: str) -> str:
    return " ".join(text.split()[::-1])


@pytest.mark.parametrize(("kind", "answer_to"), [("repeat", str), ("reverse", reversed_words)])
def test_copies_are_right(kind: str, answer_to: type) -> None:
    found = [item for item in items("core_copy") if item["kind"] == kind]
    assert len(found) >= 12
    for item in found:
        shown, asked = turns(item["prompt"])
        assert len(shown) >= 2
        assert item["answer"] == answer_to(asked) != ""
        assert all(answer == answer_to(text) for text, answer in shown)
        assert asked not in dict(shown), item["id"]


def test_lists_are_continued_up_to_their_end() -> None:
    found = [item for item in items("core_copy") if item["kind"] == "list"]
    assert len(found) >= 12
    for item in found:
        shown, asked = turns(item["prompt"])
        for text, answer in [*shown, (asked, item["answer"])]:
            given, end = re.fullmatch(r"(.*) \(\D+: (\w+)\)|$", text).groups()  # type: ignore[union-attr]
            whole = given.split(", ") + answer.split(", ")
            assert whole[-1] == end
            assert len(set(whole)) == len(whole)
            if all(part.isdigit() for part in whole):
                assert len({int(after) - int(before) for before, after in pairwise(whole)}) == 1
            elif all(len(part) == 1 and part.isalpha() for part in whole):
                assert {ord(after) - ord(before) for before, after in pairwise(whole)} == {1}
        assert asked not in dict(shown), item["id"]


def test_copies_score() -> None:
    scoring = module(CORE / "scoring.py")
    for item in items("core_copy"):
        assert scoring.score_copy(item, [f"  {item['answer']} \nmore"]) == {"exact_match": 1}
        assert scoring.score_copy(item, [item["answer"].upper() + "x"]) == {"exact_match": 0}


# --------------------------------------------------------------------------- retrieval and long texts


def test_every_query_has_one_passage() -> None:
    passages, queries = lines(RETRIEVAL / "corpus.jsonl"), lines(RETRIEVAL / "queries.jsonl")
    assert len(queries) >= 60
    assert len(passages) >= 300
    for texts in (passages, queries):
        assert len({text["_id"] for text in texts}) == len({same(text["text"]) for text in texts}) == len(texts)
    header, *rows = (RETRIEVAL / "qrels" / "test.tsv").read_text(encoding="utf-8").splitlines()
    assert header.split("\t") == ["query-id", "corpus-id", "score"]
    asked, relevant, grades = zip(*(row.split("\t") for row in rows), strict=True)
    assert sorted(asked) == sorted(query["_id"] for query in queries)
    assert set(relevant) <= {passage["_id"] for passage in passages}
    assert len(set(relevant)) == len(relevant)
    assert set(grades) == {"1"}


def test_long_prompts_by_subset() -> None:
    every, search, held_out = (long_items(subset) for subset in SUBSETS)
    assert every == items("core_long")
    assert search == every[::2]
    assert held_out == every[1::2]
    assert long_items("held-out", 3) == held_out[:3]
    for part in (search, held_out):
        assert {item["kind"] for item in part} == {item["kind"] for item in every}


def test_long_prompts_are_balanced_over_kinds() -> None:
    """As many of every kind, in each subset too; any run of so many prompts holds nearly every kind."""
    for subset in SUBSETS:
        kinds = [item["kind"] for item in long_items(subset)]
        counts = Counter(kinds)
        assert len(counts) >= 8
        assert len(set(counts.values())) == 1
        for end in range(1, len(kinds) + 1):
            prefix = Counter(kinds[:end])
            assert max(prefix.values()) - min(prefix[kind] for kind in counts) <= 1


def test_long_prompts_are_no_near_duplicates() -> None:
    """No two share a third of the shorter one's triples of words."""
    triples = {}
    for item in items("core_long"):
        found = re.findall(r"[a-z0-9']+", item["prompt"].lower())
        triples[item["id"]] = set(zip(found, found[1:], found[2:], strict=False))
    for one, other in combinations(triples, 2):
        shared = len(triples[one] & triples[other])
        assert shared < min(len(triples[one]), len(triples[other])) / 3, (one, other)


def test_long_prompts_are_short_lines_of_text() -> None:
    for item in items("core_long"):
        assert list(item) == ["id", "kind", "prompt"]
        assert re.fullmatch(r"long-\d{2,3}", item["id"])
        assert 24 <= len(item["prompt"]) <= 600
        assert item["prompt"].isascii()
        assert "\n" not in item["prompt"]


# --------------------------------------------------------------------------- tasks by name


def refused(given: Any) -> str:
    with pytest.raises(PrunelensError) as error:
        parse_tasks(given)
    return str(error.value)


def test_core_stands_for_all_its_tasks() -> None:
    found = parse_tasks("core")
    assert found.tasks == CORE_TASKS
    assert found.uses == {}
    assert found.harness == CORE_HARNESS
    assert found.retrieval == ("core_retrieval",)
    assert retrieval_folder("core_retrieval") == RETRIEVAL
    assert parse_tasks("gsm8k, core").tasks == ("gsm8k", *CORE_TASKS)
    assert parse_tasks(["core"]) == found


def test_lists_keep_their_order(tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_text("", encoding="utf-8")
    folder = str(tmp_path)
    expected = ("core_long", "arc_easy", folder)
    for names in (" core_long , arc_easy," + folder, list(expected), expected):
        found = parse_tasks(names)
        assert found.tasks == expected
        assert found.harness == ("arc_easy",)
        assert found.retrieval == (folder,)
    assert retrieval_folder(folder) == tmp_path
    assert not is_retrieval(str(tmp_path / "elsewhere"))


def test_tasks_by_class() -> None:
    found = parse_tasks({"short-generation": ["core_copy", "gsm8k"], "retrieval": ["core_retrieval"]})
    assert found.tasks == ("core_copy", "gsm8k", "core_retrieval")
    assert found.uses == {
        "core_copy": "short-generation",
        "gsm8k": "short-generation",
        "core_retrieval": "retrieval",
    }
    every = parse_tasks({"multiple-choice": ["core"]})
    assert every.tasks == CORE_TASKS
    assert every.uses == dict.fromkeys(CORE_TASKS, "multiple-choice")
    assert parse_tasks({"retrieval": "core_retrieval"}) == parse_tasks({"retrieval": ["core_retrieval"]})


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("core_chioce", ["core_chioce", "did you mean core_choice?"]),
        (["core_facts", "core_logn"], ["core_logn", "did you mean core_long?"]),
        ("core_facts,core,gsm8k", ["core_facts", "twice"]),
        (["gsm8k", "gsm8k"], ["gsm8k", "twice"]),
        ("core_facts,", ["empty", "core"]),
        ("", ["empty"]),
        ("  ", ["empty"]),
        ([], ["at least one task"]),
        ({}, ["at least one task"]),
        ({"multiple-choise": ["core_choice"]}, ["'multiple-choise'", "did you mean multiple-choice?", *USES]),
        ({"retrieval": []}, ["retrieval", "no task"]),
        ({"retrieval": [""]}, ["empty"]),
        ({"retrieval": ["gsm8k"], "multiple-choice": ["core_choice", "gsm8k"]}, ["task gsm8k", "twice"]),
        ({"retrieval": ["core_retrievel"]}, ["did you mean core_retrieval?"]),
    ],
)
def test_what_is_refused(given: Any, words: list[str]) -> None:
    found = refused(given)
    assert all(word in found for word in words), found


def test_a_name_far_from_all_gets_no_guess() -> None:
    assert "did you mean" not in refused("core_" + 20 * "z")
    assert "did you mean" not in refused({"zzzz": ["core_choice"]})


# --------------------------------------------------------------------------- subsets


@given(count=st.integers(0, 60), limit=st.none() | st.integers(0, 70))
def test_subsets_part_all_items(count: int, limit: int | None) -> None:
    every, search, held_out = (in_subset(count, subset) for subset in SUBSETS)
    assert every == list(range(count))
    assert set(search).isdisjoint(held_out)
    assert sorted(search + held_out) == every
    assert 0 <= len(search) - len(held_out) <= 1
    for subset, found in zip(SUBSETS, (every, search, held_out), strict=True):
        assert in_subset(count, subset, limit) == (found if limit is None else found[:limit])
