"""A folder that appears whole or not at all: written beside its place, then renamed; what is not ours stays."""

import ctypes
import errno
import hashlib
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from prunelens.errors import PrunelensError
from prunelens.locks import HeldError, locked
from prunelens.reading import checked_path

IsOurs = Callable[[Path], bool]
"""Whether a folder that is not empty holds an earlier result, which may be replaced."""
LONGEST = 200
"""Bytes of a target's name that the names of what lies beside it repeat; a name may have 255."""
PATIENCE_SECONDS = 30.0
"""So long the write of a finished result waits for another process that writes there."""
AT_FDCWD, RENAME_EXCHANGE = -100, 2


@contextmanager
def reserved(target: Path, is_ours: IsOurs, what: str, seconds: float = 0.0) -> Iterator[None]:
    """Let nobody else write to `target` while the body runs, and find out before hours of work whether it can be.

    What killed writers of this machine left beside `target` is removed, and an earlier folder that one had put aside
    returns to its place.

    Args:
        target: a folder that is to be written.
        is_ours: whether what is there already may be replaced.
        what: what is written, in a word for the messages, such as run or checkpoint.
        seconds: how long to wait for another writer.

    Raises:
        PrunelensError: `target` exists and is not ours, another process writes it, or there are no rights or no space.
    """
    check_target(target, is_ours, what)
    target = Path(os.path.abspath(target))
    made: list[Path] = []
    with ExitStack() as stack:
        try:
            made = make_parents(target)
            stack.callback(lambda: remove_empty(made))
            _check_name(target)
            alone = stack.enter_context(locked(_lock_of(target), str(target), seconds))
            if alone:
                _clear(target)
                check_target(target, is_ours, what)
            Path(tempfile.mkdtemp(dir=target.parent, prefix=_prefix(target))).rmdir()
        except OSError as error:
            raise unwritable(target, error, what) from error
        yield


@contextmanager
def new_folder(target: Path, is_ours: IsOurs, what: str) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its place when the body ends, and vanishes if it fails.

    Args:
        target: where the folder is to be.
        is_ours: whether what is there already may be replaced.
        what: what is written, in a word for the messages, such as run or checkpoint.

    Raises:
        PrunelensError: as `reserved`, though a short write of another process is waited for.
    """
    target = Path(os.path.abspath(target))
    temporary: Path | None = None
    with reserved(target, is_ours, what, PATIENCE_SECONDS):
        try:
            temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=_prefix(target)))
            yield temporary
            temporary.chmod(0o755)
            _swap(temporary, target)
        except Exception as error:
            fault = _fault_of_disk(error)
            if fault is None:
                raise
            raise unwritable(target, fault, what) from error
        finally:
            if temporary is not None:
                _discard(temporary)


def probe_target(target: Path, is_ours: IsOurs, what: str) -> None:
    """Find out before hours of work whether `target` can be written.

    Raises:
        PrunelensError: as `reserved`.
    """
    with reserved(target, is_ours, what):
        pass


def check_apart(target: Path, models: Iterable[Any]) -> None:
    """Refuse an output that lies in the folder of a model that is read, or around it.

    Args:
        target: the output.
        models: what was named as models; anything but the path of a file or folder is passed over.

    Raises:
        PrunelensError: as said.
    """
    place = Path(os.path.realpath(checked_path(target, "the output")))
    for model in models:
        if not isinstance(model, str | Path) or not _is_there(model):
            continue
        found = Path(os.path.realpath(model))
        if place == found or place in found.parents or (found in place.parents and found.is_dir()):
            raise PrunelensError(
                f"expected an output apart from what is read, found {target}, which is, contains or is inside the "
                f"model {model}; choose another folder with -o"
            )


def recover(target: Path) -> None:
    """Put an earlier folder back that a writer had put aside when it was killed; does nothing while one writes."""
    target = Path(os.path.abspath(target))
    if os.path.lexists(target) or not _aside(target).exists():
        return
    with suppress(OSError, HeldError), locked(_lock_of(target), str(target)) as alone:
        if alone:
            _clear(target)


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


def make_parents(target: Path) -> list[Path]:
    """Make the folders above `target`; returns those that were missing, the deepest first."""
    missing = [parent for parent in target.parents if not parent.exists()]
    made: list[Path] = []
    try:
        for parent in reversed(missing):
            parent.mkdir()
            made.insert(0, parent)
    except OSError:
        remove_empty(made)
        raise
    return made


def remove_empty(folders: list[Path]) -> None:
    """Remove empty folders, the deepest first; one that others have filled or removed meanwhile stays as it is."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def _is_there(path: str | Path) -> bool:
    try:
        return os.path.exists(path)
    except ValueError:  # a NUL byte
        return False


def _check_name(target: Path) -> None:
    """Raise what the system says to a name that is too long or has no place."""
    with suppress(FileNotFoundError):
        target.lstat()


def _short(target: Path) -> str:
    """The name, or so much of it and a hash that something can be added to it."""
    name = target.name.encode()
    if len(name) <= LONGEST:
        return target.name
    return f"{name[:LONGEST].decode(errors='ignore')}-{hashlib.sha256(name).hexdigest()[:8]}"


def _lock_of(target: Path) -> Path:
    return target.parent / f".{_short(target)}.lock"


def answers_beside(target: Path) -> Path:
    """Where a run keeps answers until its result is written to `target`; it stays there where the run is killed."""
    target = Path(os.path.abspath(target))
    return target.parent / f".{_short(target)}.answers"


def _aside(target: Path) -> Path:
    """Where an earlier folder waits while a new one takes its place in two steps."""
    return target.parent / f".{_short(target)}.earlier"


def _prefix(target: Path) -> str:
    """How the names of this machine's temporary folders for `target` begin."""
    return f".{_short(target)}.{hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]}."


def _clear(target: Path) -> None:
    """With the lock held: bring back an earlier folder, and remove what killed writers left."""
    aside = _aside(target)
    if aside.exists() and not os.path.lexists(target):
        os.rename(aside, target)
    elif os.path.lexists(aside):
        _discard(aside)
    left = re.compile(re.escape(_prefix(target)) + "[a-z0-9_]{8}")
    for path in target.parent.iterdir():
        if left.fullmatch(path.name):
            _discard(path)


def _discard(path: Path) -> None:
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def _swap(temporary: Path, target: Path) -> None:
    """Put the folder in its place; what was there is then at `temporary`, or gone."""
    if not target.exists():
        os.rename(temporary, target)
        return
    if _exchanged(temporary, target):
        return
    aside = _aside(target)
    _discard(aside)
    try:
        os.rename(target, aside)
        os.rename(temporary, target)
    except BaseException:
        if os.path.lexists(aside) and not os.path.lexists(target):
            os.rename(aside, target)  # if even this fails, the next writer or reader does it
        raise
    _discard(aside)


def _exchanged(one: Path, other: Path) -> bool:
    """Let two folders trade places in one step, where the system can; whether it could."""
    swap = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None
    if swap is None:
        return False
    if swap(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(other))
