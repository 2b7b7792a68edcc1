"""What each sublayer does to its own input (L1): heat maps of sublayer by space and of sublayer by step."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from prunelens.report.figures.drawing import HEAT, INK, ZERO, Figure, Key, Panel, axis, draw
from prunelens.report.figures.layers import (
    COSINES,
    KL,
    Place,
    Traced,
    absent,
    block_axis,
    cell_means,
    changed_places,
    kind_name,
    lens_of,
    num_blocks,
    parallel_note,
    place_name,
    sample,
    traced,
)
from prunelens.report.figures.noise import floor_note
from prunelens.report.figures.scales import Scale, scale_key, scale_of
from prunelens.report.wording import number
from prunelens.study.store import Run

SPACES = ("h", "z", "p")
ROW_HEIGHT = 26
NOT_COMPUTED = "not computed"


@dataclass(frozen=True)
class _Local:
    """The rows that a figure draws, and what is said of them."""

    rows: Traced
    changed: set[Place]
    blocks: int
    dropped: bool

    @property
    def framed(self) -> set[Place]:
        """The changed sublayers, where they are few enough for frames to tell them from the others."""
        return self.changed if 2 * len(self.changed) <= len(self.rows.places()) else set()


def local_figures(run: Run, index: int) -> list[Figure]:
    """Both heat maps of one compressed model; one empty figure where nothing was measured."""
    found = _local(run, index)
    if not len(found.rows):
        return [
            Figure("What each sublayer does to its own input", "", (Panel("", empty=absent(run, index)),), (), index)
        ]
    return [_spaces_figure(run, index, found), _steps_figure(run, index, found)]


def _local(run: Run, index: int) -> _Local:
    """For a recipe what taking out any sublayer alone would do; for a changed model its own sublayers."""
    record, lens = run.info["compressed"][index], lens_of(run)
    dropped = traced(run, "dense", "dropped", lens) if "dropped" in record else None
    use_dropped = dropped is not None and len(dropped) > 0
    rows = dropped if dropped is not None and use_dropped else traced(run, record["label"], "local", lens)
    return _Local(rows, changed_places(run, index), num_blocks(run), use_dropped)


def _spaces_figure(run: Run, index: int, found: _Local) -> Figure:
    grids = {kind: _space_grid(found, kind) for kind in found.rows.kinds()}
    cosine = scale_of(*(means[:3] for means, _ in grids.values()))
    kl = scale_of(*(means[3:] for means, _ in grids.values()))
    panels = [_spaces_panel(found, kind, means, counts, cosine, kl) for kind, (means, counts) in grids.items()]
    return Figure(
        "What each sublayer does to its own input, in each space",
        _reading(
            found,
            "A column is one sublayer, a row one measure; the further right a cell's colour",
        ),
        tuple(panels),
        (
            f"Mean over {sample(run)}. {_lens_words(run)}",
            _changed_words(found),
            floor_note(run.info, {"KL": KL}, unit=" nats"),
            parallel_note(run, "local"),
        ),
        index,
        (
            scale_key("1 − cosine", cosine),
            scale_key("KL, nats", kl),
            *_keys(found, [means for means, _ in grids.values()]),
        ),
        across=2 if len(panels) > 1 else 1,
    )


def _steps_figure(run: Run, index: int, found: _Local) -> Figure:
    steps = sorted(set(found.rows.step.tolist()))
    grids = {kind: _step_grid(found, kind, steps) for kind in found.rows.kinds()}
    scale = scale_of(*(means for means, _ in grids.values()))
    rows = [str(step) for step in steps]
    panels = [
        _heat_panel(found, kind, rows, [_Layer(means, counts, scale, ("KL",) * len(rows), " nats")], "step")
        for kind, (means, counts) in grids.items()
    ]
    first, last = (max(int(counts[row].max()) for _, counts in grids.values()) for row in (0, -1))
    return Figure(
        "What each sublayer does to its own input, step by step",
        _reading(found, "A cell is one sublayer at one step; the further right its colour"),
        tuple(panels),
        (
            f"Mean over prompts at {sample(run)}; texts end at different steps: {first} at step {steps[0]}, "
            f"{last} at step {steps[-1]}.",
        ),
        index,
        (scale_key("KL, nats", scale), *_keys(found, [means for means, _ in grids.values()])),
        across=2 if len(panels) > 1 else 1,
    )


def _reading(found: _Local, start: str) -> str:
    what = (
        "it alone is left out of the dense model"
        if found.dropped
        else "the dense sublayer and its compressed twin read the same input"
    )
    return f"{start} on its logarithmic scale, the larger the change right after it when {what}."


def _lens_words(run: Run) -> str:
    if lens_of(run) == "raw":
        return "The stream after the sublayer is read by the head without the final norm; h is the stream itself."
    return "The stream after the sublayer is read through the final norm and the head; h is the normed state."


def _changed_words(found: _Local) -> str:
    """Which of the columns this compressed model really has."""
    total = len(found.rows.places())
    if not found.changed:
        return "This model changes none of these sublayers."
    if len(found.changed) == total:
        return "This model changes every sublayer."
    verb = "takes out" if found.dropped else "changes"
    if len(found.changed) == 1:
        said, framed = f"This model {verb} the {place_name(next(iter(found.changed)))}", ", which is framed"
    else:
        said, framed = f"This model {verb} {len(found.changed)} of these {total} sublayers", ", which are framed"
    return f"{said}{framed if found.framed else ''}."


def _space_grid(found: _Local, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Means and counts of h, z, p and KL (down) in each block (across)."""
    rows, own = found.rows, found.rows.kind == kind
    blocks = rows.block[own]
    cells = [
        cell_means(rows.deviation(name)[own], np.zeros_like(blocks), blocks, (1, found.blocks))
        for name in (*COSINES, KL)
    ]
    return np.concatenate([means for means, _ in cells]), np.concatenate([counts for _, counts in cells])


def _step_grid(found: _Local, kind: str, steps: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Means over prompts and counts of the KL, step down and block across."""
    rows, own = found.rows, found.rows.kind == kind
    down = np.searchsorted(steps, rows.step[own])
    means, counts = cell_means(rows.deviation(KL)[own], down, rows.block[own], (len(steps), found.blocks))
    return means, counts


def _keys(found: _Local, grids: Sequence[np.ndarray]) -> list[Key]:
    """Keys of the marks that do occur."""
    keys = []
    if any(np.any(grid == 0) for grid in grids):
        keys.append(Key("fill", "var(--zero)", "exactly 0"))
    if found.framed:
        keys.append(Key("frame", "var(--ink)", "taken out by this model" if found.dropped else "changed by this model"))
    return keys


@dataclass(frozen=True)
class _Layer:
    """Consecutive rows of a heat map that share a scale."""

    means: np.ndarray
    counts: np.ndarray
    scale: Scale | None
    names: tuple[str, ...]
    unit: str = ""


def _spaces_panel(
    found: _Local,
    kind: str,
    means: np.ndarray,
    counts: np.ndarray,
    cosine: Scale | None,
    kl: Scale | None,
) -> Panel:
    layers = [
        _Layer(means[:3], counts[:3], cosine, tuple(f"1 − cosine of {space}" for space in SPACES)),
        _Layer(means[3:], counts[3:], kl, ("KL",), " nats"),
    ]
    return _heat_panel(found, kind, [*(f"1 − cos {space}" for space in SPACES), "KL"], layers, "")


def _heat_panel(found: _Local, kind: str, rows: list[str], layers: list[_Layer], title: str) -> Panel:
    """One kind of sublayer: blocks across, `rows` from the top down."""
    name = kind_name(kind)
    traces: list[dict[str, Any]] = []
    first = 0
    for layer in layers:
        traces += _heat_traces(layer, first, kind)
        first += len(layer.means)
    layout = {
        "xaxis": block_axis(found.blocks, showgrid=False),
        "yaxis": axis(
            title,
            range=[len(rows) - 0.5, -0.5],
            tickvals=list(range(len(rows))),
            ticktext=rows,
            showgrid=False,
        ),
        "shapes": _frames(found.framed, kind, len(rows)),
        "showlegend": False,
    }
    return Panel(name[0].upper() + name[1:], draw(traces, layout), height=min(ROW_HEIGHT * len(rows), 480) + 64)


def _heat_traces(layer: _Layer, first: int, kind: str) -> list[dict[str, Any]]:
    """The cells above 0 on the logarithmic scale, and those that are exactly 0."""
    scale = layer.scale or Scale(0.1, 1.0)
    logs = np.full(layer.means.shape, np.nan)
    np.log10(np.clip(layer.means, scale.low, None), out=logs, where=np.isfinite(layer.means) & (layer.means != 0))
    shared = {
        "type": "heatmap",
        "y": np.arange(first, first + len(layer.means)),
        "showscale": False,
        "xgap": 1,
        "ygap": 1,
    }
    zeros = np.where(layer.means == 0, 0.0, np.nan)
    heat = {
        **shared,
        "z": np.round(logs, 3),
        "zmin": float(np.log10(scale.low)),
        "zmax": float(np.log10(scale.high)),
        "colorscale": [[place / (len(HEAT) - 1), colour] for place, colour in enumerate(HEAT)],
        "text": _hover(layer, kind),
        "hovertemplate": "%{text}<extra></extra>",
    }
    flat = {**shared, "z": zeros, "zmin": 0, "zmax": 1, "colorscale": [[0, ZERO], [1, ZERO]], "hoverinfo": "skip"}
    return [heat, flat] if np.any(layer.means == 0) else [heat]


def _hover(layer: _Layer, kind: str) -> list[list[str]]:
    return [
        [
            f"block {block}, {kind_name(kind)}<br>{name}: {_value(value, int(count), layer.unit)}"
            for block, (value, count) in enumerate(zip(values, counts, strict=True))
        ]
        for name, values, counts in zip(layer.names, layer.means, layer.counts, strict=True)
    ]


def _value(value: float, count: int, unit: str) -> str:
    if not np.isfinite(value):
        return NOT_COMPUTED
    said = "exactly 0" if value == 0 else number(float(value)) + unit
    return f"{said}<br>mean of {count}"


def _frames(changed: set[Place], kind: str, rows: int) -> list[dict[str, Any]]:
    """Frames around the columns of the sublayers that a compressed model changes."""
    return [
        {
            "type": "rect",
            "x0": block - 0.5,
            "x1": block + 0.5,
            "y0": -0.5,
            "y1": rows - 0.5,
            "line": {"color": INK, "width": 2},
        }
        for block, own in sorted(changed)
        if own == kind
    ]
