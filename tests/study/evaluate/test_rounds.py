"""Items in rounds: the same items and shares whatever the number of rounds, and all of them are the whole result."""

from pathlib import Path
from typing import Any

import pytest

from conftest import text_model
from prunelens.models.model import Model
from prunelens.models.surgery.drop import Drop
from prunelens.models.surgery.variant import Variant
from prunelens.study.evaluate.measure import TaskRunner, TaskSettings
from prunelens.study.evaluate.measurement import Measurement
from prunelens.study.evaluate.rounds import items_order, num_rounds, share_of
from prunelens.tasks.kept_answers import KeptAnswers
from prunelens.tasks.suite import parse_tasks

TASKS = ("core_choice", "core_facts", "core_arithmetic", "core_long", "core_retrieval")
DROP = Drop(mlp=frozenset([1]))


@pytest.fixture(scope="module")
def dense() -> Model:
    return text_model()


@pytest.fixture(scope="module")
def runner(dense: Model) -> TaskRunner:
    return TaskRunner(dense, parse_tasks(TASKS), TaskSettings(limit=7, long_tokens=4, seed=3))


@pytest.fixture(scope="module")
def whole(runner: TaskRunner) -> Any:
    return runner.measure("whole", Variant(runner.dense, DROP))


def almost(found: Any, expected: Any) -> None:
    """Equal, but for the noise of other batches in costs and similarities."""
    assert [one.metric for one in found.scored] == [one.metric for one in expected.scored]
    for one, other in zip(found.scored, expected.scored, strict=True):
        assert list(one.values) == list(other.values)
        assert list(one.values.values()) == pytest.approx(list(other.values.values()), rel=1e-4)
        assert (one.answers, one.targets, one.parts) == (other.answers, other.targets, other.parts)
    assert [text.token_ids for text in found.texts] == [text.token_ids for text in expected.texts]


@pytest.mark.parametrize(("sizes", "rounds"), [((), 1), ((5,), 1), ((112, 36), 6), ((24,), 2), ((1300,), 108)])
def test_a_round_holds_about_a_dozen_items_of_each_task(sizes: tuple[int, ...], rounds: int) -> None:
    assert num_rounds(sizes) == rounds


@pytest.mark.parametrize("rounds", [1, 2, 5, 9, 40])
def test_rounds_cut_the_items_in_equal_shares(rounds: int) -> None:
    order = items_order(list(range(3, 60, 2)), 0, "task")
    shares = [share_of(order, rounds, number) for number in range(rounds)]
    assert sorted(place for share in shares for place in share) == list(range(3, 60, 2))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert all(share == sorted(share) for share in shares)


def test_the_order_is_fixed_by_seed_and_task() -> None:
    orders = [items_order(list(range(50)), seed, task) for seed, task in ((0, "a"), (1, "a"), (0, "b"))]
    assert len({tuple(order) for order in orders}) == 3
    assert items_order(list(range(0, 50, 2)), 0, "a") == [place for place in orders[0] if place % 2 == 0]
    assert orders[0][:6] == [3, 5, 48, 20, 21, 39]  # what is stored must stay in its rounds


@pytest.mark.parametrize("rounds", [2, 3])
def test_all_rounds_are_the_whole_result(runner: TaskRunner, whole: Any, rounds: int) -> None:
    measured = runner.begin("parts", Variant(runner.dense, DROP))
    for number in range(rounds):
        measured.run(TASKS, rounds, number)
    almost(measured.result(), whole)


def test_tasks_stop_one_by_one_and_the_items_so_far_count(runner: TaskRunner, whole: Any) -> None:
    measured = runner.begin("parts", Variant(runner.dense, DROP))
    assert measured.result().scored == []
    measured.run(("core_choice", "core_facts"), 3, 0)
    measured.run(("core_facts",), 3, 2)
    scored = {one.metric.task: one for one in measured.result().scored}
    orders = {name: runner.tasks.order(name)[name] for name in ("core_choice", "core_facts")}
    expected = {
        "core_choice": share_of(orders["core_choice"], 3, 0),
        "core_facts": sorted(share_of(orders["core_facts"], 3, 0) + share_of(orders["core_facts"], 3, 2)),
    }
    complete = {one.metric.task: list(one.values.items()) for one in whole.scored}
    assert list(scored) == list(expected)
    for name, places in expected.items():
        assert list(scored[name].values.items()) == [complete[name][place] for place in places]
    assert [one.metric.task for one in measured.result(["core_facts"]).scored] == ["core_facts"]


def test_no_item_is_asked_twice(runner: TaskRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, list[int]]] = []
    own = Measurement._ask

    def noted(self: Measurement, name: str, places: Any) -> None:
        asked.append((name, list(places[name])))
        own(self, name, places)

    monkeypatch.setattr(Measurement, "_ask", noted)
    measured = runner.begin("parts", Variant(runner.dense, DROP))
    measured.run(["core_facts"], 3, 1)
    measured.run(["core_facts"], 3, 1)
    measured.run(["core_facts"])
    measured.run(["core_facts"])
    assert sorted(place for _, places in asked for place in places) == list(range(7))
    assert len(asked) == 2


def test_retrieval_is_whole_and_has_no_say_in_the_number_of_rounds(runner: TaskRunner) -> None:
    assert runner.tasks.is_whole("core_retrieval")
    assert not runner.tasks.is_whole("core_long")
    assert runner.tasks.num_rounds(["core_retrieval"]) == 1
    many = TaskRunner(runner.dense, parse_tasks(("core_choice", "core_retrieval")), TaskSettings(limit=48))
    assert many.tasks.num_rounds(["core_choice", "core_retrieval"]) == many.tasks.num_rounds(["core_choice"]) == 4
    measured = runner.begin("parts", Variant(runner.dense, DROP))
    measured.run(["core_retrieval"], 4, 3)
    assert all(len(one.values) == 7 for one in measured.result().scored)


def test_rounds_resume_from_what_is_kept(dense: Model, runner: TaskRunner, whole: Any, tmp_path: Path) -> None:
    first, second = (
        Measurement(runner.tasks, "m", Variant(dense, DROP), KeptAnswers(tmp_path, "m"), runner.dense_measured)
        for _ in range(2)
    )
    first.run(TASKS, 3, 0)
    for number in range(3):
        second.run(TASKS, 3, number)
    almost(second.result(), whole)
    assert second.kept is not None
    assert second.kept.num_items == sum(len(share_of(range(7), 3, 0)) for _ in TASKS[:-1]) + 7


def test_compressed_models_are_told_apart(dense: Model, tmp_path: Path) -> None:
    runner = TaskRunner(dense, parse_tasks("core_facts"), TaskSettings(limit=2), unfinished=tmp_path)
    names = set()
    for label, drop, made_of in (
        ("a", DROP, {"recipe": "x"}),
        ("b", DROP, {"recipe": "y"}),
        ("c", Drop(mlp=frozenset([2])), {"recipe": "x"}),
    ):
        kept = runner.begin(label, Variant(dense, drop), made_of).kept
        assert kept is not None
        names.add(kept.identity)
    assert len(names) == 3
    assert runner.begin("d", Variant(dense, DROP)).kept is None
