"""Names of tasks: which ones lm-evaluation-harness has, read from its task files without loading it, and folders."""

import os
import re
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from prunelens.errors import PrunelensError, printable, shown
from prunelens.reading import is_file

MAX_NAME = 200
"""Characters; no task has a longer name."""
_KEY = re.compile(r"""^["']?(task|group|tag|include|class|unsafe_code)["']?[ \t]*:[ \t]*(.*)$""")
_ITEM = re.compile(r"^[ \t]*-[ \t]+(.+)$")


def check_name(name: str) -> str:
    """The name itself, if it can be one of a task or a folder.

    Raises:
        PrunelensError: it is empty, too long, or holds characters that no name has.
    """
    if not name:
        raise PrunelensError("expected the name of a task, found an empty one; such as core or core_choice")
    if printable(name) != name or "\n" in name or "\t" in name:
        raise PrunelensError(f"expected the name of a task, found one with control characters ({shown(name, 60)})")
    if len(name) > MAX_NAME and not is_path(name):
        raise PrunelensError(
            f"expected the name of a task of at most {MAX_NAME} characters, found {len(name)} ({shown(name, 60)})"
        )
    return name


def is_path(name: str) -> bool:
    """Whether a name is meant as a path: it begins with a dot or ~, or holds a separator."""
    return name.startswith((".", "~")) or os.sep in name


def is_beir(name: str) -> bool:
    """Whether there is a folder of this name with the passages of a retrieval task."""
    return is_file(Path(name) / "corpus.jsonl")


def harness_names() -> frozenset[str]:
    """All tasks, groups and tags of lm-evaluation-harness; none where it is not installed."""
    return frozenset(_harness_files())


def check_no_code(names: Sequence[str]) -> None:
    """Refuse tasks whose files say that they run code that the model writes.

    Raises:
        PrunelensError: as said.
    """
    for name in names:
        if _harness_files().get(name):
            refuse_code(name)


def refuse_code(name: str) -> NoReturn:
    """Refuse a task that runs code.

    Raises:
        PrunelensError: always.
    """
    raise PrunelensError(
        f"the task {name} runs code that the model writes, on this machine and without a sandbox; where that "
        "is safe (in a container), allow it with --allow-code of evaluate (allow_code=True)"
    )


@cache
def _harness_files() -> dict[str, bool]:
    """All tasks, groups and tags that files describe, and whether one of a name runs code."""
    spec = find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        return {}
    found: dict[str, bool] = {}
    for folder in spec.submodule_search_locations:
        for path in (Path(folder) / "tasks").glob("**/*.yaml"):
            runs_code = _keys(path).get("unsafe_code") == ["true"]
            for name in _names_in(path):
                found[name] = found.get(name, False) or runs_code
    return found


def _names_in(path: Path) -> set[str]:
    """The task or group that a file describes, and its tags."""
    keys = _keys(path)
    for kind in ("task", "group") if "class" in keys else ("group", "task"):
        if keys.get(kind):
            tags = keys.get("tag", []) if kind == "task" else []
            return {keys[kind][0], *tags}
    return set()


@cache
def _keys(path: Path) -> dict[str, list[str]]:
    """Names by key at the top level of a task file; what it includes stands behind its own."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    own: dict[str, list[str]] = {}
    for place, line in enumerate(lines):
        if match := _KEY.match(line):
            own[match[1]] = list(_values(match[2], lines[place + 1 :]))
    included: dict[str, list[str]] = {}
    for name in own.pop("include", []):
        if not os.path.isabs(name) and (path.parent / name) != path:
            included |= _keys(path.parent / name)
    if "group" not in own:
        included.pop("group", None)
    return included | {key: values for key, values in own.items() if values}


def _values(rest: str, following: Sequence[str]) -> Iterator[str]:
    """The scalar after a key, or the list there or on the lines below."""
    rest = rest.split(" #")[0].strip()
    if rest and not rest.startswith("#"):
        yield from (part for item in rest.strip("[]").split(",") if (part := item.strip().strip("'\"")))
        return
    for line in following:
        match = _ITEM.match(line)
        if match is None:
            if line.strip() and not line.lstrip().startswith("#"):
                return
            continue
        yield match[1].split(" #")[0].strip().strip("'\"")
