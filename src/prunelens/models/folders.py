"""A folder that appears whole or not at all: written beside its place, then renamed; what is not ours stays."""

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from prunelens.errors import PrunelensError
from prunelens.reading import checked_path

IsOurs = Callable[[Path], bool]
"""Whether a folder that is not empty holds an earlier result, which may be replaced."""


@contextmanager
def new_folder(target: Path, is_ours: IsOurs, what: str) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its place when the body ends, and vanishes if it fails.

    Args:
        target: where the folder is to be.
        is_ours: whether what is there already may be replaced.
        what: what is written, in a word for the messages, such as run or checkpoint.

    Raises:
        PrunelensError: `target` exists and is not ours, or there are no rights or no space.
    """
    check_target(target, is_ours, what)
    target = Path(os.path.abspath(target))
    temporary: Path | None = None
    made: list[Path] = []
    try:
        made = _make_parents(target)
        temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
        yield temporary
        temporary.chmod(0o755)
        _swap(temporary, target)
        made = []
    except Exception as error:
        fault = _fault_of_disk(error)
        if fault is None:
            raise
        raise unwritable(target, fault, what) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        _remove(made)


def probe_target(target: Path, is_ours: IsOurs, what: str) -> None:
    """Find out before hours of work whether `target` can be written.

    Raises:
        PrunelensError: `target` exists and is not ours, or there are no rights there.
    """
    check_target(target, is_ours, what)
    target = Path(os.path.abspath(target))
    made: list[Path] = []
    try:
        made = _make_parents(target)
        Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.")).rmdir()
    except OSError as error:
        raise unwritable(target, error, what) from error
    finally:
        _remove(made)


def check_target(target: Path, is_ours: IsOurs, what: str) -> None:
    """Refuse an output folder that holds something else.

    Raises:
        PrunelensError: as said.
    """
    checked_path(target, f"the {what}")
    if not os.path.lexists(target):
        return
    try:
        empty = target.is_dir() and not any(target.iterdir())
    except OSError as error:
        raise unwritable(target, error, what) from error
    if not empty and not is_ours(target):
        raise PrunelensError(
            f"expected a new folder or an earlier {what} as output, found {target}, which is neither; name another"
        )


def unwritable(target: Path, error: OSError, what: str) -> PrunelensError:
    """What a user is told when the disk refuses."""
    return PrunelensError(
        f"the {what} cannot be written to {target} ({error.strerror or error}); free space, or choose a folder you "
        "may write to"
    )


def _fault_of_disk(error: Exception) -> OSError | None:
    """The fault of the disk that an error is, or that a library written in Rust has wrapped in words of its own."""
    if isinstance(error, OSError):
        return error
    if isinstance(error, PrunelensError):
        return None
    if number := re.search(r"\(os error (\d+)\)", str(error)):
        return OSError(int(number[1]), os.strerror(int(number[1])))
    space = os.strerror(errno.ENOSPC)
    return OSError(errno.ENOSPC, space) if space in str(error) else None


def _make_parents(target: Path) -> list[Path]:
    """Make the folders above `target`; returns those that were missing, the deepest first."""
    missing = [parent for parent in target.parents if not parent.exists()]
    made: list[Path] = []
    try:
        for parent in reversed(missing):
            parent.mkdir()
            made.insert(0, parent)
    except OSError:
        _remove(made)
        raise
    return made


def _remove(folders: list[Path]) -> None:
    """Remove empty folders, the deepest first; one that others have filled meanwhile stays."""
    for folder in folders:
        if not any(folder.iterdir()):
            folder.rmdir()


def _swap(temporary: Path, target: Path) -> None:
    if not target.exists():
        os.rename(temporary, target)
        return
    aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.old."))
    earlier = aside / "earlier"
    try:
        os.rename(target, earlier)
        os.rename(temporary, target)
    except BaseException:
        if earlier.exists():
            os.rename(earlier, target)  # if even this fails, the earlier one is kept beside its place
        aside.rmdir()
        raise
    shutil.rmtree(aside, ignore_errors=True)
