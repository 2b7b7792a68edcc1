"""The one way to the terminal: no model, file or label can steer it, whatever a table or a note is made of."""

from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from prunelens.errors import one_line, printable
from prunelens.report.wording import in_words


class _Screen(Console):
    """A console whose text is printable; its own styles and cursor movements stay."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)


def console(file: Any = None) -> Console:
    """A console on stdout or `file`, to which [red] and :smile: are text."""
    return _Screen(file=file, markup=False, emoji=False)


def lean_table() -> Table:
    """A table that leaves the width to its content: no frame, no lines between columns."""
    return Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)


def closing(screen: Console, page: Path | None, remarks: Iterable[str], seconds: float | None, following: str) -> None:
    """The last lines of a screen: the page, what a reader should be warned of, the time taken and the next command."""
    if page is not None:
        screen.print(Text(f"\nThe page: {printable(str(page))}"), soft_wrap=True)
    for remark in remarks:
        screen.print(Text(f"Note: {one_line(remark)}", style="dim"))
    if seconds is not None:
        screen.print(Text(f"Took {in_words(seconds)}."))
    if following:
        screen.print(Text(f"Next: {printable(following)}"), soft_wrap=True)
        if following.startswith("prunelens evaluate") and find_spec("lm_eval") is None:
            screen.print(Text("      (first: pip install 'prunelens[tasks]')"))
