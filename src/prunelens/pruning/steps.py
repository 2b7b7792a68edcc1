"""The steps a recipe is made of: parts to drop, repairs, weights to mask, experts to drop, numbers to quantise."""

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, field_validator, model_validator

from prunelens.errors import cut, shown

DropMethod = Literal["drop-attention", "drop-mlp", "drop-block", "drop-sublayers"]
MaskMethod = Literal["magnitude", "wanda", "sparsegpt"]
Format = Literal["int8", "int4"]
Fit = Literal["bias", "linear", "folded"]

DROPS: tuple[DropMethod, ...] = get_args(DropMethod)
MASKS: tuple[MaskMethod, ...] = get_args(MaskMethod)
FITS: tuple[Fit, ...] = get_args(Fit)
METHODS = (*DROPS, *MASKS, "repair", "drop-experts", "quantize")


def _decimal(value: float) -> str:
    return f"{value:.9f}".rstrip("0")


class _Step(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Step(_Step):
    """Take parts out: the `count` most redundant, or those named in `at`.

    `at` holds layer indices as text, for drop-sublayers with a kind in front (`a25`, `m3`). `iterative` ranks what
    is left anew before each choice.
    """

    method: DropMethod
    count: StrictInt | None = None
    at: tuple[str, ...] | None = None
    consecutive: StrictBool = False
    iterative: StrictBool = False

    @model_validator(mode="before")
    @classmethod
    def _indices_as_text(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("at"), list | tuple):
            wrong = [item for item in values["at"] if isinstance(item, bool) or not isinstance(item, str | int)]
            if wrong:
                raise ValueError(f"expected indices such as 25, found {shown(wrong[0])}")
            return values | {"at": tuple(str(item) for item in values["at"])}
        return values

    @model_validator(mode="after")
    def _one_choice(self) -> "Step":
        if (self.count is None) == (self.at is None):
            raise ValueError("give either a count (METHOD:8) or indices (METHOD@25,26)")
        if self.count is not None and self.count < 1:
            raise ValueError(f"the count must be at least 1, found {self.count}")
        if self.consecutive and (self.method != "drop-block" or self.count is None):
            raise ValueError("consecutive goes with drop-block:COUNT only")
        if self.iterative and self.count is None:
            raise ValueError("iterative goes with a count (METHOD:8,iterative) only")
        if self.iterative and self.consecutive:
            raise ValueError("consecutive blocks are chosen at once, so iterative has no meaning there")
        self._check_indices()
        return self

    def _check_indices(self) -> None:
        pattern = r"[am][0-9]{1,6}" if self.method == "drop-sublayers" else r"[0-9]{1,6}"
        for item in self.at or ():
            if not re.fullmatch(pattern, item):
                example = "a25 or m3" if self.method == "drop-sublayers" else "25"
                raise ValueError(f"{self.method} expects indices such as {example}, found {shown(item)}")
        if self.at is not None and (not self.at or len(set(self.parts)) < len(self.at)):
            raise ValueError(f"expected each index once, none twice, found {cut(', '.join(self.at), 60) or 'none'}")

    @property
    def kinds(self) -> tuple[str, ...]:
        """Which parts it takes: attention, mlp, block."""
        return ("attention", "mlp") if self.method == "drop-sublayers" else (self.method.removeprefix("drop-"),)

    @property
    def parts(self) -> tuple[tuple[str, int], ...]:
        """(kind, layer index) of the parts named in `at`, in order of depth."""
        letters = {"a": "attention", "m": "mlp"}
        named = [
            (letters[item[0]], int(item[1:])) if item[0] in letters else (self.kinds[0], int(item))
            for item in self.at or ()
        ]
        return tuple(sorted(named, key=lambda part: (part[1], part[0])))

    def __str__(self) -> str:
        if self.at is not None:
            letters = len(self.kinds) > 1
            items = [f"{kind[0] if letters else ''}{layer_idx}" for kind, layer_idx in self.parts]
            return f"{self.method}@{','.join(items)}"
        words = [word for word in ("consecutive", "iterative") if getattr(self, word)]
        return ",".join([f"{self.method}:{self.count}", *words])


class RepairStep(_Step):
    """Put back what the drops before it took out: its mean, or what is linear in the part's input.

    `rank` limits a linear map. `weighted` counts the residual of a token as it moves the probabilities (R4).
    `folded` lets the map act on what the sublayer before the cut writes, so that its weights carry it.
    """

    method: Literal["repair"]
    fit: Fit
    rank: StrictInt | None = None
    weighted: StrictBool = False

    @model_validator(mode="after")
    def _rank_of_a_map(self) -> "RepairStep":
        if self.rank is not None and self.fit != "linear":
            raise ValueError(f"rank goes with repair:linear only, found it with {self.fit}")
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"the rank must be at least 1, found {self.rank}")
        return self

    def __str__(self) -> str:
        words = [f"rank={self.rank}"] if self.rank is not None else []
        return ",".join([f"{self.method}:{self.fit}", *words, *(["weighted"] if self.weighted else [])])


@dataclass(frozen=True)
class Pattern:
    """Which share of a weight becomes zero: `ratio` of it anywhere, or `zeros` among each `group` inputs in a row."""

    ratio: float
    zeros: int = 0
    group: int = 0


class MaskStep(_Step):
    """Set weights to zero: a share (0.5), or n zeros among m consecutive inputs (2:4)."""

    method: MaskMethod
    sparsity: str

    @field_validator("sparsity", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        return _decimal(value) if isinstance(value, float) and 0 < value < 1 else value

    @field_validator("sparsity", mode="after")
    @classmethod
    def _in_range(cls, value: str) -> str:
        found = re.fullmatch(r"([0-9]{1,3}):([0-9]{1,3})", value)
        if found and not 0 < int(found[1]) < int(found[2]) <= 128:
            raise ValueError(f"expected n:m with n zeros among m inputs, 0 < n < m ≤ 128, found {value}")
        if found:
            return f"{int(found[1])}:{int(found[2])}"
        if not re.fullmatch(r"0?\.[0-9]{1,9}", value) or float(value) == 0:
            raise ValueError(
                f"expected a sparsity such as 0.5, above 0 and below 1, or n:m such as 2:4, found {shown(value)}"
            )
        return _decimal(float(value))

    @property
    def pattern(self) -> Pattern:
        """The sparsity as numbers."""
        if ":" in self.sparsity:
            zeros, group = map(int, self.sparsity.split(":"))
            return Pattern(zeros / group, zeros, group)
        return Pattern(float(self.sparsity))

    def __str__(self) -> str:
        return f"{self.method}:{self.sparsity}"


class ExpertStep(_Step):
    """Drop a share of the experts of every mixture: the least used by REAP's score, or `uniform` ones at random."""

    method: Literal["drop-experts"]
    fraction: StrictFloat
    uniform: StrictBool = False

    @field_validator("fraction")
    @classmethod
    def _in_range(cls, value: float) -> float:
        if not 0 < value < 1:
            raise ValueError(f"expected a share of the experts above 0 and below 1, found {value}")
        return value

    def __str__(self) -> str:
        return f"{self.method}:{_decimal(self.fraction)}" + (",uniform" if self.uniform else "")


class QuantizeStep(_Step):
    """Store the blocks' matrices with fewer bits (weights only)."""

    method: Literal["quantize"]
    to: Format

    def __str__(self) -> str:
        return f"{self.method}:{self.to}"


KINDS = (Step, RepairStep, MaskStep, ExpertStep, QuantizeStep)
AnyStep = Annotated[Step | RepairStep | MaskStep | ExpertStep | QuantizeStep, Field(discriminator="method")]
