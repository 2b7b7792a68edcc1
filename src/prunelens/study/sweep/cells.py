"""One cell of a sweep: made by a worker that opened the model once, and written whole or not at all."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from prunelens.documents import read_json
from prunelens.errors import PrunelensError
from prunelens.files import new_folder
from prunelens.models.model import Model
from prunelens.models.opening.loading import load
from prunelens.progress import silent
from prunelens.pruning.calibration import read_calibration
from prunelens.pruning.methods import Reference
from prunelens.pruning.plugins import load_again
from prunelens.pruning.pruned import Calibration
from prunelens.pruning.redundancy import Ranking
from prunelens.study.calibration_texts import own_texts, with_repair_texts
from prunelens.study.candidates import Candidate, open_candidates
from prunelens.study.compare.dense_texts import DenseTexts
from prunelens.study.compare.describe import describe_size
from prunelens.study.compare.schemas import RUN
from prunelens.study.compare.stages import Stages
from prunelens.study.evaluate.evaluate import collect
from prunelens.study.evaluate.measure import TaskRunner
from prunelens.study.evaluate.racing import race
from prunelens.study.evaluate.tables import EVALUATION
from prunelens.study.prepare import apply_recipes, rank
from prunelens.study.store import Run, finite, read_run, write_run
from prunelens.study.sweep.study_file import Cell, Study
from prunelens.tasks.encoding import encode
from prunelens.tasks.kept_answers import answers_folder
from prunelens.tasks.prompts import prompts
from prunelens.tasks.suite import parse_tasks

CELLS, CELL = "cells", "cell.json"


@dataclass(frozen=True)
class Given:
    """What every worker of a sweep gets.

    Attributes:
        study, folder: what is measured, and where its cells are kept.
        threads: torch's, where several workers share a machine.
        methods: those from outside that the recipes use.
    """

    study: Study
    folder: Path
    threads: int | None = None
    methods: tuple[Reference, ...] = ()


@dataclass
class Context:
    """A worker's model, and what it keeps from cell to cell: the dense model's texts and its scores."""

    given: Given
    dense: Model
    written: dict[int, DenseTexts] = field(default_factory=dict)

    @cached_property
    def runner(self) -> TaskRunner | None:
        """The dense model with its tasks; the seed of a cell touches recipes only."""
        study = self.given.study
        if study.tasks is None:
            return None
        return TaskRunner(self.dense, parse_tasks(study.tasks), study.evaluate.settings(0), answers=answers_folder())

    def reported(self, candidate: Candidate) -> Sequence[str]:
        """What the tasks ask, where it matters: no repair may be fitted on it."""
        repaired = candidate.recipe is not None and candidate.recipe.repair is not None
        return self.runner.questions if repaired and self.runner is not None else ()

    @cached_property
    def calibration(self) -> list[list[int]] | None:
        """The calibration texts that the study names."""
        path = self.given.study.calibration
        return read_calibration(Path(path), self.dense) if path else None

    @cached_property
    def own_texts(self) -> list[list[int]]:
        """What calibrates where nothing is compared and nothing is named."""
        return self.calibration or own_texts(self.dense, silent)

    @cached_property
    def ranking(self) -> Ranking:
        """The dense model's sublayers, ranked on `own_texts`."""
        return rank(self.dense, self.own_texts, silent)


def setup(given: Given) -> Context:
    """Open the model, once in each worker.

    Raises:
        PrunelensError: as `load` and `load_again`.
    """
    study = given.study
    load_again(given.methods)
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    return Context(given, load(study.model, study.dtype, study.device, study.trust_remote_code))


def work(context: Context, cell: Cell) -> None:
    """Make one cell and write it.

    Raises:
        PrunelensError: a recipe that the model cannot take, or a fault on the way.
    """
    study, dense = context.given.study, context.dense
    candidate = open_candidates(dense, [cell.recipe])[0]
    run = _compare(context, candidate, cell.seed)
    if run is None:
        assert candidate.recipe is not None
        texts = Calibration(context.own_texts if candidate.recipe.needs_calibration else ())
        reported = context.reported(candidate)
        texts = with_repair_texts(texts, [candidate.recipe], dense, context.calibration, reported, silent)
        ranking = context.ranking if candidate.recipe.needs_ranking else None
        apply_recipes([candidate], dense, texts, ranking, silent, cell.seed)
    evaluation = None
    if context.runner is not None:
        found = {candidate.label: race(context.runner, candidate.label, candidate.variant(dense), study.thresholds)}
        evaluation = collect(context.runner, [candidate], found, study.thresholds, 0.0)
    with new_folder(cell_folder(context.given.folder, cell), _is_cell, "cell") as temporary:
        if run is not None:
            (temporary / "compare").mkdir()
            write_run(run, temporary / "compare")
        if evaluation is not None:
            (temporary / "evaluate").mkdir()
            write_run(evaluation, temporary / "evaluate")
        sizes = {"dense": describe_size(Candidate("dense"), dense), "compressed": describe_size(candidate, dense)}
        _write_json(temporary / CELL, cell.model_dump() | sizes)


def _compare(context: Context, candidate: Candidate, seed: int) -> Run | None:
    comparing = context.given.study.compare
    if comparing is None:
        return None
    settings = comparing.settings(seed)
    texts = encode(
        prompts(comparing.prompts, comparing.num_prompts),
        context.dense,
        settings.chat_template,
        settings.max_new_tokens,
    )
    stages = Stages(context.dense, [candidate], texts, settings, silent, context.written.get(seed))
    run = stages.run(context.calibration, context.reported(candidate))
    context.written[seed] = stages.written
    return run


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(finite(content)[0], indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def cell_folder(folder: Path, cell: Cell) -> Path:
    """Where a cell lies."""
    return folder / CELLS / cell.key


def _is_cell(folder: Path) -> bool:
    """Everything in the folder of cells is this sweep's own, half a cell too."""
    return folder.parent.name == CELLS


def keep_error(folder: Path, cell: Cell, error: str, traceback: str | None) -> None:
    """Keep how a cell failed, so that it is not tried again unasked."""
    with new_folder(cell_folder(folder, cell), _is_cell, "cell") as temporary:
        _write_json(temporary / CELL, cell.model_dump() | {"error": error, "traceback": traceback})


def read_cell(folder: Path, cell: Cell) -> dict[str, Any] | None:
    """What is known of a cell: its record, or None where it was not made yet."""
    try:
        found = read_json(cell_folder(folder, cell) / CELL, "a cell", finite=False)
    except PrunelensError:
        return None
    return found if isinstance(found, dict) else None


def read_parts(folder: Path, cell: Cell) -> tuple[Run | None, Run | None]:
    """(comparison, evaluation) of a finished cell.

    Raises:
        PrunelensError: a damaged cell.
    """
    home = cell_folder(folder, cell)
    compared = read_run(home / "compare", RUN) if (home / "compare").is_dir() else None
    evaluated = read_run(home / "evaluate", EVALUATION) if (home / "evaluate").is_dir() else None
    return compared, evaluated
