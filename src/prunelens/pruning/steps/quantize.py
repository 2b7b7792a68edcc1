"""quantize:int8, quantize:int4: store the blocks' matrices with fewer bits."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from prunelens.pruning.steps.base import BaseStep
from prunelens.pruning.values import Format

if TYPE_CHECKING:
    from prunelens.models.model import Model
    from prunelens.pruning.pruned import Pruned, StepInputs


class QuantizeStep(BaseStep):
    """Store the blocks' matrices with fewer bits (weights only)."""

    comes_last: ClassVar[str] = "quantize comes last: nothing can be changed in quantised numbers"

    method: Literal["quantize"]
    to: Format

    @classmethod
    def methods(cls) -> tuple[str, ...]:
        """The name that this kind of step goes by."""
        return ("quantize",)

    @classmethod
    def values(cls, method: str, sign: str, rest: str, part: str) -> dict[str, Any]:
        """quantize:int8 or quantize:int4."""
        return {"method": method, "to": rest.strip()}

    def __str__(self) -> str:
        return f"{self.method}:{self.to}"

    @property
    def fits_nemotron_nas(self) -> bool:
        """Whether `prune --format nemotron-nas` can hold it."""
        return False

    def check(self, model: "Model", recipe: str) -> None:
        """There are matrices that torchao takes, and torchao is installed."""
        from prunelens.pruning.quantize import check_quantizable

        check_quantizable(model, self.to)

    def apply(self, pruned: "Pruned", inputs: "StepInputs") -> "Pruned":
        """The matrices of the blocks get fewer bits."""
        from prunelens.pruning.quantize import quantize

        pruned = pruned.with_own_weights(inputs.recipe)
        before = len(pruned.model.notes)
        quantize(pruned.model, self.to)
        return replace(pruned, quantized=self.to, notes=pruned.notes + tuple(pruned.model.notes[before:]))

    def loads_where(self, model: "Model", steps: Sequence[BaseStep]) -> str:
        """In transformers with torchao."""
        return f"{self.to} weights load in transformers with torchao installed, smaller on disk and in memory"
