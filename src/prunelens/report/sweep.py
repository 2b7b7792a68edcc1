"""What the terminal shows of a sweep: one line for each cell, a verdict for each class of use."""

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from prunelens.errors import printable
from prunelens.report.evaluation import COLOURS
from prunelens.tasks.suite import USES


def print_sweep(info: dict[str, Any]) -> None:
    """Every cell with what it saves, its KL and its verdicts; then what the forecasts were worth."""
    console = Console()
    table = Table(title=Text(f"{printable(info['study']['model'])}: {info['cells']['done']} of {info['cells']['all']}"))
    for title in ("recipe", "seed", "bytes saved", "zeros", "KL", *USES):
        table.add_column(title, justify="right" if title in ("seed", "bytes saved", "zeros", "KL") else "left")
    for record in info["summary"]:
        name = Text(printable(record["recipe"]), overflow="fold")
        if record["status"] == "failed":
            table.add_row(name, str(record["seed"]), Text(f"failed: {printable(record['error'])}", "red"))
            continue
        kl = "" if record["kl"] is None else f"{record['kl']:.3f}"
        lines = [Text(line["verdict"], COLOURS.get(line["verdict"], "dim")) for line in record["verdicts"]]
        shares = (f"{100 * record[share]:.1f} %" for share in ("bytes_saved", "zeros"))
        table.add_row(name, str(record["seed"]), *shares, kl, *lines)
    console.print(table)
    for item in info["calibration"]:
        rho = "undefined" if item["rho"] is None else f"{item['rho']:.2f}"
        console.print(f"{item['use']}, forecast from {item['name']}: rank correlation {rho} over {item['n']} cells")
