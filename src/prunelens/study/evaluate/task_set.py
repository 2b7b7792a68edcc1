"""The tasks of a run: their items, in which order and in which rounds they are asked, and what a reader should know."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from prunelens.errors import PrunelensError, check_flag, check_seed, check_whole, check_word
from prunelens.models.model import Model
from prunelens.progress import Reporter
from prunelens.study.compare.settings import MOST_TOKENS
from prunelens.study.evaluate.rounds import items_order, num_rounds
from prunelens.tasks.corpora import read_corpus
from prunelens.tasks.encoding import encode, prompt_notes
from prunelens.tasks.harness import Harness
from prunelens.tasks.prompts import Prompt, PromptText
from prunelens.tasks.retrieval import POOLINGS
from prunelens.tasks.retrieval_scores import NEIGHBOURS, has_no_order
from prunelens.tasks.suite import (
    CORE_LONG,
    MIN_QUESTION,
    SUBSETS,
    TaskSelection,
    in_subset,
    long_items,
    retrieval_folder,
)
from prunelens.tracing.long_texts import LongPlan
from prunelens.tracing.sampling import samplings

MOST_SAMPLES = 64
"""Long texts of one prompt, drawn the same way."""


@dataclass(frozen=True)
class TaskSettings:
    """How tasks are run; stored in run.json.

    `limit` is the most items of each task, `subset` which of them (`all`, `search`: every second one, `held-out`: the
    others). `batch_size` counts requests run together. `chat_template` applies it to the prompts of harness tasks;
    core_long always uses it. `long_tokens` is where its texts are cut, `long_samples` how many of each prompt are drawn
    in each way (at T = 1, and by the checkpoint's own generation settings where it has any). `pooling` makes an
    embedding of a text's states (`mean`, `lasttoken`). `seed` is of drawn texts, of the order of items, and of experts
    that are dropped at random. `allow_code` runs tasks that execute what the model writes, without a sandbox.
    `all_items` runs all items of every class; without it one that is degraded or broken ends as soon as that is known.
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
    all_items: bool = False

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
        check_flag("all_items", self.all_items)
        check_seed(self.seed)
        check_word("a subset", self.subset, SUBSETS)
        check_word("--pooling", self.pooling, tuple(POOLINGS))


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


class TaskSet:
    """Tasks with their items, found and loaded once for every model of a run.

    Args:
        dense: the dense model, whose tokenizer reads the prompts of core_long.
        chosen: which tasks.
        settings: how they are run.
        reporter: progress display.
        harness: the tasks of lm-evaluation-harness, where they are loaded already.

    Raises:
        PrunelensError: an unknown task, data that cannot be loaded, a library that is missing, or generation settings
            of the checkpoint that cannot be followed.
    """

    def __init__(
        self,
        dense: Model,
        chosen: TaskSelection,
        settings: TaskSettings,
        reporter: Reporter,
        harness: Harness | None = None,
    ) -> None:
        settings.check()
        if dense.tokenizer is None:
            raise PrunelensError(f"{dense.name} has no tokenizer; put its tokenizer files beside config.json")
        self.dense, self.chosen, self.settings, self.reporter = dense, chosen, settings, reporter
        self.harness = harness or open_harness(chosen, settings)
        if self.harness is not None:
            self.harness.check_length(dense)
        self.corpora = {name: read_corpus(retrieval_folder(name)) for name in chosen.retrieval}
        self.prompts = self._long_prompts() if CORE_LONG in chosen.tasks else []
        self.long_plan = self._long_plan() if CORE_LONG in chosen.tasks else None

    def _long_prompts(self) -> list[Prompt]:
        items = long_items(self.settings.subset, self.settings.limit)
        texts = [PromptText(item["id"], item["kind"], ({"role": "user", "content": item["prompt"]},)) for item in items]
        return encode(texts, self.dense, True, self.settings.long_tokens, f"leave out {CORE_LONG}")

    def _long_plan(self) -> LongPlan:
        """The ways to draw texts are those of the dense checkpoint, for every model."""
        chosen = self.settings
        return LongPlan(tuple(samplings(self.dense)), chosen.long_samples, chosen.long_tokens, chosen.seed)

    @property
    def notes(self) -> list[str]:
        """What a reader of results on these tasks should know of their texts."""
        small = [
            f"{name}: a query has {NEIGHBOURS} passages or fewer to find, so that all of them are its nearest; "
            f"overlap_at_{NEIGHBOURS} decides nothing"
            for name, corpus in self.corpora.items()
            if has_no_order(corpus)
        ]
        corpora = [note for corpus in self.corpora.values() for note in corpus.notes]
        return corpora + small + prompt_notes(self.prompts)

    @cached_property
    def questions(self) -> list[str]:
        """What the tasks ask, every item of them: questions, prompts, queries and passages, but for short ones."""
        asked = self.harness.questions() if self.harness is not None else []
        if CORE_LONG in self.chosen.tasks:
            asked += [item["prompt"] for item in long_items()]
        for corpus in self.corpora.values():
            asked += [*corpus.queries.values(), *corpus.passages.values()]
        return [text for text in asked if len(text) >= MIN_QUESTION]

    def decoding(self, model: Model) -> dict[str, Any] | None:
        """The checkpoint's generation settings that its written answers in harness tasks follow; None without such."""
        return self.harness.decoding(model) if self.harness is not None else None

    def places(self, name: str) -> dict[str, list[int]]:
        """Places of the items of a task, or of each task of a group, ascending; of core_long those of its prompts."""
        if name == CORE_LONG:
            return {name: list(range(len(self.prompts)))}
        if name in self.corpora:
            return {name: in_subset(len(self.corpora[name].queries), self.settings.subset, self.settings.limit)}
        assert self.harness is not None
        return self.harness.items(name, self.settings.subset, self.settings.limit)

    def order(self, name: str) -> dict[str, list[int]]:
        """The same in the order in which rounds take them, which the seed of the settings fixes."""
        return {key: items_order(own, self.settings.seed, key) for key, own in self.places(name).items()}

    def is_whole(self, name: str) -> bool:
        """Whether a task cannot be cut into rounds: all passages are embedded at once, and draws follow one another."""
        if name in self.corpora:
            return True
        if name == CORE_LONG or self.harness is None:
            return False
        return any(task.samples for task in self.harness.tasks[name].values())

    def num_rounds(self, tasks: Sequence[str]) -> int:
        """In how many rounds these tasks are run, so that one holds about `ROUND_ITEMS` items of each."""
        cut = [name for name in tasks if not self.is_whole(name)]
        return num_rounds([len(own) for name in cut for own in self.places(name).values()])
