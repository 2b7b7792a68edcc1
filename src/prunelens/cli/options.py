"""What several commands share: options, and how they print."""

import io
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from prunelens.errors import printable

Dtype = Annotated[str | None, typer.Option(help="float64, float32, float16 or bfloat16; default float32 on a CPU.")]
Device = Annotated[
    str | None,
    typer.Option(help="cpu, cuda, cuda:1, …, or auto: all GPUs, memory and disk; default the first GPU, else the CPU."),
]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code that a checkpoint brings along.")]
Json = Annotated[bool, typer.Option("--json", help="Print the summary as JSON and nothing else on stdout.")]
Out = Annotated[Path | None, typer.Option("-o", "--output", help="Folder of the result; default runs/DATE-MODEL.")]


def _load_plugins(paths: list[Path] | None) -> list[Path] | None:
    from prunelens.pruning.plugins import load_plugins

    load_plugins(paths or ())
    return paths


Plugin = Annotated[
    list[Path] | None,
    typer.Option("--plugin", callback=_load_plugins, help="A .py file with masks or rankings of your own."),
]
"""Loaded while the command line is parsed, so that recipes know the names."""


MOST_OF_A_NAME = 60
"""Bytes of a model's name in a folder's name; file systems take 255, and what stands beside it is kept."""


def slug(name: str) -> str:
    """A model's name as part of a folder's name: letters, digits and -._, at most 60 bytes, never . or .. alone."""
    plain = "".join(letter if letter.isalnum() or letter in "-._" else "-" for letter in Path(name).name)
    short = plain.encode("utf-8", "replace")[:MOST_OF_A_NAME].decode("utf-8", "ignore")
    return short.strip(".") or "model"


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
