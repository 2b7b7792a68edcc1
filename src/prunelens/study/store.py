"""A run on disk: Parquet files and one run.json, whole or not at all."""

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ValidationError

from prunelens import files
from prunelens.cache import write_whole
from prunelens.documents import read_json
from prunelens.errors import PrunelensError, cut, one_line, shown
from prunelens.reading import MIB, checked_path
from prunelens.study.spool import Spool

T = TypeVar("T")
RECORD = "run.json"
PAGE = "report.html"
MAX_ROWS, MAX_TABLE = 50_000_000, 8192 * MIB
"""Rows, and bytes in memory, of a table that is read back."""
GROUP_ROWS = 65_536
"""Rows that are written, and read back, at a time."""
UNDEFINED = "not a finite number: it is undefined for these models (0/0, or an overflow)"


@dataclass(frozen=True)
class Kind:
    """One kind of result on disk: its mark in run.json, its tables, and what run.json must hold.

    `info` checks what pages are drawn from; tables in `needed_rows` cannot be empty; `renew` says in today's words what
    an older version wrote. Results of earlier versions lack the columns in `added` (by table) and the tables in
    `later`, which run.json names then; they are read as empty ones.
    """

    format: str
    version: int
    schemas: Mapping[str, pa.Schema]
    required: tuple[str, ...]
    what: str
    command: str
    info: type[BaseModel]
    needed_rows: tuple[str, ...] = ()
    renew: Callable[["Run"], "Run"] | None = None
    added: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    later: tuple[str, ...] = ()

    @property
    def article(self) -> str:
        """`a` or `an`."""
        return "an" if self.what[0] in "aeiou" else "a"

    def is_here(self, folder: Path) -> bool:
        """Whether the folder holds a result of this kind."""
        return format_of(folder) == self.format

    @contextmanager
    def new_folder(self, target: Path) -> Iterator[Path]:
        """A temporary folder beside `target` that takes its place when the body ends, and vanishes if it fails.

        Raises:
            PrunelensError: `target` exists and is not of this kind, or there are no rights or no space.
        """
        with files.new_folder(target, self.is_here, self.what) as temporary:
            yield temporary

    def reserved(self, target: Path, models: Iterable[Any] = ()) -> AbstractContextManager[None]:
        """Find out before hours of work whether a result can be written to `target`, and keep the place meanwhile.

        Args:
            target: where the result is to be.
            models: what was named as models, none of which may be there.

        Raises:
            PrunelensError: `target` exists and is not of this kind, belongs to a model, is being written by another
                process, or there are no rights there.
        """
        files.check_apart(target, models)
        return files.reserved(target, self.is_here, self.what)

    def probe_target(self, target: Path) -> None:
        """The same, without keeping the place.

        Raises:
            PrunelensError: as `reserved`.
        """
        with self.reserved(target):
            pass

    def write(self, run: "Run", target: Path, render: Callable[["Run"], str]) -> Path:
        """Write tables, run.json and the page into `target`, whole or not at all; returns the path of the page.

        Raises:
            PrunelensError: `target` exists and is not of this kind, cannot be written, or the page cannot be made: the
                tables and run.json are there all the same.
        """
        page, fault = rendered(run, render)
        with self.new_folder(target) as temporary:
            write_run(run, temporary)
            if page is not None:
                (temporary / PAGE).write_text(page, encoding="utf-8")
        if fault is not None:
            raise pageless(target, fault) from fault
        return target / PAGE


@dataclass
class Run:
    """What was found: tables by name, and `info`, the content of run.json."""

    tables: dict[str, pa.Table]
    info: dict[str, Any]


def format_of(folder: Path) -> str | None:
    """The mark of the result in a folder, None where there is none."""
    files.recover(folder)
    try:
        found = read_json(folder / RECORD, "a result")
    except PrunelensError:
        return None
    mark = found.get("format") if isinstance(found, dict) else None
    return mark if isinstance(mark, str) else None


def write_run(run: Run, folder: Path) -> None:
    """Write the tables and run.json into an existing folder."""
    for name, table in run.tables.items():
        pq.write_table(table, folder / f"{name}.parquet", compression="zstd", row_group_size=GROUP_ROWS)
    (folder / "run.json").write_text(info_text(run.info), encoding="utf-8")


def info_text(info: dict[str, Any]) -> str:
    """The text of run.json."""
    return json.dumps(sound(info), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def sound(info: dict[str, Any]) -> dict[str, Any]:
    """The content of run.json with None for numbers that JSON does not know; its `nulls` say which, and why."""
    found, undefined = finite(info)
    if not undefined:
        return info
    found["nulls"] = (found.get("nulls") or {}) | dict.fromkeys(undefined, UNDEFINED)
    return found


def finite(value: Any, path: str = "") -> tuple[Any, list[str]]:
    """(the value with None in place of NaN and infinity, the paths at which they stood)."""
    if isinstance(value, float) and not math.isfinite(value):
        return None, [path]
    if not isinstance(value, dict | list | tuple):
        return value, []
    pairs = list(value.items()) if isinstance(value, dict) else list(enumerate(value))
    found = {key: finite(item, f"{path}.{key}" if path else str(key)) for key, item in pairs}
    undefined = [place for _, places in found.values() for place in places]
    items = {key: item for key, (item, _) in found.items()}
    return items if isinstance(value, dict) else list(items.values()), undefined


def rendered(source: T, render: Callable[[T], str]) -> tuple[str | None, Exception | None]:
    """(the page or card, None), or (None, the fault that kept it from being made)."""
    try:
        return render(source), None
    except Exception as error:
        return None, error


def pageless(folder: Path, fault: Exception) -> PrunelensError:
    """What a user is told when everything is kept but the page."""
    return PrunelensError(
        f"the page could not be made ({reason_of(fault)}); the tables and run.json are in {folder}, and "
        f"`prunelens report {folder}` makes the page again"
    )


def reason_of(fault: Exception) -> str:
    """What a fault says, on one line."""
    return " ".join(f"{type(fault).__name__}: {fault}".split())[:200]


def replace_page(folder: Path, page: str) -> Path:
    """Put a new page into a run, whole or not at all; returns its path.

    Raises:
        PrunelensError: no rights or no space.
    """
    path = folder / "report.html"
    try:
        write_whole(path, page)
    except OSError as error:
        raise files.unwritable(path, error, "run") from error
    return path


def read_run(folder: Path, kind: Kind) -> Run:
    """Read a result back.

    Raises:
        PrunelensError: none of this kind there, one of another format version, or a damaged table.
    """
    again = f"run {kind.command} again"
    info = _read_info(checked_path(folder, f"{kind.article} {kind.what}"), kind)
    version = info.get("format_version", kind.version)
    if version != kind.version or isinstance(version, bool):
        found = shown(version).strip("'")
        raise PrunelensError(
            f"{folder}/{RECORD} is {kind.what} format {found}, this version reads {kind.version}; {again}"
        )
    missing = [key for key in ("format_version", *kind.required) if key not in info]
    if missing:
        raise PrunelensError(f"the {kind.what} in {folder} is damaged (run.json lacks {missing[0]}); {again}")
    tables = {
        name: schema.empty_table()
        if name in kind.later and name not in info
        else _read_table(folder / f"{name}.parquet", kind, schema)
        for name, schema in kind.schemas.items()
    }
    return Run(tables, info)


def _read_info(folder: Path, kind: Kind) -> dict[str, Any]:
    expected = f"expected {kind.article} {kind.what} (a folder with run.json) at {folder}"
    if not os.path.lexists(folder / RECORD):
        raise PrunelensError(f"{expected}, found none")
    try:
        info = read_json(folder / RECORD, "a result")
    except PrunelensError as error:
        raise PrunelensError(f"{expected}, found one that cannot be read ({error})") from error
    mark = info.get("format") if isinstance(info, dict) else info
    if mark != kind.format:
        raise PrunelensError(f"{expected}, found one of another kind ({shown(mark)})")
    return info


def _read_table(path: Path, kind: Kind, schema: pa.Schema) -> pa.Table:
    again = f"run {kind.command} again"
    try:
        if not path.is_file():
            raise PrunelensError(f"the {kind.what} is damaged: there is no table {path}; {again}")
        with pq.ParquetFile(path) as file:
            facts = file.metadata
            earlier = pa.schema([one for one in schema if one.name not in kind.added.get(path.stem, ())])
            if file.schema_arrow not in (schema, earlier):
                raise PrunelensError(f"{path} has other columns than expected; {again}")
            sizes = [facts.row_group(index).total_byte_size for index in range(facts.num_row_groups)]
            if facts.num_rows > MAX_ROWS or sum(sizes) > MAX_TABLE:
                raise PrunelensError(
                    f"expected at most {MAX_ROWS:,} rows and {MAX_TABLE // MIB} MiB in {path}, found more; {again}"
                )
            spool = Spool({path.stem: schema})
            spool.add(path.stem, (_completed(batch, schema) for batch in file.iter_batches(GROUP_ROWS)))
            return spool.tables()[path.stem]
    except (OSError, ValueError, TypeError, pa.ArrowException) as error:
        raise PrunelensError(
            f"the {kind.what} is damaged: {path} cannot be read ({shown(str(error))}); {again}"
        ) from error


def _completed(batch: pa.RecordBatch, schema: pa.Schema) -> pa.Table:
    """A table with empty columns where an earlier version had none."""
    table = pa.Table.from_batches([batch])
    for place, column in enumerate(schema):
        if column.name not in table.column_names:
            table = table.add_column(place, column, pa.nulls(len(table), column.type))
    return table


def open_run(folder: Path, kind: Kind) -> Run:
    """Read a result back, and see that a page can be drawn from it.

    Raises:
        PrunelensError: as `read_run`; a field of run.json that is missing or of another type; a table without rows.
    """
    found = read_run(folder, kind)
    again = f"run {kind.command} again"
    try:
        kind.info.model_validate(found.info)
    except ValidationError as error:
        raise PrunelensError(f"the {kind.what} is damaged: {folder}/run.json: {_fault(error)}; {again}") from error
    for name in kind.needed_rows:
        if found.tables[name].num_rows == 0:
            raise PrunelensError(f"the {kind.what} is damaged: {folder}/{name}.parquet has no rows; {again}")
    return kind.renew(found) if kind.renew else found


def _fault(error: ValidationError) -> str:
    fault = error.errors(include_url=False)[0]
    where = cut(one_line(".".join(map(str, fault["loc"]))), 120)
    if fault["type"] == "missing":
        return f"the field {where} is missing"
    return f"the field {where}: {fault['msg']}, found {shown(fault['input'])}"
