"""Compare a dense model with compressed ones: check what was asked, then run the stages."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prunelens.errors import PrunelensError
from prunelens.models.loading import Model, load
from prunelens.pruning.calibration import read_calibration
from prunelens.study.candidates import Candidate, Compressible, open_candidates, parse_candidates
from prunelens.study.result import Comparison
from prunelens.study.settings import Reporter, Settings, chosen_settings, silent
from prunelens.study.stages import Stages
from prunelens.tasks.encoding import encode
from prunelens.tasks.prompts import CORE, PromptText
from prunelens.tasks.prompts import prompts as read_prompts


def compare(
    dense: str | Path | Model,
    *compressed: Compressible,
    prompts: str | Path | Sequence[PromptText] = CORE,
    reporter: Reporter = silent,
    **settings: Any,
) -> Comparison:
    """Compare compressed models with a dense one on its own texts.

    Args:
        dense: an open model, or what `load` takes.
        compressed: recipes (`drop-attention:8`), models, or what `load` takes.
        prompts: `core`, a path, or prompts read before.
        reporter: progress display.
        settings: fields of `Settings`.

    Raises:
        PrunelensError: bad input, before anything is computed.
    """
    chosen = check_inputs(compressed, settings)
    texts = read_prompts(prompts) if isinstance(prompts, str | Path) else list(prompts)
    if not texts:
        raise PrunelensError("expected at least one prompt, found none")
    model = dense if isinstance(dense, Model) else load(dense)
    candidates = open_candidates(model, compressed)
    _check_attribute(chosen, candidates)
    encoded = encode(texts, model, chosen.chat_template, chosen.max_new_tokens)
    calibration = read_calibration(Path(chosen.calibration), model) if chosen.calibration else None
    return Comparison(Stages(model, candidates, encoded, chosen, reporter).run(calibration))


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
    strange = [] if isinstance(chosen.attribute, bool) else sorted(set(chosen.attribute) - set(labels))
    if strange:
        raise PrunelensError(f"expected to attribute one of {', '.join(labels)}, found {strange[0]!r}")
