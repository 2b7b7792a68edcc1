"""Rows and columns of Arrow tables as the summary and the figures need them."""

from collections.abc import Sequence
from functools import reduce
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


def rows_of(table: pa.Table, columns: Sequence[str] | None = None, **equal: Any) -> pa.Table:
    """Rows whose columns have these values, of all columns or those named; only what is returned is copied."""
    masks = [pc.equal(table[column], value) for column, value in equal.items()]
    return (table if columns is None else table.select(columns)).filter(reduce(pc.and_, masks))


def column(table: pa.Table, name: str) -> np.ndarray:
    """A column as float64, nulls as NaN."""
    return table[name].cast(pa.float64()).to_numpy(zero_copy_only=False)


def prompt_runs(table: pa.Table) -> list[tuple[str, int, int]]:
    """(prompt_id, first row, row after the last) of each stretch of rows of one prompt, in order."""
    if not table.num_rows:
        return []
    ids = table["prompt_id"].combine_chunks()
    same = pc.equal(ids[1:], ids[:-1]).to_numpy(zero_copy_only=False)
    starts = np.concatenate([[0], np.nonzero(~same.astype(bool))[0] + 1])
    ends = [*starts[1:].tolist(), table.num_rows]
    return list(zip(ids.take(pa.array(starts)).to_pylist(), starts.tolist(), ends, strict=True))


def by_prompt(table: pa.Table, *names: str) -> list[tuple[Any, ...]]:
    """(prompt_id, one array per column) for each prompt, in order."""
    values = [column(table, name) for name in names]
    return [(key, *[value[low:high] for value in values]) for key, low, high in prompt_runs(table)]


def survival_points(table: pa.Table, label: str) -> dict[int, dict[str, float | None]]:
    """S(n) with its interval and its bound for every n."""
    columns = {
        "value": "survival_sampled",
        "low": "survival_sampled_low",
        "high": "survival_sampled_high",
        "bound": "survival_bound",
    }
    rows = rows_of(table, compressed=label).to_pylist()
    return {row["n"]: {name: row[column] for name, column in columns.items()} for row in rows}
