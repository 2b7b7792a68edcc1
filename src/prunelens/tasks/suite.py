"""Which tasks there are: the core suite, tasks of lm-evaluation-harness by name, and BEIR folders."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from prunelens.errors import PrunelensError, nearest, shown
from prunelens.reading import is_directory
from prunelens.tasks.names import check_name, harness_names, is_beir, is_path

USES = ("retrieval", "multiple-choice", "short-generation", "long-generation")
"""Classes of use (theory.md, task classes)."""

CORE = "core"
CORE_HARNESS = ("core_choice", "core_letters", "core_facts", "core_arithmetic", "core_copy")
CORE_LONG = "core_long"
CORE_RETRIEVAL = "core_retrieval"
CORE_TASKS = (*CORE_HARNESS, CORE_LONG, CORE_RETRIEVAL)
MIN_QUESTION = 24
"""Characters; a shorter question may stand in any text."""
SUBSETS = ("all", "search", "held-out")
"""All items of a task, those at even places, or those at odd places."""


@dataclass(frozen=True)
class Metric:
    """What is counted on each item of a task.

    Attributes:
        task: the task.
        name: the metric.
        use: the class of use it speaks of, None for none.
        chance: the score that guessing gives, None where it is not known.
        better: `higher`, `lower`, or None where neither is, or nobody says.
        decides: how the verdict uses it: `kept` (share of the dense score), `agreement` (the value itself),
            `nll` or `loops` (added to the dense value), or None.
        aggregation: how items make a score: `mean`, or the name of another aggregation of the harness.
        reason: why it does not decide although its task has no other score that does; else empty.
    """

    task: str
    name: str
    use: str | None = None
    chance: float | None = 0.0
    better: str | None = "higher"
    decides: str | None = None
    aggregation: str = "mean"
    reason: str = ""


@dataclass(frozen=True)
class MetricScores:
    """One metric of one model, item by item, with what the model answered and what was expected.

    `parts` holds what the metric's aggregation takes of each item where that is no number (an answer beside its target,
    a log-likelihood beside a count); `values` is then None for the item.
    """

    metric: Metric
    values: dict[str, float | None]
    answers: dict[str, str] = field(default_factory=dict)
    targets: dict[str, str] = field(default_factory=dict)
    parts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TaskSelection:
    """Tasks to run, in order: for each its name, and the class of use if it was given."""

    tasks: tuple[str, ...]
    uses: dict[str, str] = field(default_factory=dict)

    @property
    def notes(self) -> list[str]:
        """What a reader should know of names that mean more than one thing."""
        return [
            f"{name} is the task of that name, not the folder; ./{name} is the folder"
            for name in self.tasks
            if not is_path(name) and is_directory(name) and not is_retrieval(name)
        ]

    @property
    def harness(self) -> tuple[str, ...]:
        """Those that lm-evaluation-harness runs."""
        return tuple(name for name in self.tasks if name != CORE_LONG and not is_retrieval(name))

    @property
    def retrieval(self) -> tuple[str, ...]:
        """Those that are retrieval."""
        return tuple(name for name in self.tasks if is_retrieval(name))


def parse_tasks(given: str | Sequence[str] | Mapping[str, Sequence[str]]) -> TaskSelection:
    """Tasks by name: `core`, `core_choice,gsm8k`, a BEIR folder, a list, or lists by class of use.

    Raises:
        PrunelensError: no task, a task twice, an unknown class, or a class without tasks.
    """
    if isinstance(given, Mapping):
        return _by_use(given)
    names = given.split(",") if isinstance(given, str) else [str(name) for name in given]
    return TaskSelection(tuple(_expanded([name.strip() for name in names])))


def _by_use(given: Mapping[str, Sequence[str]]) -> TaskSelection:
    tasks: list[str] = []
    uses: dict[str, str] = {}
    for use, names in given.items():
        if use not in USES:
            raise PrunelensError(f"expected a class of use of {', '.join(USES)}, found {use!r}{nearest(use, USES)}")
        if not names:
            raise PrunelensError(f"the class {use} has no task; name at least one, or leave the class out")
        expanded = _expanded([names] if isinstance(names, str) else [str(name).strip() for name in names])
        tasks += expanded
        uses |= dict.fromkeys(expanded, use)
    return TaskSelection(tuple(_expanded(tasks)), uses)


def _expanded(names: Sequence[str]) -> list[str]:
    found: list[str] = []
    for name in names:
        check_name(name)
        found += CORE_TASKS if name == CORE else [name]
    if not found:
        raise PrunelensError(f"expected at least one task, found none; {CORE} is the built-in suite")
    for name in found:
        if found.count(name) > 1:
            raise PrunelensError(f"the task {shown(name, 60)[1:-1]} is given twice; name each once")
        _check_known(name)
    return found


def _check_known(name: str) -> None:
    """Refuse a name that is no task and no retrieval folder.

    Raises:
        PrunelensError: with the nearest known name.
    """
    if name in CORE_TASKS or is_retrieval(name):
        return
    if is_path(name) or (is_directory(name) and not is_harness_task(name)):
        what = "none" if is_directory(name) else "no folder"
        raise PrunelensError(f"expected a retrieval folder with corpus.jsonl, found {what} in {shown(name, 60)[1:-1]}")
    if name.startswith("core_"):
        raise PrunelensError(f"there is no task {shown(name)}{nearest(name, CORE_TASKS)}")
    if harness_names() and not is_harness_task(name):
        known = (*CORE_TASKS, *sorted(harness_names()))
        raise PrunelensError(f"there is no task {shown(name)} in lm-evaluation-harness{nearest(name, known)}")


def is_harness_task(name: str) -> bool:
    """Whether lm-evaluation-harness has a task, group or tag of this name, or the core suite has."""
    return name in CORE_TASKS or name in harness_names()


def is_retrieval(name: str) -> bool:
    """Whether a task is the built-in retrieval set or a BEIR folder; a task's name means the task, not a folder."""
    return name == CORE_RETRIEVAL or (is_beir(name) and (is_path(name) or not is_harness_task(name)))


def retrieval_folder(name: str) -> Path:
    """Where the retrieval data of a task lie."""
    return suite_folder() / CORE_RETRIEVAL if name == CORE_RETRIEVAL else Path(name)


def suite_folder() -> Path:
    """The folder of the core suite; its part `core` is what lm_eval takes as --include_path."""
    return Path(str(resources.files("prunelens.tasks"))) / "suites"


def in_subset(count: int, subset: str, limit: int | None = None) -> list[int]:
    """Indices of the items of a subset, at most `limit`."""
    start, step = {"all": (0, 1), "search": (0, 2), "held-out": (1, 2)}[subset]
    return list(range(start, count, step))[:limit]


def long_items(subset: str = "all", limit: int | None = None) -> list[dict[str, str]]:
    """The prompts of core_long: `id`, `kind`, `prompt`."""
    lines = (suite_folder() / "core" / f"{CORE_LONG}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(lines[index]) for index in in_subset(len(lines), subset, limit)]


def files_hash(chosen: TaskSelection) -> str:
    """A hash of the files behind the tasks that are not the harness's own: the core suite, and BEIR folders."""
    folders = [retrieval_folder(name) for name in chosen.retrieval]
    if set(chosen.tasks) & set(CORE_TASKS):
        folders.append(suite_folder() / "core")
    digest = hashlib.sha256()
    for path in (path for folder in folders for path in sorted(folder.rglob("*"))):
        if path.suffix in (".yaml", ".jsonl", ".tsv", ".py"):
            digest.update(path.read_bytes())
    return digest.hexdigest()
