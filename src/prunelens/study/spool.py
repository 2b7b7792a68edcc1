"""Tables that grow piece by piece: what is large waits on disk and is read from there, so that memory stays flat."""

import mmap
import tempfile
from collections.abc import Iterable, Mapping

import pyarrow as pa

from prunelens.cache import cache_dir
from prunelens.reading import MIB

PIECE_BYTES = 8 * MIB
"""So much of each table is held in memory before it goes to disk."""


class Spool:
    """Collects the tables of a run; one is added to in any number of pieces.

    Args:
        schemas: the columns of each table.
    """

    def __init__(self, schemas: Mapping[str, pa.Schema]) -> None:
        self._schemas = schemas
        self._kept: dict[str, list[pa.Table]] = {name: [] for name in schemas}
        self._waiting: dict[str, list[pa.Table]] = {name: [] for name in schemas}
        self._bytes = dict.fromkeys(schemas, 0)

    def add(self, name: str, pieces: Iterable[pa.Table]) -> None:
        """Add rows to a table, in order."""
        waiting = self._waiting[name]
        for piece in pieces:
            waiting.append(piece)
            self._bytes[name] += piece.nbytes
            if self._bytes[name] >= PIECE_BYTES:
                self._kept[name].append(on_disk(pa.concat_tables(waiting)))
                waiting.clear()
                self._bytes[name] = 0

    def tables(self) -> dict[str, pa.Table]:
        """The tables; their columns lie in the file system's cache, which the system empties when it needs memory."""
        found = {name: [*self._kept[name], *_joined(self._waiting[name])] for name in self._schemas}
        return {
            name: pa.concat_tables(tables) if tables else self._schemas[name].empty_table()
            for name, tables in found.items()
        }


def _joined(tables: list[pa.Table]) -> list[pa.Table]:
    return [pa.concat_tables(tables).combine_chunks()] if tables else []


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
