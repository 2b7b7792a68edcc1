"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

Dtype = Annotated[str | None, typer.Option(help="float64, float32, float16 or bfloat16; default float32 on a CPU.")]
Device = Annotated[
    str | None,
    typer.Option(help="cpu, cuda, cuda:1, …, or auto: all GPUs, memory and disk; default the first GPU, else the CPU."),
]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code that a checkpoint brings along.")]
Json = Annotated[bool, typer.Option("--json", help="Print the summary as JSON and nothing else on stdout.")]
Out = Annotated[Path | None, typer.Option("-o", "--output", help="Folder of the result; default runs/DATE-MODEL.")]


def slug(name: str) -> str:
    """A model's name as part of a folder's name."""
    return "".join(letter if letter.isalnum() or letter in "-._" else "-" for letter in Path(name).name)[:60] or "model"
