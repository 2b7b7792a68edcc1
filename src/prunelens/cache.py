"""The user's cache folder, where everything appears whole or not at all, and temporary folders of one process."""

import atexit
import functools
import hashlib
import os
import re
import shutil
import socket
import tempfile
from pathlib import Path

import platformdirs


def cache_dir() -> Path:
    """Folder for what is made once: `$PRUNELENS_CACHE`, or the platform's cache folder for prunelens."""
    chosen = os.environ.get("PRUNELENS_CACHE")
    if chosen:
        return Path(chosen)
    try:
        folder = Path(platformdirs.user_cache_dir("prunelens", appauthor=False))
    except RuntimeError:  # newer versions say so where the user has no home, older ones give a path that begins with ~
        return _homeless()
    return folder if folder.is_absolute() else _homeless()


@functools.cache
def _homeless() -> Path:
    """A folder of this process alone, for a user without a home."""
    folder = scratch_folder(Path(tempfile.gettempdir()))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def write_whole(path: Path, text: str) -> None:
    """Write a text file under a temporary name and rename it; it keeps the mode of the file it replaces."""
    path.parent.mkdir(parents=True, exist_ok=True)
    mode = path.stat().st_mode & 0o777 if path.exists() else 0o644
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def scratch_folder(parent: Path) -> Path:
    """A new folder in `parent`, whose name says whose it is; what killed processes of this machine left there goes.

    Raises:
        OSError: no rights or no space there.
    """
    parent.mkdir(parents=True, exist_ok=True)
    for path in parent.glob(f"{_machine()}*"):
        owner = re.fullmatch(r"(\d+)-[a-z0-9_]{8}", path.name.removeprefix(_machine()))
        if owner is not None and not _is_alive(int(owner[1])):
            shutil.rmtree(path, ignore_errors=True)
    return Path(tempfile.mkdtemp(dir=parent, prefix=f"{_machine()}{os.getpid()}-"))


def _machine() -> str:
    """How the names of this machine's folders begin: others that share the disk have processes of their own."""
    return f"prunelens-{hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]}-"


def _is_alive(pid: int) -> bool:
    if os.name != "posix":  # there the question itself would end the process
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # somebody else's
        return True
    return True
