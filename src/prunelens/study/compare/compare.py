"""Compare a dense model with compressed ones: check what was asked, then run the stages."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from prunelens.errors import PrunelensError
from prunelens.models.model import Model
from prunelens.progress import Reporter
from prunelens.pruning.calibration import read_calibration
from prunelens.study.candidates import Candidate, Compressible, open_candidates, parse_candidates
from prunelens.study.compare.settings import Settings
from prunelens.study.compare.stages import Stages
from prunelens.study.compare.tables import prompts_table
from prunelens.study.forecast import Forecast, check_forecast, expect, prompts_hash, read_forecast
from prunelens.study.settings import chosen_settings
from prunelens.study.store import Run
from prunelens.tasks.encoding import encode
from prunelens.tasks.prompts import PromptText
from prunelens.tasks.prompts import prompts as read_prompts


def run_compare(
    model: Model,
    compressed: Sequence[Compressible],
    texts: Sequence[PromptText],
    chosen: Settings,
    reporter: Reporter,
) -> Run:
    """Compare compressed models with an open dense one; the arguments are those of `prunelens.compare`.

    Raises:
        PrunelensError: bad input, before anything is computed.
    """
    candidates = open_candidates(model, compressed)
    _check_attribute(chosen, candidates)
    encoded = encode(texts, model, chosen.chat_template, chosen.max_new_tokens)
    forecast = read_forecast(Path(chosen.forecast)) if chosen.forecast else None
    if forecast is not None:
        check_forecast(forecast, model.fingerprint, asdict(chosen), prompts_hash(prompts_table(encoded)))
    calibration = read_calibration(Path(chosen.calibration), model) if chosen.calibration else None
    run = Stages(model, candidates, encoded, chosen, reporter).run(calibration)
    return run if forecast is None else _with_expected(run, forecast)


def _with_expected(run: Run, forecast: Forecast) -> Run:
    """The run with what each model is expected to lose in each use."""
    summary = [
        record | {"expected": [asdict(one) for one in expect(forecast, record)]} for record in run.info["summary"]
    ]
    return Run(run.tables, run.info | {"summary": summary})


def read_texts(prompts: str | Path | Sequence[PromptText]) -> list[PromptText]:
    """The prompts by their name or path, or those that were read before.

    Raises:
        PrunelensError: none, or a bad file.
    """
    texts = read_prompts(prompts) if isinstance(prompts, str | Path) else list(prompts)
    if not texts:
        raise PrunelensError("expected at least one prompt, found none")
    return texts


def check_inputs(compressed: Sequence[Compressible], settings: dict[str, Any]) -> Settings:
    """Refuse what needs no model to be seen wrong.

    Raises:
        PrunelensError: settings without meaning, a malformed recipe, nothing to compare.
    """
    chosen = chosen_settings(Settings, settings, ("prompts", "reporter"))
    parse_candidates(compressed)
    return chosen


def _check_attribute(chosen: Settings, candidates: Sequence[Candidate]) -> None:
    labels = [candidate.label for candidate in candidates]
    unexpected = [] if isinstance(chosen.attribute, bool) else sorted(set(chosen.attribute) - set(labels))
    if unexpected:
        raise PrunelensError(f"expected to attribute one of {', '.join(labels)}, found {unexpected[0]!r}")
