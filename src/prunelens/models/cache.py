"""The user's cache folder: converted models and fingerprints; everything appears there whole or not at all."""

import os
import tempfile
from pathlib import Path

import platformdirs


def cache_dir() -> Path:
    """Folder for what is made once: `$PRUNELENS_CACHE`, or the platform's cache folder for prunelens."""
    chosen = os.environ.get("PRUNELENS_CACHE")
    return Path(chosen) if chosen else Path(platformdirs.user_cache_dir("prunelens", appauthor=False))


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
