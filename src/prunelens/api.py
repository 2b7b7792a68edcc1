"""The verbs: compare, evaluate, sweep, advise, prune, benchmark, inspect. Each takes an open model or its name."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prunelens.errors import PrunelensError
from prunelens.files import check_apart
from prunelens.models.describe import describe_anatomy
from prunelens.models.model import Model
from prunelens.models.opening.loading import load
from prunelens.progress import Reporter, silent
from prunelens.pruning.recipe import Recipe
from prunelens.reading import checked_path
from prunelens.results import Advice, Comparison, Evaluation, Sweep
from prunelens.study.advise.advise import check_advice, run_advise
from prunelens.study.benchmark.benchmark import run_benchmark
from prunelens.study.benchmark.record import Speed, SpeedSettings
from prunelens.study.candidates import Compressible, parse_candidates
from prunelens.study.compare.compare import check_inputs, read_texts, run_compare
from prunelens.study.evaluate.evaluate import TasksGiven, check_evaluation, run_evaluate
from prunelens.study.evaluate.verdict import Thresholds
from prunelens.study.prune.prune import PruneResult, check_request, run_prune
from prunelens.study.settings import chosen_settings
from prunelens.study.sweep.study_file import Study
from prunelens.study.sweep.sweep import run_sweep
from prunelens.tasks.harness import Harness
from prunelens.tasks.prompts import CORE, PromptText


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
    chosen, texts = check_inputs(compressed, settings), read_texts(prompts)
    return Comparison(run_compare(_opened(dense), compressed, texts, chosen, reporter))


def evaluate(
    dense: str | Path | Model,
    *compressed: Compressible,
    tasks: TasksGiven = "core",
    thresholds: Thresholds | None = None,
    calibration: str | Path | None = None,
    reporter: Reporter = silent,
    harness: Harness | None = None,
    unfinished: str | Path | None = None,
    **settings: Any,
) -> Evaluation:
    """Run tasks on a dense model and on compressed ones, and judge each class of use.

    A class that is degraded or broken ends as soon as that is known, unless `all_items` is set.

    Args:
        dense: an open model, or what `load` takes.
        compressed: recipes (`drop-attention:8`), models, or what `load` takes.
        tasks: `core`, names of core or lm-evaluation-harness tasks, BEIR folders, or lists of them by class of use.
        thresholds: where safe ends and broken begins.
        calibration: text, JSONL or .npy of token ids for the recipes; None for the dense model's own texts.
        reporter: progress display.
        harness: the tasks of lm-evaluation-harness, where `check_evaluation` has loaded them.
        unfinished: folder in which answers of compressed models are kept; a killed evaluation that is given it again
            resumes.
        settings: fields of `TaskSettings`.

    Raises:
        PrunelensError: bad input, before anything is computed.
    """
    chosen, asked, harness = check_evaluation(compressed, tasks, settings, harness)
    limits = thresholds or Thresholds()
    kept = Path(unfinished) if unfinished is not None else None
    run = run_evaluate(_opened(dense), compressed, chosen, asked, harness, limits, calibration, reporter, kept)
    return Evaluation(run)


def sweep(
    study: str | Path | Mapping[str, Any] | Study,
    folder: str | Path,
    executor: str = "local",
    workers: int = 1,
    address: str | None = None,
    retry_failed: bool = False,
    reporter: Reporter = silent,
) -> Sweep:
    """Run every cell of a study that is not there yet, then write tables and the page.

    Args:
        study: the path of a YAML document, or what stands in one.
        folder: where the cells are kept; a stopped sweep resumes.
        executor: `local` (processes) or `ray`.
        workers: processes or actors; each opens the model once.
        address: of a Ray cluster; None starts one here.
        retry_failed: make cells again that had failed.
        reporter: progress display.

    Raises:
        PrunelensError: a bad study, a folder that holds something else, no Ray at the address, or a model that no
            worker can open.
    """
    from prunelens.report.pages.sweep import render_sweep

    run = run_sweep(study, folder, executor, workers, address, retry_failed, reporter, render_sweep)
    return Sweep(run, Path(folder))


def advise(
    dense: str | Path | Model,
    use: str,
    folder: str | Path,
    keep: float = 0.95,
    budget: float | None = None,
    tasks: str | Sequence[str] | None = None,
    long_tokens: int = 96,
    limit: int | None = None,
    seed: int = 0,
    reporter: Reporter = silent,
) -> Advice:
    """Search for the strongest recipe that keeps a use, then validate it on prompts and items it did not see.

    Args:
        dense: an open model, or what `load` takes.
        use: retrieval, multiple-choice, short-generation or long-generation.
        folder: where everything is kept; a stopped search resumes, and searches for other uses share what is there.
        keep: the share of what the dense model does that is to be kept.
        budget: minutes; None for no limit.
        tasks: what decides the use, instead of the core tasks of its class.
        long_tokens: where long texts are cut.
        limit: at most so many items of each task and half.
        seed: of the random drops that the found one is held against.
        reporter: progress display.

    Raises:
        PrunelensError: bad input, or a budget that ends before the dense model's own tasks do.
    """
    from prunelens.report.pages.advise import render_advice

    aim, chosen, settings = check_advice(use, keep, budget, tasks, long_tokens, limit, seed)
    model, target = _opened(dense), checked_path(folder, "the search")
    if isinstance(dense, str | Path):
        check_apart(target, [dense])
    run = run_advise(model, aim, chosen, target, budget, settings, seed, reporter, render_advice)
    return Advice(run, target / use)


def prune(
    dense: str | Path | Model,
    recipe: str | Recipe,
    target: str | Path,
    calibration: str | Path | None = None,
    layout: str = "transformers",
    run: str | Path | None = None,
    seed: int = 0,
    reporter: Reporter = silent,
) -> PruneResult:
    """Apply a recipe and save the result; the folder appears whole or not at all.

    Args:
        dense: an open model, which stays as it is, or what `load` takes.
        recipe: how it is made smaller.
        target: a new folder, or an earlier checkpoint of this program.
        calibration: text, JSONL or .npy of token ids; None for the model's own texts on the core prompts.
        layout: `transformers` or `nemotron-nas`.
        run: a run of `compare` with the same recipe, whose findings go into the model card.
        seed: of experts that are dropped at random.
        reporter: progress display.

    Raises:
        PrunelensError: bad input, a family that cannot express the result, or no space; nothing is left behind. Or the
            model card alone cannot be made: the checkpoint is there all the same.
    """
    parsed, goal = check_request(recipe, target, layout, seed)
    model = _opened(dense)
    return run_prune(model, parsed, goal, _path(calibration), layout, _path(run), seed, reporter)


def benchmark(
    dense: str | Path | Model,
    *compressed: Compressible,
    calibration: str | Path | None = None,
    reporter: Reporter = silent,
    **settings: Any,
) -> list[Speed]:
    """Measure how fast and how large a dense model and compressed ones are, side by side in one run.

    Args:
        dense: an open model, or what `load` takes.
        compressed: recipes (`drop-block:8`), models, or what `load` takes.
        calibration: text, JSONL or .npy of token ids; None for the dense model's own texts, where a recipe needs any.
        reporter: progress display.
        settings: fields of `SpeedSettings`.

    Returns:
        One `Speed` for each model, the dense one first.

    Raises:
        PrunelensError: bad input, before anything is computed.
    """
    chosen = chosen_settings(SpeedSettings, settings, ("calibration", "reporter"))
    parse_candidates(compressed)
    return run_benchmark(_opened(dense), compressed, chosen, _path(calibration), reporter)


def inspect(dense: str | Path | Model) -> dict[str, Any]:
    """What a model's parts are: family, blocks, sublayers with their norms, the final norm and the head.

    Args:
        dense: an open model, or what `load` takes.

    Raises:
        PrunelensError: as `load`.
    """
    return describe_anatomy(_opened(dense))


def _opened(dense: str | Path | Model) -> Model:
    if isinstance(dense, str | Path):
        return load(dense)
    if not isinstance(dense, Model):
        raise PrunelensError(
            f"expected a model that `prunelens.load` opened, or its name, found {type(dense).__name__}; "
            "`prunelens.wrap` takes a network of transformers"
        )
    return dense


def _path(given: str | Path | None) -> Path | None:
    return Path(given) if given is not None else None
