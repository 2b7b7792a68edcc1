"""The options against the whole vocabulary: one point for each prompt that has options."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from prunelens.report.figures.drawing import Figure, Look, Panel, draw, log_axis, look, plot_text
from prunelens.report.figures.points import MAX_POINTS, diagonal, some
from prunelens.report.wording import number
from prunelens.study.rows import rows_of
from prunelens.study.store import Run


@dataclass(frozen=True)
class OptionsRow:
    """What the restriction to the options did for one compressed model."""

    model: int
    prompts: int
    kl_vocabulary: str
    kl_options: str
    top1_vocabulary: str
    top1_options: str


def _paired_ends(run: Run, label: str) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """(prompt_id, row over the vocabulary, row over the options) for prompts that have both."""
    rows = rows_of(run.tables["prompt_end"], compressed=label).to_pylist()
    by_space: dict[str, dict[str, dict[str, Any]]] = {"vocabulary": {}, "options": {}}
    for row in rows:
        by_space.setdefault(row["space"], {})[row["prompt_id"]] = row
    whole, options = by_space["vocabulary"], by_space["options"]
    return [(key, whole[key], options[key]) for key in options if key in whole]


def options_rows(run: Run) -> list[OptionsRow]:
    """One row per compressed model that was asked anything with options (L5, C1)."""
    found = []
    for index, record in enumerate(run.info["compressed"]):
        pairs = _paired_ends(run, record["label"])
        if pairs:
            found.append(_options_row(index, pairs))
    return found


def _options_row(index: int, pairs: list[tuple[str, dict[str, Any], dict[str, Any]]]) -> OptionsRow:
    sides = [[pair[1] for pair in pairs], [pair[2] for pair in pairs]]
    kl = [number(float(np.mean([row["kl_dense_compressed"] for row in rows]))) for rows in sides]
    same = [f"{sum(bool(row['same_top1']) for row in rows)} of {len(rows)}" for rows in sides]
    return OptionsRow(index, len(pairs), kl[0], kl[1], same[0], same[1])


def options_figure(run: Run) -> Figure | None:
    """KL over the vocabulary against KL over the option tokens, one point per prompt; None without options."""
    found = [(index, _paired_ends(run, record["label"])) for index, record in enumerate(run.info["compressed"])]
    pairs = [(index, *pair) for index, several in found for pair in several]
    if not pairs:
        return None
    values = np.array([[row["kl_dense_compressed"] for row in pair[2:]] for pair in pairs])
    kept = np.asarray((values > 0).all(axis=1))
    zero = f"{int((~kept).sum())} of {len(kept)} points with a KL of 0 are left out." if not kept.all() else ""
    drawn = some(np.nonzero(kept)[0], MAX_POINTS)
    many = f"{len(drawn):,} of {int(kept.sum()):,} points are drawn, chosen at random with a fixed seed."
    many = many if len(drawn) < kept.sum() else ""
    kept = np.isin(np.arange(len(kept)), drawn)
    return Figure(
        "The same step over the whole vocabulary and over the options alone",
        "Each point is one prompt; below the diagonal the choice among the options moved less than the whole "
        "distribution did, and a hollow point is a prompt whose chosen option changed.",
        (_options_panel(run, pairs, values, kept),),
        (zero, many),
    )


def _options_panel(run: Run, pairs: list[Any], values: np.ndarray, kept: np.ndarray) -> Panel:
    if not kept.any():
        return Panel("", empty="Every KL is exactly 0: both models agree.")
    low, high = float(values[kept].min()), float(values[kept].max())
    traces = [diagonal(low, high, "equal KL")]
    owners = np.array([pair[0] for pair in pairs])
    for index, record in enumerate(run.info["compressed"]):
        rows = np.nonzero(kept & (owners == index))[0]
        if len(rows):
            traces.append(_option_points(look(index, record["label"]), [pairs[row] for row in rows], values[rows]))
    layout = {
        "xaxis": log_axis("KL over the vocabulary, nats", low, high),
        "yaxis": log_axis("KL over the options, nats", low, high),
    }
    return Panel("", draw(traces, layout), height=400)


def _option_points(style: Look, pairs: list[Any], values: np.ndarray) -> dict[str, Any]:
    open_or_filled = ["" if pair[3]["same_top1"] else "-open" for pair in pairs]
    return {
        "type": "scatter",
        "mode": "markers",
        "x": values[:, 0],
        "y": values[:, 1],
        "text": [plot_text(pair[1], 32) for pair in pairs],
        "name": style.name,
        "marker": {
            "symbol": [style.symbol + ending for ending in open_or_filled],
            "size": 10,
            "color": style.colour,
            "line": {"width": 1.5, "color": style.colour},
        },
        "hovertemplate": "%{text}<br>vocabulary %{x:.3g} nats<br>options %{y:.3g} nats",
    }
