"""Being stopped from outside: Ctrl-C, SIGTERM and SIGHUP all end a command in order, with its clean-up."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
CLEANUP_SECONDS = 5.0
"""A second signal that comes sooner does not disturb the clean-up; a later one ends what does not come to an end."""


class Stopped(KeyboardInterrupt):
    """A signal to stop has come."""


class Stops:
    """What has come so far.

    Attributes:
        number: of the first signal, None while there was none.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._since = 0.0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        if self.number is not None and time.monotonic() - self._since < CLEANUP_SECONDS:
            return
        self.number, self._since = self.number or number, time.monotonic()
        raise Stopped(number)

    @property
    def exit_code(self) -> int:
        """128 and the number of the signal, as shells have it."""
        return 128 + (self.number or signal.SIGINT)


@contextmanager
def signals_stop() -> Iterator[Stops]:
    """Let signals to stop raise `Stopped` in the body; those that are ignored (nohup) stay so."""
    stops = Stops()
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, stops)
    try:
        yield stops
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
