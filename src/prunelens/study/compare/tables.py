"""From row statistics to the Arrow tables of a run."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from prunelens.metrics.survival import (
    agreed_length,
    agreement_rows,
    bound_rows,
    common_prefix,
    mean_curve,
    survival_rows,
)
from prunelens.models.model import Model
from prunelens.study.compare.schemas import CURVES, SCHEMAS, STAT_COLUMNS
from prunelens.tasks.prompts import Prompt
from prunelens.tracing.forced import Trajectory
from prunelens.tracing.generate import Continuation

NUM_ALTERNATIVES = 5
SURVIVAL_STATS = ("acceptance", "tv", "log_ratio_token", "same_top1")
"""The row statistics that `survival_table` reads; the others need not be kept once their rows are written."""
Stats = dict[str, Tensor]


def prompts_table(prompts: Sequence[Prompt]) -> pa.Table:
    """`prompts`: what was fed to the models."""
    names = SCHEMAS["prompts"].names
    return pa.Table.from_pylist(
        [
            {name: list(value) if isinstance(value := getattr(prompt, name), tuple) else value for name in names}
            for prompt in prompts
        ],
        SCHEMAS["prompts"],
    )


def steps_rows(
    label: str,
    prompts: Sequence[Prompt],
    trajectories: Sequence[Trajectory],
    stats: Stats,
    traces: Sequence[str] | None = None,
    diverged: Sequence[int] | None = None,
) -> pa.Table:
    """Rows of `steps` for consecutive trajectories.

    Args:
        label: the compressed model.
        prompts: all prompts.
        trajectories: whose steps `stats` holds, one after the other.
        stats: row statistics.
        traces: another name of each trace (`free`).
        diverged: number of tokens each free text has in common with the dense one.
    """
    lengths = [len(trajectory.token_ids) for trajectory in trajectories]
    step = np.concatenate([np.arange(1, length + 1) for length in lengths] or [np.zeros(0, int)])
    starts = [len(trajectory.prompt_ids) for trajectory in trajectories]
    differ = np.repeat(diverged, lengths) < step - 1 if diverged is not None else np.zeros(len(step), bool)
    names = traces or [trajectory.trace for trajectory in trajectories]
    columns: dict[str, Any] = {
        "compressed": pa.repeat(label, len(step)),
        "prompt_id": _repeat([prompts[trajectory.prompt].prompt_id for trajectory in trajectories], lengths),
        "trace": _repeat(names, lengths),
        "step": step,
        "position": np.repeat(starts, lengths) + step - 1,
        "token_id": np.concatenate([[], *(trajectory.token_ids for trajectory in trajectories)]).astype(np.int32),
        "contexts_differ": differ,
    }
    return stats_table("steps", columns, stats)


def anchors_rows(anchor: str, prompts: Sequence[Prompt], trajectories: Sequence[Trajectory], stats: Stats) -> pa.Table:
    """Rows of `anchors` for consecutive trajectories (A2)."""
    rows = steps_rows(anchor, prompts, trajectories, stats).rename_columns({"compressed": "anchor"})
    return rows.select(SCHEMAS["anchors"].names)


def prompt_end_rows(label: str, prompts: Sequence[Prompt], found: dict[str, list[tuple[int, Stats]]]) -> list[pa.Table]:
    """Rows of `prompt_end` for one compressed model."""
    tables = []
    for space, rows in found.items():
        if not rows:
            continue
        asked = [prompts[index] for index, _ in rows]
        wanted = {*STAT_COLUMNS, "token_id", "margin", "margin_compressed"} & rows[0][1].keys()
        stats = {name: torch.cat([one[name] for _, one in rows]) for name in wanted}
        columns = {
            "compressed": pa.repeat(label, len(rows)),
            "prompt_id": [prompt.prompt_id for prompt in asked],
            "space": pa.repeat(space, len(rows)),
            "position": [len(prompt.token_ids) for prompt in asked],
            "token_id": stats["token_id"].numpy(),
            "margin": stats["margin"].numpy(),
            "margin_compressed": stats["margin_compressed"].numpy(),
        }
        tables.append(stats_table("prompt_end", columns, stats))
    return tables


def stats_table(name: str, columns: dict[str, Any], stats: Stats) -> pa.Table:
    """An Arrow table of this schema; a statistic that was not measured, and NaN (an undefined ratio), is null."""
    length = len(columns["token_id"])
    schema = SCHEMAS[name]
    for field in schema:
        if field.name in STAT_COLUMNS:
            measured = field.name in stats
            columns[field.name] = stats[field.name].numpy() if measured else pa.nulls(length, field.type)
    arrays = [_array(columns[field.name], field.type) for field in schema]
    return pa.Table.from_arrays(arrays, schema=schema)


def _array(values: Any, kind: pa.DataType) -> pa.Array:
    return values if isinstance(values, pa.Array) else pa.array(values, type=kind, from_pandas=True)


def _repeat(values: Sequence[str], lengths: Sequence[int]) -> pa.Array:
    """Each value as often as its length says, without a Python object a row."""
    return pa.array(values, pa.string()).take(pa.array(np.repeat(np.arange(len(values)), lengths)))


def survival_table(
    label: str,
    sampled: Sequence[Stats],
    greedy: Sequence[Stats],
    free: Sequence[tuple[Sequence[int], Sequence[int]]],
    coupled: Sequence[Sequence[int]],
    horizon: int,
) -> pa.Table:
    """`survival` of one compressed model for n = 1 … horizon.

    Args:
        sampled: row statistics of each sampled trajectory (L3).
        greedy: the same of each greedy trajectory.
        free: the dense and the compressed greedy text of each prompt (L4).
        coupled: agreed tokens of the simulated couplings of each prompt (S3').
    """
    numpy = [{name: value.numpy() for name, value in stats.items()} for stats in sampled]
    predicted = [agreed_length(stats["same_top1"].tolist(), horizon) for stats in greedy]
    measured = [common_prefix(dense, own, horizon) for dense, own in free]
    rows = {
        "survival_sampled": survival_rows(
            [stats["acceptance"] for stats in numpy], [stats["tv"] for stats in numpy], horizon
        ),
        "survival_bound": bound_rows([stats["log_ratio_token"] for stats in numpy], horizon),
        "survival_greedy": agreement_rows(predicted, horizon),
        "survival_coupled": np.stack([agreement_rows(lengths, horizon).mean(axis=0) for lengths in coupled]),
        "survival_free": agreement_rows(measured, horizon),
    }
    columns: dict[str, Any] = {"compressed": [label] * horizon, "n": np.arange(1, horizon + 1)}
    for curve in CURVES:
        columns[curve], columns[f"{curve}_low"], columns[f"{curve}_high"] = mean_curve(rows[curve])
    schema = SCHEMAS["survival"]
    return pa.Table.from_arrays(
        [pa.array(columns[name], field.type) for name, field in zip(schema.names, schema, strict=True)],
        schema=schema,
    )


def continuation_rows(
    name: str,
    trace: str,
    prompts: Sequence[Prompt],
    written: Sequence[Continuation],
    model: Model,
    agreed: Sequence[Sequence[int]] | None = None,
) -> pa.Table:
    """Rows of `continuations`: what a model wrote, with each token's text."""
    tokenizer = model.tokenizer
    text_of = cache(lambda token: _token_text(tokenizer, token))
    records = [
        {
            "model": name,
            "prompt_id": prompt.prompt_id,
            "trace": trace,
            "token_ids": continuation.token_ids,
            "tokens": [text_of(token) for token in continuation.token_ids],
            "text": tokenizer.decode(continuation.token_ids, skip_special_tokens=True),
            "ended": continuation.ended,
            "agreed": None if agreed is None else agreed[index],
        }
        for index, (prompt, continuation) in enumerate(zip(prompts, written, strict=True))
    ]
    return pa.Table.from_pylist(records, SCHEMAS["continuations"])


def _token_text(tokenizer: Any, token: int) -> str:
    """The text of one token; decoding a single SentencePiece token drops the space it begins with."""
    text: str = tokenizer.decode([token])
    raw = tokenizer.convert_ids_to_tokens(token)
    begins_with_space = isinstance(raw, str) and raw.startswith("\N{LOWER ONE EIGHTH BLOCK}")
    return f" {text}" if begins_with_space and not text.startswith(" ") else text


def alternative_rows(
    label: str, prompts: Sequence[Prompt], trajectories: Sequence[Trajectory], stats: Stats, model: Model
) -> pa.Table:
    """Rows of `alternatives`: the most likely tokens of both models at each greedy step."""
    lengths = [len(trajectory.token_ids) for trajectory in trajectories]
    columns: dict[str, Any] = {
        "compressed": pa.repeat(label, sum(lengths)),
        "prompt_id": _repeat([prompts[trajectory.prompt].prompt_id for trajectory in trajectories], lengths),
        "step": np.concatenate([[], *(np.arange(1, length + 1) for length in lengths)]).astype(np.int32),
    }
    for side in ("dense", "compressed"):
        columns[f"{side}_tokens"] = _token_texts(stats[f"top_ids_{side}"][:, :NUM_ALTERNATIVES], model.tokenizer)
        probs = stats[f"top_probs_{side}"][:, :NUM_ALTERNATIVES].flatten().float()
        columns[f"{side}_probs"] = _lists(pa.array(probs.numpy()), sum(lengths))
    schema = SCHEMAS["alternatives"]
    return pa.Table.from_arrays([_array(columns[field.name], field.type) for field in schema], schema=schema)


def _token_texts(ids: Tensor, tokenizer: Any) -> pa.Array:
    """(rows, k) token ids as lists of texts; each token is decoded once."""
    distinct, places = np.unique(ids.numpy(), return_inverse=True)
    texts = pa.array([_token_text(tokenizer, token) for token in distinct.tolist()], pa.string())
    return _lists(texts.take(pa.array(places.ravel())), len(ids))


def _lists(values: pa.Array, rows: int) -> pa.Array:
    """Values, one row after the other, as `rows` lists of equal length."""
    width = len(values) // rows if rows else 0
    return pa.ListArray.from_arrays(pa.array(np.arange(rows + 1) * width, pa.int32()), values)
