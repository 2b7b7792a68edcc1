"""`compare` of two versions of prunelens on the same models and prompts: their time as a ratio, and every number.

Both run in turn, as processes of their own, so that what the machine does meanwhile reaches both. Printed are the
seconds of each stage, the ratio of the whole commands, and for every column of numbers in the tables the largest
difference and the 99.9th percentile, beside the noise floor that the run itself measured.

    git worktree add ../before v0.1.0
    python benchmarks/compare.py --before ../before [MODEL RECIPE...] [--max-new-tokens 64] [--repeats 1]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

HERE = Path(__file__).resolve().parents[1]
KEYS = {
    "steps": ("compressed", "trace", "prompt_id", "step"),
    "layers": ("compressed", "trace", "lens", "layer_idx", "sublayer", "prompt_id", "step"),
    "prompt_end": ("compressed", "space", "prompt_id"),
    "survival": ("compressed", "n"),
    "attribution": ("compressed", "sublayer", "layer_idx", "prompt_id"),
}
PLACES = ("step", "position", "token_id", "num_steps", "n", "layer_idx")


def main() -> None:
    """Run both versions in turn and print what they took and where they differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["smollm2", "drop-attention:1", "quantize:int8"])
    parser.add_argument("--before", type=Path, required=True, help="checkout of the version to compare with")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--num-prompts", type=int)
    parser.add_argument("--repeats", type=int, default=1)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs: dict[str, list[float]] = {"before": [], "now": []}
        for repeat in range(asked.repeats):
            for name, checkout in (("before", asked.before.resolve()), ("now", HERE)):
                runs[name].append(compare(checkout, asked, Path(folder) / f"{name}{repeat}"))
        print_seconds(Path(folder), runs)
        print_differences(Path(folder) / "before0", Path(folder) / "now0")


def compare(checkout: Path, asked: argparse.Namespace, output: Path) -> float:
    """Seconds of one `prunelens compare` with the sources of a checkout."""
    few = ["--num-prompts", str(asked.num_prompts)] if asked.num_prompts else []
    command = ["-m", "prunelens", "compare", *asked.models, "--max-new-tokens", str(asked.max_new_tokens), *few]
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, *command, "-o", str(output)],
        check=True,
        stdout=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": str(checkout / "src")},
        cwd=output.parent,
    )
    return time.perf_counter() - start


def read_info(folder: Path) -> dict[str, Any]:
    """run.json of a result."""
    found: dict[str, Any] = json.loads((folder / "run.json").read_text())
    return found


def print_seconds(folder: Path, runs: dict[str, list[float]]) -> None:
    """Stages of the first pair, and the ratio of the whole commands."""
    stages = [read_info(folder / f"{name}0")["seconds"] for name in runs]
    print(f"{'stage':<16} {'before':>9} {'now':>9} {'ratio':>6}")
    for stage in dict.fromkeys((*stages[0], *stages[1])):
        before, now = (found.get(stage, 0.0) for found in stages)
        print(f"{stage:<16} {before:>7.1f} s {now:>7.1f} s {now / before if before else float('nan'):>6.2f}")
    ratios = [now / before for before, now in zip(runs["before"], runs["now"], strict=True)]
    whole = [statistics.median(runs[name]) for name in runs]
    spread = f" [{min(ratios):.2f}, {max(ratios):.2f}]" if len(ratios) > 1 else ""
    print(f"{'whole command':<16} {whole[0]:>7.1f} s {whole[1]:>7.1f} s {statistics.median(ratios):>6.2f}{spread}")


def print_differences(before: Path, now: Path) -> None:
    """How far the tables of both versions differ, column by column, and the noise floor of the run."""
    for name, keys in KEYS.items():
        tables = [pq.read_table(folder / f"{name}.parquet").sort_by([(key, "ascending") for key in keys])
                  for folder in (before, now)]  # fmt: skip
        left, right = (shared_rows(one, other, keys) for one, other in (tables, tables[::-1]))
        print(f"\n{name}: {tables[0].num_rows} rows before, {tables[1].num_rows} now, {left.num_rows} in both")
        for column in left.column_names:
            if column not in PLACES and pa.types.is_floating(left.schema.field(column).type):
                print_column(column, left[column].to_numpy(), right[column].to_numpy())
    texts = [pq.read_table(folder / "continuations.parquet").to_pylist() for folder in (before, now)]
    same = sum(one["token_ids"] == other["token_ids"] for one, other in zip(*texts, strict=True))
    print(f"\ntexts: {same} of {len(texts[0])} the same")
    for against, found in read_info(now)["noise"].items():
        print(f"noise floor, {against}: KL {found['kl_dense_compressed']}, 1 - cosine of z {found['logit_cosine']}")


def shared_rows(table: pa.Table, other: pa.Table, keys: tuple[str, ...]) -> pa.Table:
    """The rows whose keys stand in the other table too."""
    known = set(zip(*(other[key].to_pylist() for key in keys), strict=True))
    rows = zip(*(table[key].to_pylist() for key in keys), strict=True)
    return table.filter(pa.array([row in known for row in rows], pa.bool_()))


def print_column(name: str, left: np.ndarray, right: np.ndarray) -> None:
    """Where there is any: largest difference, its 99.9th percentile, and how many are undefined on one side only."""
    both = np.isfinite(left) & np.isfinite(right)
    alone = int(np.sum(np.isfinite(left) != np.isfinite(right)))
    gaps = np.abs(left[both] - right[both])
    if len(gaps) and (gaps.max() > 0 or alone):
        undefined = f", {alone} undefined in one" if alone else ""
        print(f"  {name:<28} max {gaps.max():.1e}  99.9 % {np.quantile(gaps, 0.999):.1e}{undefined}")


if __name__ == "__main__":
    main()
