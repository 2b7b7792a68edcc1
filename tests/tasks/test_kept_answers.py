"""Answers kept on disk: used again for the very same model and request, recomputed for anything else."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance

from conftest import CACHE, text_model, text_tokenizer
from prunelens.api import evaluate
from prunelens.models.model import Model
from prunelens.models.opening.loading import wrap
from prunelens.progress import silent
from prunelens.tasks.harness import Asking, Harness
from prunelens.tasks.identity import identity_of
from prunelens.tasks.kept_answers import KeptAnswers, TaskAnswers, answers_folder, trim
from prunelens.tasks.requests import Item
from prunelens.tasks.runner import known_answer, respond

TASKS = ("core_choice", "core_facts", "core_long", "core_retrieval")
QUICK: dict[str, Any] = {"tasks": TASKS, "long_tokens": 4, "limit": 3}


@pytest.fixture(scope="module")
def model() -> Model:
    return text_model()


@pytest.fixture
def passes(model: Model) -> Iterator[Callable[[], int]]:
    """How many passes the dense model took since the last call."""
    count = 0

    def counted(*args: Any) -> None:
        nonlocal count
        count += 1

    handle = model.network.model.register_forward_hook(counted)  # of the decoder, which has no part in its identity
    seen = 0

    def since() -> int:
        nonlocal seen
        found, seen = count - seen, count
        return found

    yield since
    handle.remove()


def measured(model: Model, **settings: Any) -> tuple[Any, list[str]]:
    found = evaluate(model, "drop-mlp@1", **(QUICK | settings))
    rows = found.tables["tasks"].to_pylist()
    return rows, [note for note in found.info["notes"] if "dense answers" in note]


def test_a_second_run_asks_the_dense_model_nothing(model: Model) -> None:
    asked: list[list[str]] = []

    def reporter(stage: str, total: int) -> Callable[[int], None]:
        asked[-1].append(stage)
        return lambda done: None

    found = []
    for _ in range(2):
        asked.append([])
        found.append(measured(model, reporter=reporter))
    (first, notes), (second, later) = found
    assert second == first
    assert (notes, later) == ([], ["dense answers from an earlier run (12 items)"])
    assert {"dense: core_long", "dense: core_retrieval"} <= set(asked[0])
    assert not {"dense: core_long", "dense: core_retrieval"} & set(asked[1])
    assert {"drop-mlp@1: core_long", "drop-mlp@1: core_facts"} <= set(asked[1])


def test_more_items_reuse_what_fewer_have_asked(model: Model) -> None:
    few = ("core_choice", "core_facts", "core_long")
    alone, _ = measured(model, tasks=few, limit=5)
    for path in (CACHE / "answers").rglob("*.json"):
        path.unlink()
    measured(model, tasks=few, limit=3)
    more, notes = measured(model, tasks=few, limit=5)
    assert notes == ["dense answers from an earlier run (9 items)"]
    assert [{**row, "value": None} for row in more] == [{**row, "value": None} for row in alone]
    assert [row["value"] for row in more] == pytest.approx([row["value"] for row in alone], rel=1e-4)


def test_a_model_that_was_changed_in_memory_is_another(model: Model) -> None:
    before = identity_of(model)
    assert before == identity_of(text_model())
    weight = model.network.model.layers[0].mlp.up_proj.weight
    own = weight.detach().clone()
    swapped = own.clone()
    swapped[[0, 1]] = own[[1, 0]]
    for changed in (own * 1.0000002, swapped, own.flip(0)):
        weight.data.copy_(changed)
        assert identity_of(model) != before
        weight.data.copy_(own)
    assert identity_of(model) == before
    model.network.generation_config.repetition_penalty = 1.3
    assert identity_of(model) != before
    model.network.generation_config.repetition_penalty = 1.0


def test_what_the_weights_do_not_show_makes_another_model(model: Model) -> None:
    before = identity_of(model)
    changed = [text_model(seed=1), wrap(text_model().network.double(), text_tokenizer(), name="text-llama")]
    words = text_model()
    words.tokenizer.chat_template = "{{ messages }}"
    names = [identity_of(other) for other in (*changed, words)]
    assert len({before, *names}) == 4
    assert len({identity_of(model, {"recipe": recipe}) for recipe in ("a", "b")} | {before}) == 3
    patched = text_model()
    patched.network.model.layers[0].forward = lambda *args, **kwargs: None
    assert identity_of(patched) is None
    assert identity_of(patched, {"recipe": "mine"}) is not None


def test_damaged_and_foreign_files_are_recomputed(tmp_path: Path) -> None:
    kept = TaskAnswers(tmp_path / "a.json", "model", "task")
    kept.add("loglikelihood", ("Question:", " yes"), (-1.5, True))
    kept.write()
    path, text = tmp_path / "a.json", (tmp_path / "a.json").read_text(encoding="utf-8")

    def found(identity: str = "model", task: str = "task") -> Any:
        return TaskAnswers(path, identity, task).get("loglikelihood", ("Question:", " yes"))

    assert found() == [-1.5, True]
    assert found("other") is found(task="other") is None
    for damaged in ("", text[:-9], text.replace("-1.5", "-1.4"), "[]", '{"answers": 3}', text.replace("sha256", "sha")):
        assert damaged != text
        path.write_text(damaged, encoding="utf-8")
        assert found() is None
    path.write_text(text, encoding="utf-8")
    assert found() == [-1.5, True]


def test_two_writers_keep_what_both_have(tmp_path: Path) -> None:
    one, other = (KeptAnswers(tmp_path, "model").of("task") for _ in range(2))
    one.add("generate_until", ("a", {"until": ["\n"]}), "first")
    other.add("generate_until", ("b", {"until": ["\n"]}), "second")
    one.write()
    other.write()
    again = KeptAnswers(tmp_path, "model").of("task")
    assert again.get("generate_until", ("a", {"until": ["\n"]})) == "first"
    assert again.get("generate_until", ("b", {"until": ["\n"]})) == "second"
    assert again.get("generate_until", ("b", {"until": ["."]})) is None
    assert again.get("loglikelihood", ("b", {"until": ["\n"]})) is None


def test_a_folder_that_cannot_be_written_costs_nothing_but_time(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    kept = KeptAnswers(tmp_path / "file", "model").of("task")
    kept.add("generate_until", ("a", {}), "text")
    kept.write()
    assert kept.get("generate_until", ("a", {})) == "text"


def test_the_folder_stays_small(tmp_path: Path) -> None:
    for age, name in enumerate(("newest", "older", "oldest")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "task.json").write_text("x" * 100, encoding="utf-8")
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    trim(tmp_path, 250)
    assert {path.name for path in tmp_path.iterdir()} == {"newest", "older"}
    trim(tmp_path, 10)
    assert {path.name for path in tmp_path.iterdir()} == {"newest"}
    trim(tmp_path / "missing", 10)


@pytest.mark.parametrize(
    ("settings", "is_kept"),
    [
        ({}, True),
        ({"do_sample": False}, True),
        ({"do_sample": True, "temperature": 0.9}, False),
        ({"temperature": 0.7}, False),
    ],
)
def test_answers_that_are_drawn_are_not_kept(tmp_path: Path, settings: dict[str, Any], is_kept: bool) -> None:
    kept = TaskAnswers(tmp_path / "a.json", "model", "task")
    request = Instance("generate_until", {}, ("a text", {"until": ["\n"], "max_gen_toks": 2} | settings), 0)
    request.repeats = 1
    assert respond(text_model(), [Item({}, [request])], 4, lambda total: lambda done: None, kept) == 0
    assert path_holds(tmp_path / "a.json") == is_kept
    assert (known_answer(kept, "generate_until", request) == request.resps[0]) == is_kept


def path_holds(path: Path) -> bool:
    return path.is_file() and bool(json.loads(path.read_text(encoding="utf-8"))["answers"])


def test_every_kind_of_answer_comes_back_as_it_was(model: Model, tmp_path: Path) -> None:
    harness = Harness(("core_choice", "core_facts"))
    for name in ("core_choice", "core_facts"):
        places = harness.items(name, limit=3)
        kept = KeptAnswers(tmp_path, "model")
        found = [harness.answer(model, name, Asking(places), places, store) for store in (None, kept, kept)]
        assert found[0] == found[1] == found[2]
        assert kept.num_items == 3
        assert harness.score(name, found[2]) == harness.run(model, name, silent, limit=3)


def test_kept_answers_spare_the_passes(model: Model, passes: Callable[[], int], tmp_path: Path) -> None:
    harness = Harness(("core_choice",))
    few, more = ({"core_choice": list(range(count))} for count in (2, 4))
    for places, expected in ((few, True), (few, False), (more, True), (more, False)):
        harness.answer(model, "core_choice", Asking(more), places, KeptAnswers(tmp_path, "model"))
        assert bool(passes()) == expected


def test_the_folder_is_the_users_cache() -> None:
    assert answers_folder() == CACHE / "answers"
