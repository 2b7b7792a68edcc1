"""D1 in the summary: each part's damage at the end, how it adds up, and whether cosine would have found it."""

from typing import Any

import numpy as np
import pyarrow as pa

from prunelens.metrics.intervals import ratio_interval
from prunelens.metrics.statistics import rank_correlation
from prunelens.study.rows import column, rows_of

MIN_RANKED = 3


def attributed(tables: dict[str, pa.Table], info: dict[str, Any], label: str, kl_all: float) -> dict[str, Any] | None:
    """What `attribution` says of one compressed model; None if it was not asked for or nothing changed.

    Args:
        tables: the tables of the run.
        info: what run.json says, for the ranking.
        label: the compressed model.
        kl_all: mean KL over the greedy tokens with everything compressed, nats.
    """
    rows = rows_of(tables["attribution"], compressed=label)
    if not rows.num_rows:
        return None
    scores = {(item["kind"], item["layer_idx"]): item["score"] for item in (info.get("ranking") or {}).get("order", [])}
    keys = dict.fromkeys(zip(rows["sublayer"].to_pylist(), rows["layer_idx"].to_pylist(), strict=True))
    parts = [_part(_rows_of_part(rows, kind, layer_idx), scores.get((kind, layer_idx))) for kind, layer_idx in keys]
    sum_alone = sum(part["kl"]["mean"] for part in parts if part["changed"])
    return {
        "kl_all": kl_all,
        "sum_alone": sum_alone,
        "additivity": kl_all / sum_alone if sum_alone > 0 else None,
        "parts": parts,
        "rank_correlation": {kind: found for kind in ("attention", "mlp") if (found := _correlation(parts, kind))},
    }


def _rows_of_part(rows: pa.Table, kind: str, layer_idx: int | None) -> pa.Table:
    of_kind = rows_of(rows, sublayer=kind)
    return of_kind if layer_idx is None else rows_of(of_kind, layer_idx=layer_idx)


def _part(rows: pa.Table, redundancy: float | None) -> dict[str, Any]:
    first = rows.slice(0, 1).to_pylist()[0]
    return {
        "sublayer": first["sublayer"],
        "layer_idx": first["layer_idx"],
        "changed": first["changed"],
        "kl": _mean(rows, "kl_alone"),
        "tv": _mean(rows, "tv_alone"),
        "kl_all_but": _mean(rows, "kl_all_but") if first["changed"] else None,
        "redundancy": redundancy,
    }


def _mean(rows: pa.Table, name: str) -> dict[str, float]:
    """Mean over tokens with its interval over prompts."""
    steps = column(rows, "num_steps")
    interval = ratio_interval(column(rows, name) * steps, steps, bounded=name.startswith("tv"))
    return {"mean": interval.value, "low": interval.low, "high": interval.high}


def _correlation(parts: list[dict[str, Any]], kind: str) -> dict[str, Any] | None:
    """Whether the less redundant by cosine do the more damage alone."""
    ranked = [part for part in parts if part["sublayer"] == kind and part["redundancy"] is not None]
    if len(ranked) < MIN_RANKED:
        return None
    turned = np.array([1 - part["redundancy"] for part in ranked])
    damage = np.array([part["kl"]["mean"] for part in ranked])
    return {"rho": rank_correlation(turned, damage), "n": len(ranked)}
