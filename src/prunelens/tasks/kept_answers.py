"""What a model answered to single requests, kept in a folder: a later run, or a resumed one, asks nothing twice."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from prunelens.cache import cache_dir, write_whole
from prunelens.documents import read_json
from prunelens.errors import PrunelensError

MOST_BYTES = 256 * 2**20
"""Size of the folder in the user's cache; the models that were asked longest ago go first."""
WRITE_SECONDS = 10.0
"""A long task writes what it has so often, so that little is lost where it is killed."""


def answers_folder() -> Path:
    """Where answers of dense models are kept between runs."""
    return cache_dir() / "answers"


class KeptAnswers:
    """Answers of one model, a file for each task.

    Args:
        folder: where the files of all models are.
        identity: names the model and everything else that an answer depends on, see `identity_of`.

    Attributes:
        num_items: items that were answered from here so far.
    """

    def __init__(self, folder: Path, identity: str) -> None:
        self._home = folder / identity[:32]
        self.identity = identity
        self.num_items = 0

    def of(self, task: str) -> "TaskAnswers":
        """The answers to the requests of a task."""
        name = hashlib.sha256(task.encode()).hexdigest()[:16]
        return TaskAnswers(self._home / f"{name}.json", self.identity, task)


class TaskAnswers:
    """Answers to requests of one task; a request is known by its content, wherever in the task it stands.

    A file that is damaged or was made for something else counts as empty. A folder that cannot be written keeps
    nothing.
    """

    def __init__(self, path: Path, identity: str, task: str) -> None:
        self._path, self._about = path, {"identity": identity, "task": task}
        self._known = self._read()
        self._new: dict[str, Any] = {}
        self._written = time.monotonic()

    def get(self, kind: str, request: Sequence[Any]) -> Any:
        """The answer to a request, None where it is not known."""
        key = _key(kind, request)
        return self._known.get(key, self._new.get(key))

    def add(self, kind: str, request: Sequence[Any], answer: Any) -> None:
        """Keep an answer that JSON can hold; it is on disk after the next `write`, or some seconds later."""
        self._new[_key(kind, request)] = answer
        if time.monotonic() - self._written > WRITE_SECONDS:
            self.write()

    def write(self) -> None:
        """Put what is new on disk, beside what other processes have put there meanwhile."""
        self._written = time.monotonic()
        if not self._new:
            return
        self._known |= self._read() | self._new
        self._new = {}
        text = _text(self._known)
        whole = self._about | {"sha256": hashlib.sha256(text.encode()).hexdigest()}
        with suppress(OSError):  # a folder that cannot be written costs time, nothing else
            write_whole(self._path, f'{json.dumps(whole)[:-1]}, "answers": {text}}}\n')

    def _read(self) -> dict[str, Any]:
        try:
            found = read_json(self._path, "kept answers", finite=False)
        except PrunelensError:
            return {}
        answers = found.get("answers") if isinstance(found, dict) else None
        if not isinstance(answers, dict) or any(found.get(name) != value for name, value in self._about.items()):
            return {}
        if found.get("sha256") != hashlib.sha256(_text(answers).encode()).hexdigest():
            return {}
        with suppress(OSError):
            os.utime(self._path.parent)  # it was of use; see `trim`
        return answers


def _text(answers: Mapping[str, Any]) -> str:
    return json.dumps(answers, sort_keys=True)


def _key(kind: str, request: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps([kind, list(request)], sort_keys=True).encode()).hexdigest()[:32]


def trim(folder: Path, most_bytes: int = MOST_BYTES) -> None:
    """Remove the models that were asked longest ago until the folder is small enough; the last one stays."""
    homes: list[tuple[float, int, Path]] = []
    with suppress(OSError):
        for home in folder.iterdir():
            homes.append((home.stat().st_mtime, sum(file.stat().st_size for file in home.iterdir()), home))
    homes.sort()
    left = sum(size for _, size, _ in homes)
    for _, size, home in homes[:-1]:
        if left <= most_bytes:
            return
        shutil.rmtree(home, ignore_errors=True)
        left -= size
