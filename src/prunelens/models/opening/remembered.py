"""Hashes of files that are remembered, so that files which have not changed are not read again."""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from prunelens.cache import cache_dir, write_whole

HASH = re.compile("[0-9a-f]{64}")


def remembered(kind: str, files: Sequence[Path], about: str, made: Callable[[], str]) -> str:
    """A hash that was made of the same files before, else a new one.

    Files are the same if path, size, inode and the times of the last change of content and of inode are: the latter
    cannot be set back, so a copy that keeps the time of its original is read. What changes meanwhile is not remembered.

    Args:
        kind: folder of the cache in which it is kept.
        files: what is hashed.
        about: what else goes into the hash.
        made: makes it; 64 hexadecimal digits.
    """
    identity = _identity(files)
    place = cache_dir() / kind / hashlib.sha256(json.dumps([*identity, about]).encode()).hexdigest()
    with suppress(OSError, ValueError):  # none there, no rights, or a damaged one
        known = place.read_text(encoding="ascii").strip()
        if HASH.fullmatch(known):
            return known
    found = made()
    with suppress(OSError):  # a read-only cache costs time, nothing else
        if _identity(files) == identity:
            write_whole(place, found)
    return found


def _identity(files: Sequence[Path]) -> list[list[Any]]:
    found = []
    for path in files:
        whole = path.resolve()
        status = whole.stat()
        found.append([str(whole), status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino])
    return found
