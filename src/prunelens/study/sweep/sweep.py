"""A sweep: every cell of a study, made by workers, kept as it is finished, and read back as tables and a page."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from prunelens.cache import write_whole
from prunelens.errors import PrunelensError, check_whole
from prunelens.files import check_apart
from prunelens.models.opening.fingerprint import identify
from prunelens.models.opening.loading import check_opening
from prunelens.progress import Reporter
from prunelens.pruning.plugins import check_loadable
from prunelens.pruning.recipe import parse_recipe
from prunelens.reading import checked_path, is_directory, is_file, read_bytes
from prunelens.study.claims import claimed, probe_claim
from prunelens.study.forecast import FILE
from prunelens.study.store import PAGE, Kind, Run, info_text, pageless, rendered, sound
from prunelens.study.sweep.cells import CELLS, Given, keep_error, read_cell, setup, work
from prunelens.study.sweep.executors import EXECUTORS
from prunelens.study.sweep.ray_crew import check_ray
from prunelens.study.sweep.record import SweepInfo
from prunelens.study.sweep.study_file import Cell, Study, cells_of, parse_study, read_study
from prunelens.study.sweep.tables import SCHEMAS, sweep_tables
from prunelens.tasks.corpora import read_corpus
from prunelens.tasks.harness import Harness
from prunelens.tasks.prompts import CORE, prompts
from prunelens.tasks.suite import CORE_RETRIEVAL, files_hash, is_retrieval, parse_tasks, retrieval_folder

MARK = "study.json"
SWEEP = Kind(
    "prunelens-sweep",
    1,
    SCHEMAS,
    ("study", "cells", "summary", "calibration", "alike"),
    "sweep",
    "sweep",
    SweepInfo,
)


def run_sweep(
    study: str | Path | Mapping[str, Any] | Study,
    folder: str | Path,
    executor: str,
    workers: int,
    address: str | None,
    retry_failed: bool,
    reporter: Reporter,
    render: Callable[[Run], str],
) -> Run:
    """Run every cell of a study that is not there yet, then write tables and the page.

    Args:
        study, folder, executor, workers, address, retry_failed, reporter: as `prunelens.sweep`.
        render: draws the page.

    Raises:
        PrunelensError: as `prunelens.sweep`.
    """
    found, target = _as_study(study), checked_path(folder, "the sweep")
    check_whole("--workers", workers, 1)
    _check_executor(executor, address)
    check_opening(found.dtype, found.device, is_here=executor == "local" or address is None)
    _check_tasks(found)
    check_apart(target, [found.model])
    probe_claim(target, MARK, "sweep")
    methods = tuple(dict.fromkeys(one for recipe in found.recipes for one in parse_recipe(recipe).references))
    check_loadable(methods)
    cells = cells_of(found, identify(found.model), _texts_hash(found))
    with claimed(target, MARK, found.model_dump_json(indent=1) + "\n", "sweep", CELLS):
        missing = [cell for cell in cells if _is_missing(read_cell(target, cell), retry_failed)]
        threads = max(1, (os.cpu_count() or 1) // workers) if workers > 1 and executor == "local" else None
        given = Given(_with_whole_paths(found), target.absolute(), threads, methods)
        _make(missing, len(cells), given, executor, workers, address, reporter)
        return _finish(found, cells, target, render)


def _check_executor(executor: str, address: str | None) -> None:
    if executor not in EXECUTORS:
        raise PrunelensError(f"expected an executor of {', '.join(EXECUTORS)}, found {executor!r}")
    if executor == "ray":
        check_ray(address)
    elif address is not None:
        raise PrunelensError(f"expected --executor ray with --address, found {executor}; leave --address out")


def _is_missing(record: Mapping[str, Any] | None, retry_failed: bool) -> bool:
    return record is None or (retry_failed and "error" in record)


def _as_study(study: str | Path | Mapping[str, Any] | Study) -> Study:
    if isinstance(study, Study):
        return study
    return read_study(Path(study)) if isinstance(study, str | Path) else parse_study(study)


def _with_whole_paths(study: Study) -> Study:
    """The study as a worker reads it, wherever it begins."""
    changed: dict[str, Any] = {"model": _whole(study.model)}
    if study.calibration is not None:
        changed["calibration"] = _whole(study.calibration)
    if study.compare is not None and study.compare.prompts != CORE:
        changed["compare"] = study.compare.model_copy(update={"prompts": _whole(study.compare.prompts)})
    if study.tasks is not None:
        chosen = parse_tasks(study.tasks)
        names = [_whole(name) if is_retrieval(name) and name != CORE_RETRIEVAL else name for name in chosen.tasks]
        uses = [chosen.uses.get(name) for name in chosen.tasks]
        changed["tasks"] = names if not any(uses) else _grouped(names, uses)
    return study.model_copy(update=changed)


def _grouped(names: list[str], uses: list[str | None]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, use in zip(names, uses, strict=True):
        assert use is not None
        found.setdefault(use, []).append(name)
    return found


def _whole(name: str) -> str:
    """The absolute path of what is a file or folder here; any other name as it is."""
    return str(Path(name).absolute()) if is_directory(name) or is_file(name) else name


def _check_tasks(study: Study) -> None:
    """Find unknown tasks and data that are not there before any worker starts."""
    if study.tasks is None:
        return
    chosen = parse_tasks(study.tasks)
    for name in chosen.retrieval:
        read_corpus(retrieval_folder(name))
    if chosen.harness:
        Harness(chosen.harness)


def _texts_hash(study: Study) -> str:
    """A hash of the prompts, of the calibration texts, and of the tasks' own files."""
    digest = hashlib.sha256()
    if study.compare is not None:
        for text in prompts(study.compare.prompts, study.compare.num_prompts):
            digest.update(json.dumps([text.prompt_id, text.messages, text.options]).encode())
    if study.calibration is not None:
        digest.update(read_bytes(study.calibration, "calibration texts"))
    if study.tasks is not None:
        digest.update(files_hash(parse_tasks(study.tasks)).encode())
    return digest.hexdigest()


def _make(
    missing: list[Cell],
    total: int,
    given: Given,
    executor: str,
    workers: int,
    address: str | None,
    reporter: Reporter,
) -> None:
    advance = reporter(f"cells ({executor})", total)
    advance(total - len(missing))
    if not missing:
        return
    more = {"address": address} if executor == "ray" else {}
    for outcome in EXECUTORS[executor](missing, given, setup, work, min(workers, len(missing)), **more):
        if outcome.error is not None:
            keep_error(given.folder, outcome.job, outcome.error, outcome.traceback)
        advance(1)


def _finish(study: Study, cells: list[Cell], folder: Path, render: Callable[[Run], str]) -> Run:
    run = _gathered(study, cells, folder)
    page, fault = rendered(run, render)
    try:
        for name, table in run.tables.items():
            _write_table(folder / f"{name}.parquet", table)
        write_whole(folder / "run.json", info_text(run.info))
        if run.info["forecast"] is not None:
            write_whole(folder / FILE, json.dumps(run.info["forecast"], indent=1, ensure_ascii=False) + "\n")
        if page is not None:
            write_whole(folder / PAGE, page)
    except OSError as error:
        raise PrunelensError(f"the sweep cannot be written to {folder} ({error.strerror or error})") from error
    if fault is not None:
        raise pageless(folder, fault) from fault
    return run


def _gathered(study: Study, cells: list[Cell], folder: Path) -> Run:
    try:
        tables, info = sweep_tables(study, cells, folder)
    except PrunelensError:
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise PrunelensError(
            f"the tables of the sweep cannot be made ({reason}); every cell is kept in {folder / CELLS}"
        ) from error
    return Run(tables, sound({"format": SWEEP.format, "format_version": SWEEP.version} | info))


def _write_table(path: Path, table: pa.Table) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        pq.write_table(table, temporary, compression="zstd")
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
