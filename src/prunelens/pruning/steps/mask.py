"""magnitude, wanda, sparsegpt and masks from outside: set single weights of a model to zero."""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import StrictStr, field_validator

from prunelens.errors import shown
from prunelens.pruning.methods import SPARSEGPT, Method, built_in
from prunelens.pruning.plugins import find_mask, from_outside, is_known, known
from prunelens.pruning.steps.base import BaseStep, decimal
from prunelens.pruning.values import Pattern

if TYPE_CHECKING:
    from prunelens.models.model import Model
    from prunelens.pruning.pruned import Pruned, StepInputs

MASKS = (*built_in("mask"), SPARSEGPT)
"""The masks that prunelens brings along."""


class MaskStep(BaseStep):
    """Set weights to zero: a share (0.5), or n zeros among m consecutive inputs (2:4)."""

    makes_zeros: ClassVar[bool] = True

    method: StrictStr
    sparsity: str

    @classmethod
    def methods(cls) -> tuple[str, ...]:
        """The names that this kind of step goes by, those of masks from outside too."""
        return (*MASKS, *(name for name in known("mask") if name not in MASKS))

    @classmethod
    def goes_by(cls, method: str) -> bool:
        """Whether there is such a mask; installed packages are asked only where it is no built-in one."""
        return method in MASKS or is_known("mask", method)

    @classmethod
    def values(cls, method: str, sign: str, rest: str, part: str) -> dict[str, Any]:
        """METHOD:0.5 or METHOD:2:4."""
        return {"method": method, "sparsity": rest.strip()}

    @field_validator("method", mode="after")
    @classmethod
    def _known_mask(cls, name: str) -> str:
        if name != SPARSEGPT:
            find_mask(name)
        return name

    @field_validator("sparsity", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        return decimal(value) if isinstance(value, float) and 0 < value < 1 else value

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
        return decimal(float(value))

    @property
    def pattern(self) -> Pattern:
        """The sparsity as numbers."""
        if ":" in self.sparsity:
            zeros, group = map(int, self.sparsity.split(":"))
            return Pattern(zeros / group, zeros, group)
        return Pattern(float(self.sparsity))

    def __str__(self) -> str:
        return f"{self.method}:{self.sparsity}"

    @property
    def needs_calibration(self) -> bool:
        """Whether anything is measured on calibration texts."""
        return self.method == SPARSEGPT or find_mask(self.method).reads_inputs

    @property
    def outside_methods(self) -> tuple[Method, ...]:
        """The mask, where it is not a built-in one."""
        return from_outside("mask", self.method)

    def apply(self, pruned: "Pruned", inputs: "StepInputs") -> "Pruned":
        """The matrices of the blocks become sparse, block by block."""
        from prunelens.pruning.sequential import mask_weights

        pruned, texts = pruned.with_own_weights(inputs.recipe), inputs.calibration.texts
        blocks = len(pruned.model.anatomy.blocks)
        advance = inputs.reporter(f"{self}, block by block", (2 * blocks - 1) * sum(map(len, texts)))
        masked = mask_weights(
            pruned.model, self.method, self.pattern, texts, pruned.drop, pruned.repairs, advance=advance
        )
        return replace(pruned, masked=masked, notes=pruned.notes + tuple(f"{self}: {note}" for note in masked.notes))

    def describe(self) -> tuple[str, str]:
        """(kind, strength) for tables; shares and groups are two kinds."""
        return f"{self.method} n:m" if ":" in self.sparsity else self.method, self.sparsity

    def loads_where(self, model: "Model", steps: Sequence[BaseStep]) -> str:
        """Everywhere."""
        return "the zeros of a mask are plain weights: transformers and vLLM load it, no smaller, no faster"
