"""A compressed model on the tasks, class by class and round by round: a class ends as soon as it is known to be worse.

`safe` takes all items, so a model that keeps a class runs all of them, with the same result as without any race.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from prunelens.metrics.betting import ALPHA
from prunelens.models.surgery.variant import Variant
from prunelens.study.evaluate.early import Round, Stopped, decide, sequence_of
from prunelens.study.evaluate.measure import TaskResult, TaskRunner
from prunelens.study.evaluate.measurement import Measurement
from prunelens.study.evaluate.scores import is_share, paired_values, score_rows
from prunelens.study.evaluate.verdict import Thresholds, kept_words
from prunelens.study.evaluate.words import ORDER, Limits
from prunelens.tasks.suite import CORE_LONG, USES, MetricScores

Name = tuple[str, str]
"""Task and metric."""
Values = Mapping[str, float | None]
GROWTH = 2
"""Each look waits for another half of the rounds so far: what is run at once is run faster."""


@dataclass
class _Number:
    """What may decide a class early: scores of tasks that are added, or a rate beyond the dense model's."""

    words: str
    limits: Limits
    dense: dict[Name, Values]
    rounds: list[Round] = field(default_factory=list)
    usable: bool = True
    _seen: dict[Name, set[str]] = field(default_factory=dict)

    def take(self, own: Mapping[Name, Values]) -> None:
        """The items that are new since the last time."""
        pairs = {}
        for name, dense in self.dense.items():
            seen = self._seen.setdefault(name, set())
            new = {item: value for item, value in own.get(name, {}).items() if item not in seen}
            seen |= set(new)
            pairs[name[0]] = paired_values(dense, new)
        self.usable = self.usable and all(is_share(*pair) for pair in pairs.values())  # a NaN is no share
        self.rounds.append(pairs)

    def word(self, alpha: float) -> str | None:
        """What the items so far show."""
        return decide(self.rounds, self.limits, alpha) if self.usable else None

    def stopped(self, word: str, alpha: float) -> Stopped:
        """The class as this number has decided it."""
        used, there = sum(map(len, self._seen.values())), sum(map(len, self.dense.values()))
        return Stopped(word, sequence_of(self.rounds, self.limits, alpha), self.words, self.limits, used, there)


def race(
    runner: TaskRunner,
    label: str,
    variant: Variant,
    thresholds: Thresholds,
    made_of: Mapping[str, Any] | None = None,
) -> TaskResult:
    """What a compressed model does, with the items that it took to judge it; all of them with the setting `all_items`.

    Args:
        runner: the dense model with its tasks.
        label: what the compressed model is called.
        variant: the model.
        thresholds: what a class is held against.
        made_of: as `TaskRunner.begin`.
    """
    if runner.settings.all_items:
        return runner.measure(label, variant, made_of)
    measured = runner.begin(label, variant, made_of)
    stopped, left = {}, list(runner.chosen.tasks)
    for use, names in _classes(runner).items():
        early = _raced(runner, measured, names, _numbers(runner, use, thresholds))
        left = [name for name in left if name not in names]
        if early is not None:
            stopped[use] = early
    measured.run(left)
    return replace(measured.result(), stopped=stopped)


def _raced(
    runner: TaskRunner, measured: Measurement, names: Sequence[str], numbers: Sequence[_Number]
) -> Stopped | None:
    """Run a class until one of its numbers decides it, or its items end.

    Any of the numbers may reject a class that keeps everything, so they share the probability of that.
    """
    alpha = ALPHA / max(1, len(numbers))
    rounds = runner.tasks.num_rounds(names) if numbers else 1
    start = 0
    for stop in (*_looks(rounds), rounds):
        measured.run(names, rounds, start, stop)
        if stop == rounds:
            break  # all items decide
        start = stop
        own = {(one.metric.task, one.metric.name): one.values for one in measured.result(names).scored}
        for one in numbers:
            one.take(own)
        found = [(one, word) for one in numbers if (word := one.word(alpha)) is not None]
        if found:
            worst, word = max(found, key=lambda pair: ORDER.index(pair[1]))
            return worst.stopped(word, alpha)
    return None


def _looks(rounds: int) -> Iterator[int]:
    """After how many rounds the scores are looked at, never after the last."""
    count = 1
    while count < rounds:
        yield count
        count += max(1, count // GROWTH)


def _classes(runner: TaskRunner) -> dict[str, list[str]]:
    """The tasks of each class of use that can be cut into rounds, all of them, and speak of no other class."""
    uses: dict[str, set[str | None]] = {}
    for name in runner.chosen.tasks:
        keys = runner.tasks.places(name).keys()
        uses[name] = {one.metric.use for one in runner.dense_found.scored if one.metric.task in keys}
    found = {use: [name for name in uses if use in uses[name]] for use in USES}
    return {
        use: names
        for use, names in found.items()
        if names and all(uses[name] == {use} and not runner.tasks.is_whole(name) for name in names)
    }


def _numbers(runner: TaskRunner, use: str, thresholds: Thresholds) -> list[_Number]:
    """What may decide the class: as the verdict at the end of all items takes it (V1, V4), and atypical texts (V9)."""
    dense = runner.dense_found.scored
    values = {(one.metric.task, one.metric.name): one.values for one in dense}
    rows = [row for row in score_rows(dense, dense) if row["use"] == use]
    counted = [row for row in rows if row["decides"] == "kept" and not row["at_chance"] and row["adds"]]
    added = sorted((row["task"], row["metric"]) for row in counted)
    found = [_Number(kept_words([task for task, _ in added]), thresholds.kept, {name: values[name] for name in added})]
    for row in rows:
        name = row["task"], row["metric"]
        verb = "loop" if row["decides"] == "loops" else "are atypical" if name == (CORE_LONG, "atypical") else ""
        if verb:
            words = f"more of the texts {verb} than the dense model's ({row['task']})"
            found.append(_Number(words, thresholds.loops, {name: values[name]}))
    return [one for one in found if one.dense]


def raced_rows(dense: Sequence[MetricScores], own: TaskResult) -> list[dict[str, Any]]:
    """What `score_rows` says, with the items that there are; whether a task is at chance is seen on all of them."""
    rows = [row | {"there": row["items"]} for row in score_rows(dense, own.scored)]
    if not own.stopped:
        return rows
    whole = {(row["task"], row["metric"]): row for row in score_rows(dense, dense)}
    found = []
    for row in rows:
        every = whole[row["task"], row["metric"]]
        marks = {"there": every["items"], "at_chance": every["at_chance"]} if row["use"] in own.stopped else {}
        found.append(row | marks)
    return found


def raced_note(found: Mapping[str, TaskResult]) -> list[str]:
    """What a reader should know of classes that ended early."""
    labels = [label for label, one in found.items() if one.stopped]
    if not labels:
        return []
    return [
        f"{', '.join(labels)}: some uses were decided before their items ended; their scores are of the items that "
        "were run, with intervals that do not allow for it; --all-items runs everything"
    ]
