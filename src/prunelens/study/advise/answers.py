"""What a search has found out already, one JSON file a question; a stopped search asks nothing twice."""

import json
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from prunelens.cache import write_whole
from prunelens.documents import read_json
from prunelens.errors import PrunelensError
from prunelens.study.sweep.study_file import key_of


class OutOfTimeError(Exception):
    """The budget has ended before a new question could be asked."""


class AnswerCache:
    """Answers by question; new ones only while there is time.

    Args:
        folder: where answers are kept.
        seconds: how long new answers may take together; None for no limit.
    """

    def __init__(self, folder: Path, seconds: float | None = None) -> None:
        self.folder = folder
        self._start = time.monotonic()
        self._seconds = seconds
        self.asked = 0

    @property
    def spent(self) -> float:
        """Seconds since the search began."""
        return time.monotonic() - self._start

    def allow(self, seconds: float | None) -> None:
        """Let new answers take so long from the start of the search; None for no limit."""
        self._seconds = seconds

    def ask(self, question: dict[str, Any], answer: Callable[[], Any]) -> Any:
        """The answer that is kept, or a new one, which is kept then.

        Raises:
            OutOfTimeError: it is not there, and the time is over.
        """
        path = self.folder / f"{key_of(question)}.json"
        with suppress(PrunelensError, KeyError, TypeError):  # not there, or damaged: it is asked anew
            return read_json(path, "an answer", finite=False)["answer"]
        if self._seconds is not None and self.spent > self._seconds:
            raise OutOfTimeError
        found = answer()
        self.asked += 1
        text = json.dumps({"question": question, "answer": found}, ensure_ascii=False, default=list)
        try:
            write_whole(path, text + "\n")
        except OSError as error:
            raise PrunelensError(f"the search cannot be kept in {self.folder} ({error.strerror or error})") from error
        return json.loads(text)["answer"]
