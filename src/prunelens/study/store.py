"""A run on disk: Parquet files and one run.json, whole or not at all."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from prunelens.errors import PrunelensError
from prunelens.models.cache import write_whole
from prunelens.study.schemas import SCHEMAS

FORMAT = "prunelens-run"
FORMAT_VERSION = 2

REQUIRED = (
    "dense",
    "compressed",
    "ranking",
    "settings",
    "nulls",
    "notes",
    "seconds",
    "versions",
    "summary",
    "created",
    "lens",
    "noise",
)
"""What run.json must hold for the page."""


@dataclass
class Run:
    """What a comparison found: tables by name, and `info`, the content of run.json."""

    tables: dict[str, pa.Table]
    info: dict[str, Any]


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its place when the body ends, and vanishes if it fails.

    Raises:
        PrunelensError: `target` exists and is not a run, or there are no rights or no space.
    """
    check_target(target)
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
    except OSError as error:
        raise _unwritable(target, error) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        _remove(made)


def probe_target(target: Path) -> None:
    """Find out before hours of work whether a run can be written to `target`.

    Raises:
        PrunelensError: `target` exists and is not a run, or there are no rights there.
    """
    check_target(target)
    target = Path(os.path.abspath(target))
    made: list[Path] = []
    try:
        made = _make_parents(target)
        Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.")).rmdir()
    except OSError as error:
        raise _unwritable(target, error) from error
    finally:
        _remove(made)


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


def _unwritable(target: Path, error: OSError) -> PrunelensError:
    return PrunelensError(
        f"the run cannot be written to {target} ({error.strerror or error}); free space, or choose a folder you "
        "may write to"
    )


def check_target(target: Path) -> None:
    """Refuse an output folder that holds something other than a run.

    Raises:
        PrunelensError: as said.
    """
    if not os.path.lexists(target):
        return
    try:
        empty = target.is_dir() and not any(target.iterdir())
    except OSError as error:
        raise _unwritable(target, error) from error
    if not empty and not _is_run(target):
        raise PrunelensError(
            f"expected a new folder or an earlier run as output, found {target}, which is neither; name another"
        )


def _is_run(folder: Path) -> bool:
    try:
        return json.loads((folder / "run.json").read_text(encoding="utf-8")).get("format") == FORMAT
    except (OSError, ValueError, AttributeError):
        return False


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
            os.rename(earlier, target)  # if even this fails, the earlier run is kept beside its place
        aside.rmdir()
        raise
    shutil.rmtree(aside, ignore_errors=True)


def write_run(run: Run, folder: Path) -> None:
    """Write the tables and run.json into an existing folder."""
    for name, table in run.tables.items():
        pq.write_table(table, folder / f"{name}.parquet", compression="zstd")
    content = json.dumps(run.info, indent=1, ensure_ascii=False, allow_nan=False)
    (folder / "run.json").write_text(content + "\n", encoding="utf-8")


def replace_page(folder: Path, page: str) -> Path:
    """Put a new page into a run, whole or not at all; returns its path.

    Raises:
        PrunelensError: no rights or no space.
    """
    path = folder / "report.html"
    try:
        write_whole(path, page)
    except OSError as error:
        raise _unwritable(path, error) from error
    return path


def read_run(folder: Path) -> Run:
    """Read a run back.

    Raises:
        PrunelensError: no run there, one of another format version, or a damaged table.
    """
    if not _is_run(folder):
        raise PrunelensError(f"expected a run (a folder with run.json) at {folder}, found none")
    try:
        info = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        if info["format_version"] != FORMAT_VERSION:
            raise PrunelensError(
                f"{folder} has run format {info['format_version']}, this version reads {FORMAT_VERSION}; "
                "run compare again"
            )
        tables = {name: pq.read_table(folder / f"{name}.parquet") for name in SCHEMAS}
        for name, table in tables.items():
            if not table.schema.equals(SCHEMAS[name]):
                raise PrunelensError(f"{folder}/{name}.parquet has other columns than expected; run compare again")
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise PrunelensError(f"the run in {folder} is damaged ({str(error)[:160]}); run compare again") from error
    missing = [key for key in REQUIRED if key not in info]
    if missing:
        raise PrunelensError(f"the run in {folder} is damaged (run.json lacks {missing[0]}); run compare again")
    return Run(tables, info)
