"""The worker's side of a job: set up once, then one job after another, each fault as one sentence."""

import pickle
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from prunelens.errors import PrunelensError
from prunelens.memory import is_out_of_memory, memory_sentence

Setup = Callable[[Any], Any]
"""Called once in each worker with `given`; what it returns is the context of the worker's jobs."""
Work = Callable[[Any, Any], None]
"""Called with the context and a job; stores its own result."""


GRACE_SECONDS = 10.0
"""So long a worker without work may take to leave, and a Ray cluster to answer."""


@dataclass(frozen=True)
class Reply:
    """What came back from a worker for its setup or for a job."""

    error: str | None = None
    traceback: str | None = None
    lost: bool = False


class Worker:
    """The worker's side: the first message sets it up, every other one is a job."""

    def __init__(self) -> None:
        self.context: Any = None
        self.work: Work | None = None

    def answer(self, message: bytes) -> Reply:
        """Do what a message asks, and say how it ended."""
        prefix = "a worker could not start: " if self.work is None else ""
        try:
            if self.work is None:
                given, setup, work = pickle.loads(message)
                self.context, self.work = setup(given), work
            else:
                self.work(self.context, pickle.loads(message))
        except PrunelensError as error:
            return Reply(one_line(str(error)), traceback.format_exc())
        except Exception as error:
            text = one_line(f"{type(error).__name__}: {error}").removesuffix(":")
            if is_out_of_memory(error):
                text = memory_sentence(error, "ask for fewer workers, a smaller batch_size or a smaller dtype")
            return Reply(prefix + text, traceback.format_exc())
        return Reply()


def one_line(text: str) -> str:
    """Text without line breaks."""
    return " ".join(text.split())
