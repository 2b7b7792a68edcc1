"""The command line: parse, call one function, print. Heavy imports happen inside the commands that need them."""

import errno
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from prunelens.cli import studies as cli_studies
from prunelens.cli.options import Device, Dtype, Json, Out, Plugin, Trust, print_json, say, slug, take_any_encoding
from prunelens.errors import LONGEST_SENTENCE, PrunelensError, cut, one_line
from prunelens.memory import is_out_of_memory, memory_sentence
from prunelens.stopping import Stops, signals_stop

if TYPE_CHECKING:
    from prunelens.results import Comparison

app = typer.Typer(
    name="prunelens",
    help="See where pruning damages a language model, and for how many tokens it stays faithful.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
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


DEMO_RECIPES = ("drop-attention:1", "drop-attention:8", "drop-mlp:1")
DEMO_PROMPTS = 16
DEMO_TOKENS = 48


@app.command()
def compare(
    dense: Annotated[str, typer.Argument(help="The dense model: a folder, a .gguf file, a hub id, or smollm2.")],
    compressed: Annotated[
        list[str], typer.Argument(help="Recipes (drop-attention:8), recipe files (.yaml) or models like DENSE.")
    ],
    output: Out = None,
    prompts: Annotated[str, typer.Option(help="core, JSONL (prompt or messages), or text, one a line.")] = "core",
    num_prompts: Annotated[int | None, typer.Option(min=1, help="Use only the first so many prompts.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens written after each prompt.")] = 64,
    temperature: Annotated[float, typer.Option(help="Temperature of the softmax and of sampling.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sampled texts and of the coupling.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts decoded together (two for each prompt).")] = 32,
    chat_template: Annotated[bool, typer.Option(help="Apply the tokenizer's chat template, if it has one.")] = True,
    calibration: Annotated[
        Path | None, typer.Option(help="Text, JSONL or .npy of token ids that ranks the sublayers.")
    ] = None,
    lens_steps: Annotated[
        int, typer.Option(min=0, help="Steps of each text read after every sublayer, evenly spread; 0: none.")
    ] = 8,
    lens: Annotated[str, typer.Option(help="How a sublayer is read: normed, raw (without the final norm), both.")] = (
        "normed"
    ),
    attribute: Annotated[
        bool, typer.Option("--attribute", help="Find which sublayer causes the damage at the end (a sweep).")
    ] = False,
    noise_dtype: Annotated[
        str | None, typer.Option(help="Compare the dense model with itself in this dtype too, such as bfloat16.")
    ] = None,
    draft: Annotated[
        bool, typer.Option("--draft", help="Measure the compressed model as a draft in speculative decoding.")
    ] = False,
    plugin: Plugin = None,
    dtype: Dtype = None,
    device: Device = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Compare compressed models with a dense one: h, z, p, token by token, and how long they stay faithful."""
    from prunelens.study.compare.schemas import RUN
    from prunelens.tasks.prompts import prompts as read_prompts

    texts = read_prompts(prompts, limit=num_prompts)
    target = output or Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{slug(dense)}"
    with RUN.reserved(target, [dense, *compressed]):
        result = _compare(
            target,
            dense,
            compressed,
            {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code},
            prompts=texts,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            batch_size=batch_size,
            chat_template=chat_template,
            calibration=str(calibration) if calibration else None,
            lens_steps=lens_steps,
            lens=lens,
            attribute=attribute,
            noise_dtype=noise_dtype,
            draft=draft,
        )
        page = result.report(target)
    _show(result, page, as_json)


@app.command()
def demo(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the run.")] = Path("demo-run"),
    open_page: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
) -> None:
    """Compare the built-in model with three of its own pruned versions and write the page."""
    from prunelens.report.terminal.compare import print_advice
    from prunelens.study.compare.schemas import RUN
    from prunelens.tasks.prompts import prompts as read_prompts

    with RUN.reserved(output):
        texts = read_prompts(limit=DEMO_PROMPTS)
        result = _compare(
            output,
            "smollm2",
            list(DEMO_RECIPES),
            {},
            prompts=texts,
            max_new_tokens=DEMO_TOKENS,
            attribute=(DEMO_RECIPES[0],),
            draft=True,
        )
        page = result.report(output)
    _show(result, page, as_json=False)
    print_advice(result.summary)
    if open_page:
        import webbrowser

        webbrowser.open(page.resolve().as_uri())


@app.command()
def prune(
    model: Annotated[str, typer.Argument(help="The dense model: a folder, a .gguf file, a hub id, or smollm2.")],
    recipe: Annotated[str, typer.Argument(help="A recipe (drop-block:4, wanda:2:4, quantize:int8) or a .yaml file.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the checkpoint.")],
    calibration: Annotated[
        Path | None, typer.Option(help="Text, JSONL or .npy of token ids; default the model's own texts.")
    ] = None,
    layout: Annotated[
        str, typer.Option("--format", help="transformers, or nemotron-nas (dropped sublayers are left out).")
    ] = "transformers",
    run: Annotated[
        Path | None, typer.Option(help="A run of compare with this recipe; the model card tells what it found.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of experts dropped at random.")] = 0,
    plugin: Plugin = None,
    dtype: Dtype = None,
    device: Device = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Make a model smaller and save a checkpoint that loads elsewhere; it is opened again and checked."""
    from prunelens.pruning.recipe import parse_recipe
    from prunelens.report.terminal.compare import progress

    parsed = parse_recipe(recipe)
    with progress() as reporter:
        from prunelens.api import prune as run_prune
        from prunelens.files import check_apart
        from prunelens.models.opening.loading import load
        from prunelens.study.prune.prune import check_request

        check_request(parsed, output, layout, seed)
        check_apart(output, [model])
        opened = reporter(f"opening {model}", 1)
        dense = load(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
        opened(1)
        result = run_prune(dense, parsed, output, calibration, layout, run, seed, reporter)
    if as_json:
        print_json(result.as_json())
    else:
        from prunelens.report.terminal.prune import print_pruned

        print_pruned(result)


@app.command()
def benchmark(
    dense: Annotated[str, typer.Argument(help="The dense model: a folder, a .gguf file, a hub id, or smollm2.")],
    compressed: Annotated[list[str], typer.Argument(help="Recipes, recipe files (.yaml) or models like DENSE.")],
    batch_size: Annotated[int, typer.Option(help="Rows read and decoded together.")] = 1,
    context: Annotated[int, typer.Option(help="Tokens of each row's prompt.")] = 512,
    new_tokens: Annotated[int, typer.Option(help="Tokens decoded after it, one at a time.")] = 32,
    repeats: Annotated[int, typer.Option(help="Timed runs of each model, all models in turn.")] = 5,
    calibration: Annotated[Path | None, typer.Option(help="Text, JSONL or .npy of ids; default its own texts.")] = None,
    plugin: Plugin = None,
    dtype: Dtype = None,
    device: Device = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Measure how fast and how large a dense model and compressed ones are, side by side in one run."""
    from prunelens.report.terminal.compare import progress
    from prunelens.study.benchmark.benchmark import run_benchmark
    from prunelens.study.benchmark.record import SpeedSettings
    from prunelens.study.candidates import parse_candidates

    settings = SpeedSettings(batch_size, context, new_tokens, repeats)
    settings.check()
    parse_candidates(compressed)
    with progress() as reporter:
        from prunelens.models.opening.loading import load

        opened = reporter(f"opening {dense}", 1)
        model = load(dense, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
        opened(1)
        speeds = run_benchmark(model, compressed, settings, calibration, reporter)
    from prunelens.report.terminal.benchmark import print_speeds, speeds_as_json

    if as_json:
        print_json({"dense": model.name} | speeds_as_json(speeds))
    else:
        print_speeds(speeds)


app.command()(cli_studies.evaluate)
app.command()(cli_studies.sweep)
app.command()(cli_studies.advise)


@app.command()
def report(run: Annotated[Path, typer.Argument(help="A folder with a run.json.")]) -> None:
    """Make the page of a comparison, an evaluation, a sweep or advice again, from its tables alone."""
    from prunelens.report.pages.rerender import render_again
    from prunelens.study.store import replace_page

    say(str(replace_page(run, render_again(run))))


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="A folder, a .gguf file, a hub id, or smollm2.")],
    dtype: Dtype = None,
    device: Device = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Show what was found where: blocks, sublayers, norms and head, proved by rebuilding the residual stream."""
    from prunelens.models.describe import describe_anatomy
    from prunelens.models.opening.loading import load
    from prunelens.report.terminal.inspect import print_anatomy

    opened = load(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    if as_json:
        print_json(describe_anatomy(opened))
    else:
        print_anatomy(opened)


def _compare(target: Path, dense: str, compressed: list[str], opening: dict[str, Any], **settings: Any) -> "Comparison":
    from prunelens.api import compare as run_compare
    from prunelens.report.terminal.compare import progress
    from prunelens.study.compare.compare import check_inputs
    from prunelens.study.compare.schemas import UnsummarisedError

    check_inputs(compressed, {name: value for name, value in settings.items() if name != "prompts"})
    with progress() as reporter:
        from prunelens.models.opening.loading import load

        opened = reporter(f"opening {dense}", 1)
        model = load(dense, **opening)
        opened(1)
        try:
            return run_compare(model, *compressed, reporter=reporter, **settings)
        except UnsummarisedError as error:
            raise error.kept_in(target) from error


def _show(result: "Comparison", page: Path, as_json: bool) -> None:
    from prunelens.report.terminal.compare import print_result

    if as_json:
        answer = {"summary": result.summary, "run": str(page.parent), "report": str(page)}
        print_json(answer)
    else:
        print_result(result.tables, result.info)
        say(f"\nThe page: {page}")


def main() -> None:
    """Run the command line; what a user can mend is one sentence on stderr and exit code 2."""
    take_any_encoding()
    with signals_stop() as stops:
        try:
            code = app(standalone_mode=False) or 0
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
    """Say in one sentence why a command ends, and exit; what only a developer can mend is raised again."""
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
        _stop(f"{error.format_message()} Try `prunelens --help`.")
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
