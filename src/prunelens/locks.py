"""One writer at a time: a lock that the system lets go of when its owner dies, and a note on who that is."""

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prunelens.errors import PrunelensError, printable

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

POLL_SECONDS = 0.05
_held: dict[tuple[int, str], int] = {}
"""How often this process (by its number, since a fork holds nothing) holds a lock, by the lock's path."""


class HeldError(PrunelensError):
    """Somebody else holds the lock."""


@contextmanager
def locked(path: Path, what: str, seconds: float = 0.0) -> Iterator[bool]:
    """Hold the lock file `path`, which is there only while it is held; a process may hold one several times over.

    Args:
        path: where the lock file is.
        what: what it protects, for the message.
        seconds: how long to wait for another owner.

    Yields:
        Whether it is certain that nobody else writes: True at the first hold, False within another one and where
        the file system knows no locks.

    Raises:
        HeldError: another process holds it.
        OSError: the file cannot be made.
    """
    key = (os.getpid(), os.path.realpath(path))
    if key in _held:
        _held[key] += 1
        try:
            yield False
        finally:
            _held[key] -= 1
        return
    handle = _waited(path, what, seconds)
    _held[key] = 1
    try:
        yield handle is not None
    finally:
        del _held[key]
        if handle is not None:
            with contextlib.suppress(OSError):
                path.unlink()  # while it is held: who waits for it sees that it is gone, and makes a new one
            os.close(handle)


def _waited(path: Path, what: str, seconds: float) -> int | None:
    end = time.monotonic() + seconds
    while True:
        try:
            return _taken(path, what)
        except HeldError:
            if time.monotonic() >= end:
                raise
            time.sleep(POLL_SECONDS)


def _taken(path: Path, what: str) -> int | None:
    """The open lock file, or None where there are no locks."""
    if fcntl is None:
        return None
    while True:
        is_new = not path.exists()
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_still(handle, path):
                _sign(handle)
                return handle
            os.close(handle)  # its owner has removed it meanwhile
        except BlockingIOError as error:
            owner = _owner(handle)
            os.close(handle)
            raise HeldError(
                f"{what} is being written by {owner}; wait until that has ended, or choose another"
            ) from error
        except OSError:  # a file system without locks
            os.close(handle)
            if is_new:
                path.unlink(missing_ok=True)
            return None
        except BaseException:
            os.close(handle)
            raise


def _is_still(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _sign(handle: int) -> None:
    about = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}
    with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(about).encode(), 0)


def _owner(handle: int) -> str:
    try:
        found: dict[str, Any] = json.loads(os.pread(handle, 4096, 0))
        return printable(f"process {int(found['pid'])} on {found['host']!s:.80} since {found['since']!s:.40}")
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
