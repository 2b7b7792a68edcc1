"""How models are compared."""

from dataclasses import dataclass

from prunelens.errors import (
    PrunelensError,
    check_flag,
    check_real,
    check_seed,
    check_whole,
    check_word,
    shown,
)
from prunelens.pruning.anchors import ANCHORS, AnchorKind
from prunelens.study.record import MOST_TOKENS

LENSES = ("normed", "raw", "both")
NOISE_DTYPES = ("float64", "float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Settings:
    """How models are compared; stored in run.json.

    `batch_size` counts texts decoded together, two for each prompt; `calibration` is the path of the text
    that ranks the sublayers, None for the dense model's own. `lens_steps` steps of each greedy text are read
    through the `lens` (`normed`, `raw` or `both`) after every sublayer, 0 for none. `attribute` asks for D1 of
    all compressed models or of those with these names. `noise_dtype` is a second dtype in which the dense model
    is compared with itself (N1). `draft` asks for S5 measured: every compressed model drafts for the dense one.
    `anchors` are the roundings of the dense model's own weights that are read beside (A2). `forecast` is the folder of
    a sweep of the same model, which says what to expect in each use (F1).
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
    anchors: tuple[AnchorKind, ...] = ANCHORS
    forecast: str | None = None

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
        check_whole("--max-new-tokens", self.max_new_tokens, 1, MOST_TOKENS)
        check_whole("--batch-size", self.batch_size, 1)
        check_real("a temperature", self.temperature, 0.01, 100.0)
        check_seed(self.seed)
        check_whole("--lens-steps", self.lens_steps, 0)
        for name in ("chat_template", "draft"):
            check_flag(name, getattr(self, name))
        check_word("a lens", self.lens, LENSES)
        if not isinstance(self.anchors, tuple) or len(set(self.anchors)) != len(self.anchors):
            raise PrunelensError(f"expected anchors to be different names, found {shown(self.anchors)}")
        for anchor in self.anchors:
            check_word("an anchor", anchor, ANCHORS)
        if self.noise_dtype is not None:
            check_word("--noise-dtype", self.noise_dtype, NOISE_DTYPES)
        for name, what in (("calibration", "calibration texts"), ("forecast", "a sweep with a forecast")):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise PrunelensError(f"expected the path of {what}, found {shown(value)}")
        labels = (self.attribute,) if isinstance(self.attribute, bool) else self.attribute
        if not isinstance(labels, tuple) or not all(isinstance(label, bool | str) for label in labels):
            raise PrunelensError(f"expected attribute to be true, false or labels, found {shown(self.attribute)}")
