"""The result of tasks: item scores and texts as tables, verdicts, and the page on request."""

from collections.abc import Mapping

import pyarrow as pa

from prunelens.study.evaluate.measure import TaskResult
from prunelens.study.evaluate.record import EvaluationInfo
from prunelens.study.evaluate.words import renewed
from prunelens.study.store import Kind

SCHEMAS = {
    "tasks": pa.schema(
        [
            ("model", pa.string()),
            ("task", pa.string()),
            ("metric", pa.string()),
            ("item_id", pa.string()),
            ("value", pa.float64()),
            ("answer", pa.string()),
            ("target", pa.string()),
        ]
    ),
    "texts": pa.schema(
        [
            ("model", pa.string()),
            ("prompt_id", pa.string()),
            ("kind", pa.string()),
            ("prompt", pa.string()),
            ("text", pa.string()),
            ("num_tokens", pa.int32()),
            ("ended", pa.bool_()),
            ("nll_dense", pa.float64()),
            ("entropy_dense", pa.float64()),
            ("sampling", pa.string()),
            ("repeat", pa.int32()),
            ("atypical", pa.bool_()),
            ("loops", pa.bool_()),
        ]
    ),
}
"""The tables of an evaluation; `tasks` is a contract with other people's scripts."""

EVALUATION = Kind(
    "prunelens-evaluation",
    1,
    SCHEMAS,
    (
        "dense",
        "compressed",
        "tasks",
        "settings",
        "thresholds",
        "notes",
        "seconds",
        "versions",
        "summary",
        "created",
    ),
    "evaluation",
    "evaluate",
    EvaluationInfo,
    ("tasks",),
    renewed,
    {"texts": ("entropy_dense", "sampling", "repeat", "atypical", "loops")},
)


def values_table(found: Mapping[str, TaskResult]) -> pa.Table:
    """`tasks`: one row for each model, metric and item."""
    rows = [
        {
            "model": model,
            "task": scored.metric.task,
            "metric": scored.metric.name,
            "item_id": item,
            "value": value,
            "answer": scored.answers.get(item),
            "target": scored.targets.get(item),
        }
        for model, one in found.items()
        for scored in one.scored
        for item, value in scored.values.items()
    ]
    return pa.Table.from_pylist(rows, SCHEMAS["tasks"])


def texts_table(found: Mapping[str, TaskResult]) -> pa.Table:
    """`texts`: what each model wrote on core_long."""
    rows = [
        {
            "model": model,
            "prompt_id": text.prompt_id,
            "kind": text.kind,
            "prompt": text.prompt,
            "text": text.text,
            "num_tokens": len(text.token_ids),
            "ended": text.ended,
            "nll_dense": text.nll_dense,
            "entropy_dense": text.entropy_dense,
            "sampling": text.sampling,
            "repeat": text.repeat,
            "atypical": text.atypical,
            "loops": text.loops,
        }
        for model, one in found.items()
        for text in one.texts
    ]
    return pa.Table.from_pylist(rows, SCHEMAS["texts"])
