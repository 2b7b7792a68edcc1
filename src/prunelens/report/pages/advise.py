"""The page of advice: the recipe, what it breaks, what it was held against, and the path of the search."""

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from prunelens.report.figures.drawing import MUTED, Figure, Key, Panel, axis, draw, look, plot_text
from prunelens.report.pages.environment import THEME
from prunelens.report.pages.evaluate import task_environment
from prunelens.report.pages.payload import script_json
from prunelens.report.wording import number, percent, shorten
from prunelens.study.evaluate.words import BROKEN, DEGRADED, ORDER, SAFE, UNDECIDED
from prunelens.study.store import Run

Row = Mapping[str, Any]
SAVED, ZEROS = "bytes saved, %", "zeros in the blocks' matrices, %"


def render_advice(run: Run) -> str:
    """The whole page: one HTML file that needs no network and no model."""
    from plotly.offline import get_plotlyjs

    info = run.info
    figure = path_figure(run.tables["tried"].to_pylist(), info["aim"])
    return (
        task_environment()
        .get_template("advice.html")
        .render(
            title=f"{info['dense']['name']} for {info['aim']['use']}",
            lines=[f"decided by {', '.join(info['aim']['tasks'])}; {100 * info['aim']['keep']:g} % is to be kept"],
            plotly=Markup(get_plotlyjs()),
            theme=Markup(script_json(THEME)),
            info=info,
            sentences=sentences(info),
            verdicts=_as_summary(info),
            held_out=[_kl_cells(row) for row in info["held_out"]["kl"]],
            use=info["held_out_use"],
            speeds=[_speed_cells(row) for row in info["speeds"]],
            device=next((row["device"] for row in info["speeds"]), ""),
            tried=[_tried_cells(row, info["chosen"]) for row in run.tables["tried"].to_pylist()],
            figures=[figure] if figure else [],
            notes=info["notes"],
        )
    )


def render_advice_summary(run: Run) -> str:
    """The advice in sentences and the verdicts, as an HTML fragment for a notebook."""
    template = task_environment().get_template("advice_summary.html")
    return template.render(sentences=sentences(run.info), verdicts=_as_summary(run.info))


def _as_summary(info: Row) -> list[dict[str, Any]]:
    return [{"compressed": info["chosen"]["recipe"], "verdicts": info["verdicts"]}] if info["chosen"] else []


def sentences(info: Row) -> list[str]:
    """The advice in words: what, how much it saves, where it loads, what it was held against, what it breaks."""
    aim, chosen = info["aim"], info["chosen"]
    if chosen is None:
        closest = info["closest"]
        near = f" The nearest was {closest['recipe']} ({closest['number']})." if closest else ""
        return [
            f"Nothing that was tried keeps {100 * aim['keep']:g} % for {aim['use']}.{near}",
            *_against(info),
        ]
    saved = percent(chosen["bytes_saved"])
    found = [
        f"{chosen['recipe']} is the strongest that was found: it saves {saved} of the bytes; on the items of the "
        f"search: {chosen['number']}.",
        f"Deployment: {chosen['loads']}.",
        *_on_held_out(info),
        *_against(info),
    ]
    runner_up = info["runner_up"]
    if runner_up:
        found.append(
            f"Runner-up: {runner_up['recipe']}, {percent(runner_up['bytes_saved'])} of the bytes saved, "
            f"{percent(runner_up['zeros'])} zeros, {runner_up['number']}."
        )
    found.append(_costs(info["verdicts"]))
    return found


def _costs(verdicts: Sequence[Row]) -> str:
    """What it breaks, degrades and leaves undecided, and which uses it keeps."""
    uses = {word: ", ".join(line["use"] for line in verdicts if line["verdict"] == word) for word in ORDER}
    broken = uses[BROKEN] or "nothing that was measured"
    others = [f"{word}: {uses[word]}" for word in (DEGRADED, UNDECIDED, SAFE) if uses[word]]
    return f"It breaks: {'; '.join([broken, *others])}."


def _on_held_out(info: Row) -> list[str]:
    own = next((row for row in info["held_out_use"] if row["role"] == "chosen"), None)
    if own is None:
        return []
    verdict = "keeps the use there too" if own["loss"] <= 1 else "does not keep the use there"
    return [f"On items that the search did not see: {own['number']}; by that value it {verdict} (interval below)."]


RIVALS = {
    "against_cosine": "the cosine ranking's choice of the same size",
    "against_random": "random drops of the same size",
    "against_unrepaired": "the same drop without its repair",
}


def _against(info: Row) -> list[str]:
    found = []
    for key, name in RIVALS.items():
        pair = info["held_out"].get(key)
        if pair:
            found.append(
                f"{pair['left']} {_beats(pair)} {name} in KL on prompts that the search did not see"
                f" ({_difference(pair)})."
            )
    return found


def _beats(pair: Row) -> str:
    if pair["difference"]["low"] == pair["difference"]["high"] == 0:
        return "is the same as"
    return {pair["left"]: "beats", None: "is a tie with"}.get(pair["better"], "does worse than")


def _difference(pair: Row) -> str:
    found = pair["difference"]
    return f"{found['mean']:+.3f} nats [{found['low']:+.3f}, {found['high']:+.3f}]".replace("-", "−")


def _kl_cells(row: Row) -> dict[str, str]:
    return {
        "role": row["role"],
        "recipe": shorten(row["recipe"], 90),
        "kl": f"{number(row['mean'])} [{number(row['low'])} to {number(row['high'])}]",
    }


def _speed_cells(row: Row) -> dict[str, str]:
    ratio = row["decode_ratio"]
    return {
        "recipe": shorten(row["recipe"], 90),
        "speed": number(row["decode_tokens_per_second"]),
        "ratio": f"{ratio['median']:.2f} [{ratio['low']:.2f} to {ratio['high']:.2f}]" if ratio else "1",
        "kv": f"{row['kv_bytes_per_token']:,.0f}",
    }


def _tried_cells(row: Row, chosen: Row | None) -> dict[str, Any]:
    return {
        "recipe": shorten(row["recipe"], 90),
        "saved": percent(row["bytes_saved"]),
        "zeros": percent(row["zeros"]),
        "kl": number(row["kl"]),
        "number": row["number"],
        "keeps": "yes" if row["keeps"] else "no",
        "chosen": chosen is not None and row["recipe"] == chosen["recipe"],
    }


def path_figure(tried: list[Row], aim: Row) -> Figure | None:
    """What was lost against what was saved, in tolerances: below the line the use is kept."""
    families = list(dict.fromkeys(row["family"] for row in tried))
    if not families:
        return None
    panels, lost = [], 100 * (1 - aim["keep"])
    lost_words = "lost / tolerance, no unit"
    for title, quantity, columns, words, wanted in (
        ("Drops and formats", SAVED, ("bytes_saved", "loss"), lost_words, [one for one in families if one != "masks"]),
        ("Masks", ZEROS, ("zeros", "loss"), lost_words, [one for one in families if one == "masks"]),
        ("Drops: damage at the head", SAVED, ("bytes_saved", "kl"), "KL, nats per token", families),
    ):
        traces = [_trace(tried, family, columns, families.index(family)) for family in wanted]
        if any(trace["x"] for trace in traces):
            line = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": 1, "y1": 1, "line": {"color": MUTED}}
            layout = {
                "xaxis": axis(quantity),
                "yaxis": axis(words),
                "shapes": [line] if columns[1] == "loss" else [],
                "showlegend": False,
            }
            panels.append(Panel(title, draw(traces, layout), height=300))
    return Figure(
        f"The search for {aim['use']}",
        f"Each point is one recipe. At or below 1 it keeps the use: at most {lost:.3g} % of the score lost; for long "
        f"texts at most {lost / 50:.2g} nats per token and {lost:.3g} points more of looping texts.",
        tuple(panels),
        keys=tuple(Key("dot", look(place, "").colour, family) for place, family in enumerate(families)),
        across=2,
    )


def _trace(tried: list[Row], family: str, columns: tuple[str, str], place: int) -> dict[str, Any]:
    across, up = columns
    rows = [row for row in tried if row["family"] == family and row[up] is not None]
    rows.sort(key=lambda row: row[across])
    style = look(place, family)
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "x": [100 * row[across] for row in rows],
        "y": [row[up] for row in rows],
        "text": [plot_text(row["recipe"]) for row in rows],
        "name": style.name,
        "line": {"color": style.colour},
        "marker": {"symbol": style.symbol, "size": 8},
        "hovertemplate": "%{text}: %{y:.2f}<extra></extra>",
    }
