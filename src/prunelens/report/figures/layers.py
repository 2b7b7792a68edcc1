"""Rows of `layers` brought together by sublayer: what the figures of the sublayers share."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from prunelens.report.figures.drawing import axis
from prunelens.report.wording import visible
from prunelens.study.rows import column
from prunelens.study.store import Run

KL = "kl_dense_compressed"
COSINES = ("hidden_cosine", "logit_cosine", "prob_cosine")
KINDS = {"attention": "attention", "mlp": "MLP"}
MOVED = ("hidden_alpha", "hidden_rho")
"""Columns that are 0 where a sublayer is unchanged, even if a cosine lost the change in rounding."""

Place = tuple[int, str]
"""Block and kind of a sublayer."""


@dataclass(frozen=True)
class Traced:
    """Rows of one trace of `layers` as arrays, one entry per row; `kind` holds names of sublayers."""

    block: np.ndarray
    kind: np.ndarray
    step: np.ndarray
    columns: Mapping[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.block)

    def deviation(self, name: str) -> np.ndarray:
        """1 - cosine, or the KL as it is."""
        return self.columns[name] if name == KL else 1 - self.columns[name]

    def kinds(self) -> list[str]:
        """The kinds of sublayer there are, in the order they have in a block."""
        return np.unique(self.kind).tolist()

    def places(self) -> list[Place]:
        """Every sublayer, from the first to the last."""
        kinds = self.kinds()
        codes = np.unique(self.block.astype(np.int64) * len(kinds) + np.searchsorted(kinds, self.kind))
        return [(int(code) // len(kinds), kinds[int(code) % len(kinds)]) for code in codes]


def traced(run: Run, compressed: str, trace: str, lens: str) -> Traced:
    """The rows of one trace, read through one lens; empty where there are none."""
    names = [*COSINES, KL, *MOVED]
    wanted = (pc.field("compressed") == compressed) & (pc.field("trace") == trace) & (pc.field("lens") == lens)
    keys = ["compressed", "trace", "lens", "layer_idx", "sublayer", "step"]
    rows: pa.Table = run.tables["layers"].select([*keys, *names]).filter(wanted)
    return Traced(
        rows["layer_idx"].to_numpy(),
        _words(rows["sublayer"]),
        rows["step"].to_numpy(),
        {name: column(rows, name) for name in names},
    )


def _words(values: pa.ChunkedArray) -> np.ndarray:
    """A column of few words as an array of strings, without a Python object a row."""
    if not len(values):
        return np.zeros(0, dtype=str)
    coded = values.combine_chunks().dictionary_encode()
    return np.array(coded.dictionary.to_pylist(), dtype=str)[coded.indices.to_numpy()]


def lens_of(run: Run) -> str:
    """The lens through which z and p were read: with the final norm unless only the raw one was asked for."""
    return "raw" if (run.info.get("lens") or {}).get("lens") == "raw" else "normed"


def num_blocks(run: Run) -> int:
    """Blocks of the dense model, from the rows themselves where they name more."""
    seen = run.tables["layers"]["layer_idx"]
    most = pc.max(seen).as_py() if len(seen) else None
    return max(int(run.info["dense"].get("num_layers") or 0), 0 if most is None else most + 1, 1)


def kind_name(kind: str) -> str:
    """A kind of sublayer as people write it."""
    return KINDS.get(kind, visible(kind))


def place_name(place: Place) -> str:
    """A sublayer as people call it: MLP of block 12."""
    return f"{kind_name(place[1])} of block {place[0]}"


def dropped_places(record: Mapping[str, Any], places: list[Place]) -> set[Place]:
    """The sublayers among `places` that a recipe takes out."""
    dropped = record.get("dropped") or {}
    whole = dropped.get("block", [])
    return {place for place in places if place[0] in whole or place[0] in dropped.get(place[1], [])}


def changed_places(run: Run, index: int) -> set[Place]:
    """The sublayers that a compressed model takes out, or whose own trace `local` is not exactly 0."""
    record = run.info["compressed"][index]
    rows = traced(run, record["label"], "local", lens_of(run))
    if "dropped" in record:
        both = rows.places() or [(block, kind) for block in range(num_blocks(run)) for kind in KINDS]
        return dropped_places(record, both)
    moved = np.zeros(len(rows), dtype=bool)
    for name in (*MOVED, KL):
        moved |= np.nan_to_num(rows.columns[name]) != 0
    return set(zip(rows.block[moved].tolist(), rows.kind[moved].tolist(), strict=True))


def absent(run: Run, index: int) -> str:
    """Why a compressed model has no rows in `layers`, in one sentence."""
    label = run.info["compressed"][index]["label"]
    reason = run.info["nulls"].get(f"layers.{label}")
    if reason:
        return f"Not measured: {visible(str(reason))}"
    if not run.info.get("lens"):
        return "Not measured: the traces of the sublayers were switched off (--lens-steps 0)."
    return "Not measured: this run has no such rows."


def sample(run: Run) -> str:
    """How much was looked at: 8 of 48 steps, 16 prompts."""
    lens = run.info.get("lens") or {}
    steps, prompts = len(lens.get("steps", ())), lens.get("prompts", 0)
    return f"{steps} of {lens.get('horizon', 0)} steps, {prompts} prompt{'' if prompts == 1 else 's'}"


def parallel_note(run: Run, trace: str) -> str:
    """What a sublayer's point means where attention and MLP of a block read the same input."""
    if not (run.info.get("lens") or {}).get("parallel"):
        return ""
    if trace == "cumulative":
        return (
            "In this model attention and MLP of a block read the same input: the attention's point is that input "
            "with the attention's output added, the MLP's point is the block's output."
        )
    return (
        "In this model attention and MLP of a block read the same input: each is looked at alone, added to the block's "
        "input."
    )


def block_axis(blocks: int, title: str = "block", **more: Any) -> dict[str, Any]:
    """The axis all figures of sublayers share: blocks from 0."""
    whole = {"dtick": 1} if blocks <= 12 else {}
    return axis(title, range=[-0.7, blocks - 0.3], **whole, **more)


def offsets(kinds: list[str]) -> dict[str, float]:
    """Where on the axis of blocks each kind of sublayer stands, from the block's own mark."""
    return {kind: order / len(kinds) for order, kind in enumerate(kinds)}


def cell_means(values: np.ndarray, down: np.ndarray, across: np.ndarray, shape: tuple[int, int]) -> Any:
    """(mean, number of values) of each cell, each of `shape`; NaN values do not count, empty cells are NaN."""
    kept = np.isfinite(values)
    cells = down[kept] * shape[1] + across[kept]
    counts = np.bincount(cells, minlength=shape[0] * shape[1])
    sums = np.bincount(cells, weights=values[kept], minlength=len(counts))
    means = np.full(len(counts), np.nan)
    np.divide(sums, counts, out=means, where=counts > 0)
    return means.reshape(shape), counts.reshape(shape)
