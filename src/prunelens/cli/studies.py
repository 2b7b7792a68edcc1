"""The commands that ask tasks of models and search among them: evaluate, sweep, advise."""

import shlex
import shutil
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from prunelens.cli.options import (
    TEXTS,
    BatchSize,
    CalibrationTexts,
    Compressed,
    Dense,
    Device,
    Dtype,
    Full,
    Json,
    LongTokens,
    Out,
    Plugin,
    Trust,
    libraries,
    opened,
    print_json,
    slug,
)
from prunelens.report.terminal.progress import progress


def evaluate(
    dense: Dense,
    compressed: Compressed,
    output: Out = None,
    tasks: Annotated[
        str, typer.Option(metavar="NAMES", help="core, core and lm_eval tasks, BEIR folders; with commas.")
    ] = "core",
    limit: Annotated[int | None, typer.Option(metavar="N", help="Maximum items per task.")] = None,
    batch_size: BatchSize = 40,
    chat_template: Annotated[
        bool,
        typer.Option(help="Use the template for lm_eval tasks too.", show_default=False, rich_help_panel=TEXTS),
    ] = False,
    long_tokens: LongTokens = 96,
    pooling: Annotated[
        str, typer.Option(metavar="KIND", help="How retrieval embeds: mean or lasttoken.", rich_help_panel=TEXTS)
    ] = "mean",
    calibration: CalibrationTexts = None,
    seed: Annotated[
        int,
        typer.Option(min=0, metavar="N", help="Seed of drawn texts, and of experts that are dropped at random."),
    ] = 0,
    all_items: Annotated[
        bool, typer.Option("--all-items", help="Run all items, also where some have decided a use.")
    ] = False,
    allow_code: Annotated[
        bool, typer.Option("--allow-code", help="Run code that a model writes, without a sandbox.")
    ] = False,
    plugin: Plugin = None,
    dtype: Dtype = None,
    device: Device = None,
    trust_remote_code: Trust = False,
    full: Full = False,
    as_json: Json = False,
) -> None:
    """Measure on real tasks what compressed models can still do.

    A killed run resumes where --output names the same folder.
    """
    from prunelens.tasks.names import check_no_code
    from prunelens.tasks.suite import parse_tasks

    harness_tasks = parse_tasks(tasks).harness  # a mistyped name is told before libraries that take seconds to import
    if not allow_code:
        check_no_code(harness_tasks)
    start = time.perf_counter()
    settings: dict[str, Any] = {
        "limit": limit,
        "batch_size": batch_size,
        "chat_template": chat_template,
        "long_tokens": long_tokens,
        "pooling": pooling,
        "seed": seed,
        "allow_code": allow_code,
        "all_items": all_items,
    }
    target = output or Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{slug(dense)}-tasks"
    with progress() as reporter:
        libraries(reporter)
        from prunelens.api import evaluate as run_evaluate
        from prunelens.files import answers_beside
        from prunelens.study.evaluate.evaluate import check_evaluation
        from prunelens.study.evaluate.tables import EVALUATION

        *_, harness = check_evaluation(compressed, tasks, settings)
        given = {"tasks": tasks, "calibration": calibration, "harness": harness} | settings
        with EVALUATION.reserved(target, [dense, *compressed]):
            model = opened(dense, dtype, device, trust_remote_code, reporter)
            unfinished = answers_beside(target) if output is not None else None  # another run has another default name
            result = run_evaluate(model, *compressed, reporter=reporter, unfinished=unfinished, **given)
            page = result.report(target)
            if unfinished is not None:
                shutil.rmtree(unfinished, ignore_errors=True)
    if as_json:
        print_json({"summary": result.summary, "run": str(page.parent), "report": str(page)})
        return
    from prunelens.report.terminal.evaluate import print_evaluation

    following = shlex.join(["prunelens", "compare", dense, *compressed])
    print_evaluation(result.info, page, time.perf_counter() - start, following, full)


def sweep(
    study: Annotated[
        Path, typer.Argument(metavar="STUDY", help="A study in YAML: model, recipes, seeds, tasks, thresholds.")
    ],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FOLDER", help="Folder of the sweep; default runs/NAME-OF-STUDY."),
    ] = None,
    executor: Annotated[str, typer.Option(metavar="KIND", help="local (processes here) or ray.")] = "local",
    workers: Annotated[int, typer.Option(metavar="N", help="Processes; each opens the model once.")] = 1,
    address: Annotated[str | None, typer.Option(metavar="URL", help="Of a Ray cluster; default starts one.")] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Run failed cells again.")] = False,
    plugin: Plugin = None,
    full: Full = False,
    as_json: Json = False,
) -> None:
    """Run all recipes and seeds of a study; a killed sweep resumes."""
    from prunelens.study.sweep.study_file import read_study

    start = time.perf_counter()
    parsed = read_study(study)
    target = output or Path("runs") / slug(study.stem)
    with progress() as reporter:
        libraries(reporter)
        from prunelens.api import sweep as run_sweep

        result = run_sweep(parsed, target, executor, workers, address, retry_failed, reporter)
    if as_json:
        print_json({"summary": result.info["summary"], "run": str(target), "report": str(result.page)})
        return
    from prunelens.report.terminal.sweep import print_sweep

    print_sweep(result.info, result.page, time.perf_counter() - start, full)


def advise(
    model: Dense,
    use: Annotated[
        str,
        typer.Option("--for", metavar="USE", help="retrieval, multiple-choice, short-generation, long-generation."),
    ],
    keep: Annotated[
        float, typer.Option(metavar="SHARE", help="How much of what the dense model does must stay.")
    ] = 0.95,
    budget: Annotated[float | None, typer.Option(metavar="MINUTES", help="Time limit; default none.")] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FOLDER", help="Shared by all uses; default runs/advice-MODEL."),
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(metavar="NAMES", help="Tasks that decide the use, instead of core ones.")
    ] = None,
    limit: Annotated[int | None, typer.Option(metavar="N", help="Maximum items per task and half.")] = None,
    long_tokens: LongTokens = 96,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Seed of the random drops to compare with.")] = 0,
    plugin: Plugin = None,
    dtype: Dtype = None,
    device: Device = None,
    trust_remote_code: Trust = False,
    full: Full = False,
    as_json: Json = False,
) -> None:
    """Find the strongest compression that keeps a use. A killed search resumes."""
    start = time.perf_counter()
    with progress() as reporter:
        libraries(reporter)
        from prunelens.api import advise as run_advise
        from prunelens.files import check_apart
        from prunelens.models.opening.loading import check_opening
        from prunelens.study.advise.advise import MARK, check_advice
        from prunelens.study.claims import probe_claim

        check_advice(use, keep, budget, tasks, long_tokens, limit, seed)
        target = output or Path("runs") / f"advice-{slug(model)}"
        check_opening(dtype, device)
        check_apart(target, [model])
        probe_claim(target, MARK, "search")
        dense = opened(model, dtype, device, trust_remote_code, reporter)
        result = run_advise(dense, use, target, keep, budget, tasks, long_tokens, limit, seed, reporter)
    if as_json:
        print_json({"recipe": result.recipe, "info": result.info, "report": str(result.page)})
        return
    from prunelens.report.terminal.advise import print_advice_result

    following = shlex.join(["prunelens", "prune", model, result.recipe, "-o", "smaller"]) if result.recipe else ""
    print_advice_result(result.info, result.tables["tried"], result.page, time.perf_counter() - start, following, full)
