"""What the terminal shows of a sweep: one line for each cell, a verdict for each class of use."""

from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from prunelens.errors import printable
from prunelens.report.terminal.evaluate import COLOURS, SHORT
from prunelens.report.terminal.screen import closing, console, lean_table
from prunelens.report.wording import DASH
from prunelens.study.evaluate.verdict import UNKNOWN
from prunelens.study.forecast import PREDICTORS
from prunelens.tasks.suite import USES

MOST_CELLS = 20
"""Cells that fit one screen; the page and `--full` have them all."""


def print_sweep(
    info: dict[str, Any], page: Path | None = None, seconds: float | None = None, full: bool = False
) -> None:
    """Print the cells with what they save, their KL and verdicts; then what the forecasts were worth.

    Args:
        info: the content of run.json.
        page: where the page lies.
        seconds: that the command took.
        full: all cells, however many.
    """
    screen = console()
    cells = info["summary"] if full else info["summary"][:MOST_CELLS]
    title = f"{printable(info['study']['model'])}: {info['cells']['done']} of {info['cells']['all']} cells done\n"
    screen.print(Text(title, style="bold"), cells_table(cells, len(info["study"]["seeds"]) > 1), sep="\n")
    if len(cells) < len(info["summary"]):
        screen.print(Text(f"… and {len(info['summary']) - len(cells)} more, on the page and with --full", "dim"))
    screen.print(Text(f"saved: bytes of the weights; a mask saves none and leaves zeros. {DASH}: not measured", "dim"))
    for record in cells:
        if record["status"] == "failed":
            screen.print(Text(f"{printable(record['recipe'])} failed: {printable(record['error'])}", "red"))
    for item in info["calibration"]:
        rho = "undefined" if item["rho"] is None else f"{item['rho']:.2f}"
        screen.print(Text(f"{item['use']} from {item['name']}: rank correlation {rho}, {item['n']} cells"))
    for line in forecast_lines(info.get("forecast")):
        screen.print(Text(line))
    closing(screen, page, info.get("notes", []), seconds, "")


def forecast_lines(forecast: dict[str, Any] | None) -> list[str]:
    """What each class of the sweep's forecast is worth: how often its intervals covered, and how wide they are."""
    found = []
    for one in forecast["classes"] if forecast else ():
        if one["withheld"]:
            found.append(f"forecast of {one['use']}: withheld, {one['withheld']}")
            continue
        unit = "points" if one["bounded"] else "nats per token"
        width = 100 * one["width"] if one["bounded"] else one["width"]
        found.append(
            f"forecast of {one['use']} from {PREDICTORS[one['predictor']].words}: {len(one['points'])} recipes, "
            f"{100 * one['coverage']:.0f} % of left-out ones in their 90 % interval, median width {width:.2g} {unit}"
        )
    return found


def cells_table(cells: list[dict[str, Any]], several: bool) -> Table:
    """One row per cell; `several` seeds are told apart by a column."""
    table = lean_table()
    table.add_column("recipe", overflow="fold", min_width=16)
    for heading in (*(["seed"] if several else []), "saved", "KL"):
        table.add_column(heading, justify="right", no_wrap=True)
    for use in USES:
        table.add_column(SHORT.get(use, use).removesuffix(" texts"), no_wrap=True)
    for record in cells:
        seed = [str(record["seed"])] if several else []
        table.add_row(Text(printable(record["recipe"])), *seed, *_cells(record))
    return table


def _cells(record: dict[str, Any]) -> list[str | Text]:
    if record["status"] == "failed":
        return [Text("failed", "red")]
    saved = f"{100 * record['bytes_saved']:.1f} %" if record["bytes_saved"] > 0 else f"{100 * record['zeros']:.0f} % 0s"
    kl = "" if record["kl"] is None else f"{record['kl']:.3g}"
    verdicts = [DASH if line["verdict"] == UNKNOWN else line["verdict"] for line in record["verdicts"]]
    return [saved, kl, *[Text(verdict, COLOURS.get(verdict, "dim")) for verdict in verdicts]]
