"""A run as one self-contained page, and its summary as a fragment, from the tables alone."""

from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from prunelens.report.figures import accumulation, attribution, curves, depth, generation, local, noise, options, points
from prunelens.report.figures.drawing import COLOURS, Figure
from prunelens.report.pages import answer, details, draft
from prunelens.report.pages.environment import THEME, environment
from prunelens.report.pages.payload import KL_EDGES, Texts, script_json
from prunelens.report.wording import expectation, shorten
from prunelens.study.compare.summary import by_damage_per_byte
from prunelens.study.store import Run


@dataclass(frozen=True)
class AnswerRow:
    """One compressed model of the answer table."""

    label: str
    colour: str
    cells: list[answer.Cell]
    more: list[answer.Cell]
    sentence: str = ""
    checks: str = ""
    expected: list[str] = field(default_factory=list)


def render_page(run: Run) -> str:
    """The whole page: one HTML file that needs no network, no tokenizer and no model."""
    from plotly.offline import get_plotlyjs

    texts = Texts(run)
    return (
        environment()
        .get_template("page.html")
        .render(
            plotly=Markup(get_plotlyjs()),
            texts=Markup(script_json(texts.index())),
            pieces=map(Markup, texts.pieces()),
            theme=Markup(script_json(THEME)),
            edges=KL_EDGES,
            rows=_answer_rows(run),
            ranked=[*_ranked_rows(run), *_anchor_rows(run)],
            anchors=run.info.get("anchors", []),
            columns=answer.COLUMNS,
            more=answer.MORE,
            info=run.info,
            run=_described(run),
            figures=_figures(run),
            attributed=[index for index, record in enumerate(run.info["summary"]) if record.get("attribution")],
            options=options.options_rows(run),
            damage=[details.damage(run, index) for index in range(len(run.info["compressed"]))],
            split=[accumulation.split_rows(run, index) for index in range(len(run.info["compressed"]))],
            drafts=draft.draft_rows(run),
            draft_how=draft.draft_how(run),
            noise=noise.noise_rows(run.info),
            noise_sentence=noise.noise_sentence(run.info),
            noise_where=noise.sampled_at(run.info),
            ranking=details.ranking(run.info),
            models=details.made(run.info),
        )
    )


def render_summary(run: Run) -> str:
    """The answer table alone, as an HTML fragment for a notebook."""
    template = environment().get_template("summary.html")
    return template.render(rows=_ranked_rows(run), columns=answer.COLUMNS)


def _answer_rows(run: Run) -> list[AnswerRow]:
    temperature = run.info["settings"]["temperature"]
    return [
        AnswerRow(
            shorten(record["compressed"], 80),
            COLOURS[index % len(COLOURS)],
            answer.cells(record),
            answer.cells(record, answer.MORE),
            answer.sentence(record, temperature),
            answer.checks(record),
            [expectation(one) for one in record.get("expected") or []],
        )
        for index, record in enumerate(run.info["summary"])
    ]


def _ranked_rows(run: Run) -> list[AnswerRow]:
    """The rows of the answer table, least damage per byte saved first."""
    summary = run.info["summary"]
    places = {id(record): index for index, record in enumerate(summary)}
    rows = _answer_rows(run)
    return [rows[places[id(record)]] for record in by_damage_per_byte(summary)]


def _anchor_rows(run: Run) -> list[AnswerRow]:
    """The dense model with rounded weights, below the compressed models: a scale for them (A2)."""
    return [
        AnswerRow(
            f"dense in {found['anchor']}",
            "var(--muted)",
            answer.anchor_cells(found),
            answer.anchor_cells(found, answer.MORE),
        )
        for found in run.info.get("anchors", [])
        if not found.get("reason")
    ]


def _described(run: Run) -> dict[str, Any]:
    """The run in one line."""
    settings = run.info["settings"]
    prompts = run.tables["prompts"].num_rows
    return {
        "prompts": f"{prompts} prompt{'s' if prompts != 1 else ''}",
        "settings": f"{settings['max_new_tokens']} tokens each, temperature {settings['temperature']:g}, "
        f"seed {settings['seed']}, chat template {'on' if settings['chat_template'] else 'off'}",
        "horizon": settings["max_new_tokens"],
    }


def _figures(run: Run) -> dict[str, list[Figure]]:
    """The figures of each section, one per compressed model where they are drawn for one."""
    several = range(len(run.info["compressed"]))
    choices = options.options_figure(run)
    return {
        "deviation": [curves.deviation_figure(run, index) for index in several],
        "estimates": [points.estimates_figure(run, index) for index in several],
        "survival": [
            *([generation.survival_overview(run)] if len(several) > 1 else []),
            *(generation.survival_figure(run, index) for index in several),
        ],
        "accumulation": [accumulation.accumulation_figure(run, index) for index in several],
        "local": [figure for index in several for figure in local.local_figures(run, index)],
        "depth": [depth.depth_figure(run, index) for index in several],
        "attribution": [figure for index in several if (figure := attribution.attribution_figure(run, index))],
        "options": [choices] if choices else [],
    }
