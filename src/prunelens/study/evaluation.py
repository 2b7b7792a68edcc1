"""The result of tasks: item scores and texts as tables, verdicts, and the page on request."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from prunelens.study.store import Kind, Result, write_run
from prunelens.study.stored import open_run

if TYPE_CHECKING:
    from prunelens.study.bench import Found

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
)


class Evaluation(Result):
    """What models did on tasks, item by item, and for which uses each compressed one is safe.

    Attributes:
        tables: `tasks` (a value for each model, metric and item) and `texts` (the long texts).
        info: the content of run.json.
        summary: for each compressed model its scores beside the dense ones, and its verdicts.
    """

    @classmethod
    def open(cls, folder: str | Path) -> "Evaluation":
        """Read a stored evaluation.

        Raises:
            PrunelensError: none there, or a damaged one.
        """
        return cls(open_run(Path(folder), EVALUATION))

    @property
    def summary(self) -> list[dict[str, Any]]:
        """One record per compressed model."""
        found: list[dict[str, Any]] = self._run.info["summary"]
        return found

    @property
    def verdict(self) -> dict[str, list[dict[str, Any]]]:
        """One line for each class of use, by compressed model."""
        return {record["compressed"]: record["verdicts"] for record in self.summary}

    def write(self, folder: Path) -> None:
        """Write tables and run.json into an existing folder."""
        write_run(self._run, folder)

    def report(self, folder: str | Path) -> Path:
        """Write tables, run.json and the page into `folder`, whole or not at all; return the page's path.

        Raises:
            PrunelensError: the folder exists and is not an evaluation, or cannot be written; or the page alone cannot
                be made.
        """
        from prunelens.report.evaluation_page import render_evaluation

        return EVALUATION.write(self._run, Path(folder), render_evaluation)

    def _repr_html_(self) -> str:
        from prunelens.report.evaluation_page import render_evaluation_summary

        return render_evaluation_summary(self._run)


def values_table(found: Mapping[str, "Found"]) -> pa.Table:
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


def texts_table(found: Mapping[str, "Found"]) -> pa.Table:
    """`texts`: what each model wrote on core_long."""
    rows = [
        {
            "model": model,
            "prompt_id": text.prompt.prompt_id,
            "kind": text.prompt.kind,
            "prompt": text.prompt.text,
            "text": text.text,
            "num_tokens": len(text.token_ids),
            "ended": text.ended,
            "nll_dense": text.nll_dense,
        }
        for model, one in found.items()
        for text in one.texts
    ]
    return pa.Table.from_pylist(rows, SCHEMAS["texts"])
