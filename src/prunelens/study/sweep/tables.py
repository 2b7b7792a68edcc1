"""The tables of a sweep from its cells."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from prunelens.errors import PrunelensError
from prunelens.pruning.recipe import Recipe, parse_recipe
from prunelens.pruning.steps.drop import DROPS
from prunelens.pruning.steps.experts import ExpertStep
from prunelens.pruning.steps.quantize import QuantizeStep
from prunelens.study.evaluate.scores import score_rows
from prunelens.study.evaluate.verdict import judge
from prunelens.study.store import Run
from prunelens.study.sweep.cells import cell_folder, read_cell, read_parts
from prunelens.study.sweep.forecasts import alike, calibration, fit_forecast
from prunelens.study.sweep.study_file import Cell, Study
from prunelens.tasks.aggregation import MEAN
from prunelens.tasks.suite import Metric, MetricScores

CELL_NUMBERS = (
    "parameters_saved",
    "bytes_saved",
    "zeros",
    "kl",
    "kl_low",
    "kl_high",
    "tv",
    "same_top1",
    "survival_8",
    "survival_32",
    "expected_agreed",
    "excess_nll_predicted",
    "same_choice",
)
SCORE_NUMBERS = (
    "chance",
    "dense",
    "compressed",
    "difference",
    "difference_low",
    "difference_high",
    "kept",
    "kept_low",
    "kept_high",
    "sign_test",
)
NAMES = [("key", pa.string()), ("recipe", pa.string()), ("seed", pa.int64())]
SCHEMAS = {
    "cells": pa.schema(
        [
            *NAMES,
            ("kind", pa.string()),
            ("strength", pa.string()),
            ("status", pa.string()),
            ("error", pa.string()),
            *[(name, pa.float64()) for name in CELL_NUMBERS],
        ]
    ),
    "scores": pa.schema(
        [
            *NAMES,
            ("task", pa.string()),
            ("metric", pa.string()),
            ("use", pa.string()),
            ("decides", pa.string()),
            ("items", pa.int32()),
            ("at_chance", pa.bool_()),
            ("tie", pa.bool_()),
            ("lost", pa.int32()),
            ("gained", pa.int32()),
            *[(name, pa.float64()) for name in SCORE_NUMBERS],
        ]
    ),
    "verdicts": pa.schema(
        [
            *NAMES,
            ("use", pa.string()),
            ("verdict", pa.string()),
            ("number", pa.string()),
            *[(name, pa.float64()) for name in ("value", "low", "high")],
            ("rule", pa.string()),
            ("source", pa.string()),
            ("reason", pa.string()),
        ]
    ),
}
"""The tables of a sweep; a contract with other people's scripts."""

Row = dict[str, Any]
SUM = "sum"
"""The kind of a recipe with several steps."""


def sweep_tables(study: Study, cells: Sequence[Cell], folder: Path) -> tuple[dict[str, pa.Table], dict[str, Any]]:
    """(tables, info) of a sweep whose cells are all made or have failed.

    Verdicts are given anew with the study's thresholds, from item scores.
    """
    rows: dict[str, list[Row]] = {name: [] for name in SCHEMAS}
    dense: dict[str, Any] = {}
    notes: dict[str, None] = {}
    compared_cells: dict[str, Run] = {}
    for cell in cells:
        record = read_cell(folder, cell)
        if record is None:
            continue
        names = {"key": cell.key, "recipe": cell.recipe, "seed": cell.seed}
        about = names | _kind(parse_recipe(cell.recipe))
        if "error" in record:
            rows["cells"].append(about | {"status": "failed", "error": record["error"]})
            continue
        try:
            compared, evaluated = read_parts(folder, cell)
        except PrunelensError as error:
            again = f"{error}; remove {cell_folder(folder, cell)} and run the sweep again"
            rows["cells"].append(about | {"status": "failed", "error": again})
            continue
        dense = dense or _dense(compared or evaluated)
        notes |= dict.fromkeys(note for run in (compared, evaluated) if run for note in run.info["notes"])
        summary = compared.info["summary"][0] if compared else None
        if compared:
            compared_cells[cell.key] = compared
        rows["cells"].append(about | {"status": "done"} | _numbers(record, summary))
        scores, lines = _judged(evaluated, study)
        rows["scores"] += [names | _flat(row) for row in scores]
        rows["verdicts"] += [names | line for line in lines]
    tables = {name: pa.Table.from_pylist(found, SCHEMAS[name]) for name, found in rows.items()}
    info = {
        "study": study.model_dump(mode="json"),
        "dense": dense,
        "cells": {"done": sum(row["status"] == "done" for row in rows["cells"]), "all": len(cells)},
        "summary": _summary(rows),
        "calibration": calibration(rows),
        "alike": alike(rows),
        "forecast": fit_forecast(rows, compared_cells),
        "notes": list(notes),
    }
    return tables, info | _made_with(cells)


def _made_with(cells: Sequence[Cell]) -> dict[str, Any]:
    """The methods from outside that the recipes use, each once; nothing where there are none."""
    methods = dict.fromkeys(method for cell in cells for method in parse_recipe(cell.recipe).outside_methods)
    return {"methods": [method.record() for method in methods]} if methods else {}


def _dense(run: Run | None) -> dict[str, Any]:
    found: dict[str, Any] = run.info["dense"] if run is not None else {}
    return found


def _kind(recipe: Recipe) -> dict[str, str]:
    """What kind of recipe it is, and how strong."""
    step, repair = recipe.steps[0], recipe.repair
    if repair is not None and len(recipe.steps) == 2:
        drop = _kind(Recipe(steps=(step,)))
        return drop | {"kind": f"{drop['kind']} + {repair.describe()[1]}"}
    if len(recipe.steps) > 1:
        return {"kind": SUM, "strength": str(recipe)}
    kind, strength = step.describe()
    return {"kind": kind, "strength": strength}


def is_drop(kind: str) -> bool:
    """Whether a kind takes whole parts out, repaired or not."""
    return kind.partition(" + ")[0] in DROPS


def is_mask(kind: str) -> bool:
    """Whether a kind sets single weights to zero; masks from outside have names of their own."""
    return not is_drop(kind) and kind not in (SUM, *ExpertStep.methods(), *QuantizeStep.methods())


def _numbers(record: Mapping[str, Any], summary: Mapping[str, Any] | None) -> Row:
    before, after = record["dense"], record["compressed"]
    found: Row = {
        "parameters_saved": 1 - after["parameters"] / before["parameters"],
        "bytes_saved": 1 - after["bytes"] / before["bytes"],
        "zeros": after["zeros"],
    }
    if summary is not None:
        options = summary["options"]
        found |= {
            "kl": summary["kl"]["mean"],
            "kl_low": summary["kl"]["low"],
            "kl_high": summary["kl"]["high"],
            "tv": summary["tv"]["mean"],
            "same_top1": summary["same_top1"]["mean"],
            "survival_8": summary["survival"].get("8", {}).get("value"),
            "survival_32": summary["survival"].get("32", {}).get("value"),
            "expected_agreed": summary["faithful_length"]["expected"]["mean"],
            "excess_nll_predicted": summary["excess_nll"]["mean"],
            "same_choice": options["same_choice"] / options["prompts"] if options else None,
        }
    return found


def _flat(row: Mapping[str, Any]) -> Row:
    kept = row["kept"] or {}
    return {name: row[name] for name in ("task", "metric", "use", "decides", "items", "at_chance", "tie")} | {
        "lost": row["lost"],
        "gained": row["gained"],
        "sign_test": row["sign_test"],
        "chance": row["chance"],
        "dense": row["dense"]["mean"],
        "compressed": row["compressed"]["mean"],
        "difference": row["difference"]["mean"],
        "difference_low": row["difference"]["low"],
        "difference_high": row["difference"]["high"],
        "kept": kept.get("mean"),
        "kept_low": kept.get("low"),
        "kept_high": kept.get("high"),
    }


def _judged(evaluated: Run | None, study: Study) -> tuple[list[Row], list[Row]]:
    """Scores and verdicts; those of a class that ended early as they were found, with the thresholds of the cell."""
    record: Row = evaluated.info["summary"][0] if evaluated else {"scores": [], "verdicts": []}
    early = {line["use"]: line for line in record["verdicts"] if line.get("stopped_early")}
    stored = {(row["task"], row["metric"]): row for row in record["scores"]}
    sides = _sides(evaluated) if evaluated else ([], [])
    made = score_rows(*sides, record["scores"])
    scores = [stored[row["task"], row["metric"]] if row["use"] in early else row for row in made]
    return scores, [early.get(line.use) or line.as_dict() for line in judge(*sides, scores, study.thresholds)]


def _sides(evaluated: Run) -> tuple[list[MetricScores], list[MetricScores]]:
    """Item scores of the dense and of the compressed model."""
    (record,) = evaluated.info["summary"]
    return _scored(evaluated, "dense", record["scores"]), _scored(evaluated, record["compressed"], record["scores"])


def _scored(run: Run, model: str, rows: Sequence[Mapping[str, Any]]) -> list[MetricScores]:
    """Item scores from the stored table."""
    values: dict[tuple[str, str], dict[str, float | None]] = {}
    for row in run.tables["tasks"].to_pylist():
        if row["model"] == model:
            values.setdefault((row["task"], row["metric"]), {})[row["item_id"]] = row["value"]
    metrics = [
        Metric(
            row["task"],
            row["metric"],
            row["use"],
            row["chance"],
            row["better"],
            row["decides"],
            row.get("aggregation", MEAN),
            row.get("reason", ""),
        )
        for row in rows
    ]
    return [MetricScores(metric, values[metric.task, metric.name]) for metric in metrics]


def _summary(rows: Mapping[str, Sequence[Row]]) -> list[Row]:
    """One record for each cell: what it saves, its damage, and its verdicts by class."""
    found = []
    several = len({cell["seed"] for cell in rows["cells"]}) > 1
    for cell in rows["cells"]:
        lines = [line for line in rows["verdicts"] if line["key"] == cell["key"]]
        found.append(
            {name: cell.get(name) for name in ("key", "recipe", "seed", "kind", "status", "error")}
            | {name: cell.get(name) for name in ("bytes_saved", "parameters_saved", "zeros", "kl")}
            | {
                "compressed": f"{cell['recipe']} (seed {cell['seed']})" if several else cell["recipe"],
                "verdicts": lines,
            }
        )
    return found
