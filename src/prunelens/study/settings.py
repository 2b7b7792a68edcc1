"""How models are compared, and how progress is shown."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from prunelens.errors import PrunelensError

LENSES = ("normed", "raw", "both")
NOISE_DTYPES = ("float64", "float32", "float16", "bfloat16")

LARGEST_SEED = 2**62
"""What is added to a seed (a row's number) leaves it within 64 bits."""

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


def check_seed(seed: int) -> None:
    """Refuse a seed that the generators or the tables of a result cannot hold.

    Raises:
        PrunelensError: as said.
    """
    if not 0 <= seed <= LARGEST_SEED:
        found = str(seed) if abs(seed) < 10**30 else f"a number of {len(str(abs(seed)))} digits"
        raise PrunelensError(f"expected a seed of at least 0 and at most 2**62, found {found}; choose a smaller one")


@dataclass(frozen=True)
class Settings:
    """How models are compared; stored in run.json.

    `batch_size` counts texts decoded together, two for each prompt; `calibration` is the path of the text
    that ranks the sublayers, None for the dense model's own. `lens_steps` steps of each greedy text are read
    through the `lens` (`normed`, `raw` or `both`) after every sublayer, 0 for none. `attribute` asks for D1 of
    all compressed models or of those with these names. `noise_dtype` is a second dtype in which the dense model
    is compared with itself (N1). `draft` asks for S5 measured: every compressed model drafts for the dense one.
    """

    max_new_tokens: int = 64
    temperature: float = 1.0
    seed: int = 0
    batch_size: int = 32
    chat_template: bool = True
    calibration: str | None = None
    lens_steps: int = 8
    lens: str = "normed"
    attribute: bool | tuple[str, ...] = False
    noise_dtype: str | None = None
    draft: bool = False

    @property
    def lenses(self) -> tuple[str, ...]:
        """The lenses asked for."""
        return ("normed", "raw") if self.lens == "both" else (self.lens,)

    def attributes(self, label: str) -> bool:
        """Whether D1 was asked for of this compressed model."""
        return self.attribute if isinstance(self.attribute, bool) else label in self.attribute

    def check(self) -> None:
        """Refuse settings without meaning.

        Raises:
            PrunelensError: as said.
        """
        if self.max_new_tokens < 1 or self.batch_size < 1:
            raise PrunelensError("expected --max-new-tokens and --batch-size of at least 1")
        if not 0.01 <= self.temperature <= 100:
            raise PrunelensError(f"expected a temperature from 0.01 to 100, found {self.temperature}")
        check_seed(self.seed)
        if self.lens_steps < 0:
            raise PrunelensError(f"expected --lens-steps of at least 0, found {self.lens_steps}")
        if self.lens not in LENSES:
            raise PrunelensError(f"expected a lens of {', '.join(LENSES)}, found {self.lens!r}")
        if self.noise_dtype is not None and self.noise_dtype not in NOISE_DTYPES:
            raise PrunelensError(f"expected --noise-dtype of {', '.join(NOISE_DTYPES)}, found {self.noise_dtype!r}")
