"""What the terminal shows of advice: the answer in sentences, then what was tried."""

from pathlib import Path
from typing import Any

import pyarrow as pa
from rich.table import Table
from rich.text import Text

from prunelens.errors import printable
from prunelens.report.pages.advise import sentences
from prunelens.report.terminal.evaluate import rules_in_words, verdict_matrix, verdict_table
from prunelens.report.terminal.screen import closing, console, lean_table

MOST_TRIED = 12
"""Recipes that fit one screen; the page and `--full` have them all."""


def print_advice_result(
    info: dict[str, Any],
    tried: pa.Table,
    page: Path | None = None,
    seconds: float | None = None,
    following: str = "",
    full: bool = False,
) -> None:
    """Print the advice in sentences, the verdicts of what was chosen on unseen items, and the recipes tried.

    Args:
        info: the content of run.json.
        tried: the recipes that were tried, in order.
        page: where the page lies.
        seconds: that the command took.
        following: the next command worth running.
        full: all recipes, and what decided each verdict.
    """
    screen = console()
    for sentence in sentences(info):
        screen.print(Text(printable(sentence)))
    screen.print()
    if info["chosen"]:
        summary = [{"compressed": info["chosen"]["recipe"], "verdicts": info["verdicts"]}]
        screen.print(verdict_matrix(summary), Text(f"{rules_in_words(summary)}\n", style="dim"), sep="\n")
        if full:
            screen.print(verdict_table(summary))
    rows = tried.to_pylist()
    screen.print(tried_table(rows if full else rows[-MOST_TRIED:]))
    if len(rows) > MOST_TRIED and not full:
        screen.print(Text(f"the last {MOST_TRIED} of {len(rows)} tried; all on the page and with --full", "dim"))
    closing(screen, page, info["notes"], seconds, following)


def tried_table(rows: list[dict[str, Any]]) -> Table:
    """One row per recipe that was tried."""
    table = lean_table()
    table.add_column("tried", overflow="fold", min_width=16)
    for name in ("saved", "zeros"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("what it kept", overflow="fold")
    table.add_column("keeps\nthe use", no_wrap=True)
    for row in rows:
        shares = (f"{100 * row[name]:.1f} %" for name in ("bytes_saved", "zeros"))
        kept = Text(printable(row["number"] or ""))
        table.add_row(Text(printable(row["recipe"])), *shares, kept, "yes" if row["keeps"] else "no")
    return table
