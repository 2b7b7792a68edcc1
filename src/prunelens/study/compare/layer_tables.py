"""Tables of the traces inside the models: `layers`, `attribution` and `noise`."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from prunelens.metrics.distributions import identical_stats
from prunelens.metrics.head import Stats
from prunelens.models.surgery.drop import Drop
from prunelens.study.compare.schemas import SCHEMAS, STAT_COLUMNS
from prunelens.study.compare.tables import stats_table
from prunelens.tasks.prompts import Prompt
from prunelens.tracing.attribution import REST, Damage, Part
from prunelens.tracing.forced import Trajectory
from prunelens.tracing.layers import LayerRows

DEVIATIONS = {
    "hidden_deviation": "hidden_cosine",
    "logit_deviation": "logit_cosine",
    "prob_deviation": "prob_cosine",
}
"""1 - cosine in the three spaces."""


def layer_rows(
    rows: LayerRows, prompts: Sequence[Prompt], trajectories: Sequence[Trajectory], drops: Mapping[str, Drop]
) -> Iterator[tuple[str, pa.Table]]:
    """Rows of `layers` with whose they are, a sublayer at a time.

    What dropping each sublayer does serves every recipe, whose other sublayers change nothing.

    Args:
        rows: what was measured.
        prompts: all prompts.
        trajectories: the texts that were read.
        drops: what each recipe drops, by label.
    """
    places = _places(rows.steps, prompts, trajectories)
    for table in _layer_tables(rows.label, rows.trace, rows, rows.stats, places):
        yield rows.label, table
    if rows.trace == "dropped":
        for label, drop in drops.items():
            for table in _layer_tables(label, "local", rows, _only_dropped(rows, drop), places):
                yield label, table


def _only_dropped(rows: LayerRows, drop: Drop) -> Stats:
    """The statistics of the sublayers that a recipe drops, and those of equal models for all others."""
    gone = [layer_idx in drop.block | getattr(drop, kind) for layer_idx, kind in rows.sublayers]
    mask = torch.tensor(gone).repeat_interleave(len(rows.steps))
    same = identical_stats(rows.stats["entropy_dense"])
    zero = torch.zeros_like(rows.stats["hidden_rho"])
    same |= {"hidden_cosine": zero + 1, "hidden_alpha": zero, "hidden_rho": zero}
    return {name: torch.where(mask, rows.stats[name], same[name]) for name in STAT_COLUMNS}


def _layer_tables(label: str, trace: str, rows: LayerRows, stats: Stats, places: dict[str, Any]) -> Iterator[pa.Table]:
    num_steps = len(rows.steps)
    for part, (layer_idx, kind) in enumerate(rows.sublayers):
        same = {"compressed": label, "trace": trace, "lens": rows.lens, "sublayer": kind}
        columns: dict[str, Any] = places | {name: pa.repeat(value, num_steps) for name, value in same.items()}
        columns["layer_idx"] = np.full(num_steps, layer_idx, dtype=np.int32)
        own = {name: value[part * num_steps : (part + 1) * num_steps] for name, value in stats.items()}
        yield stats_table("layers", columns, own)


def _places(
    steps: Sequence[tuple[int, int]], prompts: Sequence[Prompt], trajectories: Sequence[Trajectory]
) -> dict[str, Any]:
    texts = [trajectories[index] for index, _ in steps]
    numbers = [step for _, step in steps]
    return {
        "prompt_id": pa.array([prompts[text.prompt].prompt_id for text in texts], pa.string()),
        "step": np.array(numbers, dtype=np.int32),
        "position": np.array(
            [len(text.prompt_ids) + step - 1 for text, step in zip(texts, numbers, strict=True)], dtype=np.int32
        ),
        "token_id": np.array(
            [text.token_ids[step - 1] for text, step in zip(texts, numbers, strict=True)], dtype=np.int32
        ),
    }


def noise_rows(
    against: str,
    steps: Sequence[tuple[int, int]],
    prompts: Sequence[Prompt],
    trajectories: Sequence[Trajectory],
    stats: Stats,
) -> pa.Table:
    """Rows of `noise` for steps of trajectories, (index, step from 1) each (N1)."""
    columns: dict[str, Any] = _places(steps, prompts, trajectories)
    columns |= {
        "against": pa.repeat(against, len(steps)),
        "trace": pa.array([trajectories[index].trace for index, _ in steps], pa.string()),
    }
    return stats_table("noise", columns, stats)


def attribution_rows(
    label: str, found: Mapping[Part, Damage], prompts: Sequence[Prompt], trajectories: Sequence[Trajectory]
) -> pa.Table:
    """Rows of `attribution` of one compressed model (D1)."""
    records = [
        {
            "compressed": label,
            "prompt_id": prompts[text.prompt].prompt_id,
            "layer_idx": None if part == REST else part[1],
            "sublayer": part[0],
            "changed": damage.changed,
            "num_steps": len(text.token_ids),
            **{name: _number(getattr(damage, name)[index].item()) for name in ATTRIBUTED},
        }
        for part, damage in found.items()
        for index, text in enumerate(trajectories)
    ]
    return pa.Table.from_pylist(records, SCHEMAS["attribution"])


ATTRIBUTED = ("kl_alone", "tv_alone", "kl_all_but", "tv_all_but")


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def noise_summary(table: pa.Table) -> dict[str, dict[str, dict[str, float] | None]]:
    """Mean, 95th percentile and maximum of what arithmetic alone does, by what was changed; None where undefined."""
    found: dict[str, dict[str, dict[str, float] | None]] = {}
    for against in table["against"].unique().to_pylist():
        rows = table.filter(pa.compute.equal(table["against"], against))
        values = {name: rows[name].to_numpy() for name in ("kl_dense_compressed", "tv")}
        values |= {name: 1 - rows[cosine].to_numpy() for name, cosine in DEVIATIONS.items()}
        found[against] = {name: _spread(value) for name, value in values.items()}
        found[against]["same_top1"] = {"mean": float(np.mean(rows["same_top1"].to_numpy(zero_copy_only=False)))}
    return found


def _spread(values: np.ndarray) -> dict[str, float] | None:
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    return {
        "mean": float(np.mean(values)),
        "p95": float(np.percentile(values, 95)),
        "max": float(np.max(values)),
    }
