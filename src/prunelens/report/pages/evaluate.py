"""The page of tasks: verdicts first, then differences, scores, long texts and changed answers."""

from collections.abc import Mapping
from typing import Any

import jinja2
from markupsafe import Markup

from prunelens.report.figures.drawing import GRID, MUTED, Figure, Key, Look, Panel, axis, draw, look, plot_text
from prunelens.report.pages.environment import THEME, environment
from prunelens.report.pages.payload import script_json
from prunelens.report.task_words import (
    UNITS,
    amount,
    chance_words,
    decoding_lines,
    is_shown_as_share,
    items_words,
    null_lines,
    remark,
)
from prunelens.report.wording import shorten
from prunelens.study.rows import rows_of
from prunelens.study.store import Run
from prunelens.tracing.sampling import OWN, PLAIN

MAX_CHANGED = 60
DRAWN = "Drawn with the same random numbers by every model"
ROW_HEIGHT = 26

Record = Mapping[str, Any]


def render_evaluation(run: Run) -> str:
    """The whole page: one HTML file that needs no network and no model."""
    from plotly.offline import get_plotlyjs

    info = run.info
    return (
        task_environment()
        .get_template("evaluation.html")
        .render(
            title=f"{info['dense']['name']} on tasks",
            lines=[", ".join(info["tasks"])],
            plotly=Markup(get_plotlyjs()),
            theme=Markup(script_json(THEME)),
            info=info,
            summary=info["summary"],
            rules=rules(info["thresholds"]),
            figures=[figure] if (figure := differences_figure(info["summary"])) else [],
            texts=_texts(run),
            cut=_cut(run),
            changed=_changed(run),
            made=_made(info),
            notes=[*decoding_lines(info), *null_lines(info), *info["notes"]],
        )
    )


def render_evaluation_summary(run: Run) -> str:
    """The verdicts and scores as an HTML fragment for a notebook."""
    return task_environment().get_template("evaluation_summary.html").render(summary=run.info["summary"])


def task_environment() -> jinja2.Environment:
    """The templates' environment with what verdicts and scores need."""
    found = environment()
    found.globals["score_cells"] = score_cells
    return found


def rules(thresholds: Record) -> str:
    """The thresholds in one sentence."""
    return (
        f"Safe: at least {100 * thresholds['safe']:g} % of the dense score or agreement; broken: less than "
        f"{100 * thresholds['broken']:g} %. Long texts: excess NLL at most {thresholds['safe_nll']:g} and more than "
        f"{thresholds['broken_nll']:g} nats per token, looping texts at most {100 * thresholds['safe_loops']:g} and "
        f"more than {100 * thresholds['broken_loops']:g} points beyond the dense model's."
    )


def score_cells(record: Record) -> list[dict[str, Any]]:
    """The rows of a score table as text."""
    found, task = [], None
    for row in record["scores"]:
        share = is_shown_as_share(row)
        found.append(
            {
                "first": row["task"] != task,
                "task": f"{shorten(row['task'], 60)} ({items_words(row)} items)",
                "metric": row["metric"],
                "meaning": UNITS.get(row["metric"], "share" if share else ""),
                "dense": amount(row["dense"], share),
                "chance": chance_words(row),
                "compressed": amount(row["compressed"], share),
                "difference": amount(row["difference"], share),
                "flips": "" if row["lost"] is None else f"{row['lost']} / {row['gained']} (p {row['sign_test']:.2g})",
                "remark": remark(row),
            }
        )
        task = row["task"]
    return found


def differences_figure(summary: list[Record]) -> Figure | None:
    """For each task the deciding metric's difference to the dense model, one mark a compressed model."""
    shown = [
        [row for row in record["scores"] if row["decides"] and row["difference"]["low"] is not None]
        for record in summary
    ]
    shares = [[row for row in rows if row["decides"] != "nll" and row.get("adds", True)] for rows in shown]
    costs = [[row for row in rows if row["decides"] == "nll"] for rows in shown]
    panels = [
        panel
        for panel in (
            _differences(summary, shares, "Scores and shares", "compressed − dense, points", 100.0),
            _differences(summary, costs, "Long texts", "excess NLL under the dense model, nats per token", 1.0),
        )
        if panel
    ]
    if not panels:
        return None
    return Figure(
        "Compressed minus dense, with 95 % intervals",
        "A mark on the line in the middle is a tie with the dense model; for loops and excess NLL right is worse, for "
        "all else left is worse.",
        tuple(panels),
        keys=tuple(
            Key("dot", look(index, "").colour, shorten(record["compressed"], 48))
            for index, record in enumerate(summary)
        ),
    )


def _differences(
    summary: list[Record], chosen: list[list[Record]], title: str, quantity: str, scale: float
) -> Panel | None:
    names = list(dict.fromkeys(f"{row['task']}: {row['metric']}" for rows in chosen for row in rows))
    if not names:
        return None
    traces = []
    for index, (record, rows) in enumerate(zip(summary, chosen, strict=True)):
        offset = (index - (len(summary) - 1) / 2) * 0.7 / max(1, len(summary))
        places = [names.index(f"{row['task']}: {row['metric']}") + offset for row in rows]
        traces.append(_marks(look(index, record["compressed"]), rows, places, scale))
    height = 90 + ROW_HEIGHT * len(names) * max(1, (len(summary) + 1) // 2)
    layout = {
        "xaxis": axis(quantity, zeroline=True, zerolinecolor=MUTED, zerolinewidth=2),
        "yaxis": axis(
            "",
            tickvals=list(range(len(names))),
            ticktext=[plot_text(name) for name in names],
            range=[len(names) - 0.5, -0.5],
            gridcolor=GRID,
        ),
    }
    return Panel(title, draw(traces, layout), height=height)


def _marks(style: Look, rows: list[Record], places: list[float], scale: float) -> dict[str, Any]:
    middle, low, high = ([scale * row["difference"][end] for row in rows] for end in ("mean", "low", "high"))
    return {
        "type": "scatter",
        "mode": "markers",
        "x": middle,
        "y": places,
        "name": style.name,
        "showlegend": False,
        "marker": {"color": style.colour, "symbol": style.symbol, "size": 8},
        "error_x": {
            "type": "data",
            "symmetric": False,
            "array": [end - at for end, at in zip(high, middle, strict=True)],
            "arrayminus": [at - end for end, at in zip(low, middle, strict=True)],
            "color": style.colour,
            "thickness": 1.5,
        },
        "hovertemplate": f"{style.name}: %{{x:.3g}}<extra></extra>",
    }


def _texts(run: Run) -> list[dict[str, Any]]:
    rows = run.tables["texts"].to_pylist()
    prompts = dict.fromkeys((row["prompt_id"], row["prompt"]) for row in rows)
    return [
        {
            "prompt": prompt,
            "texts": [
                {"model": row["model"], "text": row["text"], "remark": _remark(row)}
                for row in rows
                if row["prompt_id"] == key
            ],
        }
        for key, prompt in prompts
    ]


def _remark(row: Record) -> str:
    end = "ended by itself" if row["ended"] else "cut by the limit"
    cost = f"{row['nll_dense']:.2f} nats per token under the dense model"
    if row["entropy_dense"] is not None:
        cost += f", which expects {row['entropy_dense']:.2f}"
    flags = [word for word, holds in (("loops", row["loops"]), ("atypical", row["atypical"])) if holds]
    drawn = {PLAIN: ["T = 1"], OWN: ["own settings"]}.get(row["sampling"], [])
    return ", ".join([*flags, *drawn, f"{row['num_tokens']} tokens", end, cost])


def _cut(run: Run) -> str:
    dense = rows_of(run.tables["texts"], model="dense").to_pylist()
    whole = sum(not row["ended"] for row in dense)
    drawn = any(row["sampling"] is not None for row in dense)
    how = f"{DRAWN if drawn else 'Greedy decoding'} after the same prompt."
    return (
        f"{how} The limit of {run.info['settings']['long_tokens']} tokens cut {whole} "
        f"of the dense model's {len(dense)} texts; of those no ending can be judged."
    )


def _changed(run: Run) -> list[dict[str, Any]]:
    """For each compressed model the items that the dense model got right and it gets wrong."""
    found = []
    dense = {_key(row): row for row in rows_of(run.tables["tasks"], model="dense").to_pylist()}
    for record in run.info["summary"]:
        deciding = {
            (row["task"], row["metric"]) for row in record["scores"] if row["lost"] and row["decides"] == "kept"
        }
        rows = []
        for row in rows_of(run.tables["tasks"], model=record["compressed"]).to_pylist():
            before = dense.get(_key(row))
            if (row["task"], row["metric"]) in deciding and before and before["value"] == 1 and row["value"] == 0:
                rows.append(row | {"dense": before["answer"] or "", "compressed": row["answer"] or ""})
        if rows:
            found.append({"label": record["compressed"], "total": len(rows), "rows": rows[:MAX_CHANGED]})
    return found


def _key(row: Record) -> tuple[str, str, str]:
    return row["task"], row["metric"], row["item_id"]


def _made(info: Record) -> list[tuple[str, Any]]:
    dense = info["dense"]
    found = [
        ("dense model", f"{dense['name']}, {dense['family']}, {dense['dtype']} on {dense['device']}"),
        ("fingerprint", dense["fingerprint"]),
        *((name.replace("_", " "), value) for name, value in info["settings"].items()),
        *_decoding(info),
        ("seconds", info["seconds"]),
        ("made", info["created"]),
        ("versions", [f"{name} {value}" for name, value in info["versions"].items()]),
    ]
    return [(name, value) for name, value in found if value is not None]


def _decoding(info: Record) -> list[tuple[str, Any]]:
    """How answers were written, by model; nothing where no task of the harness has any written, or nobody says."""
    found = info.get("decoding", {}).get("harness", {})
    return [
        (f"generation settings of {label}", [f"{name} {value}" for name, value in own.items()] or "plain")
        for label, own in found.items()
        if own is not None
    ]
