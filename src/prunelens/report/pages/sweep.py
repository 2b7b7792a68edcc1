"""The page of a sweep: verdicts, models alike in multiple choice, damage against size, and forecasts."""

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from prunelens.report.figures.drawing import INK, Figure, Key, Look, Panel, axis, draw, look, plot_text
from prunelens.report.pages.environment import THEME
from prunelens.report.pages.evaluate import rules, task_environment
from prunelens.report.pages.payload import script_json
from prunelens.report.wording import correlation_words, number, percent
from prunelens.study.store import Run
from prunelens.study.sweep.forecasts import use_loss
from prunelens.study.sweep.tables import is_drop, is_mask

LOOPS = "long-generation, loops"
KL = "KL per token"
QUANTITY = {
    "retrieval": "share of the dense score kept, %",
    "multiple-choice": "share of the dense score kept, %",
    "short-generation": "share of the dense score kept, %",
    "long-generation": "excess NLL, nats per token",
    LOOPS: "more looping texts, points",
    KL: "nats",
}
"""What each panel of damage against size shows."""

Row = Mapping[str, Any]


def render_sweep(run: Run) -> str:
    """The whole page: one HTML file that needs no network and no model."""
    from plotly.offline import get_plotlyjs

    info = run.info
    model = info["study"]["model"]
    return (
        task_environment()
        .get_template("sweep.html")
        .render(
            title=f"sweep of {model}",
            lines=[f"{info['cells']['done']} of {info['cells']['all']} cells, {len(info['study']['seeds'])} seed(s)"],
            plotly=Markup(get_plotlyjs()),
            theme=Markup(script_json(THEME)),
            model=model,
            info=info,
            done=[record for record in info["summary"] if record["status"] == "done"],
            failed=[record for record in info["summary"] if record["status"] == "failed"],
            rules=rules(info["study"]["thresholds"]),
            alike=[_alike(row) for row in info["alike"]],
            figures=[figure for figure in size_figures(run) if figure],
            forecasts=[figure] if (figure := calibration_figure(info["calibration"])) else [],
            notes=info.get("notes", []),
        )
    )


def render_sweep_summary(run: Run) -> str:
    """Verdicts as an HTML fragment for a notebook."""
    done = [record for record in run.info["summary"] if record["status"] == "done"]
    return task_environment().get_template("sweep_summary.html").render(done=done)


def _alike(row: Row) -> dict[str, str]:
    return {
        "recipe": row["recipe"],
        "choice": percent(row["choice"]),
        "dense": percent(row["choice_dense"]),
        "short": percent(row["short_kept"]),
        "loops": f"{100 * row['loops']:+.0f} points" if row["loops"] is not None else "—",
        "nll": number(row["excess_nll"]),
        "survival": percent(row["survival_8"]),
        "kl": number(row["kl"]),
    }


def size_figures(run: Run) -> list[Figure | None]:
    """Damage against size: whole parts taken out, and single weights set to zero, a panel for each class of use."""
    rows = {name: table.to_pylist() for name, table in run.tables.items()}
    done = [row for row in rows["cells"] if row["status"] == "done"]
    return [
        _size_figure(
            rows,
            [row for row in done if is_drop(row["kind"])],
            "Whole parts taken out: what each class of use keeps",
            "parameters_saved",
            "parameters saved, %",
        ),
        _size_figure(
            rows,
            [row for row in done if is_mask(row["kind"])],
            "Single weights set to zero: what each class of use keeps",
            "zeros",
            "zeros in the blocks' matrices, %",
        ),
        _size_figure(
            rows,
            [row for row in done if not is_drop(row["kind"]) and not is_mask(row["kind"])],
            "Quantised and mixed: what each class of use keeps",
            "bytes_saved",
            "bytes saved, %",
        ),
    ]


def _size_figure(
    rows: Mapping[str, Sequence[Row]], cells: list[Row], title: str, column: str, quantity: str
) -> Figure | None:
    kinds = list(dict.fromkeys(cell["kind"] for cell in cells))
    panels = []
    for shown, unit in QUANTITY.items():
        traces = [
            trace
            for place, kind in enumerate(kinds)
            if (trace := _curve(rows, [one for one in cells if one["kind"] == kind], shown, column, look(place, kind)))
        ]
        if traces:
            layout = {"xaxis": axis(quantity), "yaxis": axis(unit), "showlegend": False}
            panels.append(Panel(shown, draw(traces, layout), height=280))
    if not panels:
        return None
    return Figure(
        title,
        "A point is one cell; 100 % is the dense model's score. For long generation lower is better.",
        tuple(panels),
        keys=tuple(Key("dot", look(place, kind).colour, kind) for place, kind in enumerate(kinds)),
        across=2,
    )


def _curve(
    rows: Mapping[str, Sequence[Row]], cells: list[Row], use: str, column: str, style: Look
) -> dict[str, Any] | None:
    points = []
    for cell in cells:
        value = _shown(rows, cell["key"], use)
        if value is not None and cell[column] is not None:
            points.append((100 * cell[column], value, cell["recipe"]))
    if not points:
        return None
    points.sort()
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "x": [point[0] for point in points],
        "y": [point[1] for point in points],
        "text": [plot_text(point[2]) for point in points],
        "name": style.name,
        "line": {"color": style.colour, "width": 2},
        "marker": {"symbol": style.symbol, "size": 8},
        "hovertemplate": "%{text}: %{y:.3g}<extra></extra>",
    }


def _shown(rows: Mapping[str, Sequence[Row]], key: str, title: str) -> float | None:
    """The value of a cell in a panel."""
    if title == KL:
        return next(row["kl"] for row in rows["cells"] if row["key"] == key)
    if title == LOOPS:
        found = [row["difference"] for row in rows["scores"] if row["key"] == key and row["decides"] == "loops"]
        return 100 * sum(found) / len(found) if found else None
    loss = use_loss(rows, key, title)
    return loss if loss is None or title == "long-generation" else 100 * (1 - loss)


def calibration_figure(found: Sequence[Row]) -> Figure | None:
    """Predicted against measured over all recipes, with the rank correlation as it is."""
    if not found:
        return None
    panels, says = [], []
    for item in found:
        rho = "undefined" if item["rho"] is None else f"{item['rho']:.2f}"
        says.append(f"{item['use']}, from {item['name']}: rank correlation {correlation_words(item)}.")
        trace = {
            "type": "scatter",
            "mode": "markers",
            "x": [point["predicted"] for point in item["points"]],
            "y": [point["measured"] for point in item["points"]],
            "text": [plot_text(point["recipe"]) for point in item["points"]],
            "marker": {"color": look(0, "").colour, "size": 8},
            "hovertemplate": "%{text}: predicted %{x:.3g}, measured %{y:.3g}<extra></extra>",
        }
        loss = "measured excess NLL, nats" if item["use"] == "long-generation" else "measured share lost"
        layout = {"xaxis": axis(plot_text(item["name"])), "yaxis": axis(loss), "font": {"color": INK}}
        panels.append(Panel(f"{item['use']}: ρ = {rho}, n = {item['n']}", draw([trace], layout), height=260))
    return Figure(
        "Does the forecast tell the measured loss?",
        "Each point is one cell. A forecast that orders the recipes as the tasks do has a rank correlation of 1 "
        "(for agreed tokens, of which more is better, it is turned round); over few recipes chance alone gives one.",
        tuple(panels),
        across=3,
        says=tuple(says),
    )
