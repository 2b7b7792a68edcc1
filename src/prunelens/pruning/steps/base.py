"""What every kind of step can be asked: its syntax, what it needs, what it does to a model, where the result loads."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict

from prunelens.errors import shown

if TYPE_CHECKING:
    from prunelens.models.model import Model
    from prunelens.pruning.methods import Method
    from prunelens.pruning.pruned import Pruned, StepInputs


class BaseStep(BaseModel):
    """One step of a recipe.

    Attributes:
        takes_indices: whether METHOD@INDEX names parts.
        drops_parts: whether it takes attentions, MLPs or blocks out and leaves all weights as they are.
        repairs_drops: whether it needs drops before it, and none after it.
        makes_zeros: whether it sets single weights to zero.
        only_once: whether a recipe holds at most one.
        comes_last: why nothing may come after it; empty where something may.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    takes_indices: ClassVar[bool] = False
    drops_parts: ClassVar[bool] = False
    repairs_drops: ClassVar[bool] = False
    makes_zeros: ClassVar[bool] = False
    only_once: ClassVar[bool] = False
    comes_last: ClassVar[str] = ""

    method: str

    @classmethod
    def methods(cls) -> tuple[str, ...]:
        """The names that this kind of step goes by."""
        raise NotImplementedError

    @classmethod
    def goes_by(cls, method: str) -> bool:
        """Whether a step of that name is of this kind."""
        return method in cls.methods()

    @classmethod
    def values(cls, method: str, sign: str, rest: str, part: str) -> dict[str, Any]:
        """The fields of a step that was given as text, METHOD, `:` or `@`, and the rest.

        Raises:
            ValueError: malformed; it says what was expected and shows `part`, the whole step.
        """
        raise NotImplementedError

    @property
    def needs_ranking(self) -> bool:
        """Whether the dense model's cosine ranking turns a count into parts."""
        return False

    @property
    def needs_calibration(self) -> bool:
        """Whether anything is measured on calibration texts."""
        return False

    @property
    def spoils_zeros(self) -> str:
        """Why it cannot come after a mask; empty where it can."""
        return ""

    @property
    def fits_nemotron_nas(self) -> bool:
        """Whether `prune --format nemotron-nas` can hold what it does beside dropped sublayers."""
        return True

    @property
    def outside_methods(self) -> "tuple[Method, ...]":
        """The methods it uses that prunelens does not bring along."""
        return ()

    def check(self, model: "Model", recipe: str) -> None:
        """Refuse, before anything runs, what the model does not have.

        Args:
            model: the dense model.
            recipe: the whole recipe, for messages.

        Raises:
            PrunelensError: as said.
        """

    def apply(self, pruned: "Pruned", inputs: "StepInputs") -> "Pruned":
        """The model after this step; `pruned.dense` stays as it is.

        Raises:
            PrunelensError: what only shows while it runs, such as too few parts left.
        """
        raise NotImplementedError

    def describe(self) -> tuple[str, str]:
        """(kind, strength) for tables."""
        kind, _, strength = str(self).replace("@", ":").partition(":")
        return kind, strength

    def loads_where(self, model: "Model", steps: "Sequence[BaseStep]") -> str:
        """Where a checkpoint of a recipe with this step loads, and whether it is smaller there.

        Args:
            model: the dense model.
            steps: the whole recipe.
        """
        raise NotImplementedError


def decimal(value: float) -> str:
    """A share as recipes print it: no exponent, no zeros at its end."""
    return f"{value:.9f}".rstrip("0")


def number(item: str, pattern: str, field: str, example: str, part: str) -> dict[str, Any]:
    """The field with its number.

    Raises:
        ValueError: the item does not match.
    """
    if not re.fullmatch(pattern, item):
        raise ValueError(f"expected {example}, found {shown(part.strip())}")
    return {field: float(item) if "." in item else int(item)}


def words(items: list[str], known: tuple[str, ...], example: str, part: str, listed: str = "") -> dict[str, bool]:
    """A true field for each word; `listed` says what may follow a comma, where it is more than the known words.

    Raises:
        ValueError: an unknown word, or one that is given twice.
    """
    unexpected = [item for item in items if item not in known or items.count(item) > 1]
    if unexpected:
        raise ValueError(
            f"expected {example}, and {listed or ' or '.join(known)} after a comma, found {shown(part.strip())}"
        )
    return dict.fromkeys(items, True)
