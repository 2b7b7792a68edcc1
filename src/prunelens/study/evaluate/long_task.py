"""core_long for one dense model: its own texts, drawn once, and those of compressed models beside them."""

from dataclasses import replace
from functools import cached_property

from prunelens.models.model import Model
from prunelens.models.surgery.drop import NOTHING
from prunelens.models.surgery.variant import Variant
from prunelens.progress import Reporter
from prunelens.tasks.encoding import encode
from prunelens.tasks.prompts import Prompt, PromptText
from prunelens.tasks.suite import CORE_LONG, MetricScores
from prunelens.tracing.long_scores import held_against, score_long
from prunelens.tracing.long_texts import DenseLongTexts, LongPlan, LongText, write_long
from prunelens.tracing.sampling import samplings

AGAIN = "dense, other numbers"
"""Label of the dense model's second set of texts."""


class LongTask:
    """The prompts of core_long and the dense model's texts on them.

    Args:
        dense: the dense model.
        plan: which texts; the ways to draw them are those of the dense checkpoint, for every model.
        items: prompts as `long_items` gives them.
        batch_size: texts decoded together.
        reporter: progress display.

    Raises:
        PrunelensError: a prompt that cannot be encoded, or generation settings that cannot be followed.
    """

    def __init__(
        self, dense: Model, plan: LongPlan, items: list[dict[str, str]], batch_size: int, reporter: Reporter
    ) -> None:
        self._dense, self._batch_size, self._reporter = dense, batch_size, reporter
        self.plan = replace(plan, samplings=tuple(samplings(dense)))
        texts = [PromptText(item["id"], item["kind"], ({"role": "user", "content": item["prompt"]},)) for item in items]
        self.prompts: list[Prompt] = encode(texts, dense, True, plan.max_new_tokens, f"leave out {CORE_LONG}")

    @cached_property
    def dense_texts(self) -> DenseLongTexts:
        """The dense model's texts, written once."""
        dense = Variant(self._dense)
        own = self._write("dense", dense, self.plan)
        return DenseLongTexts(own, self._write(AGAIN, dense, self.plan.null))

    def run(self, label: str, variant: Variant) -> tuple[list[LongText], list[MetricScores]]:
        """What a model writes, and its scores beside the dense model's texts."""
        is_dense = variant.model is self._dense and variant.drop == NOTHING
        texts = self.dense_texts.own if is_dense else self._write(label, variant, self.plan)
        judged = held_against(self.dense_texts.both, texts)
        return judged, score_long(judged)

    def null(self) -> list[MetricScores]:
        """The scores of the dense model's second texts: what a model as good as itself scores."""
        return score_long(held_against(self.dense_texts.both, self.dense_texts.null))

    def _write(self, label: str, variant: Variant, plan: LongPlan) -> list[LongText]:
        steps = len(self.prompts) * plan.per_prompt * plan.max_new_tokens
        advance = self._reporter(f"{label}: {CORE_LONG}", steps)
        return write_long(self._dense, variant, self.prompts, plan, self._batch_size, advance)
