"""What the terminal shows of a sweep: one line for each cell, a verdict for each class of use."""

from typing import Any

from rich.table import Table
from rich.text import Text

from prunelens.errors import printable
from prunelens.report.terminal.evaluate import COLOURS
from prunelens.report.terminal.screen import console
from prunelens.tasks.suite import USES

SHORT = {"multiple-choice": "choice", "short-generation": "short", "long-generation": "long"}


def print_sweep(info: dict[str, Any]) -> None:
    """Every cell with what it saves, its KL and its verdicts; then what the forecasts were worth."""
    screen = console()
    several = len(info["study"]["seeds"]) > 1
    title = f"{printable(info['study']['model'])}: {info['cells']['done']} of {info['cells']['all']} cells"
    table = Table(title=Text(title), caption="saved: bytes of the weights; a mask saves none and leaves zeros")
    numbers = (*(["seed"] if several else []), "saved", "KL")
    for heading in ("recipe", *numbers, *(SHORT.get(use, use) for use in USES)):
        table.add_column(heading, justify="right" if heading in numbers else "left", no_wrap=heading in numbers)
    for record in info["summary"]:
        seed = [str(record["seed"])] if several else []
        table.add_row(Text(printable(record["recipe"]), overflow="fold"), *seed, *_cells(record))
    screen.print(table)
    for record in info["summary"]:
        if record["status"] == "failed":
            screen.print(Text(f"{printable(record['recipe'])} failed: {printable(record['error'])}", "red"))
    for item in info["calibration"]:
        rho = "undefined" if item["rho"] is None else f"{item['rho']:.2f}"
        screen.print(Text(f"{item['use']} from {item['name']}: rank correlation {rho}, {item['n']} cells"))
    for note in info.get("notes", []):
        screen.print(Text(printable(note), "dim"))


def _cells(record: dict[str, Any]) -> list[str | Text]:
    if record["status"] == "failed":
        return [Text("failed", "red")]
    saved = f"{100 * record['bytes_saved']:.1f} %" if record["bytes_saved"] > 0 else f"{100 * record['zeros']:.0f} % 0s"
    kl = "" if record["kl"] is None else f"{record['kl']:.3f}"
    return [saved, kl, *[Text(line["verdict"], COLOURS.get(line["verdict"], "dim")) for line in record["verdicts"]]]
