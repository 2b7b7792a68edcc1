"""What the terminal shows of advice: the answer in sentences, then what was tried."""

from typing import Any

import pyarrow as pa
from rich.table import Table
from rich.text import Text

from prunelens.errors import printable
from prunelens.report.pages.advise import sentences
from prunelens.report.terminal.evaluate import verdict_table
from prunelens.report.terminal.screen import console


def print_advice_result(info: dict[str, Any], tried: pa.Table) -> None:
    """The advice, the verdicts of what was chosen on unseen items, and the recipes that were tried."""
    screen = console()
    for sentence in sentences(info):
        screen.print(Text(printable(sentence)))
    if info["chosen"]:
        summary = [{"compressed": info["chosen"]["recipe"], "verdicts": info["verdicts"]}]
        screen.print(verdict_table(summary, info["dense"]["name"]))
    table = Table(title=Text(f"tried for {info['aim']['use']}"))
    for name in ("recipe", "bytes saved", "zeros", "kept", "keeps the use"):
        table.add_column(name, justify="left" if name == "recipe" else "right")
    for row in tried.to_pylist():
        shares = (f"{100 * row[name]:.1f} %" for name in ("bytes_saved", "zeros"))
        recipe = Text(printable(row["recipe"]), overflow="fold")
        table.add_row(recipe, *shares, row["number"], "yes" if row["keeps"] else "no")
    screen.print(table)
    for note in info["notes"]:
        screen.print(Text(f"Note: {printable(note)}"))
