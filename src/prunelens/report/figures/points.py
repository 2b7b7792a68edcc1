"""Estimate against truth at every step: points, and quantiles where there are too many."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from prunelens.report.figures.curves import QUANTILES
from prunelens.report.figures.drawing import (
    INK,
    MUTED,
    Figure,
    Key,
    Look,
    Panel,
    band,
    draw,
    line,
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
READ = (
    *("prompt_id", "trace", "step", "trust", "kl_dense_compressed", "prob_cosine"),
    *("prob_deviation_estimate", "kl_estimate", "kl_estimate_third"),
)
"""The columns of `steps` that are drawn."""
BINNED_FROM, BINNED_POINTS = 20_000, 300
"""Steps above which quantiles of the estimate stand for them, and how many points are drawn all the same."""
NUM_BINS, SMALLEST_BIN = 24, 20
"""Bins of the truth, equally wide on a logarithmic axis, and the steps below which one is left out."""


@dataclass(frozen=True)
class _Cloud:
    """Estimate and truth at every step, with whether the second order is trusted there."""

    title: str
    quantity: str
    truth: np.ndarray
    estimate: np.ndarray
    trusted: np.ndarray
    rows: pa.Table

    @property
    def shown(self) -> np.ndarray:
        """Which steps can stand on logarithmic axes."""
        return (self.truth > 0) & (self.estimate > 0)

    @property
    def is_binned(self) -> bool:
        """Whether there are too many steps for points."""
        return int(self.shown.sum()) > BINNED_FROM

    def names(self, rows: np.ndarray) -> list[str]:
        """Where these steps stand."""
        found = self.rows.select(["prompt_id", "trace", "step"]).take(rows).to_pydict().values()
        return [f"{plot_text(key, 32)}, {trace}, step {step}" for key, trace, step in zip(*found, strict=True)]


def estimates_figure(run: Run, index: int) -> Figure:
    """T2, T3 and T3+ against what they estimate, over greedy and sampled steps."""
    label = run.info["compressed"][index]["label"]
    steps = run.tables["steps"]
    rows = pa.concat_tables([rows_of(steps, READ, compressed=label, trace=trace) for trace in ("greedy", "sampled")])
    clouds, style = _clouds(rows), look(index, label)
    drawn = [_drawn(cloud) for cloud in clouds]
    chosen, binned = [shown for shown, _ in drawn], any(cloud.is_binned for cloud in clouds)
    panels = [_cloud_panel(cloud, rows_shown, clouds, style) for cloud, rows_shown in zip(clouds, chosen, strict=True)]
    return Figure(
        "Estimate against truth, step by step",
        "A point on the diagonal is an exact estimate and one below it an estimate that is too small; dots are steps "
        f"where the second order is trusted, crosses are not.{' Curve and bands are of all steps.' if binned else ''}",
        tuple(panels),
        tuple(f"{cloud.title}: {_ratios(cloud)} {note}" for cloud, (_, note) in zip(clouds, drawn, strict=True)),
        index,
        (
            Key("dot", style.colour, f"trusted, |κ₃|/(3Tκ₂) ≤ {TRUSTED}"),
            Key("cross", "var(--muted)", "not trusted"),
            Key("line", "var(--ink)", "estimate = truth"),
            *(_band_keys(style) if binned else ()),
        ),
        across=3,
    )


def _clouds(rows: pa.Table) -> list[_Cloud]:
    trusted = column(rows, "trust") <= TRUSTED
    kl = column(rows, "kl_dense_compressed")
    found = (
        ("T2", "1 − cos(p, p′), no unit", 1 - column(rows, "prob_cosine"), "prob_deviation_estimate"),
        ("T3", "KL, nats", kl, "kl_estimate"),
        ("T3+", "KL, nats", kl, "kl_estimate_third"),
    )
    return [_Cloud(title, quantity, truth, column(rows, name), trusted, rows) for title, quantity, truth, name in found]


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
    most = BINNED_POINTS if cloud.is_binned else MAX_POINTS
    if len(shown) > most:
        notes.append(f"{most:,} of {len(shown):,} points are drawn, chosen at random with a fixed seed")
        shown = some(shown, most)
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
        diagonal(low, high, "estimate = truth"),
    ]
    if cloud.is_binned:
        traces = _bands(cloud, style) + traces
    layout = {
        "xaxis": log_axis(f"truth: {cloud.quantity}", low, high),
        "yaxis": log_axis("estimate", low, high),
        "showlegend": False,
    }
    return Panel(title, draw(traces, layout), height=340)


def some(rows: np.ndarray, most: int) -> np.ndarray:
    """At most so many of the rows, in their order, chosen at random with a fixed seed."""
    return np.sort(np.random.default_rng(0).permutation(rows)[:most])


def binned_quantiles(truth: np.ndarray, estimate: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(bins,) middles of bins of the truth, and (5, bins) quantiles of the estimate in each.

    Args:
        truth: (n,) above 0.
        estimate: (n,).
    """
    edges = np.geomspace(truth.min(), truth.max(), NUM_BINS + 1)
    places = np.clip(np.searchsorted(edges, truth, side="right") - 1, 0, NUM_BINS - 1)
    filled = np.nonzero(np.bincount(places, minlength=NUM_BINS) >= SMALLEST_BIN)[0]
    order = np.argsort(places, kind="stable")
    starts = np.searchsorted(places[order], np.arange(NUM_BINS + 1))
    groups = [estimate[order[starts[place] : starts[place + 1]]] for place in filled]
    quantiles = np.array([np.quantile(group, QUANTILES) for group in groups]).reshape(len(groups), len(QUANTILES))
    return np.sqrt(edges[filled] * edges[filled + 1]), quantiles.T


def _band_keys(style: Look) -> tuple[Key, ...]:
    return (
        Key("line", style.colour, "median of the estimate"),
        Key("band", style.faded(0.42), "25 to 75 %"),
        Key("band", style.faded(0.16), "5 to 95 %"),
    )


def _bands(cloud: _Cloud, style: Look) -> list[dict[str, Any]]:
    middles, (p05, p25, p50, p75, p95) = binned_quantiles(cloud.truth[cloud.shown], cloud.estimate[cloud.shown])
    return [
        band(middles, p05, p95, style.faded(0.16), "5–95 %"),
        band(middles, p25, p75, style.faded(0.32), "25–75 %"),
        line(middles, p50, "median", style.colour, hovertemplate="truth %{x:.3g}<br>median estimate %{y:.3g}"),
    ]


def _points(cloud: _Cloud, rows: np.ndarray, name: str, marker: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "markers",
        "x": cloud.truth[rows].astype(np.float32),
        "y": cloud.estimate[rows].astype(np.float32),
        "text": cloud.names(rows),
        "name": name,
        "marker": marker,
        "hovertemplate": "%{text}<br>truth %{x:.3g}<br>estimate %{y:.3g}",
    }


def diagonal(low: float, high: float, name: str) -> dict[str, Any]:
    """The line on which both axes have the same value."""
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
