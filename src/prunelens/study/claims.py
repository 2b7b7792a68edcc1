"""A folder that is filled bit by bit, by one process at a time, and is gone again where nothing came of it."""

import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from prunelens.cache import write_whole
from prunelens.errors import PrunelensError
from prunelens.files import make_parents, remove_empty
from prunelens.locks import locked

LOCK = ".lock"
HALF = re.compile(r"\.[^.]+\.(json|html|parquet)\.[a-z0-9_]{8}")
"""Names of files that a killed writer had not finished."""


@dataclass
class Claim:
    """A folder that is ours meanwhile.

    Attributes:
        results: the folder within it that holds what is worth keeping.
        worthless: whether nothing in it is, whatever it holds.
    """

    results: Path
    worthless: bool = False

    @property
    def is_kept(self) -> bool:
        """Whether there is something worth keeping."""
        if self.worthless:
            return False
        return self.results.is_dir() and any(not path.name.startswith(".") for path in self.results.iterdir())


@contextmanager
def claimed(folder: Path, mark: str, content: str, what: str, results: str) -> Iterator[Claim]:
    """Make the folder a sweep's or a search's while the body runs, or see that it is one already.

    What killed writers left is removed. If the body fails before there is any result, a new folder goes again, and an
    old one has its old mark.

    Args:
        folder: where it is.
        mark: name of the file that says what the folder is.
        content: of the mark.
        what: a word for messages, such as sweep.
        results: name of the folder within that holds results, one file or folder each.

    Raises:
        PrunelensError: the folder holds something else, another process is at work in it, or it cannot be written.
    """
    place, path, claim = folder.absolute(), folder.absolute() / mark, Claim(folder.absolute() / results)
    _check_claimable(folder, mark, what)
    earlier = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None
    made: list[Path] = []
    with ExitStack() as stack:
        stack.callback(lambda: remove_empty(made))
        try:
            made = make_parents(path)
            stack.enter_context(locked(place / LOCK, str(folder)))
            _clear(place, results)
            write_whole(path, content)
        except OSError as error:
            raise PrunelensError(f"the {what} cannot be kept in {folder} ({error.strerror or error})") from error
        try:
            yield claim
        except BaseException:
            _clear(place, results)
            if earlier is None and not claim.is_kept:
                _undo(place, (mark, results))
            elif earlier is not None and not claim.is_kept:
                write_whole(path, earlier)
            raise


def probe_claim(folder: Path, mark: str, what: str) -> None:
    """Find out before anything is opened whether the folder can be claimed.

    Raises:
        PrunelensError: as `claimed`.
    """
    _check_claimable(folder, mark, what)
    with ExitStack() as stack:
        try:
            made = make_parents(folder.absolute() / mark)
            stack.callback(lambda: remove_empty(made))
            stack.enter_context(locked(folder.absolute() / LOCK, str(folder)))
        except OSError as error:
            raise PrunelensError(f"the {what} cannot be kept in {folder} ({error.strerror or error})") from error


def _check_claimable(folder: Path, mark: str, what: str) -> None:
    try:
        if not folder.exists() or (folder / mark).is_file():
            return
        if not folder.is_dir() or any(path.name != LOCK for path in folder.iterdir()):
            raise PrunelensError(f"{folder} exists and is not a {what}; choose another folder or remove it")
    except OSError as error:
        raise PrunelensError(f"the {what} cannot be kept in {folder} ({error.strerror or error})") from error


def _clear(place: Path, results: str) -> None:
    """Remove what writers that were killed have left; only the owner of the lock may."""
    home = place / results
    left = [*(home.glob(".*") if home.is_dir() else ()), *(one for one in place.glob(".*") if HALF.fullmatch(one.name))]
    for path in left:
        _remove(path)


def _undo(place: Path, names: Sequence[str]) -> None:
    for name in names:
        _remove(place / name)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
