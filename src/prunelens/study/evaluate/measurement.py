"""One model on the tasks, whole or round by round, with the scores of the items so far."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np

from prunelens.models.model import Model
from prunelens.models.surgery.variant import Variant
from prunelens.study.evaluate.early import Stopped
from prunelens.study.evaluate.long_task import LongTexts
from prunelens.study.evaluate.rounds import share_of
from prunelens.study.evaluate.task_set import TaskSet
from prunelens.tasks.harness import Asking
from prunelens.tasks.harness_metrics import Row
from prunelens.tasks.kept_answers import KeptAnswers
from prunelens.tasks.retrieval import Retrieved, retrieve
from prunelens.tasks.retrieval_scores import retrieval_scores
from prunelens.tasks.suite import CORE_LONG, MetricScores
from prunelens.tracing.long_scores import score_long
from prunelens.tracing.long_texts import LongText

MOST_SIMILARITIES = 1_000_000
"""Numbers of a retrieval task that are kept; those of a larger one are computed anew."""


@dataclass(frozen=True)
class TaskResult:
    """What one model did on the tasks.

    Attributes:
        scored: item scores.
        texts: its long texts.
        null: of the dense model, the scores of long texts that it drew once more with other numbers.
        stopped: classes of use that were decided before their items ended.
    """

    scored: list[MetricScores]
    texts: list[LongText]
    null: list[MetricScores] = field(default_factory=list)
    stopped: dict[str, Stopped] = field(default_factory=dict)


@dataclass
class Measurement:
    """One model on the tasks; items that were run are not run again.

    Attributes:
        tasks: the tasks, and how they are run.
        label: what the model is called.
        variant: the model.
        kept: answers of this model on disk; None where they are not kept.
        dense: the dense model on the same tasks; None for the dense model itself.
    """

    tasks: TaskSet
    label: str
    variant: Variant
    kept: KeptAnswers | None = None
    dense: "Measurement | None" = None
    _samples: dict[str, dict[str, list[Row]]] = field(default_factory=dict, init=False)
    _asked: dict[str, dict[str, set[int]]] = field(default_factory=dict, init=False)
    _long: LongTexts = field(init=False)
    _retrieved: dict[str, Retrieved] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self._long = LongTexts(
            self.tasks, self.label, self.variant, self.kept, self.dense._long if self.dense else None
        )

    def run(self, tasks: Sequence[str], rounds: int = 1, start: int = 0, stop: int | None = None) -> None:
        """Run one round of several of some tasks, or the rounds up to `stop` at once.

        What cannot be cut into rounds (retrieval, and answers that are drawn) is run whole in the first of them that
        is asked for.

        Args:
            tasks: their names.
            rounds: how many rounds there are.
            start: which one, from 0.
            stop: up to which one, without it.

        Raises:
            PrunelensError: a task that fails on the model.
        """
        for name in tasks:
            if self.tasks.is_whole(name):
                self._run(name, self.tasks.places(name))
            else:
                order = self.tasks.order(name)
                self._run(name, {key: share_of(own, rounds, start, stop) for key, own in order.items()})

    def result(self, tasks: Sequence[str] | None = None) -> TaskResult:
        """Scores of the items so far of these tasks, or of all; a task of which nothing was run is left out."""
        scored: list[MetricScores] = []
        for name in self.tasks.chosen.tasks if tasks is None else tasks:
            scored += [with_use(one, self.tasks.chosen.uses.get(name)) for one in self._score(name)]
        return TaskResult(scored, self._long.judged())

    def null(self) -> list[MetricScores]:
        """Of the dense model, the scores of its long texts drawn with other numbers; empty where there are none."""
        use = self.tasks.chosen.uses.get(CORE_LONG)
        return [with_use(one, use) for one in self._long.null()] if self._asked.get(CORE_LONG) else []

    def retrieved(self, name: str) -> Retrieved:
        """What the model retrieves in a task, found once."""
        if name not in self._retrieved:
            self._retrieved[name] = self._retrieve(name)
        return self._retrieved[name]

    def _run(self, name: str, places: Mapping[str, Sequence[int]]) -> None:
        asked = self._asked.setdefault(name, {})
        missing = {key: [place for place in own if place not in asked.get(key, ())] for key, own in places.items()}
        missing = {key: own for key, own in missing.items() if own}
        if not missing:
            return
        if name == CORE_LONG:
            self._long.write(missing[name])
        elif name in self.tasks.corpora:
            self.retrieved(name)
        else:
            self._ask(name, missing)
        for key, own in missing.items():
            asked.setdefault(key, set()).update(own)

    def _score(self, name: str) -> list[MetricScores]:
        if not self._asked.get(name):
            return []
        if name == CORE_LONG:
            return score_long(self._long.judged())
        if name in self.tasks.corpora:
            reference, queries = (self.dense or self).retrieved(name), self.tasks.places(name)[name]
            return retrieval_scores(name, self.tasks.corpora[name], reference, self.retrieved(name), queries)
        assert self.tasks.harness is not None
        return self.tasks.harness.score(name, self._samples[name])

    @contextmanager
    def _running(self) -> Iterator[Model]:
        """The model; a compressed checkpoint may lack the tokenizer that it shares with the dense model."""
        with self.variant.running() as model:
            yield model if model.tokenizer is not None else replace(model, tokenizer=self.tasks.dense.tokenizer)

    def _ask(self, name: str, places: Mapping[str, Sequence[int]]) -> None:
        harness, settings = self.tasks.harness, self.tasks.settings
        assert harness is not None
        asking = Asking(
            self.tasks.places(name), settings.batch_size, settings.chat_template, self.tasks.reporter, self.label
        )
        with self._running() as model:
            found = harness.answer(model, name, asking, places, self.kept)
        known = self._samples.setdefault(name, {})
        for key, samples in found.items():
            known[key] = _in_order([*known.get(key, []), *samples])

    def _retrieve(self, name: str) -> Retrieved:
        corpus, chosen = self.tasks.corpora[name], self.tasks.settings
        texts = [list(corpus.queries.items()), list(corpus.passages.items()), corpus.relevant, chosen.pooling]
        request = [hashlib.sha256(json.dumps(texts, sort_keys=True).encode()).hexdigest()]
        small = len(corpus.queries) * len(corpus.passages) <= MOST_SIMILARITIES
        kept = self.kept.of(f"retrieval {request[0]}") if self.kept is not None and small else None
        known = kept.get("retrieval", request) if kept is not None else None
        if known is not None and self.kept is not None:
            self.kept.num_items += len(self.tasks.places(name)[name])
            return Retrieved(np.array(known[0]), np.array(known[1]), np.array(known[2], np.float32))
        advance = self.tasks.reporter(f"{self.label}: {name}", len(corpus.passages) + len(corpus.queries))
        with self._running() as model:
            found = retrieve(model, corpus, chosen.pooling, chosen.batch_size, advance)
        if kept is not None:
            kept.add("retrieval", request, [found.ndcg.tolist(), found.recall.tolist(), found.similarities.tolist()])
            kept.write()
        return found


def with_use(scored: MetricScores, use: str | None) -> MetricScores:
    """The class of use that the user gave the task, where one was given."""
    if use is None:
        return scored
    return replace(scored, metric=replace(scored.metric, use=use))


def _in_order(samples: Sequence[Row]) -> list[Row]:
    """Samples as one run over all of them gives them: filter by filter, each in the order of the items."""
    filters = list(dict.fromkeys(sample["filter"] for sample in samples))
    return sorted(samples, key=lambda sample: (filters.index(sample["filter"]), sample["doc_id"]))
