"""The dense model with its tasks: what one model does on them, item by item."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from prunelens.models.model import Model
from prunelens.models.surgery.variant import Variant
from prunelens.progress import Reporter, silent
from prunelens.study.evaluate.measurement import Measurement, TaskResult
from prunelens.study.evaluate.task_set import TaskSet, TaskSettings, open_harness
from prunelens.tasks.harness import Harness
from prunelens.tasks.identity import identity_of
from prunelens.tasks.kept_answers import KeptAnswers, trim
from prunelens.tasks.suite import TaskSelection

__all__ = ["TaskResult", "TaskRunner", "TaskSettings", "open_harness"]


class TaskRunner:
    """A dense model with its tasks, found and loaded once; measures compressed models beside it.

    Args:
        dense: the dense model.
        chosen: its tasks.
        settings: how they are run.
        reporter: progress display.
        harness: the tasks of lm-evaluation-harness, where they are loaded already.
        answers: folder in which the dense model's answers are kept between runs; None keeps none.
        unfinished: folder in which answers of compressed models are kept, so that a killed run resumes; None keeps
            none.

    Raises:
        PrunelensError: as `TaskSet`.
    """

    def __init__(
        self,
        dense: Model,
        chosen: TaskSelection,
        settings: TaskSettings,
        reporter: Reporter = silent,
        harness: Harness | None = None,
        answers: Path | None = None,
        unfinished: Path | None = None,
    ) -> None:
        self.tasks = TaskSet(dense, chosen, settings, reporter, harness)
        self.dense, self.chosen, self.settings = dense, chosen, settings
        self._answers, self._unfinished = answers, unfinished
        self._resumed: dict[str, KeptAnswers] = {}

    @property
    def notes(self) -> list[str]:
        """What a reader of results on these tasks should know of their texts and of where answers come from."""
        dense = self.dense_measured.kept
        earlier = [f"dense answers from an earlier run ({dense.num_items} items)"] if dense and dense.num_items else []
        stopped = [
            f"{label}: answers from a run that was stopped ({kept.num_items} items)"
            for label, kept in self._resumed.items()
            if kept.num_items
        ]
        return [*self.tasks.notes, *earlier, *stopped]

    @cached_property
    def questions(self) -> list[str]:
        """As `TaskSet.questions`."""
        return self.tasks.questions

    def decoding(self, model: Model) -> dict[str, Any] | None:
        """As `TaskSet.decoding`."""
        return self.tasks.decoding(model)

    @cached_property
    def dense_measured(self) -> Measurement:
        """The dense model on the tasks, as far as it was run."""
        folder = self._answers or self._unfinished
        name = identity_of(self.dense) if folder is not None else None
        kept = KeptAnswers(folder, name) if folder is not None and name is not None else None
        if self._answers is not None:
            trim(self._answers)
        return Measurement(self.tasks, "dense", Variant(self.dense), kept)

    @property
    def drawn(self) -> dict[str, dict[str, Any]]:
        """The ways in which long texts are drawn, each with the generation settings that it follows."""
        plan = self.tasks.long_plan
        return {one.name: dict(one.settings) for one in plan.samplings} if plan else {}

    @cached_property
    def dense_found(self) -> TaskResult:
        """What the dense model does on all items, measured once."""
        self.dense_measured.run(self.chosen.tasks)
        return replace(self.dense_measured.result(), null=self.dense_measured.null())

    def begin(self, label: str, variant: Variant, made_of: Mapping[str, Any] | None = None) -> Measurement:
        """A compressed model on the tasks, of which nothing was run yet.

        Args:
            label: what it is called.
            variant: the model.
            made_of: everything that made it; its answers are kept under that, and not at all without it.
        """
        return Measurement(self.tasks, label, variant, self._kept(label, variant, made_of), self.dense_measured)

    def measure(self, label: str, variant: Variant, made_of: Mapping[str, Any] | None = None) -> TaskResult:
        """What a compressed model does on all items; where neighbours are compared, the dense one retrieves too."""
        measured = self.begin(label, variant, made_of)
        measured.run(self.chosen.tasks)
        return measured.result()

    def _kept(self, label: str, variant: Variant, made_of: Mapping[str, Any] | None) -> KeptAnswers | None:
        dense = self.dense_measured.kept
        if self._unfinished is None or made_of is None or dense is None:
            return None
        drop = {"attention": sorted(variant.drop.attention), "mlp": sorted(variant.drop.mlp)}
        name = identity_of(variant.model, {"made of": made_of, "drop": drop, "dense": dense.identity})
        if name is None:
            return None
        self._resumed[label] = KeptAnswers(self._unfinished, name)
        return self._resumed[label]
