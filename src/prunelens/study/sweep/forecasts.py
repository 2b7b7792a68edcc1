"""What each prediction of a sweep was worth, and models that multiple choice cannot tell from the dense one."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from prunelens.metrics.statistics import rank_correlation
from prunelens.study.forecast import SETTINGS, Forecast, Point, fit, predictors_of, prompts_hash
from prunelens.study.store import Run
from prunelens.tasks.suite import USES

Row = dict[str, Any]

ALIKE = 0.02
"""Models whose multiple-choice score is at most so far from the dense one count as alike."""


def use_loss(rows: Mapping[str, Sequence[Mapping[str, Any]]], key: str, use: str) -> float | None:
    """What a cell lost in a class of use: 1 - share of the dense score kept, or excess NLL for long generation.

    Several tasks count alike; those with the dense model at chance are left out. None where nothing was measured.
    """
    decides = "nll" if use == "long-generation" else "kept"
    found = [
        row
        for row in rows["scores"]
        if row["key"] == key and row["use"] == use and row["decides"] == decides and not row["at_chance"]
    ]
    if not found:
        return None
    if decides == "nll":
        return float(np.mean([row["difference"] for row in found]))
    found = [row for row in found if row["dense"] <= 1]  # scores on other scales cannot be added
    return 1 - float(sum(row["compressed"] for row in found) / sum(row["dense"] for row in found)) if found else None


PREDICTIONS = (
    ("multiple-choice", "same_choice", "prompts whose choice among the options changed", True),
    ("multiple-choice", "kl", "mean KL, nats", False),
    ("short-generation", "survival_8", "1 − S(8)", True),
    ("short-generation", "kl", "mean KL, nats", False),
    ("long-generation", "excess_nll_predicted", "predicted excess NLL, nats per token", False),
    ("long-generation", "expected_agreed", "expected agreed tokens", False),
    ("retrieval", "kl", "mean KL, nats", False),
)
"""(class, column of cells, in words, whether it is turned into 1 − value)."""


def calibration(rows: Mapping[str, Sequence[Row]]) -> list[Row]:
    """What each prediction was worth: its rank correlation with the measured loss, over all finished cells."""
    found = []
    for use, column, name, turned in PREDICTIONS:
        points = []
        for cell in rows["cells"]:
            value, loss = cell.get(column), use_loss(rows, cell["key"], use)
            if value is not None and loss is not None:
                predicted = 1 - value if turned else value
                points.append({"recipe": cell["recipe"], "predicted": predicted, "measured": loss})
        if points:
            sides = [np.array([point[side] for point in points]) for side in ("predicted", "measured")]
            rho = rank_correlation(*sides)
            found.append({"use": use, "column": column, "name": name, "rho": rho, "n": len(points), "points": points})
    return found


def fit_forecast(rows: Mapping[str, Sequence[Row]], compared: Mapping[str, Run]) -> dict[str, Any] | None:
    """What the finished cells allow to forecast (F1); None where none was compared and measured.

    Args:
        rows: of the tables `cells` and `scores`.
        compared: the comparison of each cell, by its key.
    """
    classes = []
    for use in USES:
        points = _points(rows, compared, use)
        if points:
            classes.append(fit(use, points, bounded=use != "long-generation"))
    if not classes:
        return None
    first = next(iter(compared.values()))
    found = Forecast(
        dense=first.info["dense"]["name"],
        fingerprint=first.info["dense"]["fingerprint"],
        settings={name: first.info["settings"][name] for name in SETTINGS},
        prompts=prompts_hash(first.tables["prompts"]),
        classes=classes,
    )
    return found.model_dump()


def _points(rows: Mapping[str, Sequence[Row]], compared: Mapping[str, Run], use: str) -> list[Point]:
    """One point a recipe: the mean over its seeds."""
    sides: dict[str, list[tuple[dict[str, float], float]]] = {}
    for cell in rows["cells"]:
        loss = use_loss(rows, cell["key"], use) if cell["key"] in compared else None
        if loss is not None and np.isfinite(loss):
            found = predictors_of(compared[cell["key"]].info["summary"][0])
            sides.setdefault(cell["recipe"], []).append((found, loss))
    return [
        Point(
            recipe=recipe,
            predictors={name: float(np.mean([one[name] for one, _ in own])) for name in own[0][0]},
            loss=float(np.mean([loss for _, loss in own])),
        )
        for recipe, own in sides.items()
    ]


def alike(rows: Mapping[str, Sequence[Row]]) -> list[Row]:
    """Models that multiple choice cannot tell from the dense one (a tie, at most 2 points away), the worst last.

    Their generation stands beside it: the share of the short-generation score kept, loops and excess NLL.
    """
    found = []
    for cell in rows["cells"]:
        own = [row for row in rows["scores"] if row["key"] == cell["key"]]
        choice = [row for row in own if row["use"] == "multiple-choice" and row["decides"] == "kept"]
        choice = [row for row in choice if not row["at_chance"]]
        if not choice or not all(row["tie"] and abs(row["difference"]) <= ALIKE for row in choice):
            continue
        short = use_loss(rows, cell["key"], "short-generation")
        found.append(
            {
                "recipe": cell["recipe"],
                "choice": float(np.mean([row["compressed"] for row in choice])),
                "choice_dense": float(np.mean([row["dense"] for row in choice])),
                "short_kept": None if short is None else 1 - short,
                "excess_nll": use_loss(rows, cell["key"], "long-generation"),
                "loops": _difference(own, "loops"),
                "survival_8": cell.get("survival_8"),
                "kl": cell.get("kl"),
            }
        )
    return sorted(found, key=lambda row: -(row["short_kept"] if row["short_kept"] is not None else 1.0))


def _difference(rows: Sequence[Row], decides: str) -> float | None:
    found = [row["difference"] for row in rows if row["decides"] == decides]
    return float(np.mean(found)) if found else None
