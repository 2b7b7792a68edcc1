"""The commands compare and demo."""

import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prunelens.cli.options import (
    INSIDE,
    TEXTS,
    BatchSize,
    CalibrationTexts,
    Compressed,
    Dense,
    Device,
    Dtype,
    Full,
    Json,
    Out,
    Plugin,
    Trust,
    libraries,
    opened,
    print_json,
    slug,
)
from prunelens.report.terminal.progress import progress

if TYPE_CHECKING:
    from prunelens.tasks.prompts import PromptText

DEMO_RECIPES = ("drop-attention:8", "drop-attention:1")
"""A harmful cut, which the page opens with, and a mild one; both need nothing but the base installation."""
DEMO_PROMPTS = (
    *("explanation-1", "story-1", "list-1", "arithmetic-1", "code-1", "rewrite-1"),
    *(f"choice-{number}" for number in range(1, 7)),
)
DEMO_TOKENS = 32
DEMO_LENS_STEPS = 4


def compare(
    dense: Dense,
    compressed: Compressed,
    output: Out = None,
    prompts: Annotated[
        str,
        typer.Option(metavar="FILE", help="core, JSONL (prompt or messages), or one a line.", rich_help_panel=TEXTS),
    ] = "core",
    num_prompts: Annotated[
        int | None, typer.Option(metavar="N", help="Maximum number of prompts.", rich_help_panel=TEXTS)
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(metavar="N", help="Tokens written after each prompt.", rich_help_panel=TEXTS)
    ] = 64,
    temperature: Annotated[
        float, typer.Option(metavar="T", help="Temperature of softmax and sampling.", rich_help_panel=TEXTS)
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Seed of sampled texts.", rich_help_panel=TEXTS)] = 0,
    batch_size: BatchSize = 32,
    chat_template: Annotated[
        bool, typer.Option(help="Leave out the tokenizer's chat template.", show_default=False, rich_help_panel=TEXTS)
    ] = True,
    calibration: CalibrationTexts = None,
    lens_steps: Annotated[
        int,
        typer.Option(metavar="N", help="Steps of each text read in every layer; 0: none.", rich_help_panel=INSIDE),
    ] = 8,
    lens: Annotated[
        str, typer.Option(metavar="KIND", help="normed, raw (no final norm) or both.", rich_help_panel=INSIDE)
    ] = "normed",
    attribute: Annotated[
        bool,
        typer.Option("--attribute", help="Measure which sublayers cause the damage.", rich_help_panel=INSIDE),
    ] = False,
    noise_dtype: Annotated[
        str | None,
        typer.Option(metavar="TYPE", help="Compare dense with itself in this dtype.", rich_help_panel=INSIDE),
    ] = None,
    draft: Annotated[
        bool, typer.Option("--draft", help="Time speculative decoding with it as draft.", rich_help_panel=INSIDE)
    ] = False,
    anchors: Annotated[
        str,
        typer.Option(
            metavar="NAMES",
            help="Roundings of dense to read beside: bfloat16,int8 or none.",
            rich_help_panel=INSIDE,
        ),
    ] = "bfloat16,int8",
    forecast: Annotated[
        Path | None,
        typer.Option(metavar="SWEEP", help="Say what to expect in each use, from a sweep.", rich_help_panel=INSIDE),
    ] = None,
    plugin: Plugin = None,
    dtype: Dtype = None,
    device: Device = None,
    trust_remote_code: Trust = False,
    full: Full = False,
    as_json: Json = False,
) -> None:
    """Show how far compressed models stray from the dense one.

    Token by token, and for how many tokens both write the same text.
    """
    from prunelens.tasks.prompts import prompts as read_prompts

    texts = read_prompts(prompts, limit=num_prompts)
    target = output or Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{slug(dense)}"
    settings = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "seed": seed,
        "batch_size": batch_size,
        "chat_template": chat_template,
        "calibration": str(calibration) if calibration else None,
        "lens_steps": lens_steps,
        "lens": lens,
        "attribute": attribute,
        "noise_dtype": noise_dtype,
        "draft": draft,
        "anchors": () if anchors == "none" else tuple(name.strip() for name in anchors.split(",")),
        "forecast": str(forecast) if forecast else None,
    }
    opening = (dtype, device, trust_remote_code)
    _compare(target, dense, compressed, opening, texts, settings, full=full, as_json=as_json)


def demo(
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FOLDER", help="Folder of the result.")] = Path(
        "demo-run"
    ),
    open_page: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
    full: Full = False,
) -> None:
    """Compare the built-in model with two pruned versions. It takes about a minute."""
    from prunelens.tasks.prompts import prompts as read_prompts

    by_id = {prompt.prompt_id: prompt for prompt in read_prompts()}
    texts = [by_id[name] for name in DEMO_PROMPTS]
    settings = {"max_new_tokens": DEMO_TOKENS, "lens_steps": DEMO_LENS_STEPS}
    page = _compare(output, "smollm2", list(DEMO_RECIPES), (None, None, False), texts, settings, full=full)
    if open_page:
        import webbrowser

        webbrowser.open(page.resolve().as_uri())


def _compare(
    target: Path,
    dense: str,
    compressed: list[str],
    opening: tuple[str | None, str | None, bool],
    texts: "list[PromptText]",
    settings: dict[str, Any],
    full: bool = False,
    as_json: bool = False,
) -> Path:
    """Compare, write the result into a folder and print the screen; return the page's path."""
    start = time.perf_counter()
    with progress() as reporter:
        from prunelens.study.compare.schemas import RUN, UnsummarisedError

        with RUN.reserved(target, [dense, *compressed]):
            libraries(reporter)
            from prunelens.api import compare as run_compare
            from prunelens.study.compare.compare import check_inputs

            check_inputs(compressed, settings)
            model = opened(dense, *opening, reporter)
            try:
                result = run_compare(model, *compressed, prompts=texts, reporter=reporter, **settings)
            except UnsummarisedError as error:
                raise error.kept_in(target) from error
            reporter("writing the page", 1)
            page = result.report(target)
    if as_json:
        print_json({"summary": result.summary, "run": str(page.parent), "report": str(page)})
        return page
    from prunelens.report.terminal.compare import print_result

    following = shlex.join(["prunelens", "evaluate", dense, *compressed])
    print_result(result.tables, result.info, page, time.perf_counter() - start, following, full)
    return page
