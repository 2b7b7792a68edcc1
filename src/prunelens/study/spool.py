"""Tables that grow piece by piece: what is large waits on disk and is read from there, so that memory stays flat."""

import mmap
import sys
import tempfile
from collections.abc import Iterable, Mapping

import pyarrow as pa

from prunelens.cache import cache_dir
from prunelens.reading import MIB

PIECE_BYTES = 8 * MIB
"""So much of each table is held in memory before it goes to disk."""


LAST = sys.maxsize
"""The lane behind all others."""


class Spool:
    """Collects the tables of a run; one is added to in any number of pieces.

    Args:
        schemas: the columns of each table.
    """

    def __init__(self, schemas: Mapping[str, pa.Schema]) -> None:
        self._schemas = schemas
        self._lanes: dict[str, dict[int, _Lane]] = {name: {} for name in schemas}

    def add(self, name: str, pieces: Iterable[pa.Table], lane: int = LAST) -> None:
        """Add rows to a table: in order within a lane, and the lanes in the order of their numbers."""
        own = self._lanes[name].setdefault(lane, _Lane())
        for piece in pieces:
            own.add(piece)

    def tables(self) -> dict[str, pa.Table]:
        """The tables; their columns lie in the file system's cache, which the system empties when it needs memory."""
        found = {
            name: [table for lane in sorted(lanes) for table in lanes[lane].tables()]
            for name, lanes in self._lanes.items()
        }
        return {
            name: pa.concat_tables(tables) if tables else self._schemas[name].empty_table()
            for name, tables in found.items()
        }


class _Lane:
    """Rows of one table that stand together."""

    def __init__(self) -> None:
        self._kept: list[pa.Table] = []
        self._waiting: list[pa.Table] = []
        self._bytes = 0

    def add(self, piece: pa.Table) -> None:
        self._waiting.append(piece)
        self._bytes += piece.nbytes
        if self._bytes >= PIECE_BYTES:
            self._kept.append(on_disk(pa.concat_tables(self._waiting)))
            self._waiting, self._bytes = [], 0

    def tables(self) -> list[pa.Table]:
        return [*self._kept, *([pa.concat_tables(self._waiting).combine_chunks()] if self._waiting else [])]


def on_disk(table: pa.Table) -> pa.Table:
    """The same table, mapped from a file without a name, whose space is free again when nobody uses the table.

    Where no such file can be written, the table stays in memory.
    """
    try:
        cache_dir().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache_dir(), prefix="rows-") as file:
            with pa.ipc.new_file(file, table.schema) as writer:
                writer.write_table(table)
            file.flush()
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return pa.ipc.open_file(pa.py_buffer(mapped)).read_all()
    except OSError:  # no rights or no space
        return table
