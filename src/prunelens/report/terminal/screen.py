"""The one way to the terminal: no model, file or label can steer it, whatever a table or a note is made of."""

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from prunelens.errors import printable


class _Screen(Console):
    """A console whose text is printable; its own styles and cursor movements stay."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)


def console(file: Any = None) -> Console:
    """A console on stdout or `file`, to which [red] and :smile: are text."""
    return _Screen(file=file, markup=False, emoji=False)
