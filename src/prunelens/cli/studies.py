"""The commands that ask tasks of models and search among them: evaluate, sweep, advise."""

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from prunelens.cli.options import Device, Dtype, Json, Out, Plugin, Trust, print_json, say, slug

Dense = Annotated[str, typer.Argument(help="The dense model: a folder, a .gguf file, a hub id, or smollm2.")]


def evaluate(
    dense: Dense,
    compressed: Annotated[
        list[str], typer.Argument(help="Recipes (drop-attention:8), recipe files (.yaml) or models like DENSE.")
    ],
    output: Out = None,
    tasks: Annotated[
        str, typer.Option(help="core, or names of core and lm-evaluation-harness tasks, or BEIR folders, with commas.")
    ] = "core",
    limit: Annotated[int | None, typer.Option(help="Use only the first so many items of each task.")] = None,
    batch_size: Annotated[int, typer.Option(help="Requests or texts run together.")] = 40,
    chat_template: Annotated[
        bool, typer.Option(help="Apply the chat template to harness tasks too (core_long always has it).")
    ] = False,
    long_tokens: Annotated[int, typer.Option(help="Where the texts of core_long are cut, tokens.")] = 256,
    pooling: Annotated[str, typer.Option(help="How retrieval makes an embedding: mean or lasttoken.")] = "mean",
    calibration: Annotated[
        Path | None, typer.Option(help="Text, JSONL or .npy of token ids for the recipes; default its own texts.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of experts dropped at random.")] = 0,
    allow_code: Annotated[
        bool, typer.Option("--allow-code", help="Run code that the model writes (humaneval), without a sandbox.")
    ] = False,
    plugin: Plugin = None,
    dtype: Dtype = None,
    device: Device = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Run real tasks on a dense model and on compressed ones, and say for which uses each is safe."""
    from prunelens.tasks.suite import parse_tasks

    parse_tasks(tasks)  # a mistyped name is told before libraries that take seconds to import
    from prunelens.api import evaluate as run_evaluate
    from prunelens.report.terminal.compare import progress
    from prunelens.study.evaluate.evaluate import check_evaluation
    from prunelens.study.evaluate.tables import EVALUATION

    settings: dict[str, Any] = {
        "limit": limit,
        "batch_size": batch_size,
        "chat_template": chat_template,
        "long_tokens": long_tokens,
        "pooling": pooling,
        "seed": seed,
        "allow_code": allow_code,
    }
    *_, harness = check_evaluation(compressed, tasks, settings)
    target = output or Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{slug(dense)}-tasks"
    with EVALUATION.reserved(target, [dense, *compressed]):
        with progress() as reporter:
            model = _opened(dense, dtype, device, trust_remote_code, reporter)
            result = run_evaluate(
                model, *compressed, tasks=tasks, calibration=calibration, reporter=reporter, harness=harness, **settings
            )
        page = result.report(target)
    if as_json:
        answer = {"summary": result.summary, "run": str(page.parent), "report": str(page)}
        print_json(answer)
        return
    from prunelens.report.terminal.evaluate import print_evaluation

    print_evaluation(result.info)
    say(f"\nThe page: {page}")


def _opened(name: str, dtype: str | None, device: str | None, trust_remote_code: bool, reporter: Any) -> Any:
    from prunelens.models.opening.loading import load

    opened = reporter(f"opening {name}", 1)
    model = load(name, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    opened(1)
    return model


def sweep(
    study: Annotated[Path, typer.Argument(help="A study in YAML: a model, recipes, seeds, tasks, thresholds.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder of the sweep; default runs/NAME-OF-STUDY.")
    ] = None,
    executor: Annotated[str, typer.Option(help="local (processes of this machine) or ray.")] = "local",
    workers: Annotated[int, typer.Option(help="Processes or actors; each opens the model once.")] = 1,
    address: Annotated[str | None, typer.Option(help="Of a Ray cluster; default starts one on this machine.")] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Make failed cells again.")] = False,
    plugin: Plugin = None,
    as_json: Json = False,
) -> None:
    """Run recipes, strengths and seeds of a study; a stopped sweep goes on where it was."""
    from prunelens.api import sweep as run_sweep
    from prunelens.report.terminal.compare import progress
    from prunelens.study.sweep.study_file import read_study

    parsed = read_study(study)
    target = output or Path("runs") / slug(study.stem)
    with progress() as reporter:
        result = run_sweep(parsed, target, executor, workers, address, retry_failed, reporter)
    if as_json:
        answer = {"summary": result.info["summary"], "run": str(target), "report": str(result.page)}
        print_json(answer)
        return
    from prunelens.report.terminal.sweep import print_sweep

    print_sweep(result.info)
    say(f"\nThe page: {result.page}")


def advise(
    model: Annotated[str, typer.Argument(help="The dense model: a folder, a .gguf file, a hub id, or smollm2.")],
    use: Annotated[str, typer.Option("--for", help="retrieval, multiple-choice, short-generation or long-generation.")],
    keep: Annotated[float, typer.Option(help="The share of what the dense model does that is to be kept.")] = 0.95,
    budget: Annotated[float | None, typer.Option(help="Minutes; default no limit.")] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Folder of the search, shared by all uses; default runs/advice-MODEL."),
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="What decides the use, instead of the core tasks of it.")] = None,
    limit: Annotated[int | None, typer.Option(help="At most so many items of each task and half.")] = None,
    long_tokens: Annotated[int, typer.Option(help="Where the texts of core_long are cut, tokens.")] = 256,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random drops it is held against.")] = 0,
    plugin: Plugin = None,
    dtype: Dtype = None,
    device: Device = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Find the strongest recipe that keeps a use; a stopped search goes on where it was."""
    from prunelens.api import advise as run_advise
    from prunelens.files import check_apart
    from prunelens.models.opening.loading import check_opening
    from prunelens.report.terminal.compare import progress
    from prunelens.study.advise.advise import MARK, check_advice
    from prunelens.study.claims import probe_claim

    check_advice(use, keep, budget, tasks, long_tokens, limit, seed)
    target = output or Path("runs") / f"advice-{slug(model)}"
    check_opening(dtype, device)
    check_apart(target, [model])
    probe_claim(target, MARK, "search")
    with progress() as reporter:
        opened = _opened(model, dtype, device, trust_remote_code, reporter)
        result = run_advise(opened, use, target, keep, budget, tasks, long_tokens, limit, seed, reporter)
    if as_json:
        answer = {"recipe": result.recipe, "info": result.info, "report": str(result.page)}
        print_json(answer)
        return
    from prunelens.report.terminal.advise import print_advice_result

    print_advice_result(result.info, result.tables["tried"])
    say(f"\nThe page: {result.page}")
