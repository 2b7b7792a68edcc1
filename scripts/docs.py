"""Run the commands that the documents show, keep what they print in docs/printed, and copy it into the documents.

    python scripts/docs.py              run every command (a few minutes on two cores)
    python scripts/docs.py demo help    run only these
    python scripts/docs.py --embed      run nothing, only copy

A document shows a stored output by a comment right before a fence: `<!-- printed: demo -->` for all of it, or
`<!-- printed: demo, lines 2-12 -->` for a part. Line 1 is the command.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STORED = ROOT / "docs" / "printed"
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
VERBS = ("compare", "demo", "prune", "benchmark", "evaluate", "sweep", "advise", "report", "inspect")
COMMANDS = {
    "demo": "prunelens demo",
    "inspect": "prunelens inspect smollm2",
    "prune": "prunelens prune smollm2 drop-attention@25,26+drop-block@20 -o smaller",
    "misspelt": "prunelens compare smollm2 drop-atention:1",
    "help": "prunelens --help",
    **{f"help-{verb}": f"prunelens {verb} --help" for verb in VERBS},
}
"""Every command whose output a document shows, by the name of its file."""
START = "import sys; sys.argv[0] = 'prunelens'; from prunelens.cli.main import main; main()"
MARKED = re.compile(r"^<!-- printed: ([\w-]+)(?:, lines (\d+)-(\d+))? -->$")


@dataclass(frozen=True)
class Fence:
    """A fenced block: its language, its lines, where it begins (the index of the opening fence), the line before it."""

    language: str
    lines: list[str]
    start: int
    before: str

    @property
    def text(self) -> str:
        """Its lines as one text."""
        return "\n".join(self.lines)


def fences(text: str) -> list[Fence]:
    """The fenced blocks of a document."""
    lines, found, start = text.split("\n"), [], None
    for index, line in enumerate(lines):
        if start is None and line.startswith("```"):
            start = index
        elif start is not None and line == "```":
            before = lines[start - 1] if start else ""
            found.append(Fence(lines[start][3:].strip(), lines[start + 1 : index], start, before))
            start = None
    return found


def expected(marker: re.Match[str]) -> list[str]:
    """The lines that a marker asks for."""
    lines = stored(marker[1]).read_text(encoding="utf-8").rstrip("\n").split("\n")
    return lines[int(marker[2]) - 1 : int(marker[3])] if marker[2] else lines


def stored(name: str) -> Path:
    """Where the output of a command is kept."""
    return STORED / f"{name}.txt"


def run(name: str) -> None:
    """Run a command in an empty folder, 80 columns wide and without colour, and keep what it prints."""
    words = shlex.split(COMMANDS[name])[1:]
    settings = os.environ | {"COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb"}
    with tempfile.TemporaryDirectory() as folder:
        answer = subprocess.run(
            [sys.executable, "-c", START, *words], cwd=folder, env=settings, capture_output=True, text=True, check=False
        )
    if answer.returncode not in (0, 2):
        sys.exit(f"{COMMANDS[name]} ended with {answer.returncode}: {answer.stderr}")
    refusal = answer.stderr.rstrip().rpartition("\n")[2]  # what comes before it on stderr is progress
    printed = refusal if answer.returncode else answer.stdout
    lines = [f"$ {COMMANDS[name]}", *(line.rstrip() for line in printed.split("\n"))]
    STORED.mkdir(exist_ok=True)
    stored(name).write_text("\n".join(lines).rstrip("\n") + "\n", encoding="utf-8")
    print(COMMANDS[name], flush=True)


def embedded(text: str) -> str:
    """A document with every marked block as it was printed."""
    lines = text.split("\n")
    for fence in reversed(fences(text)):
        if marker := MARKED.match(fence.before):
            lines[fence.start + 1 : fence.start + 1 + len(fence.lines)] = expected(marker)
    return "\n".join(lines)


def main() -> None:
    """Run what is asked for, then copy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"commands to run: {', '.join(COMMANDS)}")
    parser.add_argument("--embed", action="store_true", help="run nothing, only copy stored output into the documents")
    options = parser.parse_args()
    if unknown := set(options.names) - set(COMMANDS):
        parser.error(f"expected names among {', '.join(COMMANDS)}, found {', '.join(sorted(unknown))}")
    for name in [] if options.embed else options.names or COMMANDS:
        run(name)
    for path in DOCUMENTS:
        path.write_text(embedded(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
