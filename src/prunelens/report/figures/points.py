"""Point clouds: estimate against truth, and the options against the whole vocabulary."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from prunelens.report.figures.drawing import (
    INK,
    MUTED,
    Figure,
    Key,
    Look,
    Panel,
    draw,
    log_axis,
    look,
    plot_text,
    positive,
)
from prunelens.report.wording import number
from prunelens.study.rows import column, rows_of
from prunelens.study.store import Run

TRUSTED = 0.3
"""Largest |κ₃|/(3Tκ₂) at which the second order is trusted (T3+)."""
MAX_POINTS = 1500


@dataclass(frozen=True)
class _Cloud:
    """Estimate and truth at every step, with whether the second order is trusted there."""

    title: str
    quantity: str
    truth: np.ndarray
    estimate: np.ndarray
    trusted: np.ndarray
    names: list[str]

    @property
    def shown(self) -> np.ndarray:
        """Which steps can stand on logarithmic axes."""
        return (self.truth > 0) & (self.estimate > 0)


def estimates_figure(run: Run, index: int) -> Figure:
    """T2, T3 and T3+ against what they estimate, over greedy and sampled steps."""
    label = run.info["compressed"][index]["label"]
    rows = rows_of(run.tables["steps"], compressed=label)
    rows = pa.concat_tables([rows_of(rows, trace=trace) for trace in ("greedy", "sampled")])
    clouds, style = _clouds(rows), look(index, label)
    drawn = [_drawn(cloud) for cloud in clouds]
    chosen = [shown for shown, _ in drawn]
    panels = [_cloud_panel(cloud, rows_shown, clouds, style) for cloud, rows_shown in zip(clouds, chosen, strict=True)]
    return Figure(
        "Estimate against truth, step by step",
        "A point on the diagonal is an exact estimate and one below it an estimate that is too small; dots are steps "
        "where the second order is trusted, crosses are not.",
        tuple(panels),
        tuple(f"{cloud.title}: {_ratios(cloud)} {note}" for cloud, (_, note) in zip(clouds, drawn, strict=True)),
        index,
        (
            Key("dot", style.colour, f"trusted, |κ₃|/(3Tκ₂) ≤ {TRUSTED}"),
            Key("cross", "var(--muted)", "not trusted"),
            Key("line", "var(--ink)", "estimate = truth"),
        ),
        across=3,
    )


def _clouds(rows: pa.Table) -> list[_Cloud]:
    trusted = column(rows, "trust") <= TRUSTED
    keys = ("prompt_id", "trace", "step")
    columns = [rows[key].to_pylist() for key in keys]
    names = [f"{plot_text(key, 32)}, {trace}, step {step}" for key, trace, step in zip(*columns, strict=True)]
    kl = column(rows, "kl_dense_compressed")
    found = (
        ("T2", "1 − cos(p, p′), no unit", 1 - column(rows, "prob_cosine"), "prob_deviation_estimate"),
        ("T3", "KL, nats", kl, "kl_estimate"),
        ("T3+", "KL, nats", kl, "kl_estimate_third"),
    )
    return [
        _Cloud(title, quantity, truth, column(rows, name), trusted, names) for title, quantity, truth, name in found
    ]


def _drawn(cloud: _Cloud) -> tuple[np.ndarray, str]:
    """Indices of the drawn steps, and a sentence on the steps that are not."""
    shown = np.nonzero(cloud.shown)[0]
    notes = []
    total = int(np.sum(np.isfinite(cloud.truth) & np.isfinite(cloud.estimate)))
    negative = int(np.sum((cloud.estimate < 0) & np.isfinite(cloud.truth)))
    if negative:
        notes.append(f"{negative:,} step{'s' if negative > 1 else ''} with an estimate below 0 left out")
    if total - negative - len(shown):
        notes.append(f"{total - negative - len(shown):,} steps with a 0 are left out")
    if len(shown) > MAX_POINTS:
        notes.append(f"{MAX_POINTS:,} of {len(shown):,} points are drawn, chosen at random with a fixed seed")
        shown = np.sort(np.random.default_rng(0).permutation(shown)[:MAX_POINTS])
    return shown, "; ".join(notes).capitalize() + "." if notes else ""


def _ratios(cloud: _Cloud) -> str:
    parts = []
    for name, wanted in (("where trusted", cloud.trusted), ("elsewhere", ~cloud.trusted)):
        kept = wanted & (cloud.truth > 0) & np.isfinite(cloud.estimate)
        if kept.any():
            ratio = float(np.median(cloud.estimate[kept] / cloud.truth[kept]))
            parts.append(f"{number(ratio)} {name} ({int(kept.sum()):,} steps)")
    return f"median of estimate / truth {', '.join(parts)}." if parts else "no step with a difference."


def _cloud_panel(cloud: _Cloud, shown: np.ndarray, clouds: list[_Cloud], style: Look) -> Panel:
    title = {"T2": "T2: deviation of p", "T3": "T3: KL, second order", "T3+": "T3+: KL, third order"}[cloud.title]
    if not len(shown):
        return Panel(title, empty="No step with a difference above 0.")
    alike = [other for other in clouds if other.quantity == cloud.quantity]
    values = positive(*[side[other.shown] for other in alike for side in (other.truth, other.estimate)])
    low, high = float(values.min()), float(values.max())
    traces = [
        _points(
            cloud,
            shown[~cloud.trusted[shown]],
            "not trusted",
            {"symbol": "x-thin", "size": 6, "line": {"color": MUTED, "width": 1.1}},
        ),
        _points(
            cloud, shown[cloud.trusted[shown]], "trusted", {"symbol": "circle", "size": 5, "color": style.faded(0.6)}
        ),
        _diagonal(low, high, "estimate = truth"),
    ]
    layout = {
        "xaxis": log_axis(f"truth: {cloud.quantity}", low, high),
        "yaxis": log_axis("estimate", low, high),
        "showlegend": False,
    }
    return Panel(title, draw(traces, layout), height=340)


def _points(cloud: _Cloud, rows: np.ndarray, name: str, marker: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "markers",
        "x": cloud.truth[rows].astype(np.float32),
        "y": cloud.estimate[rows].astype(np.float32),
        "text": [cloud.names[row] for row in rows],
        "name": name,
        "marker": marker,
        "hovertemplate": "%{text}<br>truth %{x:.3g}<br>estimate %{y:.3g}",
    }


def _diagonal(low: float, high: float, name: str) -> dict[str, Any]:
    ends = np.array([low / 10, high * 10])
    return {
        "type": "scatter",
        "mode": "lines",
        "x": ends,
        "y": ends,
        "name": name,
        "line": {"color": INK, "width": 1.2},
        "hoverinfo": "skip",
    }


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
    note = f"{int((~kept).sum())} of {len(kept)} points with a KL of 0 are left out." if not kept.all() else ""
    return Figure(
        "The same step over the whole vocabulary and over the options alone",
        "Each point is one prompt; below the diagonal the choice among the options moved less than the whole "
        "distribution did, and a hollow point is a prompt whose chosen option changed.",
        (_options_panel(run, pairs, values, kept),),
        (note,),
    )


def _options_panel(run: Run, pairs: list[Any], values: np.ndarray, kept: np.ndarray) -> Panel:
    if not kept.any():
        return Panel("", empty="Every KL is exactly 0: both models agree.")
    low, high = float(values[kept].min()), float(values[kept].max())
    traces = [_diagonal(low, high, "equal KL")]
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
