"""Classes that end early: what a race runs, what it says, and how often it is wrong, with made-up scores."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from conftest import text_model
from prunelens.api import evaluate
from prunelens.models.model import Model
from prunelens.models.surgery.variant import Variant
from prunelens.report.terminal.evaluate import print_evaluation
from prunelens.results import Evaluation
from prunelens.study.evaluate.measure import TaskRunner, TaskSettings
from prunelens.study.evaluate.measurement import Measurement, TaskResult
from prunelens.study.evaluate.racing import race, raced_note, raced_rows
from prunelens.study.evaluate.rounds import items_order, num_rounds, share_of
from prunelens.study.evaluate.verdict import Thresholds, Verdict, judge
from prunelens.tasks.suite import Metric, MetricScores
from prunelens.tracing.long_scores import ATYPICAL, EXCESS, LOOPS

Scores = Mapping[Metric, tuple[np.ndarray, np.ndarray]]
"""For each metric the dense and the compressed scores of all items."""
FACTS = Metric("facts", "acc", "short-generation", decides="kept")
COPY = Metric("copy", "acc", "short-generation", decides="kept")
CHOICE = Metric("choice", "acc", "multiple-choice", 0.25, decides="kept")


class MadeUp(TaskRunner, Measurement):
    """A runner and a measurement in one, whose scores are given."""

    def __init__(self, scores: Scores, order: Sequence[str] = (), whole: Sequence[str] = (), **settings: Any) -> None:
        self.scores, self.whole, self.settings = scores, whole, TaskSettings(**settings)
        names = dict.fromkeys(metric.task for metric in scores)
        self.chosen = SimpleNamespace(tasks=tuple(order or names))
        self.tasks = self
        self.dense_found = TaskResult(self._scored(0, {name: self.places(name)[name] for name in names}), [])
        self.run_items: dict[str, list[int]] = {}

    def begin(self, *_: Any) -> "MadeUp":
        self.run_items = {}
        return self

    def measure(self, *_: Any) -> TaskResult:
        self.begin().run(self.chosen.tasks)
        return self.result()

    def places(self, name: str) -> dict[str, list[int]]:
        size = next(len(pair[0]) for metric, pair in self.scores.items() if metric.task == name)
        return {name: list(range(size))[: self.settings.limit]}

    def is_whole(self, name: str) -> bool:
        return name in self.whole

    def num_rounds(self, names: Sequence[str]) -> int:
        return num_rounds([len(self.places(name)[name]) for name in names])

    def run(self, names: Sequence[str], rounds: int = 1, start: int = 0, stop: int | None = None) -> None:
        for name in names:
            order = items_order(self.places(name)[name], self.settings.seed, name)
            own = order if self.is_whole(name) else share_of(order, rounds, start, stop)
            self.run_items[name] = sorted({*self.run_items.get(name, []), *own})

    def result(self, names: Sequence[str] | None = None) -> TaskResult:
        return TaskResult(self._scored(1, {n: p for n, p in self.run_items.items() if names is None or n in names}), [])

    def _scored(self, side: int, places: Mapping[str, Sequence[int]]) -> list[MetricScores]:
        return [
            MetricScores(metric, {str(place): float(pair[side][place]) for place in places[metric.task]})
            for metric, pair in self.scores.items()
            if metric.task in places
        ]

    def raced(self, thresholds: Thresholds | None = None) -> TaskResult:
        return race(self, "m", object.__new__(Variant), thresholds or Thresholds())

    def verdicts(self, found: TaskResult) -> dict[str, Verdict]:
        rows = raced_rows(self.dense_found.scored, found)
        lines = judge(self.dense_found.scored, found.scored, rows, None, found.stopped)
        return {line.use: line for line in lines}


def kept(generator: np.random.Generator, size: int, keep: float, right: float = 0.75) -> tuple[np.ndarray, np.ndarray]:
    dense = (generator.random(size) < right).astype(float)
    return dense, dense * (generator.random(size) < keep)


def short(keep: float, seed: int = 0, **settings: Any) -> MadeUp:
    draw = partial(kept, np.random.default_rng(seed))
    return MadeUp({FACTS: draw(116, keep), COPY: draw(48, keep)}, **settings)


def test_a_broken_class_ends_early_and_says_by_what() -> None:
    made = short(0.1)
    found = made.raced()
    line = made.verdicts(found)["short-generation"]
    assert (line.verdict, line.stopped_early, line.there) == ("broken", True, 164)
    assert line.used == sum(map(len, made.run_items.values())) <= 164 / 3
    assert line.number == "of the dense score kept (copy, facts)"
    assert line.high is not None
    assert line.high <= 0.8
    assert line.reason == f"decided after {line.used} of 164 items"
    assert all(len(one.values) == len(made.run_items[one.metric.task]) for one in found.scored)


def test_the_scores_say_that_items_are_missing() -> None:
    made = short(0.1)
    found = made.raced()
    rows = {row["task"]: row for row in raced_rows(made.dense_found.scored, found)}
    assert {name: (row["items"], row["there"]) for name, row in rows.items()} == {
        name: (len(made.run_items[name]), size) for name, size in (("facts", 116), ("copy", 48))
    }
    assert not any(row["at_chance"] for row in rows.values())
    assert "--all-items" in raced_note({"m": found, "n": TaskResult([], [])})[0]
    assert raced_note({"m": short(1).raced()}) == []


@pytest.mark.parametrize("keep", [1.0, 0.97])
def test_a_class_that_is_kept_runs_all_items_with_the_same_result(keep: float) -> None:
    raced, whole = short(keep), short(keep, all_items=True)
    assert raced.raced() == whole.raced()
    assert raced.run_items == whole.run_items == {"facts": list(range(116)), "copy": list(range(48))}


def test_all_items_are_run_where_somebody_asks_for_them() -> None:
    made = short(0.0, all_items=True)
    found = made.raced()
    assert found.stopped == {}
    assert made.verdicts(found)["short-generation"].used == 164


def test_classes_end_on_their_own() -> None:
    draw = partial(kept, np.random.default_rng(1))
    made = MadeUp({CHOICE: draw(112, 1.0), FACTS: draw(116, 0.0), COPY: draw(48, 0.0)})
    lines = made.verdicts(made.raced())
    assert {use: line.stopped_early for use, line in lines.items() if line.used} == {
        "multiple-choice": False,
        "short-generation": True,
    }
    assert len(made.run_items["choice"]) == 112


def test_neither_the_order_of_tasks_nor_a_limit_beyond_them_changes_anything() -> None:
    found = [short(0.5, 3, **given).raced() for given in ({}, {"order": ("copy", "facts")}, {"limit": 500})]
    assert found[0].stopped
    assert all(one == found[0] for one in found)


def test_a_task_at_chance_has_no_say_and_ends_with_its_class() -> None:
    draw = partial(kept, np.random.default_rng(2))
    letters = Metric("letters", "acc", "multiple-choice", 0.25, decides="kept")
    made = MadeUp({CHOICE: draw(224, 0.05), letters: draw(224, 1.0, 0.25)})
    line = made.verdicts(made.raced())["multiple-choice"]
    assert (line.verdict, line.number, line.there) == ("broken", "of the dense score kept (choice)", 224)
    assert len(made.run_items["letters"]) == len(made.run_items["choice"]) < 112


def test_a_class_runs_whole_where_a_task_of_it_cannot_be_cut() -> None:
    draw = partial(kept, np.random.default_rng(2))
    made = MadeUp({FACTS: draw(116, 0.0), COPY: draw(48, 0.0)}, whole=("copy",))
    assert made.raced().stopped == {}
    assert len(made.run_items["facts"]) == 116


@pytest.mark.parametrize("bad", [2.0, np.nan])
def test_scores_that_have_no_bounds_end_nothing(bad: float) -> None:
    draw = partial(kept, np.random.default_rng(2))
    dense, own = draw(116, 0.0)
    own[items_order(range(116), 0, "facts")[0]] = bad
    made = MadeUp({FACTS: (dense, own)})
    assert made.raced().stopped == {}


def long(loops: tuple[float, float], atypical: tuple[float, float], seed: int = 0) -> MadeUp:
    generator = np.random.default_rng(seed)
    rates = {
        metric: tuple((generator.random(144) < rate).astype(float) for rate in pair)
        for metric, pair in ((LOOPS, loops), (ATYPICAL, atypical))
    }
    return MadeUp({EXCESS: (generator.normal(0, 0.3, 144), generator.normal(0, 0.3, 144)), **rates})


@pytest.mark.parametrize(
    ("loops", "atypical", "words"), [((0.0, 0.8), (0.05, 0.05), "loop"), ((0.0, 0.0), (0.05, 0.8), "are atypical")]
)
def test_long_texts_end_by_loops_or_by_atypical_texts(loops: Any, atypical: Any, words: str) -> None:
    made = long(loops, atypical)
    line = made.verdicts(made.raced())["long-generation"]
    assert (line.verdict, line.stopped_early, line.there) == ("broken", True, 144)
    assert line.number == f"more of the texts {words} than the dense model's (core_long)"
    assert line.used <= 48
    assert line.low is not None
    assert line.low >= 0.25


def test_long_texts_as_good_as_the_dense_ones_are_all_written() -> None:
    made = long((0.05, 0.05), (0.05, 0.05))
    assert made.raced().stopped == {}
    assert len(made.run_items["core_long"]) == 144


def test_words_are_seldom_wrong_through_the_whole_race() -> None:
    """At a truth of 95 % kept, and of two rates 5 points higher: `degraded` or worse at most 5 % of the time."""
    worse = ("degraded", "broken")
    runs = 200
    made = [short(0.95, seed) for seed in range(runs)]
    assert sum(one.verdicts(one.raced())["short-generation"].verdict in worse for one in made) <= 0.05 * runs
    written = [long((0.05, 0.10), (0.05, 0.10), seed) for seed in range(runs)]
    assert sum(bool(one.raced().stopped) for one in written) <= 0.05 * runs


# --------------------------------------------------------------------------- a real run

GIVEN: dict[str, Any] = {"tasks": ("core_facts", "core_long"), "limit": 96, "long_tokens": 6}


def sharp() -> Model:
    """The tiny model with larger logits: its texts are cheap, and nearly all alike."""
    found = text_model()
    found.network.lm_head.weight.data *= 60
    return replace(found, name="sharp")


@pytest.fixture(scope="module")
def raced() -> Evaluation:
    return evaluate(text_model(), sharp(), replace(text_model(), name="same"), **GIVEN)


def test_a_real_run_ends_early_and_shows_it(
    raced: Evaluation, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    worse, same = raced
    line = worse.verdict("long-generation")
    assert (line.verdict in ("degraded", "broken"), line.stopped_early, line.there) == (True, True, 96)
    assert not same.verdict("long-generation").stopped_early
    texts = raced.tables["texts"].to_pylist()
    written = {label: sum(row["model"] == label for row in texts) for label in ("dense", worse.compressed)}
    assert written == {"dense": 96, worse.compressed: line.used}
    print_evaluation(raced.info, full=True)
    printed = " ".join(capsys.readouterr().out.split())
    page = raced.report(tmp_path / "run").read_text(encoding="utf-8")
    assert f"{line.used} of 96 items" in printed
    assert f"core_long ({line.used} of 96)" in printed
    assert f"decided after {line.used} of 96 items" in page
    assert f"core_long ({line.used} of 96 items)" in page
    assert "--all-items" in page
    assert Evaluation.open(tmp_path / "run").summary == raced.summary


def test_the_same_model_gets_what_all_items_give(raced: Evaluation) -> None:
    whole = evaluate(text_model(), replace(text_model(), name="same"), all_items=True, **GIVEN)
    pairs = [one["same"].verdicts for one in (raced, whole)]
    assert [(line.use, line.verdict, line.used, line.reason) for line in pairs[0]] == [
        (line.use, line.verdict, line.used, line.reason) for line in pairs[1]
    ]
    for one, other in zip(*(one["same"].scores for one in (raced, whole)), strict=True):
        assert (one.task, one.metric, one.items, one.there) == (other.task, other.metric, other.items, other.there)
        assert one.compressed.model_dump() == pytest.approx(other.compressed.model_dump(), rel=1e-3, abs=1e-6)
    assert not any(line["stopped_early"] for record in whole.summary for line in record["verdicts"])
