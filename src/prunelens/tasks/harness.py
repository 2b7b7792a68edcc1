"""Tasks of lm-evaluation-harness on a model as it runs now: scores, answers and targets, item by item."""

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from functools import partial
from io import StringIO
from typing import Any
from unittest.mock import patch

from prunelens.errors import PrunelensError, nearest
from prunelens.models.model import Model
from prunelens.models.opening.quiet import quiet
from prunelens.progress import Reporter, silent
from prunelens.tasks.decoding import own_settings
from prunelens.tasks.harness_metrics import HarnessTask, Row, declared, described, score_items
from prunelens.tasks.identity import tokenizer_words
from prunelens.tasks.kept_answers import KeptAnswers
from prunelens.tasks.names import refuse_code
from prunelens.tasks.suite import CORE_HARNESS, MIN_QUESTION, MetricScores, in_subset, suite_folder


class Harness:
    """Tasks by name, found and loaded once.

    Raises:
        PrunelensError: lm-evaluation-harness is missing, a task is unknown, its data cannot be loaded, it counts
            nothing, or it runs code that the model writes and nobody allowed that.
    """

    def __init__(self, names: Sequence[str], allow_code: bool = False) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise PrunelensError(
                "tasks need lm-evaluation-harness, which is not installed; pip install 'prunelens[tasks]'"
            ) from error
        self._allow_code = allow_code
        self._built: dict[str, Any] = {}
        others = [name for name in names if name not in CORE_HARNESS]
        with silenced():
            self._manager = TaskManager(include_path=str(suite_folder() / "core"), include_defaults=bool(others))
        for name in others:
            if name not in self._manager.all_tasks:
                known = (*CORE_HARNESS, *self._manager.all_tasks)
                raise PrunelensError(f"there is no task {name!r} in lm-evaluation-harness{nearest(name, known)}")
        with self._code_allowed():
            self.tasks = {name: self._load(name) for name in names}

    def _load(self, name: str) -> dict[str, HarnessTask]:
        """The task of this name, or all tasks of the group of this name."""
        entry = self._manager.task_index.get(name)
        if entry is not None and entry.cfg and entry.cfg.get("unsafe_code"):
            self._check_code(name)  # such a task may fail on loading where nobody allowed it
        try:
            with silenced():
                found = self._manager.load([name])["tasks"]
        except Exception as error:
            raise PrunelensError(
                f"the data of the task {name} cannot be loaded ({type(error).__name__}: {_first_line(error)}); tasks "
                "other than core need the hub, or their data in the local cache"
            ) from error
        for key, task in found.items():
            if getattr(task, "UNSAFE_CODE", False):
                self._check_code(key)
            _check_runnable(key, task)
        with silenced():
            return {key: _described(key, task) for key, task in found.items()}

    def _check_code(self, name: str) -> None:
        if not self._allow_code:
            refuse_code(name)

    @contextmanager
    def _code_allowed(self) -> Iterator[None]:
        """Let metrics run code where it is allowed; they ask for this variable."""
        if not self._allow_code:
            yield
            return
        with patch.dict(os.environ, {"HF_ALLOW_CODE_EVAL": "1"}):
            yield

    def check_items(self, subset: str, limit: int | None) -> None:
        """Refuse a task of which the subset holds no item.

        Raises:
            PrunelensError: as said.
        """
        for tasks in self.tasks.values():
            for task in tasks.values():
                if not in_subset(task.num_items, subset, limit):
                    raise PrunelensError(
                        f"expected items in the subset {subset} of the task {task.name}, found none: it has "
                        f"{task.num_items} in all; leave the task out"
                    )

    def check_length(self, model: Model) -> None:
        """Refuse a task whose answers alone fill a model's context, before anything runs.

        Raises:
            PrunelensError: as said.
        """
        context = model.context_length
        for task in self.all_tasks:
            if task.output_type == "generate_until" and context is not None and task.max_tokens >= context:
                raise PrunelensError(
                    f"the task {task.name} lets a model write {task.max_tokens} tokens, and {model.name} has a context "
                    f"of {context}; leave the task out"
                )

    @property
    def all_tasks(self) -> list[HarnessTask]:
        """Every task, those of groups too."""
        return [task for tasks in self.tasks.values() for task in tasks.values()]

    def decoding(self, model: Model) -> dict[str, Any] | None:
        """The checkpoint's generation settings that written answers follow; None where no task has any written."""
        written = [task for task in self.all_tasks if task.output_type == "generate_until"]
        return own_settings(model, any(task.samples for task in written)) if written else None

    def questions(self) -> list[str]:
        """What each item of the tasks asks; an item whose question is no text is left out."""
        with silenced():
            found = [_question(one.task, doc) for one in self.all_tasks for doc in one.task.eval_docs]
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
    ) -> list[MetricScores]:
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
            PrunelensError: as `answer`.
        """
        items = self.items(name, subset, limit)
        asking = Asking(items, batch_size, chat_template, reporter, label)
        return self.score(name, self.answer(model, name, asking, items))

    def items(self, name: str, subset: str = "all", limit: int | None = None) -> dict[str, list[int]]:
        """Places of the items of a task, or of each task of a group, that are asked."""
        return {key: in_subset(task.num_items, subset, limit) for key, task in self.tasks[name].items()}

    def score(self, name: str, samples: Mapping[str, Sequence[Row]]) -> list[MetricScores]:
        """The scores of a task, or of all tasks of a group, from samples."""
        with silenced(), self._code_allowed():
            return [
                scored
                for key, task in self.tasks[name].items()
                if key in samples
                for scored in score_items(task, samples[key])
            ]

    def answer(
        self,
        model: Model,
        name: str,
        asking: "Asking",
        items: Mapping[str, Sequence[int]],
        kept: KeptAnswers | None = None,
    ) -> dict[str, list[Row]]:
        """What a model, as it runs now, answers to some items of a task, or of the tasks of a group: their samples.

        Args:
            model: the model.
            name: a task that this harness was made with.
            asking: how it is asked.
            items: the items that are asked now, places among those of `asking`.
            kept: answers of this very model that are there already; new ones are added.

        Raises:
            PrunelensError: the model has no tokenizer, or the task fails on it.
        """
        if model.tokenizer is None:
            raise PrunelensError(f"{model.name} has no tokenizer; put its tokenizer files beside config.json")
        from prunelens.tasks.runner import respond

        started = partial(asking.reporter, f"{asking.label}: {name}")
        with silenced(), self._code_allowed():
            try:
                questions = self._questions(model, name, asking)
                chosen = list(questions.chosen(items))
                answers = kept.of(name) if kept is not None else None
                ready = respond(model, chosen, asking.batch_size, started, answers)
                if kept is not None:
                    kept.num_items += ready
                return questions.samples(items)
            except (AssertionError, LookupError, TypeError, ValueError) as error:  # out of somebody else's code
                raise PrunelensError(
                    f"the task {name} cannot be run on {model.name} ({type(error).__name__}: {_first_line(error)}); "
                    "leave it out"
                ) from error

    def _questions(self, model: Model, name: str, asking: "Asking") -> Any:
        """The requests of all items that `asking` holds, built where no model had them before."""
        from prunelens.tasks.requests import build
        from prunelens.tasks.runner import chat_writer

        words = tokenizer_words(model.tokenizer) if asking.chat_template else ""
        key = json.dumps([name, asking.items, words])
        if key not in self._built:
            template = chat_writer(model) if asking.chat_template else None
            loaded = {task: described.task for task, described in self.tasks[name].items()}
            questions = build(loaded, asking.items, template)
            if words is None:  # a tokenizer that cannot be told from another
                return questions
            self._built[key] = questions
        return self._built[key]


@dataclass(frozen=True)
class Asking:
    """How models are asked a task.

    Attributes:
        items: for each task of the name the places of all its items that any model of the run is asked, ascending.
        batch_size: requests run together.
        chat_template: apply the tokenizer's chat template to each prompt.
        reporter: progress display.
        label: what the model is called there.
    """

    items: Mapping[str, Sequence[int]]
    batch_size: int = 40
    chat_template: bool = False
    reporter: Reporter = silent
    label: str = ""


def _described(name: str, task: Any) -> HarnessTask:
    try:
        return described(name, task)
    except (ValueError, TypeError) as error:
        raise PrunelensError(f"the task {name} cannot be run: {_first_line(error)}") from error


def _check_runnable(name: str, task: Any) -> None:
    """Refuse what can never give a score, before anything runs.

    Raises:
        PrunelensError: it needs pictures or sound, or counts nothing.
    """
    if getattr(task, "MULTIMODAL", False):
        raise PrunelensError(f"the task {name} asks about pictures or sound; give tasks of text alone")
    if set(declared(task)) == {"bypass"}:
        raise PrunelensError(f"the task {name} has no score for its items (metric bypass); give a task with a score")


def _question(task: Any, doc: dict[str, Any]) -> str:
    """The longest text of an item that its prompt holds, mostly the question without the words around it."""
    prompt = task.doc_to_text(doc)
    if not isinstance(prompt, str):
        return ""
    parts = [part for part in doc.values() if isinstance(part, str) and part in prompt and len(part) >= MIN_QUESTION]
    return max(parts, key=len, default=prompt)


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
