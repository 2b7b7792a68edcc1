"""Tasks of lm-evaluation-harness on a model as it runs now: scores, answers and targets, item by item."""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from functools import partial
from io import StringIO
from typing import Any

from prunelens.errors import PrunelensError
from prunelens.models.loading import Model
from prunelens.models.opening import quiet
from prunelens.tasks.suite import CORE_HARNESS, MIN_QUESTION, Metric, Scored, in_subset, nearest, suite_folder

SHORT_TOKENS = 32
"""Generation of at most so many tokens is short."""
ACCURACIES = ("acc", "acc_norm", "acc_bytes")
SHOWN = 200

Advance = Callable[[int], None]
Reporter = Callable[[str, int], Advance]


@dataclass(frozen=True)
class HarnessTask:
    """One task, loaded: its name, its configuration, and how many items it has."""

    name: str
    output_type: str
    primary: str
    max_tokens: int
    num_items: int

    @property
    def use(self) -> str | None:
        """The class of use that it speaks of."""
        if self.output_type == "multiple_choice":
            return "multiple-choice"
        if self.output_type == "generate_until":
            return "short-generation" if self.max_tokens <= SHORT_TOKENS else "long-generation"
        return None


class Harness:
    """Tasks by name, found and loaded once.

    Raises:
        PrunelensError: lm-evaluation-harness is missing, a task is unknown, or its data cannot be loaded.
    """

    def __init__(self, names: Sequence[str]) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise PrunelensError(
                "tasks need lm-evaluation-harness, which is not installed; pip install 'prunelens[tasks]'"
            ) from error
        others = [name for name in names if name not in CORE_HARNESS]
        with silenced():
            self._manager = TaskManager(include_path=str(suite_folder() / "core"), include_defaults=bool(others))
        for name in others:
            if name not in self._manager.all_tasks:
                known = (*CORE_HARNESS, *self._manager.all_tasks)
                raise PrunelensError(f"there is no task {name!r} in lm-evaluation-harness{nearest(name, known)}")
        self._loaded: list[Any] = []
        self.tasks = {name: self._load(name) for name in names}

    def _load(self, name: str) -> dict[str, HarnessTask]:
        """The task of this name, or all tasks of the group of this name."""
        try:
            with silenced():
                found = self._manager.load([name])["tasks"]
                self._loaded += found.values()
                return {key: _described(key, task) for key, task in found.items()}
        except Exception as error:
            raise PrunelensError(
                f"the data of the task {name} cannot be loaded ({type(error).__name__}: {_first_line(error)}); tasks "
                "other than core need the hub, or their data in the local cache"
            ) from error

    def questions(self) -> list[str]:
        """What each item of the tasks asks; an item whose question is no text is left out."""
        with silenced():
            found = [_question(task, doc) for task in self._loaded for doc in task.eval_docs]
        return [text for text in found if text]

    def run(
        self,
        model: Model,
        name: str,
        reporter: Reporter,
        subset: str = "all",
        limit: int | None = None,
        batch_size: int = 40,
        chat_template: bool = False,
        label: str = "",
    ) -> list[Scored]:
        """Run a task, or all tasks of a group, on the model as it runs now (parts may be dropped around the call).

        Args:
            model: the model.
            name: a task that this harness was made with.
            reporter: progress display.
            subset: which items, one of `SUBSETS`.
            limit: at most so many items of each task.
            batch_size: requests run together.
            chat_template: apply the tokenizer's chat template to each prompt.
            label: what the model is called in the progress display.

        Raises:
            PrunelensError: the model has no tokenizer.
        """
        if model.tokenizer is None:
            raise PrunelensError(f"{model.name} has no tokenizer; put its tokenizer files beside config.json")
        from prunelens.tasks.runner import evaluate

        tasks = self.tasks[name]
        items = {key: in_subset(task.num_items, subset, limit) for key, task in tasks.items()}
        started = partial(reporter, f"{label}: {name}")
        with silenced():
            samples = evaluate(model, self._manager, items, batch_size, chat_template, started)
        return [scored for key, task in tasks.items() for scored in _scored(task, samples[key])]


def _described(name: str, task: Any) -> HarnessTask:
    metrics = task.config.metric_list or [{"metric": "acc"}]
    limit = (task.config.generation_kwargs or {}).get("max_gen_toks", 256)
    return HarnessTask(name, task.config.output_type, str(metrics[0]["metric"]), int(limit), len(task.eval_docs))


def _question(task: Any, doc: dict[str, Any]) -> str:
    """The longest text of an item that its prompt holds, mostly the question without the words around it."""
    prompt = task.doc_to_text(doc)
    if not isinstance(prompt, str):
        return ""
    parts = [part for part in doc.values() if isinstance(part, str) and part in prompt and len(part) >= MIN_QUESTION]
    return max(parts, key=len, default=prompt)


def _scored(task: HarnessTask, samples: list[dict[str, Any]]) -> list[Scored]:
    """One `Scored` for each metric and filter whose value is a number on each item."""
    by_filter: dict[str, list[dict[str, Any]]] = {}
    for sample in samples:
        by_filter.setdefault(sample["filter"], []).append(sample)
    found = []
    for place, (filtered, rows) in enumerate(by_filter.items()):
        for metric in rows[0]["metrics"]:
            if all(isinstance(row[metric], bool | int | float) or hasattr(row[metric], "item") for row in rows):
                name = metric if len(by_filter) == 1 else f"{metric}/{filtered}"
                first = place == 0 and metric == task.primary
                found.append(_one_metric(task, metric, name, rows, first))
    if not found:
        raise PrunelensError(
            f"expected a task with a number for each item, found none in {task.name}; models cannot be paired on it"
        )
    return found


def _one_metric(task: HarnessTask, metric: str, name: str, rows: list[dict[str, Any]], decides: bool) -> Scored:
    chance = 0.0
    if task.output_type == "multiple_choice" and metric in ACCURACIES:
        chance = sum(1 / len(row["filtered_resps"]) for row in rows) / len(rows)
    described = Metric(task.name, name, task.use, chance, "higher", "kept" if decides and task.use else None)
    keys = [str(row["doc"]["id"] if task.name in CORE_HARNESS else row["doc_id"]) for row in rows]
    return Scored(
        described,
        {key: float(row[metric]) for key, row in zip(keys, rows, strict=True)},
        {key: _answer(task, row) for key, row in zip(keys, rows, strict=True)},
        {key: _target(row) for key, row in zip(keys, rows, strict=True)},
    )


def _answer(task: HarnessTask, row: dict[str, Any]) -> str:
    """The choice with the highest log-likelihood (from 0), or what was written."""
    if task.output_type == "multiple_choice":
        scores = [response[0] for response in row["filtered_resps"]]
        return str(scores.index(max(scores)))
    return str(row["filtered_resps"][0])[:SHOWN]


def _target(row: dict[str, Any]) -> str:
    return str(row["target"])[:SHOWN]


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "no reason given")[:160]


@contextmanager
def silenced() -> Iterator[None]:
    """Keep the harness's own bars and remarks off the terminal; progress is shown by the reporter."""
    remarks = [logging.getLogger(name) for name in ("lm_eval", "lm-eval", "datasets")]
    levels = [logger.level for logger in remarks]
    before = logging.root.manager.disable
    try:
        logging.disable(logging.ERROR)
        with quiet(), redirect_stderr(StringIO()):
            yield
    finally:
        logging.disable(before)
        for logger, level in zip(remarks, levels, strict=True):
            logger.setLevel(level)
