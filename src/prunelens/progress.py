"""How work says how far it is: types that every room shares, and the reporter that says nothing."""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

Advance = Callable[[int], None]
"""Called with what was finished since the last call, in the units of the stage's total."""


@runtime_checkable
class Reporter(Protocol):
    """Shows progress: called with a stage and its total, returns the function to call with what was finished."""

    def __call__(self, stage: str, total: int, /) -> Advance:
        """Begin a stage."""
        ...


def unreported(done: int) -> None:
    """Report nothing of a stage."""


def silent(stage: str, total: int) -> Advance:
    """Report no stage."""
    return unreported
