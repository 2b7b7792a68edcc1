"""All kinds of steps, found by the name of a method."""

from typing import Annotated, Any

from pydantic import Discriminator, Tag

from prunelens.pruning.steps.base import BaseStep
from prunelens.pruning.steps.drop import DropStep
from prunelens.pruning.steps.experts import ExpertStep
from prunelens.pruning.steps.mask import MaskStep
from prunelens.pruning.steps.quantize import QuantizeStep
from prunelens.pruning.steps.repair import RepairStep

KINDS: tuple[type[BaseStep], ...] = (DropStep, RepairStep, ExpertStep, QuantizeStep, MaskStep)


def known_methods() -> tuple[str, ...]:
    """Every name that a step may begin with, those of masks from outside too."""
    return tuple(method for kind in KINDS for method in kind.methods())


def kind_of(method: Any) -> type[BaseStep] | None:
    """The kind of step that a method is of; None where there is no such method."""
    return next((kind for kind in KINDS if isinstance(method, str) and kind.goes_by(method)), None)


def _tag(value: Any) -> str | None:
    kind = kind_of(value.get("method")) if isinstance(value, dict) else type(value)
    return kind.__name__ if kind in KINDS else None


AnyStep = Annotated[
    Annotated[DropStep, Tag("DropStep")]
    | Annotated[MaskStep, Tag("MaskStep")]
    | Annotated[RepairStep, Tag("RepairStep")]
    | Annotated[ExpertStep, Tag("ExpertStep")]
    | Annotated[QuantizeStep, Tag("QuantizeStep")],
    Discriminator(_tag),
]
TAGS = tuple(kind.__name__ for kind in KINDS)
