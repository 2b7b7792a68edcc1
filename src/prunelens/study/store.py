"""A run on disk: Parquet files and one run.json, whole or not at all."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from prunelens.errors import PrunelensError
from prunelens.models import folders
from prunelens.models.cache import write_whole
from prunelens.study.schemas import SCHEMAS

FORMAT = "prunelens-run"
FORMAT_VERSION = 3

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
    with folders.new_folder(target, _is_run, "run") as temporary:
        yield temporary


def probe_target(target: Path) -> None:
    """Find out before hours of work whether a run can be written to `target`.

    Raises:
        PrunelensError: `target` exists and is not a run, or there are no rights there.
    """
    folders.probe_target(target, _is_run, "run")


def check_target(target: Path) -> None:
    """Refuse an output folder that holds something other than a run.

    Raises:
        PrunelensError: as said.
    """
    folders.check_target(target, _is_run, "run")


def _is_run(folder: Path) -> bool:
    try:
        return json.loads((folder / "run.json").read_text(encoding="utf-8")).get("format") == FORMAT
    except (OSError, ValueError, AttributeError):
        return False


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
        raise folders.unwritable(path, error, "run") from error
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
