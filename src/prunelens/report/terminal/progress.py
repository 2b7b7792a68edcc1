"""How the terminal shows progress on stderr: bars on a terminal, a line now and then elsewhere."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from prunelens.errors import cut, one_line, printable
from prunelens.progress import Advance, Reporter
from prunelens.report.terminal.screen import console
from prunelens.report.wording import in_words

QUIET_SECONDS = 2.0
"""What takes less says nothing."""
EVERY_SECONDS = 15.0
"""Between two lines about the same stage."""
TICK_SECONDS = 0.5
LONGEST_STAGE = 90
"""Characters of a stage's name in a line."""


@contextmanager
def progress() -> Iterator[Reporter]:
    """Show progress on stderr; the body gets a reporter."""
    screen = console(sys.stderr)  # the stream itself: the harness's own bars are kept off `sys.stderr`
    with _bars(screen) if screen.is_terminal else _lines(sys.stderr) as reporter:
        yield reporter


@contextmanager
def _bars(screen: Console) -> Iterator[Reporter]:
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=screen) as display:

        def reporter(stage: str, total: int) -> Advance:
            task = display.add_task(printable(stage), total=total)
            done = 0

            def advance(count: int) -> None:
                nonlocal done
                done += count
                display.update(task, completed=min(done, total))

            return advance

        yield reporter
        for task in display.tasks:  # texts that ended early leave their bars short
            display.update(task.id, completed=task.total)


@contextmanager
def _lines(stream: Any) -> Iterator[Reporter]:
    """Lines by a thread of their own: libraries that work for a minute without a word do not hold them up."""
    slow = "torch" not in sys.modules  # its import takes longer than that, and may hold up the thread
    log = ProgressLog(lambda line: _write(stream, line), first_at_once=slow)
    over = threading.Event()

    def watch() -> None:
        while not over.wait(TICK_SECONDS):
            log.tick()

    thread = threading.Thread(target=watch, name="prunelens progress", daemon=True)
    thread.start()
    try:
        yield log.begin
    finally:
        over.set()
        thread.join()


def _write(stream: Any, line: str) -> None:
    try:
        print(line, file=stream, flush=True) if stream is not None else None
    except (OSError, ValueError):  # nobody reads on, or the stream is closed
        return


@dataclass
class _Stage:
    name: str
    total: int
    start: float
    done: int = 0
    told: bool = False


class ProgressLog:
    """Which line is due: the stage at work once it has lasted two seconds, then how far it is every 15 seconds.

    Args:
        write: takes a line.
        clock: seconds from any beginning.
        first_at_once: tell of the first stage as it begins.
    """

    def __init__(
        self,
        write: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
        first_at_once: bool = False,
    ) -> None:
        self._write, self._clock, self._at_once = write, clock, first_at_once
        self._start = self._last = clock()
        self._stage = _Stage("starting", 1, self._start)

    def begin(self, stage: str, total: int) -> Advance:
        """Begin a stage; the one that advances last is the one that is told."""
        own = _Stage(cut(one_line(printable(stage)), LONGEST_STAGE), total, self._clock())
        self._stage = own
        if self._at_once:
            self._tell(own.start)
        self._at_once = False

        def advance(count: int) -> None:
            own.done += count
            self._stage = own

        return advance

    def tick(self) -> None:
        """Write a line if one is due."""
        now, stage = self._clock(), self._stage
        due = now - self._last >= EVERY_SECONDS if stage.told else now - stage.start >= QUIET_SECONDS
        if due:
            self._tell(now)

    def _tell(self, now: float) -> None:
        stage = self._stage
        self._write(f"[{now - self._start:4.0f} s] {stage.name}{_far(stage, now)}")
        stage.told, self._last = True, now


def _far(stage: _Stage, now: float) -> str:
    """How far a stage is and how long it may still take; nothing while nobody knows."""
    if stage.total <= 1 or stage.done <= 0:
        return " …"
    share = min(stage.done / stage.total, 1.0)
    left = (now - stage.start) * (1 - share) / share
    return f": {100 * share:.0f} %, about {in_words(left)} left"
