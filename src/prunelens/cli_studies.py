"""The commands that ask tasks of models and search among them: evaluate, sweep, advise."""

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from prunelens.cli_options import Device, Dtype, Json, Out, Trust, slug

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
    batch_size: Annotated[int, typer.Option(help="Requests or texts run together.")] = 32,
    chat_template: Annotated[
        bool, typer.Option(help="Apply the chat template to harness tasks too (core_long always has it).")
    ] = False,
    long_tokens: Annotated[int, typer.Option(help="Where the texts of core_long are cut, tokens.")] = 256,
    pooling: Annotated[str, typer.Option(help="How retrieval makes an embedding: mean or lasttoken.")] = "mean",
    calibration: Annotated[
        Path | None, typer.Option(help="Text, JSONL or .npy of token ids for the recipes; default its own texts.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of experts dropped at random.")] = 0,
    dtype: Dtype = None,
    device: Device = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Run real tasks on a dense model and on compressed ones, and say for which uses each is safe."""
    from prunelens.report.terminal import progress
    from prunelens.study.evaluate import check_evaluation
    from prunelens.study.evaluate import evaluate as run_evaluate
    from prunelens.study.evaluation import EVALUATION

    settings: dict[str, Any] = {
        "limit": limit,
        "batch_size": batch_size,
        "chat_template": chat_template,
        "long_tokens": long_tokens,
        "pooling": pooling,
        "seed": seed,
    }
    check_evaluation(compressed, tasks, settings)
    target = output or Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{slug(dense)}-tasks"
    EVALUATION.probe_target(target)
    with progress() as reporter:
        model = _opened(dense, dtype, device, trust_remote_code, reporter)
        result = run_evaluate(model, *compressed, tasks=tasks, calibration=calibration, reporter=reporter, **settings)
    page = result.report(target)
    if as_json:
        answer = {"summary": result.summary, "run": str(page.parent), "report": str(page)}
        print(json.dumps(answer, ensure_ascii=False))
        return
    from prunelens.report.evaluation import print_evaluation

    print_evaluation(result.info)
    print(f"\nThe page: {page}")


def _opened(name: str, dtype: str | None, device: str | None, trust_remote_code: bool, reporter: Any) -> Any:
    from prunelens.models.loading import load

    opened = reporter(f"opening {name}", 1)
    model = load(name, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    opened(1)
    return model
