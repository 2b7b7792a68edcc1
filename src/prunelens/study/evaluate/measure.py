"""The dense model with its tasks: what one model does on them, item by item."""

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Float64

from prunelens.errors import PrunelensError, check_flag, check_seed, check_whole, check_word
from prunelens.models.model import Model
from prunelens.models.surgery.variant import Variant
from prunelens.progress import Reporter, silent
from prunelens.study.compare.settings import MOST_TOKENS
from prunelens.study.evaluate.long_task import LongTask
from prunelens.tasks.corpora import Corpus, read_corpus
from prunelens.tasks.encoding import prompt_notes
from prunelens.tasks.harness import Harness
from prunelens.tasks.retrieval import POOLINGS, Retrieved, neighbour_correlation, overlap_at, retrieve
from prunelens.tasks.suite import (
    CORE_LONG,
    MIN_QUESTION,
    SUBSETS,
    Metric,
    MetricScores,
    TaskSelection,
    in_subset,
    long_items,
    retrieval_folder,
)
from prunelens.tracing.long_texts import LongPlan, LongText

NEIGHBOURS = 10
MOST_SAMPLES = 64
"""Long texts of one prompt, drawn the same way."""


@dataclass(frozen=True)
class TaskSettings:
    """How tasks are run; stored in run.json.

    `limit` is the most items of each task, `subset` which of them (`all`, `search`: every second one, `held-out`: the
    others). `batch_size` counts requests run together. `chat_template` applies it to the prompts of harness tasks;
    core_long always uses it. `long_tokens` is where its texts are cut, `long_samples` how many of each prompt are drawn
    in each way (at T = 1, and by the checkpoint's own generation settings where it has any). `pooling` makes an
    embedding of a text's states (`mean`, `lasttoken`). `seed` is of drawn texts and of experts that are dropped at
    random. `allow_code` runs tasks that execute what the model writes, without a sandbox.
    """

    limit: int | None = None
    subset: str = "all"
    batch_size: int = 40
    chat_template: bool = False
    long_tokens: int = 96
    long_samples: int = 1
    pooling: str = "mean"
    seed: int = 0
    allow_code: bool = False

    def check(self) -> None:
        """Refuse settings without meaning.

        Raises:
            PrunelensError: as said.
        """
        if self.limit is not None:
            check_whole("--limit", self.limit, 2)
        check_whole("--batch-size", self.batch_size, 1)
        check_whole("--long-tokens", self.long_tokens, 1, MOST_TOKENS)
        check_whole("long_samples", self.long_samples, 1, MOST_SAMPLES)
        check_flag("chat_template", self.chat_template)
        check_seed(self.seed)
        check_word("a subset", self.subset, SUBSETS)
        check_word("--pooling", self.pooling, tuple(POOLINGS))


@dataclass(frozen=True)
class TaskResult:
    """What one model did on the tasks.

    Attributes:
        scored: item scores.
        texts: its long texts.
        null: of the dense model, the scores of long texts that it drew once more with other numbers.
    """

    scored: list[MetricScores]
    texts: list[LongText]
    null: list[MetricScores] = field(default_factory=list)


def open_harness(chosen: TaskSelection, settings: TaskSettings) -> Harness | None:
    """The tasks of lm-evaluation-harness, loaded without any model; None where none was chosen.

    Raises:
        PrunelensError: a task that cannot be run, or of which the subset holds no item.
    """
    if not chosen.harness:
        return None
    found = Harness(chosen.harness, settings.allow_code)
    found.check_items(settings.subset, settings.limit)
    return found


class TaskRunner:
    """A dense model with its tasks, found and loaded once; measures compressed models beside it.

    Raises:
        PrunelensError: an unknown task, data that cannot be loaded, or a library that is missing.
    """

    def __init__(
        self,
        dense: Model,
        chosen: TaskSelection,
        settings: TaskSettings,
        reporter: Reporter = silent,
        harness: Harness | None = None,
    ) -> None:
        settings.check()
        if dense.tokenizer is None:
            raise PrunelensError(f"{dense.name} has no tokenizer; put its tokenizer files beside config.json")
        self.dense, self.chosen, self.settings, self.reporter = dense, chosen, settings, reporter
        self._harness = harness or open_harness(chosen, settings)
        if self._harness is not None:
            self._harness.check_length(dense)
        self._corpora = {name: read_corpus(retrieval_folder(name)) for name in chosen.retrieval}
        self.long_task = self._long_task() if CORE_LONG in chosen.tasks else None
        self._retrieved: dict[str, Retrieved] = {}

    def _long_task(self) -> LongTask:
        chosen = self.settings
        plan = LongPlan(samples=chosen.long_samples, max_new_tokens=chosen.long_tokens, seed=chosen.seed)
        items = long_items(chosen.subset, chosen.limit)
        return LongTask(self.dense, plan, items, chosen.batch_size, self.reporter)

    @property
    def notes(self) -> list[str]:
        """What a reader of results on these tasks should know of their texts."""
        small = [
            f"{name}: a query has {NEIGHBOURS} passages or fewer to find, so that all of them are its nearest; "
            f"overlap_at_{NEIGHBOURS} decides nothing"
            for name, corpus in self._corpora.items()
            if _has_no_order(corpus)
        ]
        asked = self.long_task.prompts if self.long_task is not None else []
        return [note for corpus in self._corpora.values() for note in corpus.notes] + small + prompt_notes(asked)

    @cached_property
    def questions(self) -> list[str]:
        """What the tasks ask, every item of them: questions, prompts, queries and passages, but for short ones."""
        asked = self._harness.questions() if self._harness is not None else []
        if CORE_LONG in self.chosen.tasks:
            asked += [item["prompt"] for item in long_items()]
        for corpus in self._corpora.values():
            asked += [*corpus.queries.values(), *corpus.passages.values()]
        return [text for text in asked if len(text) >= MIN_QUESTION]

    def decoding(self, model: Model) -> dict[str, Any] | None:
        """The checkpoint's generation settings that its written answers in harness tasks follow; None without such."""
        return self._harness.decoding(model) if self._harness is not None else None

    @property
    def drawn(self) -> dict[str, dict[str, Any]]:
        """The ways in which long texts are drawn, each with the generation settings that it follows."""
        plan = self.long_task.plan if self.long_task is not None else None
        return {one.name: dict(one.settings) for one in plan.samplings} if plan else {}

    @cached_property
    def dense_found(self) -> TaskResult:
        """What the dense model does, measured once."""
        found = self._run("dense", Variant(self.dense))
        null = self.long_task.null() if self.long_task is not None else []
        return replace(found, null=[_with_use(one, self.chosen.uses.get(CORE_LONG)) for one in null])

    def measure(self, label: str, variant: Variant) -> TaskResult:
        """What a compressed model does; where neighbours are compared, the dense one is measured first."""
        if self._corpora and not self._retrieved:
            _ = self.dense_found
        return self._run(label, variant)

    def _run(self, label: str, variant: Variant) -> TaskResult:
        scored: list[MetricScores] = []
        texts: list[LongText] = []
        for name in self.chosen.tasks:
            if name == CORE_LONG and self.long_task is not None:
                texts, found = self.long_task.run(label, variant)
            elif name in self._corpora:
                found = self._retrieve(label, variant, name)
            else:
                found = self._ask(label, variant, name)
            scored += [_with_use(one, self.chosen.uses.get(name)) for one in found]
        return TaskResult(scored, texts)

    def _ask(self, label: str, variant: Variant, name: str) -> list[MetricScores]:
        assert self._harness is not None
        chosen = self.settings
        with variant.running() as model:
            return self._harness.run(
                self._with_tokenizer(model),
                name,
                self.reporter,
                chosen.subset,
                chosen.limit,
                chosen.batch_size,
                chosen.chat_template,
                label,
            )

    def _with_tokenizer(self, model: Model) -> Model:
        """A compressed checkpoint may lack the tokenizer that it shares with the dense model."""
        return model if model.tokenizer is not None else replace(model, tokenizer=self.dense.tokenizer)

    def _retrieve(self, label: str, variant: Variant, name: str) -> list[MetricScores]:
        corpus, chosen = self._corpora[name], self.settings
        advance = self.reporter(f"{label}: {name}", len(corpus.passages) + len(corpus.queries))
        with variant.running() as model:
            found = retrieve(self._with_tokenizer(model), corpus, chosen.pooling, chosen.batch_size, advance)
        reference = self._retrieved.setdefault(name, found)
        values = {
            Metric(name, "ndcg_at_10", "retrieval", _guessed_ndcg(corpus), decides="kept"): found.ndcg,
            Metric(name, "recall_at_10", "retrieval", _guessed_recall(corpus)): found.recall,
            _overlap(name, corpus): overlap_at(reference, found, NEIGHBOURS),
            Metric(name, "neighbour_correlation", "retrieval"): neighbour_correlation(reference, found),
        }
        keys = list(corpus.queries)
        kept = in_subset(len(keys), chosen.subset, chosen.limit)
        return [
            MetricScores(metric, {keys[at]: float(numbers[at]) for at in kept if np.isfinite(numbers[at])})
            for metric, numbers in values.items()
        ]


def _with_use(scored: MetricScores, use: str | None) -> MetricScores:
    """The class of use that the user gave the task, where one was given."""
    if use is None:
        return scored
    return replace(scored, metric=replace(scored.metric, use=use))


def _guessed_recall(corpus: Corpus) -> float:
    """Mean recall@10 of a random order; a query's own passage may be relevant, but is never found."""
    shares = [1 - (query in grades) / len(grades) for query, grades in corpus.relevant.items()]
    return float(np.mean(np.array(shares) * _near_shares(corpus)))


def _near_shares(corpus: Corpus) -> Float64[np.ndarray, " Q"]:
    """What share of the passages that a query can find is among its 10 nearest: overlap@10 of two random orders."""
    counts = np.array([corpus.num_candidates(query) for query in corpus.queries])
    return np.minimum(1.0, NEIGHBOURS / counts)


def _overlap(name: str, corpus: Corpus) -> Metric:
    """Decides nothing where all passages are among the 10 nearest."""
    decides = None if _has_no_order(corpus) else "agreement"
    return Metric(name, "overlap_at_10", "retrieval", float(_near_shares(corpus).mean()), decides=decides)


def _has_no_order(corpus: Corpus) -> bool:
    return any(corpus.num_candidates(query) <= NEIGHBOURS for query in corpus.queries)


def _guessed_ndcg(corpus: Corpus) -> float:
    """Mean nDCG@10 of a random order: every rank holds the mean grade of what can be found."""
    discounts = 1 / np.log2(np.arange(2, NEIGHBOURS + 2))
    shares = []
    for query, grades in corpus.relevant.items():
        count = corpus.num_candidates(query)
        ideal = np.array(sorted(grades.values(), reverse=True)[:NEIGHBOURS], dtype=float)
        mean = sum(grade for passage, grade in grades.items() if passage != query) / count
        shares.append(mean * float(discounts[:count].sum()) / float(ideal @ discounts[: len(ideal)]))
    return min(1.0, float(np.mean(shares)))
