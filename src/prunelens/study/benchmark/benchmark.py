"""Open or make what is to be measured, then measure how fast and how large each model is, in one run."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from prunelens.models.model import Model
from prunelens.models.surgery.drop import Drop
from prunelens.models.surgery.variant import Variant
from prunelens.progress import Reporter, silent
from prunelens.pruning.pruned import Pruned
from prunelens.study.benchmark.record import Speed, SpeedSettings
from prunelens.study.benchmark.speed import check_lengths, measure_speeds
from prunelens.study.candidates import Candidate, Compressible, open_candidates
from prunelens.study.prepare import prepare


def run_benchmark(
    dense: Model,
    compressed: Sequence[Compressible],
    settings: SpeedSettings,
    calibration: Path | None = None,
    reporter: Reporter = silent,
) -> list[Speed]:
    """Open or make compressed models, and measure them beside the dense one, which is labelled `dense`.

    Args:
        dense: the dense model, which stays as it is.
        compressed: recipes and models, as in `compare`.
        settings: what is run.
        calibration: text, JSONL or .npy of token ids; None for the model's own texts, where a recipe needs any.
        reporter: progress display.

    Raises:
        PrunelensError: as `open_candidates`, `apply` and `measure_speeds`.
    """
    settings.check()
    candidates = open_candidates(dense, compressed)
    check_lengths(_variants(dense, candidates), settings)
    prepare(candidates, dense, calibration, reporter, settings.seed)
    variants = _variants(dense, candidates)
    speeds = measure_speeds(variants, settings, reporter("measuring", settings.num_runs(len(variants))))
    others = [_as_saved(speed, found) for speed, found in zip(speeds[1:], candidates, strict=True)]
    return [replace(speeds[0], notes=(*speeds[0].notes, *dense.notes)), *others]


def _variants(dense: Model, candidates: Sequence[Candidate]) -> dict[str, Variant]:
    return {"dense": Variant(dense)} | {found.label: found.variant(dense) for found in candidates}


def _as_saved(speed: Speed, found: Candidate) -> Speed:
    """With the bytes that `prune` would write of a recipe's result, and what was noted when it was made or opened."""
    if found.pruned is None:
        return replace(speed, notes=(*speed.notes, *(found.model.notes if found.model is not None else ())))
    pruned, notes = found.pruned, [*speed.notes, *found.pruned.notes]
    if pruned.drop.attention or pruned.drop.mlp:
        left_out = "" if pruned.repairs else ", unless --format nemotron-nas leaves them out"
        notes.append(f"saved, its single sublayers stay on disk as zeros{left_out}")
    if pruned.experts:
        notes.append("its dropped experts stay in memory here; a saved checkpoint leaves them out")
    return replace(speed, weight_bytes_stored=_saved_bytes(pruned), notes=tuple(notes))


def _saved_bytes(pruned: Pruned) -> int:
    """Bytes of weights that `prune` writes: whole blocks and experts are cut out, single sublayers are zeros."""
    return replace(pruned, drop=Drop(block=pruned.drop.block)).num_bytes
