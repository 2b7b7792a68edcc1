"""How long a command shows nothing, and what opening a model costs with and without its remembered fingerprint.

`compare` of a few tokens is started as a user would; its lines of progress are timed as they arrive. `cold` first drops
the packages' files from the file system's cache (those that no other process has mapped). `opening` is `load` in
a process of its own: with an empty cache the fingerprint is made beside the loading, else it is remembered.

    python benchmarks/start.py [MODEL] [--repeats 3] [--source FOLDER]
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

SHORT = ("--num-prompts", "1", "--max-new-tokens", "2", "--lens-steps", "0")
OPENING = """
import time
from prunelens.models.opening.loading import load
from prunelens.models.opening.sources import resolve_name
import os, sys, tempfile
path = resolve_name(sys.argv[1])
load(str(path))  # first use of everything
forget = sys.argv[2] == "forget"
if forget:
    os.environ["PRUNELENS_CACHE"] = tempfile.mkdtemp()
start = time.perf_counter()
load(str(path))
print(time.perf_counter() - start)
"""


def forget_files() -> None:
    """Drop the files of the installed packages from the file system's cache."""
    import torch

    for path in Path(torch.__file__).parents[1].rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def lines_of(model: str, environment: dict[str, str]) -> list[tuple[float, str]]:
    """(seconds, line) of everything that a short comparison says on stderr, its end last."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "prunelens", "compare", model, "drop-mlp:1", *SHORT, "-o", f"{folder}/run"]
        start = time.perf_counter()
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment, cwd=folder
        )
        assert process.stderr is not None
        found = [(time.perf_counter() - start, line.rstrip()) for line in process.stderr]
        assert process.wait() == 0, found
        return [*found, (time.perf_counter() - start, "end")]


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} s ({min(values):.2f} to {max(values):.2f})"


def started(model: str, environment: dict[str, str], repeats: int, before: Callable[[], None]) -> None:
    found = []
    for _ in range(repeats):
        before()
        found.append(lines_of(model, environment))
    first = [lines[0] for lines in found]
    said = sorted({re.sub(r"^\[.*?\] ", "", line) for _, line in first})
    print(f"  first line after {spread([seconds for seconds, _ in first])}: {'; '.join(said)}")
    print(f"  end after {spread([lines[-1][0] for lines in found])}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--source", type=Path, help="src of another version to measure")
    options = parser.parse_args()
    source = (options.source or Path(__file__).parents[1] / "src").resolve()
    environment = os.environ | {"PYTHONPATH": str(source)}
    print("warm")
    started(options.model, environment, options.repeats, lambda: None)
    print("cold")
    started(options.model, environment, options.repeats, forget_files)
    for what, name in (("remember", "remembered"), ("forget", "to be made")):
        command = [sys.executable, "-c", OPENING, options.model, what]
        times = [
            float(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)
            for _ in range(options.repeats)
        ]
        print(f"opening, fingerprint {name}: {spread(times)}", flush=True)


if __name__ == "__main__":
    main()
