"""What several commands share: options in groups, how help shows them, and how commands print."""

import importlib
import io
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from prunelens.errors import printable

if TYPE_CHECKING:
    from prunelens.models.model import Model
    from prunelens.progress import Reporter

TEXTS, INSIDE, HARDWARE, OUTPUT = "Texts", "Inside the model", "Hardware", "Output"
GROUPS = ("Arguments", "Options", TEXTS, INSIDE, HARDWARE, OUTPUT)
"""Sections of a command's help, in this order."""


class GroupedCommand(TyperCommand):
    """A command whose help lists its options in groups, each option and its help on one line."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments, then the options group by group; of a switch the name that changes anything."""
        groups: dict[str, list[tuple[str, str]]] = {name: [] for name in GROUPS}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is None:
                continue
            name, said = record
            if parameter.param_type_name == "argument":
                groups["Arguments"].append((name.partition(" <")[0], said.removesuffix("[required]").rstrip()))
                continue
            if parameter.secondary_opts:
                name = parameter.secondary_opts[0] if parameter.default else parameter.opts[0]
            place = OUTPUT if "--help" in parameter.opts else getattr(parameter, "rich_help_panel", None)
            groups[place or "Options"].append((name, said))
        for title, records in groups.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)


Dense = Annotated[
    str, typer.Argument(metavar="DENSE", help="The dense model: a folder, a .gguf file, a hub id, or smollm2.")
]
Compressed = Annotated[
    list[str],
    typer.Argument(metavar="COMPRESSED...", help="Recipes (drop-attention:8), recipe files (.yaml) or models."),
]
CalibrationTexts = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Calibration texts: text, JSONL or .npy of ids; default the model's own.",
                 rich_help_panel=TEXTS),
]  # fmt: skip
BatchSize = Annotated[int, typer.Option(metavar="N", help="Texts run together.", rich_help_panel=HARDWARE)]
LongTokens = Annotated[
    int, typer.Option(metavar="N", help="Tokens after which texts of core_long are cut.", rich_help_panel=TEXTS)
]
ExpertSeed = Annotated[int, typer.Option(min=0, metavar="N", help="Seed of experts that are dropped at random.")]
Dtype = Annotated[
    str | None,
    typer.Option(metavar="TYPE", help="float64, float32, float16 or bfloat16; default float32 on a CPU.",
                 rich_help_panel=HARDWARE),
]  # fmt: skip
Device = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="cpu, cuda, cuda:1, or auto (GPUs, memory, disk); default a GPU if any.",
                 rich_help_panel=HARDWARE),
]  # fmt: skip
Trust = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run Python code that comes with a checkpoint.",
                 rich_help_panel=HARDWARE),
]  # fmt: skip
Json = Annotated[bool, typer.Option("--json", help="Print the summary as JSON, nothing else.", rich_help_panel=OUTPUT)]
Full = Annotated[bool, typer.Option("--full", help="Print every number, not one screen.", rich_help_panel=OUTPUT)]
Out = Annotated[
    Path | None,
    typer.Option("-o", "--output", metavar="FOLDER", help="Folder of the result; default runs/DATE-MODEL.",
                 rich_help_panel=OUTPUT),
]  # fmt: skip


def _load_plugins(paths: list[Path] | None) -> list[Path] | None:
    from prunelens.pruning.plugins import load_plugins

    load_plugins(paths or ())
    return paths


Plugin = Annotated[
    list[Path] | None,
    typer.Option("--plugin", metavar="FILE", callback=_load_plugins, help="Masks or rankings of your own, in Python."),
]
"""Loaded while the command line is parsed, so that recipes know the names."""


MOST_OF_A_NAME = 60
"""Bytes of a model's name in a folder's name; file systems take 255, and what stands beside it is kept."""


def slug(name: str) -> str:
    """A model's name as part of a folder's name: letters, digits and -._, at most 60 bytes, never . or .. alone."""
    plain = "".join(letter if letter.isalnum() or letter in "-._" else "-" for letter in Path(name).name)
    short = plain.encode("utf-8", "replace")[:MOST_OF_A_NAME].decode("utf-8", "ignore")
    return short.strip(".") or "model"


def libraries(reporter: "Reporter") -> None:
    """Load PyTorch and transformers, which takes most of a start, and say so before."""
    advance = reporter("loading PyTorch and transformers", 1)
    importlib.import_module("prunelens.models.opening.loading")
    advance(1)


def opened(name: str, dtype: str | None, device: str | None, trust_remote_code: bool, reporter: "Reporter") -> "Model":
    """Open a model, and say so while it takes long."""
    advance = reporter(f"opening {name}", 1)
    from prunelens.models.opening.loading import load

    model = load(name, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    advance(1)
    return model


def say(text: str) -> None:
    """Print a sentence for people; a path or a name in it cannot steer the terminal."""
    print(printable(text))


def print_json(answer: Any) -> None:
    """Print for machines: one line of ASCII, whatever is in it; null stands for a number that JSON does not know."""
    from prunelens.study.store import finite

    print(json.dumps(finite(answer)[0], allow_nan=False).replace("\x7f", "\\u007f"))


def take_any_encoding() -> None:
    """Let a terminal or pipe that lacks a character get its code instead of a fault."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
