"""Which tasks there are: the core suite, tasks of lm-evaluation-harness by name, and BEIR folders."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

from prunelens.errors import PrunelensError, nearest
from prunelens.reading import is_directory, is_file

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
        chance: the mean value that guessing gives.
        better: `higher`, `lower`, or None where neither is.
        decides: how the verdict uses it: `kept` (share of the dense score), `agreement` (the value itself),
            `nll` or `loops` (added to the dense value), or None.
    """

    task: str
    name: str
    use: str | None = None
    chance: float = 0.0
    better: str | None = "higher"
    decides: str | None = None


@dataclass(frozen=True)
class Scored:
    """One metric of one model, item by item, with what the model answered and what was expected."""

    metric: Metric
    values: dict[str, float]
    answers: dict[str, str] = field(default_factory=dict)
    targets: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Chosen:
    """Tasks to run, in order: for each its name, and the class of use if it was given."""

    tasks: tuple[str, ...]
    uses: dict[str, str] = field(default_factory=dict)

    @property
    def harness(self) -> tuple[str, ...]:
        """Those that lm-evaluation-harness runs."""
        return tuple(name for name in self.tasks if name != CORE_LONG and not is_retrieval(name))

    @property
    def retrieval(self) -> tuple[str, ...]:
        """Those that are retrieval."""
        return tuple(name for name in self.tasks if is_retrieval(name))


def parse_tasks(given: str | Sequence[str] | Mapping[str, Sequence[str]]) -> Chosen:
    """Tasks by name: `core`, `core_choice,gsm8k`, a BEIR folder, a list, or lists by class of use.

    Raises:
        PrunelensError: no task, a task twice, an unknown class, or a class without tasks.
    """
    if isinstance(given, Mapping):
        return _by_use(given)
    names = given.split(",") if isinstance(given, str) else [str(name) for name in given]
    return Chosen(tuple(_expanded([name.strip() for name in names])))


def _by_use(given: Mapping[str, Sequence[str]]) -> Chosen:
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
    return Chosen(tuple(_expanded(tasks)), uses)


def _expanded(names: Sequence[str]) -> list[str]:
    found: list[str] = []
    for name in names:
        if not name:
            raise PrunelensError(f"expected the name of a task, found an empty one; such as {CORE} or core_choice")
        found += CORE_TASKS if name == CORE else [name]
    if not found:
        raise PrunelensError(f"expected at least one task, found none; {CORE} is the built-in suite")
    for name in found:
        if found.count(name) > 1:
            raise PrunelensError(f"the task {name} is given twice; name each once")
        if is_directory(name) and name not in CORE_TASKS and not is_retrieval(name):
            raise PrunelensError(f"expected a retrieval folder with corpus.jsonl, found none in {name}")
        if name.startswith("core_") and name not in CORE_TASKS:
            raise PrunelensError(f"there is no task {name!r}{nearest(name, CORE_TASKS)}")
    return found


def is_retrieval(name: str) -> bool:
    """Whether a task is the built-in retrieval set or a BEIR folder."""
    return name == CORE_RETRIEVAL or is_file(Path(name) / "corpus.jsonl")


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


def files_hash(chosen: Chosen) -> str:
    """A hash of the files behind the tasks that are not the harness's own: the core suite, and BEIR folders."""
    folders = [retrieval_folder(name) for name in chosen.retrieval]
    if set(chosen.tasks) & set(CORE_TASKS):
        folders.append(suite_folder() / "core")
    digest = hashlib.sha256()
    for path in (path for folder in folders for path in sorted(folder.rglob("*"))):
        if path.suffix in (".yaml", ".jsonl", ".tsv", ".py"):
            digest.update(path.read_bytes())
    return digest.hexdigest()
