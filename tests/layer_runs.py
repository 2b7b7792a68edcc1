"""Runs with made-up traces of the sublayers, attribution and noise floor, for the page."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from prunelens.study.compare.schemas import SCHEMAS
from prunelens.study.rows import rows_of
from prunelens.study.store import Run

Row = dict[str, Any]
SIZES = {"hidden_cosine": 1.0, "logit_cosine": 0.8, "prob_cosine": 2.0}


def _row(schema: str, **values: Any) -> Row:
    return dict.fromkeys(SCHEMAS[schema].names) | values


def _stats(size: float, spaces: bool = True) -> Row:
    """Statistics of one step whose deviation is about `size`; exact zeros for 0."""
    names = list(SIZES) if spaces else ["hidden_cosine"]
    found: Row = {name: 1 - min(SIZES[name] * size, 0.99) for name in names}
    found |= {"hidden_alpha": size / 3, "hidden_rho": float(np.sqrt(2 * size))}
    return found | ({"kl_dense_compressed": 4 * size} if spaces else {})


def texts_lengths(run: Run) -> dict[str, int]:
    """Steps of each dense greedy text."""
    rows = rows_of(run.tables["continuations"], model="dense", trace="greedy").to_pylist()
    return {row["prompt_id"]: len(row["token_ids"]) for row in rows}


def add_layers(
    run: Run,
    blocks: int = 3,
    kinds: Sequence[str] = ("attention", "mlp"),
    steps: Sequence[int] = (1, 3),
    lens: str = "normed",
    parallel: bool = False,
) -> Run:
    """Fill `layers`: recipes change what they drop, any other model changes every sublayer after the first."""
    texts, settings = texts_lengths(run), run.info["settings"]
    run.info["dense"]["num_layers"] = blocks
    run.info["lens"] = {
        "lens": lens,
        "steps": list(steps),
        "horizon": settings["max_new_tokens"],
        "prompts": len(texts),
        "parallel": parallel,
    }
    places = [(block, kind) for block in range(blocks) for kind in kinds]
    rows: list[Row] = []
    for record in [{"label": "dense", "dropped": {}}, *run.info["compressed"]]:
        for prompt_id, length in texts.items():
            for step in range(1, length + 1):
                rows += _step_rows(record, prompt_id, step, places, step in steps, lens)
    run.tables["layers"] = pa.Table.from_pylist(rows, SCHEMAS["layers"])
    return run


def _step_rows(
    record: Row, prompt_id: str, step: int, places: list[tuple[int, str]], sampled: bool, lens: str
) -> list[Row]:
    rows: list[Row] = []
    total = 0.0
    for order, (block, kind) in enumerate(places):
        own = (0.01 + 0.002 * order) * (1 + 0.1 * step)
        changed = _changes(record, order, block, kind)
        total += own if changed else 0.0
        base = {"compressed": record["label"], "prompt_id": prompt_id, "step": step, "position": step, "token_id": 5}
        base |= {"layer_idx": block, "sublayer": kind}
        if record["label"] == "dense":
            rows += [_row("layers", **base, trace="dropped", lens=lens, **_stats(own))] if sampled else []
            continue
        rows.append(_row("layers", **base, trace="cumulative", lens="raw", **_stats(total, sampled and lens == "raw")))
        if sampled:
            rows.append(_row("layers", **base, trace="local", lens=lens, **_stats(own if changed else 0.0)))
            if lens == "normed":
                rows.append(_row("layers", **base, trace="cumulative", lens="normed", **_stats(total)))
    return rows


def _changes(record: Row, order: int, block: int, kind: str) -> bool:
    if "dropped" not in record:
        return order > 0
    dropped = record["dropped"]
    return block in dropped.get(kind, []) or block in dropped.get("block", [])


def add_attribution(
    run: Run, index: int = 0, blocks: int = 4, changed: Sequence[int] = (1, 2), rho: float = 0.8
) -> Run:
    """Fill `attribution` and the summary of one compressed model: block b alone costs 0.1 (b + 1) nats."""
    label, texts = run.info["compressed"][index]["label"], texts_lengths(run)
    rows = [
        _row(
            "attribution",
            compressed=label,
            prompt_id=prompt_id,
            layer_idx=block,
            sublayer="attention",
            changed=block in changed,
            num_steps=length,
            kl_alone=0.1 * (block + 1),
            tv_alone=0.1,
            kl_all_but=0.05 if block in changed else None,
            tv_all_but=0.05 if block in changed else None,
        )
        for block in range(blocks)
        for prompt_id, length in texts.items()
    ]
    run.tables["attribution"] = pa.Table.from_pylist(rows, SCHEMAS["attribution"])
    alone = sum(0.1 * (block + 1) for block in changed)
    run.info["summary"][index]["attribution"] = {
        "kl_all": 2 * alone,
        "sum_alone": alone,
        "additivity": 2.0,
        "parts": [_part("attention", block, block in changed) for block in range(blocks)]
        + [_part("rest", None, True) | {"redundancy": None}],
        "rank_correlation": {"attention": {"rho": rho, "n": blocks}},
    }
    return run


def _part(kind: str, block: int | None, changed: bool) -> Row:
    place = 0 if block is None else block
    mean = 0.1 * (place + 1)
    return {
        "sublayer": kind,
        "layer_idx": block,
        "changed": changed,
        "kl": {"mean": mean, "low": 0.0, "high": 2 * mean},
        "tv": {"mean": 0.1, "low": 0.05, "high": 0.2},
        "kl_all_but": {"mean": 0.05, "low": 0.04, "high": 0.06} if changed else None,
        "redundancy": 0.99 - 0.01 * place,
    }


def add_noise(run: Run, floor: float = 1e-12) -> Run:
    """A floor far below everything, one that is exactly 0, and one in the middle of the figures."""
    names = ("kl_dense_compressed", "tv", "hidden_deviation", "logit_deviation", "prob_deviation")

    def of(size: float) -> Row:
        found: Row = {name: {"mean": size, "p95": 2 * size, "max": 9 * size} for name in names}
        return found | {"same_top1": {"mean": 1.0 if size < 1e-6 else 0.97}}

    run.info["noise"] = {"batch shape": of(floor), "same shape": of(0.0), "bfloat16": of(0.01)}
    return run
