"""Which sublayer causes the damage at the end (D1): KL of each alone, beside what the cosine ranking says of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from prunelens.metrics.intervals import ratio_interval
from prunelens.report.figures.attribution_words import REST, sentences
from prunelens.report.figures.drawing import INK, MUTED, Figure, Key, Look, Panel, draw, log_axis, look, positive
from prunelens.report.figures.layers import KL, block_axis, kind_name, num_blocks, place_name
from prunelens.report.figures.noise import floor_lines, floor_note
from prunelens.report.wording import interval, number
from prunelens.study.rows import by_prompt, column, rows_of
from prunelens.study.store import Run

TITLE = "The damage at the end, by the sublayer that causes it"
SYMBOLS = {"attention": "circle", "mlp": "square"}
KL_TITLE = "KL at the head, nats"
FAR_BELOW = 4.0
MAX_NAMED = 3
CLEAR = 1.3
"""Most sublayers that are named in the second panel, and how much more damage than the next each must do."""


@dataclass(frozen=True)
class _Dots:
    """Sublayers as dots: where they stand on the axis of blocks, the KL alone with its interval, 1 - score."""

    parts: list[Mapping[str, Any]]
    x: np.ndarray
    kl: np.ndarray
    cosine: np.ndarray

    def __len__(self) -> int:
        return len(self.parts)

    def name(self, row: int) -> str:
        """A sublayer as people call it."""
        return place_name((self.parts[row]["layer_idx"], self.parts[row]["sublayer"]))


def attribution_figure(run: Run, index: int) -> Figure | None:
    """Damage of each sublayer alone, by depth and against the cosine ranking; None where it was not asked for."""
    record = run.info["summary"][index].get("attribution")
    if not record:
        return None
    label = run.info["compressed"][index]["label"]
    style, parts = look(index, label), [part for part in record["parts"] if part["sublayer"] != REST]
    dots = _dots(parts)
    saved = _saved(run, label, dots)
    yaxis = _kl_axis(dots, saved)
    panels = [_depth_panel(run, dots, saved, yaxis, style)]
    if np.any((dots.cosine > 0) & (dots.kl[1] > 0)):
        panels.append(_ranking_panel(run, dots, yaxis, style))
    return Figure(
        TITLE,
        "A bar ends at the mean KL at the head when only this sublayer is compressed, with its 95 % interval over "
        "prompts, on a logarithmic axis; in the second panel the same sublayers stand in the order of cosine, the most "
        "redundant first, so a good ranking rises.",
        tuple(panels),
        (
            _left_out(dots),
            _negative(dots, saved),
            floor_note(run.info, {"KL": KL}, yaxis, " nats"),
        ),
        index,
        _keys(dots, saved, style),
        across=2 if len(panels) > 1 else 1,
        says=tuple(sentences(record, parts)),
    )


def _dots(parts: list[Mapping[str, Any]]) -> _Dots:
    kinds = sorted({part["sublayer"] for part in parts})
    shift = {kind: 0.36 * (order - (len(kinds) - 1) / 2) for order, kind in enumerate(kinds)}
    return _Dots(
        parts,
        np.array([part["layer_idx"] + shift[part["sublayer"]] for part in parts], dtype=float),
        np.array([[part["kl"][key] for part in parts] for key in ("low", "mean", "high")], dtype=float),
        np.array([np.nan if part["redundancy"] is None else 1 - part["redundancy"] for part in parts], dtype=float),
    )


def _saved(run: Run, label: str, dots: _Dots) -> np.ndarray:
    """(low, mean, high) of KL of all minus KL of all but one, paired by prompt; NaN where it says nothing new."""
    found = np.full((3, len(dots)), np.nan)
    if sum(bool(part["changed"]) for part in dots.parts) < 2:
        return found
    steps = rows_of(run.tables["steps"], compressed=label, trace="greedy")
    whole = {key: float(np.sum(values)) for key, values in by_prompt(steps, KL)}
    rows = rows_of(run.tables["attribution"], compressed=label, changed=True)
    for order, part in enumerate(dots.parts):
        own = rows_of(rows, layer_idx=part["layer_idx"], sublayer=part["sublayer"])
        if not part["changed"] or not own.num_rows:
            continue
        counts = column(own, "num_steps")
        before = np.array([whole.get(key, np.nan) for key in own["prompt_id"].to_pylist()])
        kept = (counts > 0) & np.isfinite(before)
        if kept.any():
            gain = ratio_interval((before - column(own, "kl_all_but") * counts)[kept], counts[kept])
            found[:, order] = gain.low, gain.value, gain.high
    return found


def _kl_axis(dots: _Dots, saved: np.ndarray) -> dict[str, Any]:
    """The axis of both panels; lower ends of intervals far below every mean do not stretch it."""
    means, ends = positive(dots.kl[1], saved[1]), positive(dots.kl[2], saved[2])
    if not len(means):
        return log_axis(KL_TITLE, 1e-6, 1.0)
    lows = positive(dots.kl[0], saved[0])
    low = max(float(min(lows, default=means.min())), float(means.min()) / FAR_BELOW)
    return log_axis(KL_TITLE, 0.85 * low, float(max(means.max(), ends.max(initial=0))))


def _depth_panel(run: Run, dots: _Dots, saved: np.ndarray, yaxis: dict[str, Any], style: Look) -> Panel:
    title = "KL of each sublayer alone, by depth"
    if not np.any(dots.kl[1] > 0):
        return Panel(title, empty="Every KL is exactly 0.")
    blocks = num_blocks(run)
    traces = [
        *_dot_traces(dots, dots.x, yaxis, style),
        _saved_trace(dots, saved, yaxis),
        *floor_lines(run.info, KL, (-0.5, blocks - 0.5), yaxis),
        _bars(dots, yaxis, style),
    ]
    kinds = _kinds(dots)
    blocks_of = f"block ({kind_name(kinds[0])} sublayers)" if len(kinds) == 1 else "block"
    layout = {"xaxis": block_axis(blocks, blocks_of), "yaxis": yaxis, "showlegend": False}
    return Panel(title, draw(traces, layout), height=400)


def _kinds(dots: _Dots) -> list[str]:
    return sorted({part["sublayer"] for part in dots.parts})


def _bars(dots: _Dots, yaxis: dict[str, Any], style: Look) -> dict[str, Any]:
    """Light bars from the axis up to the means; the dots carry the intervals and the words."""
    rows = np.nonzero(dots.kl[1] > 0)[0]
    floor = 10 ** (yaxis["range"][0] - 1)
    return {
        "type": "bar",
        "x": dots.x[rows],
        "y": np.maximum(dots.kl[1, rows] - floor, 0),
        "base": floor,
        "width": 0.7 / len(_kinds(dots)),
        "marker": {"color": [style.colour if dots.parts[row]["changed"] else MUTED for row in rows], "opacity": 0.25},
        "hoverinfo": "skip",
    }


def _ranking_panel(run: Run, dots: _Dots, yaxis: dict[str, Any], style: Look) -> Panel:
    values = positive(dots.cosine)
    xaxis = log_axis("1 − cosine score of the ranking (no unit)", float(values.min()), float(values.max()))
    ends = (10 ** xaxis["range"][0], 10 ** xaxis["range"][1])
    traces = [
        *_dot_traces(dots, dots.cosine, yaxis, style),
        *floor_lines(run.info, KL, ends, yaxis),
        _names(dots, xaxis),
    ]
    layout = {"xaxis": xaxis, "yaxis": yaxis, "showlegend": False}
    return Panel("The same KL, in the order of the cosine ranking", draw(traces, layout), height=400)


def _names(dots: _Dots, xaxis: dict[str, Any]) -> dict[str, Any]:
    """Names beside the dots that do most damage, where they stand clear of the next."""
    shown = [int(row) for row in np.nonzero((dots.kl[1] > 0) & (dots.cosine > 0))[0]]
    worst = sorted(shown, key=lambda row: -dots.kl[1, row])
    clear = [dots.kl[1, row] > CLEAR * dots.kl[1, below] for row, below in pairwise(worst)]
    rows = [row for row, free in zip(worst[:MAX_NAMED], clear, strict=False) if free]
    middle = 10 ** (sum(xaxis["range"]) / 2)
    return {
        "type": "scatter",
        "mode": "text",
        "x": dots.cosine[rows],
        "y": dots.kl[1, rows],
        "text": [f"\u00a0\u00a0{dots.name(row)}\u00a0\u00a0" for row in rows],
        "textposition": [f"middle {'left' if dots.cosine[row] > middle else 'right'}" for row in rows],
        "textfont": {"size": 11, "color": MUTED},
        "hoverinfo": "skip",
    }


def _dot_traces(dots: _Dots, x: np.ndarray, yaxis: dict[str, Any], style: Look) -> list[dict[str, Any]]:
    """One trace for the sublayers that are changed and one for the others."""
    changed = np.array([bool(part["changed"]) for part in dots.parts])
    shown = (dots.kl[1] > 0) & np.isfinite(x) & (x > -1 if x is dots.x else x > 0)
    return [
        _dot_trace(dots, x, np.nonzero(shown & wanted)[0], yaxis, colour, ending)
        for wanted, colour, ending in ((~changed, MUTED, "-open"), (changed, style.colour, ""))
        if np.any(shown & wanted)
    ]


def _dot_trace(
    dots: _Dots, x: np.ndarray, rows: np.ndarray, yaxis: dict[str, Any], colour: str, ending: str
) -> dict[str, Any]:
    symbols = [SYMBOLS.get(dots.parts[row]["sublayer"], "diamond") + ending for row in rows]
    return {
        "type": "scatter",
        "mode": "markers",
        "x": x[rows],
        "y": dots.kl[1, rows],
        "error_y": _errors(dots.kl[:, rows], yaxis, colour),
        "text": [_dot_words(dots, int(row)) for row in rows],
        "marker": {"symbol": symbols, "size": 8, "color": colour, "line": {"color": colour, "width": 1.5}},
        "hovertemplate": "%{text}<extra></extra>",
    }


def _dot_words(dots: _Dots, row: int) -> str:
    part = dots.parts[row]
    score = f"<br>1 − cosine score {number(float(dots.cosine[row]))}" if np.isfinite(dots.cosine[row]) else ""
    return f"{dots.name(row)}<br>KL alone {number(part['kl']['mean'])} nats {interval(part['kl'])}{score}"


def _errors(values: np.ndarray, yaxis: dict[str, Any], colour: str) -> dict[str, Any]:
    """Error bars; a lower end that a logarithmic axis cannot show stops below it."""
    low, mean, high = values
    floor = 10 ** yaxis["range"][0] / 2
    return {
        "type": "data",
        "symmetric": False,
        "array": high - mean,
        "arrayminus": np.maximum(mean - np.maximum(low, floor), 0),
        "color": colour,
        "thickness": 1.2,
        "width": 2,
    }


def _saved_trace(dots: _Dots, saved: np.ndarray, yaxis: dict[str, Any]) -> dict[str, Any]:
    """What restoring one sublayer alone saves, a little to the right of its damage."""
    rows = [int(row) for row in np.nonzero(saved[1] > 0)[0]]
    words = [
        f"{dots.name(row)}<br>saved by restoring it "
        f"{number(float(saved[1, row]))} nats {interval({'low': float(saved[0, row]), 'high': float(saved[2, row])})}"
        for row in rows
    ]
    return {
        "type": "scatter",
        "mode": "markers",
        "x": dots.x[rows] + 0.22,
        "y": saved[1, rows],
        "error_y": _errors(saved[:, rows], yaxis, INK),
        "text": words,
        "marker": {"symbol": "diamond-open", "size": 8, "color": INK, "line": {"color": INK, "width": 1.5}},
        "hovertemplate": "%{text}<extra></extra>",
    }


def _keys(dots: _Dots, saved: np.ndarray, style: Look) -> tuple[Key, ...]:
    kinds = _kinds(dots)
    keys = [Key("dot", style.colour, "changed by this model")]
    if not all(part["changed"] for part in dots.parts):
        keys.append(Key("ring", "var(--muted)", "kept by this model: what dropping it alone would do"))
    if np.any(saved[1] > 0):
        keys.append(Key("diamond", "var(--ink)", "saved by restoring it alone"))
    if len(kinds) > 1:
        keys.append(Key("none", "inherit", "round: attention, square: MLP"))
    return tuple(keys)


def _left_out(dots: _Dots) -> str:
    zeros = int(np.sum(dots.kl[1] <= 0))
    unknown = int(np.sum(~np.isfinite(dots.cosine)))
    parts = [f"{zeros} with a KL of exactly 0 are not drawn"] if zeros else []
    if 0 < unknown < len(dots):
        parts.append(f"{unknown} without a score are missing in the second panel")
    return f"Of {len(dots)} sublayers {'; '.join(parts)}." if parts else ""


def _negative(dots: _Dots, saved: np.ndarray) -> str:
    """Sublayers whose return would make things worse, which a logarithmic axis cannot show."""
    rows = np.nonzero(saved[1] <= 0)[0]
    if not len(rows):
        return ""
    named = ", ".join(f"{dots.name(int(row))} ({number(float(saved[1, row]))} nats)" for row in rows[:4])
    more = f" and {len(rows) - 4} more" if len(rows) > 4 else ""
    return f"Restoring these alone saves nothing, and they have no diamond: {named}{more}."
