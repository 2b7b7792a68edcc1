"""The answer first: a few numbers per compressed model, from the tables of a run alone."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from prunelens.metrics.intervals import Interval, ratio_interval
from prunelens.metrics.survival import (
    agreed_length,
    common_prefix,
    draft_speedup,
    expected_agreed,
    faithful_length,
    survival_rows,
)
from prunelens.study.compare.attributed import attributed
from prunelens.study.rows import by_prompt, column, prompt_runs, rows_of

SURVIVAL_AT = (8, 32)
SMALLEST_SAVING = 1e-3
"""Share of the dense bytes below which a compressed model saves nothing."""
NUM_DRAFTED = 4
SUMMARISED = (
    *("prompt_id", "kl_dense_compressed", "kl_compressed_dense", "tv", "same_top1", "entropy_dense"),
    *("entropy_compressed", "hidden_cosine", "logit_cosine", "prob_cosine"),
)
"""The columns of `steps` that are read here."""
SHARES = ("tv", "same_top1")
"""Columns of `steps` whose values lie between 0 and 1."""
TIE = {"float64": 1e-8, "float32": 1e-3, "float16": 0.1, "bfloat16": 0.3}
"""Gap of two log-probabilities below which rounding may decide which token is the most likely one."""


def summarise(
    tables: dict[str, pa.Table], info: dict[str, Any], drafts: Mapping[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    """One record per compressed model, in the order given; `drafts` holds S5 as measured, by label."""
    records = [_summary(tables, info, record) for record in info["compressed"]]
    for record in records:
        record["draft"]["measured"] = drafts.get(record["compressed"])
    return records


def _summary(tables: dict[str, pa.Table], info: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    label = record["label"]
    greedy, sampled, free = (
        rows_of(tables["steps"], SUMMARISED, compressed=label, trace=trace) for trace in ("greedy", "sampled", "free")
    )
    dense_parameters = info["dense"]["parameters"]
    acceptance = 1 - float(np.mean(column(sampled, "tv")))
    cost_ratio = record["parameters"] / dense_parameters
    return {
        "compressed": label,
        "num_prompts": len(set(sampled["prompt_id"].to_pylist())),
        "parameters": record["parameters"],
        "parameters_saved": 1 - cost_ratio,
        "size": _size(info, record, token_mean(greedy, "kl_dense_compressed").value),
        "kl": _quantiles(greedy, "kl_dense_compressed") | _interval(token_mean(greedy, "kl_dense_compressed")),
        "tv": _interval(token_mean(greedy, "tv")),
        "excess_nll": _interval(_excess_nll(sampled)),
        "same_top1": _interval(token_mean(greedy, "same_top1")),
        "cosines": {
            space: _defined_mean(column(greedy, name))
            for space, name in (("h", "hidden_cosine"), ("z", "logit_cosine"), ("p", "prob_cosine"))
        },
        "survival": _survival(tables, label),
        "faithful_length": _faithful(tables, label),
        "first_divergent_token": _first_divergent(tables, label),
        "coupling": _coupling(tables, label),
        "greedy_check": _greedy_check(tables, info, label),
        "accumulation": {
            "kl_alone": float(np.mean(column(greedy, "kl_dense_compressed"))),
            "kl_free": float(np.mean(column(free, "kl_dense_compressed"))),
        },
        "draft": {
            "acceptance": acceptance,
            "num_drafted": NUM_DRAFTED,
            "cost_ratio": cost_ratio,
            "speedup": draft_speedup(acceptance, cost_ratio, NUM_DRAFTED),
        },
        "options": _options(tables, label),
        "attribution": attributed(tables, info, label, float(np.mean(column(greedy, "kl_dense_compressed")))),
    }


def _defined_mean(values: np.ndarray) -> float | None:
    """The mean over the steps at which a cosine is defined (neither vector is zero), None where there are none."""
    values = values[np.isfinite(values)]
    return float(np.mean(values)) if len(values) else None


def by_damage_per_byte(summary: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records, least KL per byte saved first; those that save no bytes last, by their KL."""
    return sorted(
        summary,
        key=lambda record: (
            record["size"]["kl_per_percent"] is None,
            record["size"]["kl_per_percent"] or 0.0,
            record["kl"]["mean"],
        ),
    )


def _size(info: dict[str, Any], record: dict[str, Any], kl: float) -> dict[str, Any]:
    """Bytes of the weights, and the mean KL in nats for each percent of the dense model's bytes that is saved."""
    saved = 1 - record["bytes"] / info["dense"]["bytes"]
    return {
        "bytes": record["bytes"],
        "saved": saved,
        "zeros": record["zeros"],
        "kl_per_percent": kl / (100 * saved) if saved >= SMALLEST_SAVING else None,
    }


def token_mean(table: pa.Table, name: str) -> Interval:
    """Mean over tokens with its interval over prompts."""
    grouped = table.group_by("prompt_id", use_threads=False).aggregate([(name, "sum"), (name, "count")])
    totals, counts = column(grouped, f"{name}_sum"), column(grouped, f"{name}_count")
    return ratio_interval(totals, counts, bounded=name in SHARES)


def _excess_nll(sampled: pa.Table) -> Interval:
    """E_p'[-log p] - E_p[-log p] = H(p') + KL(p'‖p) - H(p) on the dense model's sampled texts, nats per token.

    What the dense model needs for the compressed model's next token beyond its own, with no accumulation.
    """
    names = ("entropy_compressed", "kl_compressed_dense", "entropy_dense")
    rows = by_prompt(sampled, *names)
    totals = np.array([float(np.sum(own + reverse - dense)) for _, own, reverse, dense in rows])
    return ratio_interval(totals, np.array([float(len(row[1])) for row in rows]))


def _interval(interval: Interval) -> dict[str, float]:
    return {"mean": interval.value, "low": interval.low, "high": interval.high}


def _quantiles(table: pa.Table, name: str) -> dict[str, float]:
    values = column(table, name)
    points = {"min": 0, "p05": 5, "median": 50, "p95": 95, "p99": 99, "max": 100}
    return {key: float(np.percentile(values, point)) for key, point in points.items()}


def _survival(tables: dict[str, pa.Table], label: str) -> dict[str, Any]:
    rows = rows_of(tables["survival"], compressed=label)
    horizon = rows.num_rows
    found = {}
    for n in SURVIVAL_AT:
        if n <= horizon:
            row = rows.slice(n - 1, 1).to_pylist()[0]
            found[str(n)] = {
                "value": row["survival_sampled"],
                "low": row["survival_sampled_low"],
                "high": row["survival_sampled_high"],
                "bound": row["survival_bound"],
            }
    return found


def _faithful(tables: dict[str, pa.Table], label: str) -> dict[str, Any]:
    rows = rows_of(tables["survival"], compressed=label)
    curve = column(rows, "survival_sampled")
    expected = expected_agreed_tokens(tables, label)
    median = faithful_length(curve)
    return {
        "median": median,
        "beyond_horizon": median == len(curve),
        "horizon": len(curve),
        "expected": _interval(expected),
    }


def expected_agreed_tokens(tables: dict[str, pa.Table], label: str) -> Interval:
    """Σ S(n) (S4) with its interval over prompts, from the sampled rows of `steps`."""
    horizon = rows_of(tables["survival"], compressed=label).num_rows
    sampled = by_prompt(
        rows_of(tables["steps"], ("prompt_id", "acceptance", "tv"), compressed=label, trace="sampled"),
        "acceptance",
        "tv",
    )
    return expected_agreed(survival_rows([row[1] for row in sampled], [row[2] for row in sampled], horizon))


def texts_of(tables: dict[str, pa.Table], model: str, trace: str = "greedy") -> dict[str, dict[str, Any]]:
    """Continuations of a model by prompt."""
    rows = rows_of(tables["continuations"], model=model, trace=trace).to_pylist()
    return {row["prompt_id"]: row for row in rows}


def free_agreement(tables: dict[str, pa.Table], label: str) -> dict[str, int]:
    """Tokens that the free greedy texts of both models have in common, by prompt."""
    horizon = rows_of(tables["survival"], compressed=label).num_rows
    dense, own = (_token_ids(tables["continuations"], model) for model in ("dense", label))
    return {key: common_prefix(ids, own[key], horizon) for key, ids in dense.items()}


def _token_ids(continuations: pa.Table, model: str) -> dict[str, list[int]]:
    rows = rows_of(continuations, ("prompt_id", "token_ids"), model=model, trace="greedy")
    return dict(zip(rows["prompt_id"].to_pylist(), rows["token_ids"].to_pylist(), strict=True))


def _first_divergent(tables: dict[str, pa.Table], label: str) -> dict[str, Any]:
    horizon = rows_of(tables["survival"], compressed=label).num_rows
    agreed = free_agreement(tables, label).values()
    positions = [length + 1 if length < horizon else math.inf for length in agreed]
    median = float(np.median(positions)) if positions else math.inf
    return {
        "median": median if math.isfinite(median) else None,
        "never": sum(not math.isfinite(position) for position in positions),
        "prompts": len(positions),
    }


def _coupling(tables: dict[str, pa.Table], label: str) -> dict[str, Any]:
    """S3' beside S4: the mean agreed length measured by running the coupling, and what S(n) predicts."""
    rows = rows_of(tables["survival"], compressed=label)
    measured = float(np.sum(column(rows, "survival_coupled")))
    predicted = expected_agreed_tokens(tables, label)
    return {"measured": measured, "predicted": _interval(predicted)}


def _greedy_check(tables: dict[str, pa.Table], info: dict[str, Any], label: str) -> dict[str, Any]:
    """S3 against free running: on which prompts they differ, and whether rounding explains it."""
    horizon = rows_of(tables["survival"], compressed=label).num_rows
    steps = rows_of(tables["steps"], ("prompt_id", "same_top1"), compressed=label, trace="greedy")
    measured = free_agreement(tables, label)
    limit = TIE.get(info["dense"]["dtype"], 1e-3)
    alternatives = rows_of(tables["alternatives"], compressed=label)
    places = {prompt_id: (low, high) for prompt_id, low, high in prompt_runs(alternatives)}
    ties: list[dict[str, Any]] = []
    unexplained: list[dict[str, Any]] = []
    for prompt_id, same in by_prompt(steps, "same_top1"):
        predicted = agreed_length([bool(value) for value in same], horizon)
        if predicted == measured[prompt_id]:
            continue
        step = min(predicted, measured[prompt_id]) + 1
        low, high = places.get(prompt_id, (0, 0))
        gap = _smallest_gap(alternatives.slice(low, high - low), step)
        (ties if gap is not None and gap <= limit else unexplained).append(
            {"prompt_id": prompt_id, "step": step, "gap": gap}
        )
    return {"prompts": len(measured), "ties": ties, "unexplained": unexplained}


def _smallest_gap(alternatives: pa.Table, step: int) -> float | None:
    """The smaller of both models' gaps in log-probability between the two most likely tokens.

    None where there is no such step, because one of the texts had ended.
    """
    rows = rows_of(alternatives, step=step).to_pylist()
    gaps = [
        math.log(max(probs[0], 1e-300) / max(probs[1], 1e-300))
        for row in rows
        for probs in (row["dense_probs"], row["compressed_probs"])
        if len(probs) > 1
    ]
    return min(gaps, default=None)


def _options(tables: dict[str, pa.Table], label: str) -> dict[str, Any] | None:
    """Multiple choice: how often the choice among the options stayed."""
    rows = rows_of(tables["prompt_end"], compressed=label, space="options")
    if rows.num_rows == 0:
        return None
    return {
        "prompts": rows.num_rows,
        "same_choice": int(np.sum(column(rows, "same_top1"))),
        "kl_mean": float(np.mean(column(rows, "kl_dense_compressed"))),
    }
