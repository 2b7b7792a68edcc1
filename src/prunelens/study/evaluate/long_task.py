"""core_long for one model: the texts that it drew so far, kept on disk where answers are, beside the dense model's."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from prunelens.models.surgery.drop import NOTHING
from prunelens.models.surgery.variant import Variant
from prunelens.study.evaluate.task_set import TaskSet
from prunelens.tasks.kept_answers import KeptAnswers
from prunelens.tasks.prompts import Prompt
from prunelens.tasks.suite import CORE_LONG, MetricScores
from prunelens.tracing.long_scores import held_against, score_long
from prunelens.tracing.long_texts import LongPlan, LongText, write_long

AGAIN = "dense, other numbers"
"""What the dense model's second set of texts is called in the progress display."""


class LongTexts:
    """The long texts of one model, by the places of their prompts.

    Args:
        tasks: the prompts, and the plan of the texts.
        label: what the model is called.
        variant: the model.
        kept: answers of this model on disk; None where they are not kept.
        dense: the dense model's; None for the dense model itself.
    """

    def __init__(
        self,
        tasks: TaskSet,
        label: str,
        variant: Variant,
        kept: KeptAnswers | None,
        dense: "LongTexts | None",
    ) -> None:
        self._tasks, self._label, self._variant, self._kept, self._dense = tasks, label, variant, kept, dense
        self._own: dict[int, list[LongText]] = {}
        self._again: dict[int, list[LongText]] = {}

    def write(self, places: Sequence[int]) -> None:
        """Draw the texts of these prompts, those that are kept aside."""
        if self._dense is not None and self._variant.model is self._tasks.dense and self._variant.drop == NOTHING:
            self._own |= {place: texts for place, texts in self._dense.own().items() if place in set(places)}
            return
        assert self._tasks.long_plan is not None
        self._own |= self._drawn(self._tasks.long_plan, places, self._label)

    def own(self) -> dict[int, list[LongText]]:
        """All texts, those of prompts that were not drawn yet too."""
        self.write([place for place in range(len(self._tasks.prompts)) if place not in self._own])
        return self._own

    def again(self) -> dict[int, list[LongText]]:
        """All texts of the plan, drawn once more with other numbers."""
        if not self._again and self._tasks.long_plan is not None:
            self._again = self._drawn(self._tasks.long_plan.null, range(len(self._tasks.prompts)), AGAIN)
        return self._again

    def judged(self) -> list[LongText]:
        """The texts so far, held against all of the dense model's."""
        return self._held([text for place in sorted(self._own) for text in self._own[place]]) if self._own else []

    def null(self) -> list[MetricScores]:
        """Of the dense model: the scores of its second texts, what a model as good as itself scores."""
        return score_long(self._held([text for texts in self.again().values() for text in texts]))

    def _held(self, texts: list[LongText]) -> list[LongText]:
        dense = self._dense or self
        both = [text for drawn in (dense.own(), dense.again()) for place in sorted(drawn) for text in drawn[place]]
        return held_against(both, texts)

    def _drawn(self, plan: LongPlan, places: Sequence[int], label: str) -> dict[int, list[LongText]]:
        kept = self._kept.of(CORE_LONG) if self._kept is not None else None
        asked = {place: self._tasks.prompts[place] for place in places}
        stored = {
            place: kept.get(CORE_LONG, _request(plan, prompt)) if kept is not None else None
            for place, prompt in asked.items()
        }
        missing = [place for place, known in stored.items() if known is None]
        written = self._written(plan, [asked[place] for place in missing], label) if missing else []
        found = {place: [_read(one) for one in known] for place, known in stored.items() if known is not None}
        if self._kept is not None and plan == self._tasks.long_plan:
            self._kept.num_items += len(found)
        for number, place in enumerate(missing):
            texts = written[number * plan.per_prompt : (number + 1) * plan.per_prompt]
            found[place] = texts
            if kept is not None:
                kept.add(CORE_LONG, _request(plan, asked[place]), [_stored(text) for text in texts])
        if kept is not None:
            kept.write()
        return dict(sorted(found.items()))

    def _written(self, plan: LongPlan, prompts: Sequence[Prompt], label: str) -> list[LongText]:
        steps = len(prompts) * plan.per_prompt * plan.max_new_tokens
        advance = self._tasks.reporter(f"{label}: {CORE_LONG}", steps)
        return write_long(self._tasks.dense, self._variant, prompts, plan, self._tasks.settings.batch_size, advance)


def _request(plan: LongPlan, prompt: Prompt) -> list[Any]:
    ways = [[one.name, dict(one.settings)] for one in plan.samplings]
    return [list(prompt.token_ids), ways, plan.samples, plan.max_new_tokens, plan.seed, plan.series]


def _stored(text: LongText) -> dict[str, Any]:
    return asdict(text)


def _read(stored: Mapping[str, Any]) -> LongText:
    values = {one.name: stored[one.name] for one in fields(LongText)}
    return LongText(**values | {"token_ids": tuple(values["token_ids"])})
