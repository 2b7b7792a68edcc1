"""repair:bias, repair:linear, repair:folded: put back what the drops before it took out."""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from pydantic import StrictBool, StrictInt, model_validator

from prunelens.errors import PrunelensError, shown
from prunelens.pruning.steps.base import BaseStep, words
from prunelens.pruning.values import Fit, RepairForm

if TYPE_CHECKING:
    from prunelens.models.model import Model
    from prunelens.pruning.pruned import Pruned, StepInputs

FITS: tuple[Fit, ...] = get_args(Fit)
LOADS = {
    "bias": "the repair lies in biases where the family has them, else in a file that prunelens alone reads",
    "linear": "its maps lie in a file that prunelens alone reads: other programs load it without the repair",
    "folded": "the repair lies in the weights before the cut: every program has it",
}


class RepairStep(BaseStep):
    """Put back what the drops before it took out: its mean, or what is linear in the part's input.

    `rank` limits a linear map. `weighted` counts the residual of a token as it moves the probabilities (R4).
    `folded` lets the map act on what the sublayer before the cut writes, so that its weights carry it.
    """

    repairs_drops: ClassVar[bool] = True
    only_once: ClassVar[bool] = True

    method: Literal["repair"]
    fit: Fit
    rank: StrictInt | None = None
    weighted: StrictBool = False

    @classmethod
    def methods(cls) -> tuple[str, ...]:
        """The name that this kind of step goes by."""
        return ("repair",)

    @classmethod
    def values(cls, method: str, sign: str, rest: str, part: str) -> dict[str, Any]:
        """repair:FIT, with `rank=64` and `weighted` after commas."""
        items, example = [item.strip() for item in rest.split(",")], "repair:bias, repair:linear or repair:folded"
        if items[0] not in FITS:
            raise ValueError(f"expected {example}, found {shown(part.strip())}")
        ranks = [match[1] for item in items[1:] if (match := re.fullmatch(r"rank=([0-9]{1,6})", item))]
        if len(ranks) > 1:
            raise ValueError(f"expected one rank, found {shown(part.strip())}")
        others = [item for item in items[1:] if not item.startswith("rank=")]
        if len(others) + len(ranks) < len(items) - 1:
            raise ValueError(f"expected a rank such as repair:linear,rank=64, found {shown(part.strip())}")
        found: dict[str, Any] = {"method": method, "fit": items[0]} | ({"rank": int(ranks[0])} if ranks else {})
        return found | words(others, ("weighted",), example, part)

    @model_validator(mode="after")
    def _rank_of_a_map(self) -> "RepairStep":
        if self.rank is not None and self.fit != "linear":
            raise ValueError(f"rank goes with repair:linear only, found it with {self.fit}")
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"the rank must be at least 1, found {self.rank}")
        return self

    def __str__(self) -> str:
        found = [f"rank={self.rank}"] if self.rank is not None else []
        return ",".join([f"{self.method}:{self.fit}", *found, *(["weighted"] if self.weighted else [])])

    @property
    def spoils_zeros(self) -> str:
        """Why it cannot come after a mask; empty where it can."""
        if self.fit != "folded":
            return ""
        return "repair:folded comes before a mask: it would fill the zeros of the weights it changes"

    @property
    def fits_nemotron_nas(self) -> bool:
        """Whether `prune --format nemotron-nas` can hold it."""
        return self.fit == "folded"

    def check(self, model: "Model", recipe: str) -> None:
        """A map cannot have more ranks than the stream is wide."""
        if (self.rank or 0) > model.anatomy.hidden_size:
            raise PrunelensError(
                f"recipe {shown(recipe)}: expected a rank of at most {model.anatomy.hidden_size}, the hidden size of "
                f"{model.name}, found {self.rank}"
            )

    def apply(self, pruned: "Pruned", inputs: "StepInputs") -> "Pruned":
        """What the drops have taken out is put back as far as the step can."""
        calibration = inputs.calibration
        notes = pruned.notes + tuple(f"{self}: {note}" for note in calibration.notes)
        tokens, inputs_of_a_map = sum(map(len, calibration.repair)), pruned.model.anatomy.hidden_size
        if tokens < inputs_of_a_map and self.fit != "bias":
            notes += (f"{self}: fitted on {tokens} tokens, fewer than the {inputs_of_a_map} inputs of a map",)
        pruned = replace(pruned, notes=notes)
        return self._folded(pruned, inputs) if self.fit == "folded" else self._fitted(pruned, inputs)

    def _folded(self, pruned: "Pruned", inputs: "StepInputs") -> "Pruned":
        from prunelens.pruning.folding import find_cuts, fold_repairs, num_folding_runs

        texts = inputs.calibration.repair
        prefix = inputs.calibration.prefix_of(pruned.dense) if pruned.model is pruned.dense else None
        pruned = pruned.with_own_weights(inputs.recipe)
        runs = num_folding_runs(find_cuts(pruned.model, pruned.drop))
        advance = inputs.reporter(f"{self}: fitting", runs * sum(map(len, texts)))
        repaired = fold_repairs(pruned.model, pruned.drop, texts, self.weighted, prefix, advance=advance)
        return replace(pruned, repaired=tuple(repaired))

    def _fitted(self, pruned: "Pruned", inputs: "StepInputs") -> "Pruned":
        from prunelens.pruning.repair import find_gaps, fit_repairs, num_block_runs

        calibration = inputs.calibration
        prefix = calibration.prefix_of(pruned.dense) if pruned.model is pruned.dense else None
        metric = calibration.metric_of(pruned.dense) if self.weighted and self.rank is not None else None
        runs = num_block_runs(find_gaps(pruned.model, pruned.drop))
        advance = inputs.reporter(f"{self}: fitting", runs * sum(map(len, calibration.repair)))
        form = RepairForm(self.fit, self.rank, self.weighted)
        repairs, repaired = fit_repairs(
            pruned.model, form, pruned.drop, calibration.repair, metric, prefix, advance=advance
        )
        return replace(pruned, repairs=tuple(repairs), repaired=tuple(repaired))

    def loads_where(self, model: "Model", steps: Sequence[BaseStep]) -> str:
        """Where programs other than this one have the repair."""
        return LOADS[self.fit]
