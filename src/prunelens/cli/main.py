"""The command line: parse, call one function, print. Heavy imports happen inside the commands that need them."""

import errno
import os
import shlex
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from prunelens.cli import compare as comparing
from prunelens.cli import studies
from prunelens.cli.options import (
    BatchSize,
    CalibrationTexts,
    Compressed,
    Dense,
    Device,
    Dtype,
    ExpertSeed,
    GroupedCommand,
    Json,
    Plugin,
    Trust,
    libraries,
    opened,
    print_json,
    say,
    take_any_encoding,
)
from prunelens.errors import LONGEST_SENTENCE, PrunelensError, cut, one_line
from prunelens.memory import is_out_of_memory, memory_sentence
from prunelens.report.terminal.progress import progress
from prunelens.stopping import Stops, signals_stop

if TYPE_CHECKING:
    pass

app = typer.Typer(
    name="prunelens",
    help="See where pruning damages a language model, and for how many tokens it stays faithful.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"max_content_width": 80},
)


def _show_version(wanted: bool) -> bool:
    if wanted:
        from prunelens import __version__

        print(f"prunelens {__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version and exit.")
    ] = False,
) -> None:
    """See where pruning damages a language model, and for how many tokens it stays faithful."""


app.command(cls=GroupedCommand)(comparing.compare)
app.command(cls=GroupedCommand)(comparing.demo)


@app.command(cls=GroupedCommand)
def prune(
    model: Dense,
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="drop-block:4, wanda:2:4, quantize:int8, … or a .yaml file.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FOLDER", help="Folder of the checkpoint.")],
    calibration: CalibrationTexts = None,
    layout: Annotated[
        str,
        typer.Option("--format", metavar="FORMAT", help="transformers, or nemotron-nas (without dropped sublayers)."),
    ] = "transformers",
    run: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="A run of compare; the model card quotes its numbers."),
    ] = None,
    seed: ExpertSeed = 0,
    plugin: Plugin = None,
    dtype: Dtype = None,
    device: Device = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Save a smaller model that other programs can load. It is reopened and checked."""
    from prunelens.pruning.recipe import parse_recipe

    start = time.perf_counter()
    parsed = parse_recipe(recipe)
    with progress() as reporter:
        libraries(reporter)
        from prunelens.api import prune as run_prune
        from prunelens.files import check_apart
        from prunelens.study.prune.prune import check_request

        check_request(parsed, output, layout, seed)
        check_apart(output, [model])
        dense = opened(model, dtype, device, trust_remote_code, reporter)
        result = run_prune(dense, parsed, output, calibration, layout, run, seed, reporter)
    if as_json:
        print_json(result.as_json())
    else:
        from prunelens.report.terminal.prune import print_pruned

        following = shlex.join(["prunelens", "compare", model, str(output)])
        print_pruned(result, time.perf_counter() - start, following)


@app.command(cls=GroupedCommand)
def benchmark(
    dense: Dense,
    compressed: Compressed,
    batch_size: BatchSize = 1,
    context: Annotated[int, typer.Option(metavar="N", help="Tokens of each row's prompt.")] = 512,
    new_tokens: Annotated[int, typer.Option(metavar="N", help="Tokens decoded after it, one by one.")] = 32,
    repeats: Annotated[int, typer.Option(metavar="N", help="Timed runs of each model, in turn.")] = 5,
    calibration: CalibrationTexts = None,
    plugin: Plugin = None,
    dtype: Dtype = None,
    device: Device = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Measure speed, memory and size of models, side by side."""
    start = time.perf_counter()
    with progress() as reporter:
        libraries(reporter)
        from prunelens.study.benchmark.benchmark import run_benchmark
        from prunelens.study.benchmark.record import SpeedSettings
        from prunelens.study.candidates import parse_candidates

        settings = SpeedSettings(batch_size, context, new_tokens, repeats)
        settings.check()
        parse_candidates(compressed)
        model = opened(dense, dtype, device, trust_remote_code, reporter)
        speeds = run_benchmark(model, compressed, settings, calibration, reporter)
    from prunelens.report.terminal.benchmark import print_speeds, speeds_as_json

    if as_json:
        print_json({"dense": model.name} | speeds_as_json(speeds))
    else:
        print_speeds(speeds, time.perf_counter() - start)


app.command(cls=GroupedCommand)(studies.evaluate)
app.command(cls=GroupedCommand)(studies.sweep)
app.command(cls=GroupedCommand)(studies.advise)


@app.command(cls=GroupedCommand)
def report(run: Annotated[Path, typer.Argument(metavar="RUN", help="A folder with a run.json.")]) -> None:
    """Write the page of a stored result again. Its tables are all that is needed."""
    with progress() as reporter:
        reporter("writing the page", 1)
        from prunelens.report.pages.rerender import render_again
        from prunelens.study.store import replace_page

        page = replace_page(run, render_again(run))
    say(str(page))


@app.command(cls=GroupedCommand)
def inspect(
    model: Dense,
    dtype: Dtype = None,
    device: Device = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Show the detected blocks, norms and head. Rebuilding the residual stream proves them."""
    with progress() as reporter:
        libraries(reporter)
        from prunelens.models.describe import describe_anatomy

        found = opened(model, dtype, device, trust_remote_code, reporter)
    if as_json:
        print_json(describe_anatomy(found))
    else:
        from prunelens.report.terminal.inspect import print_anatomy

        print_anatomy(found)


def main() -> None:
    """Run the command line; what a user can fix is one sentence on stderr and exit code 2."""
    take_any_encoding()
    with signals_stop() as stops:
        try:
            code = app(standalone_mode=False, prog_name="prunelens") or 0
            if code == 130:  # what typer makes of Ctrl-C
                raise KeyboardInterrupt
            if sys.stdout is not None:
                sys.stdout.flush()  # here, where a closed pipe or a full disk can still be told
        except BaseException as error:
            if stops.number is None and isinstance(error, SystemExit):
                raise
            _end(error, stops)
    sys.exit(code)


def _end(error: BaseException, stops: Stops) -> NoReturn:
    """Say in one sentence why a command ends, and exit; what only a developer can fix is raised again."""
    if stops.number is not None or isinstance(error, KeyboardInterrupt) or type(error).__name__ == "Abort":
        _exit(stops.exit_code, "stopped")  # whatever a library has made of the signal
    if isinstance(error, PrunelensError):
        _stop(str(error))
    if isinstance(error, BrokenPipeError):  # `| head`: nobody reads on
        with suppress(OSError, ValueError, AttributeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still in the buffer
        sys.exit(128 + 13)
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()  # type: ignore[attr-defined]
        sys.exit(2)
    if hasattr(error, "format_message"):  # a command line that typer cannot parse
        context = getattr(error, "ctx", None)
        _stop(f"{error.format_message()} Try `{context.command_path if context else 'prunelens'} --help`.")
    if is_out_of_memory(error):
        _stop(memory_sentence(error))
    if isinstance(error, OSError) and error.errno == errno.ENOSPC and error.filename is None:
        _stop(f"the answer could not be printed ({error.strerror}); free space where the output goes")
    raise error


def _stop(sentence: str) -> NoReturn:
    _exit(2, sentence)


def _exit(code: int, sentence: str) -> NoReturn:
    """Say it and exit; a terminal that is gone hears nothing."""
    with suppress(OSError, ValueError):
        print(f"prunelens: {cut(one_line(sentence), LONGEST_SENTENCE)}", file=sys.stderr, flush=True)
    sys.exit(code)
