"""Ask real tasks of a dense model and of compressed ones, on the same items in one run."""

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from prunelens.models.model import Model
from prunelens.progress import Reporter
from prunelens.reading import read_bytes
from prunelens.study.candidates import Candidate, Compressible, open_candidates, parse_candidates
from prunelens.study.compare.describe import describe_candidate, describe_model, describe_size
from prunelens.study.evaluate.measure import TaskResult, TaskRunner, TaskSettings, open_harness
from prunelens.study.evaluate.racing import race, raced_note, raced_rows
from prunelens.study.evaluate.scores import score_rows
from prunelens.study.evaluate.tables import EVALUATION, texts_table, values_table
from prunelens.study.evaluate.verdict import Thresholds, judge
from prunelens.study.prepare import prepare
from prunelens.study.settings import chosen_settings
from prunelens.study.store import Run, sound
from prunelens.tasks.decoding import FREE, decoding_note
from prunelens.tasks.harness import Harness
from prunelens.tasks.kept_answers import answers_folder
from prunelens.tasks.suite import TaskSelection, parse_tasks

TasksGiven = str | Sequence[str] | Mapping[str, Sequence[str]]


def run_evaluate(
    model: Model,
    compressed: Sequence[Compressible],
    chosen: TaskSelection,
    asked: TaskSettings,
    harness: Harness | None,
    thresholds: Thresholds,
    calibration: str | Path | None,
    reporter: Reporter,
    unfinished: Path | None = None,
) -> Run:
    """Run tasks on an open dense model and on compressed ones; the other arguments are those of `prunelens.evaluate`.

    Args:
        unfinished: folder in which the answers of compressed models are kept meanwhile, so that a killed run resumes.

    Raises:
        PrunelensError: bad input, before anything is computed.
    """
    candidates = open_candidates(model, compressed)
    start = time.perf_counter()
    runner = TaskRunner(model, chosen, asked, reporter, harness, answers_folder(), unfinished)
    _make(runner, candidates, calibration, reporter)
    _ = runner.dense_found
    made_of = _made_of(runner, calibration)
    found = {one.label: race(runner, one.label, one.variant(model), thresholds, made_of(one)) for one in candidates}
    return collect(runner, candidates, found, thresholds, time.perf_counter() - start)


def check_evaluation(
    compressed: Sequence[Compressible], tasks: TasksGiven, settings: dict[str, Any], harness: Harness | None = None
) -> tuple[TaskSelection, TaskSettings, Harness | None]:
    """Refuse what needs no model to be seen wrong; the harness's tasks are loaded for it, unless they are already.

    Raises:
        PrunelensError: settings without meaning, a malformed recipe, no task, one that is unknown or cannot be run,
            nothing to compare.
    """
    asked = chosen_settings(TaskSettings, settings, ("tasks", "thresholds", "calibration", "reporter"))
    parse_candidates(compressed)
    chosen = parse_tasks(tasks)
    return chosen, asked, harness or open_harness(chosen, asked)


def _make(
    runner: TaskRunner, candidates: Sequence[Candidate], calibration: str | Path | None, reporter: Reporter
) -> None:
    path = Path(calibration) if calibration is not None else None
    repaired = any(candidate.recipe is not None and candidate.recipe.repair is not None for candidate in candidates)
    reported = runner.questions if repaired else ()
    prepare(candidates, runner.dense, path, reporter, runner.settings.seed, reported)


def _made_of(runner: TaskRunner, calibration: str | Path | None) -> Callable[[Candidate], dict[str, Any]]:
    """What a compressed model is made of, beside the dense one: that its weights alone may not show."""
    texts = hashlib.sha256(read_bytes(calibration, "calibration texts")).hexdigest() if calibration else None
    shared = {"seed": runner.settings.seed, "calibration": texts, "tasks": list(runner.chosen.tasks)}

    def made_of(candidate: Candidate) -> dict[str, Any]:
        return {"recipe": str(candidate.recipe), **candidate.recipe.made_with, **shared} if candidate.recipe else {}

    return made_of


def collect(
    runner: TaskRunner,
    candidates: Sequence[Candidate],
    found: Mapping[str, TaskResult],
    thresholds: Thresholds,
    seconds: float,
) -> Run:
    """Everything that was measured as one result."""
    everything = {"dense": runner.dense_found, **found}
    summary = []
    for candidate in candidates:
        own = found[candidate.label]
        rows = raced_rows(runner.dense_found.scored, own)
        lines = judge(runner.dense_found.scored, own.scored, rows, thresholds, own.stopped)
        summary.append(
            {
                "compressed": candidate.label,
                "scores": rows,
                "verdicts": [line.as_dict() for line in lines],
            }
        )
    models = [runner.dense, *[candidate.model for candidate in candidates if candidate.model]]
    made = [candidate.pruned for candidate in candidates if candidate.pruned]
    decoding = {
        label: runner.decoding(model)
        for label, model in (
            ("dense", runner.dense),
            *[(candidate.label, candidate.model) for candidate in candidates if candidate.model],
        )
    }
    info = {
        "format": EVALUATION.format,
        "format_version": EVALUATION.version,
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "dense": describe_model(runner.dense) | describe_size(Candidate("dense"), runner.dense),
        "compressed": [describe_candidate(candidate, runner.dense) for candidate in candidates],
        "tasks": list(runner.chosen.tasks),
        "settings": asdict(runner.settings),
        "decoding": {"harness": decoding, "others": FREE, "core_long": runner.drawn},
        "thresholds": thresholds.model_dump(),
        "notes": [
            *[note for model in models for note in model.notes],
            *runner.notes,
            *raced_note(found),
            *[note for one in made for note in one.notes],
            *runner.chosen.notes,
            *decoding_note(decoding),
        ],
        "seconds": round(seconds, 3),
        "versions": {
            name: version(name)
            for name in ("prunelens", "torch", "transformers", *(["lm_eval"] if runner.chosen.harness else []))
        },
        "summary": summary,
        "null": score_rows(runner.dense_found.scored, runner.dense_found.null),
    }
    tables = {"tasks": values_table(everything), "texts": texts_table(everything)}
    return Run(tables, sound(info))
