"""How models are compared, and how progress is shown."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from prunelens.errors import PrunelensError

Advance = Callable[[int], None]


@runtime_checkable
class Reporter(Protocol):
    """Shows progress: called with a stage and its total, gives a function to call with what was finished."""

    def __call__(self, stage: str, total: int, /) -> Advance:
        """Begin a stage."""
        ...


def silent(stage: str, total: int) -> Advance:
    """No progress display."""
    return lambda done: None


@dataclass(frozen=True)
class Settings:
    """How models are compared; stored in run.json.

    `batch_size` counts texts decoded together, two for each prompt; `calibration` is the path of the text
    that ranks the sublayers, None for the dense model's own.
    """

    max_new_tokens: int = 64
    temperature: float = 1.0
    seed: int = 0
    batch_size: int = 32
    chat_template: bool = True
    calibration: str | None = None

    def check(self) -> None:
        """Refuse settings without meaning.

        Raises:
            PrunelensError: as said.
        """
        if self.max_new_tokens < 1 or self.batch_size < 1:
            raise PrunelensError("expected --max-new-tokens and --batch-size of at least 1")
        if not 0.01 <= self.temperature <= 100:
            raise PrunelensError(f"expected a temperature from 0.01 to 100, found {self.temperature}")
        if self.seed < 0:
            raise PrunelensError(f"expected a seed of at least 0, found {self.seed}")
