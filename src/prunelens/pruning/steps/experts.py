"""drop-experts: take a share of the experts out of every mixture."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import StrictBool, StrictFloat, field_validator

from prunelens.pruning.steps.base import BaseStep, decimal, number, words

if TYPE_CHECKING:
    from prunelens.models.model import Model
    from prunelens.pruning.pruned import Pruned, StepInputs


class ExpertStep(BaseStep):
    """Drop a share of the experts of every mixture: the least used by REAP's score, or `uniform` ones at random."""

    only_once: ClassVar[bool] = True

    method: Literal["drop-experts"]
    fraction: StrictFloat
    uniform: StrictBool = False

    @classmethod
    def methods(cls) -> tuple[str, ...]:
        """The name that this kind of step goes by."""
        return ("drop-experts",)

    @classmethod
    def values(cls, method: str, sign: str, rest: str, part: str) -> dict[str, Any]:
        """drop-experts:0.25, with `uniform` after a comma."""
        items, example = [item.strip() for item in rest.split(",")], "a share such as drop-experts:0.25"
        fraction = number(items[0], r"0?\.[0-9]{1,9}", "fraction", example, part)
        return {"method": method} | fraction | words(items[1:], ("uniform",), example, part)

    @field_validator("fraction")
    @classmethod
    def _in_range(cls, value: float) -> float:
        if not 0 < value < 1:
            raise ValueError(f"expected a share of the experts above 0 and below 1, found {value}")
        return value

    def __str__(self) -> str:
        return f"{self.method}:{decimal(self.fraction)}" + (",uniform" if self.uniform else "")

    @property
    def needs_calibration(self) -> bool:
        """Whether anything is measured on calibration texts."""
        return not self.uniform

    def check(self, model: "Model", recipe: str) -> None:
        """There are mixtures, and their routers can do with what is left."""
        from prunelens.models.surgery.mixtures import find_mixtures
        from prunelens.pruning.expert_scores import choose_experts

        choose_experts(find_mixtures(model), self.fraction, None)

    def apply(self, pruned: "Pruned", inputs: "StepInputs") -> "Pruned":
        """The routers pass the dropped experts over."""
        from prunelens.models.surgery.drop import dropped
        from prunelens.models.surgery.experts import mask_experts
        from prunelens.models.surgery.mixtures import find_mixtures
        from prunelens.pruning.expert_scores import choose_experts, score_experts

        pruned, texts = pruned.with_own_weights(inputs.recipe), inputs.calibration.texts
        mixtures = find_mixtures(pruned.model)
        scores, notes = None, pruned.notes
        if not self.uniform:
            advance = inputs.reporter(f"{self}: scoring experts", sum(map(len, texts)))
            with dropped(pruned.model.anatomy, pruned.drop, pruned.repairs):
                scores = score_experts(pruned.model, texts, advance=advance, mixtures=mixtures)
            out = pruned.drop.block | pruned.drop.mlp
            unseen = sum(int((found.counts == 0).sum()) for layer_idx, found in scores.items() if layer_idx not in out)
            if unseen:
                notes += (f"{self}: {unseen} experts read no calibration token; their score is 0",)
        experts = choose_experts(mixtures, self.fraction, scores, inputs.seed)
        mask_experts(pruned.model, experts)
        return replace(pruned, experts=experts, notes=notes)

    def loads_where(self, model: "Model", steps: Sequence[BaseStep]) -> str:
        """In transformers."""
        return "fewer experts: plain transformers loads it, smaller"
