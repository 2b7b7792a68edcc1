"""Tables that grow piece by piece: what comes back is what was added, and memory does not grow with it."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prunelens.study import spool as spooling
from prunelens.study import store
from prunelens.study.compare.schemas import SCHEMAS
from prunelens.study.spool import Spool
from prunelens.study.store import Run, write_run

SCHEMA = pa.schema([("name", pa.string()), ("value", pa.float64()), ("words", pa.list_(pa.string()))])


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PRUNELENS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def piece(number: int, rows: int = 1000) -> pa.Table:
    values = np.random.default_rng(number).normal(size=rows)
    columns = [[f"piece {number}"] * rows, [None if value > 2 else value for value in values], [["a", "<b>"]] * rows]
    return pa.table(columns, schema=SCHEMA)


@pytest.mark.parametrize("limit", [1, 100_000, 10**9])
def test_what_is_added_comes_back_in_order(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spooling, "PIECE_BYTES", limit)
    spool, pieces = Spool({"one": SCHEMA, "none": SCHEMA}), [piece(number) for number in range(7)]
    spool.add("one", pieces[:3])
    spool.add("one", iter(pieces[3:]))
    found = spool.tables()
    assert found["one"].equals(pa.concat_tables(pieces))
    assert (found["none"].num_rows, found["none"].schema) == (0, SCHEMA)


def most_allocated(pieces: int) -> int:
    """Arrow's memory at its largest while so many pieces are added, above what is held already, in bytes."""
    spool, most = Spool({"one": SCHEMA}), 0
    before = pa.total_allocated_bytes()
    for number in range(pieces):
        spool.add("one", [piece(number % 3)])
        most = max(most, pa.total_allocated_bytes() - before)
    assert spool.tables()["one"].num_rows == 1000 * pieces
    return most


def test_memory_does_not_grow_with_the_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spooling, "PIECE_BYTES", 200_000)
    few, many = most_allocated(20), most_allocated(80)
    assert many < 1.3 * few
    monkeypatch.setattr(spooling, "PIECE_BYTES", 10**12)
    assert most_allocated(80) > 3 * many


def test_no_file_is_left_behind(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spooling, "PIECE_BYTES", 1)
    spool = Spool({"one": SCHEMA})
    spool.add("one", [piece(0), piece(1)])
    assert list(cache.iterdir()) == []


def test_without_a_place_on_disk_the_rows_stay_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("PRUNELENS_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(spooling, "PIECE_BYTES", 1)
    spool = Spool({"one": SCHEMA})
    spool.add("one", [piece(0), piece(1)])
    assert spool.tables()["one"].equals(pa.concat_tables([piece(0), piece(1)]))


def test_rows_are_written_in_groups_and_read_back_equal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "GROUP_ROWS", 300)
    monkeypatch.setattr(spooling, "PIECE_BYTES", 20_000)
    steps = pa.Table.from_pylist(
        [{"compressed": "a", "prompt_id": f"p{row // 64}", "trace": "greedy", "step": row % 64 + 1, "tv": row / 1000}
         for row in range(1000)],
        SCHEMAS["steps"],
    )  # fmt: skip
    write_run(Run({"steps": steps}, {}), tmp_path)
    with pq.ParquetFile(tmp_path / "steps.parquet") as file:
        assert [file.metadata.row_group(group).num_rows for group in range(4)] == [300, 300, 300, 100]
    found = store._read_table(tmp_path / "steps.parquet", store_kind(), SCHEMAS["steps"])
    assert found.equals(steps)


def store_kind() -> store.Kind:
    from prunelens.study.compare.schemas import RUN

    return RUN
