"""What a repair buys: drops with nothing, a bias, a map, … put back, from single tokens to whole texts and tasks.

Each cell is a recipe. The maps are fitted on the dense model's samples on the calibration prompts; everything here is
measured on other prompts: KL and same top-1 per token, S(8) and S(32) on the core prompts, loops of long texts, and
the scores of the core suite, with 95 % intervals over prompts or items. A finished cell is kept in the folder and not
measured again, so a stopped run resumes.

    python benchmarks/repair.py [MODEL] [--folder repair-bench] [--limit 112] [--long-tokens 128] [--workers 2]
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DROPS = (
    "drop-attention:1",
    "drop-attention:2",
    "drop-attention:4",
    "drop-attention:8",
    "drop-mlp:1",
    "drop-mlp:2",
    "drop-block:1",
    "drop-block:2",
)
REPAIRS = {
    "nothing": "",
    "bias": "+repair:bias",
    "linear": "+repair:linear",
    "rank 64": "+repair:linear,rank=64",
    "weighted": "+repair:linear,weighted",
    "folded": "+repair:folded",
}
TASKS = ("core_choice", "core_facts", "core_arithmetic", "core_copy", "core_long", "core_retrieval")
SCORES = {
    "choice": ("core_choice", "acc"),
    "facts": ("core_facts", "exact_match"),
    "arithmetic": ("core_arithmetic", "exact_match"),
    "copy": ("core_copy", "exact_match"),
    "nDCG@10": ("core_retrieval", "ndcg_at_10"),
    "loops": ("core_long", "loops"),
}
HORIZON = 64


def measure(options: argparse.Namespace) -> None:
    """Measure every unfinished cell of one worker's share (child process)."""
    wanted = [
        recipe
        for recipe in cells(DROPS[options.worker :: options.workers])
        if not is_finished(cell_file(options.folder, recipe), options.no_tasks)
    ]
    if not wanted:
        return
    import torch

    from prunelens.models.opening.loading import load
    from prunelens.progress import silent
    from prunelens.pruning.apply import apply
    from prunelens.pruning.pruned import Calibration
    from prunelens.pruning.recipe import parse_recipe
    from prunelens.pruning.redundancy import rank_redundancy
    from prunelens.study.calibration_texts import own_texts, repair_texts
    from prunelens.study.evaluate.measure import TaskRunner, TaskSettings
    from prunelens.study.evaluate.scores import score_rows
    from prunelens.tasks.suite import parse_tasks

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // options.workers))
    model = load(options.model)
    texts = Calibration(own_texts(model, silent), repair_texts(model, silent))
    ranking = rank_redundancy(model, texts.texts)
    reader = Reader(model)
    bench = TaskRunner(model, parse_tasks(TASKS), TaskSettings(limit=options.limit, long_tokens=options.long_tokens))
    for recipe in wanted:
        pruned = apply(parse_recipe(recipe), model, texts, ranking)
        scores = []
        if not options.no_tasks:
            scores = score_rows(bench.dense_found.scored, bench.measure(recipe, pruned.variant).scored)
        saved = 1 - pruned.num_bytes / model.weight_bytes
        found = {"recipe": recipe, "bytes_saved": saved, **reader.read(pruned.variant), "scores": scores}
        found["explained"] = [one.explained for one in pruned.repaired]
        target = cell_file(options.folder, recipe)
        temporary = target.with_suffix(".partial")
        temporary.write_text(json.dumps(found), encoding="utf-8")
        temporary.rename(target)
        print(f"{recipe}: KL {found['kl'][0]:.4f}, S(8) {found['s8'][0]:.3f}", flush=True)


class Reader:
    """The dense model's greedy and sampled texts on the core prompts, and how other models read them."""

    def __init__(self, model: Any) -> None:
        import torch

        from prunelens.tasks.encoding import encode
        from prunelens.tasks.prompts import prompts
        from prunelens.tracing.forced import Trajectory, forced_states
        from prunelens.tracing.free import write_dense

        self._model = model
        asked = encode(prompts(), model, True, HORIZON)
        greedy, sampled = write_dense(model, [prompt.token_ids for prompt in asked], HORIZON, 1.0, 0, 48)
        written = [("greedy", greedy), ("sampled", sampled)]
        self._texts = [
            Trajectory(index, trace, prompt.token_ids, tuple(text.token_ids), text.ended)
            for trace, texts in written
            for index, (prompt, text) in enumerate(zip(asked, texts, strict=True))
        ]
        self._states = forced_states(model, self._texts)[0]
        self._tokens = torch.tensor([token for text in self._texts for token in text.token_ids])

    def read(self, variant: Any) -> dict[str, list[float]]:
        """KL and same top-1 over the tokens of all texts, S(8) and S(32) over the sampled: [value, low, high]."""
        from prunelens.metrics.head import Pair, stream_pairs
        from prunelens.metrics.survival import mean_curve, survival_rows
        from prunelens.tracing.forced import forced_states

        drops = [variant.drop] if variant.model is self._model else []
        states = forced_states(variant.model, self._texts, drops)[-1]
        pair = Pair(states, variant.model.head)
        (stats,) = stream_pairs(self._states, self._model.head, [pair], self._tokens, 1.0)
        lengths = [len(text.token_ids) for text in self._texts]
        each = {name: [part.double().numpy() for part in stats[name].split(lengths)] for name in NAMES}
        half = len(lengths) // 2
        mean, low, high = mean_curve(survival_rows(each["acceptance"][half:], each["tv"][half:], HORIZON))
        found = {f"s{n}": [float(mean[n - 1]), float(low[n - 1]), float(high[n - 1])] for n in (8, 32)}
        found["agreed"] = [float(mean.sum())] * 3
        return found | {"kl": over_prompts(each["kl_dense_compressed"]), "top1": over_prompts(each["same_top1"])}


NAMES = ("acceptance", "tv", "kl_dense_compressed", "same_top1")


def over_prompts(values: list[Any]) -> list[float]:
    """Mean over tokens, with its interval over prompts; the greedy and the sampled text of a prompt go together."""
    import numpy as np

    from prunelens.metrics.intervals import ratio_interval

    half = len(values) // 2
    totals = np.array([first.sum() + second.sum() for first, second in zip(values[:half], values[half:], strict=True)])
    counts = np.array([len(first) + len(second) for first, second in zip(values[:half], values[half:], strict=True)])
    found = ratio_interval(totals, counts.astype(float))
    return [found.value, found.low, found.high]


def cells(drops: Sequence[str]) -> list[str]:
    """The recipes of some drops, those of one drop after the other, so that their fits share what lies before it."""
    return [drop + repair for drop in drops for repair in REPAIRS.values()]


def is_finished(path: Path, no_tasks: bool) -> bool:
    """Whether a cell is kept, with scores if they are wanted."""
    return path.exists() and (no_tasks or bool(json.loads(path.read_text(encoding="utf-8"))["scores"]))


def cell_file(folder: Path, recipe: str) -> Path:
    """Where a cell is kept."""
    return folder / f"{recipe.replace(':', '-').replace('+', '_').replace(',', '_').replace('=', '')}.json"


def table(folder: Path) -> str:
    """All finished cells in Markdown."""
    head = ["drop", "repair", "bytes saved", "KL per token", "same top-1", "S(8)", "S(32)", *SCORES]
    lines = [head, ["---"] * len(head)]
    dense: dict[str, float] = {}
    for drop in DROPS:
        for name, repair in REPAIRS.items():
            path = cell_file(folder, drop + repair)
            if path.exists():
                cell = json.loads(path.read_text(encoding="utf-8"))
                if cell["scores"]:
                    dense |= {score: row_of(cell, *of)["dense"]["mean"] for score, of in SCORES.items()}
                lines.append([f"`{drop}`", name, *words(cell)])
    scores = [f"{100 * dense[score]:.1f}" if dense else "—" for score in SCORES]
    lines.insert(2, ["dense", "", "0 %", "0", "100 %", "1", "1", *scores])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def words(cell: dict[str, Any]) -> list[str]:
    """One cell as columns; scores in percent."""
    found = [f"{100 * cell['bytes_saved']:.1f} %", interval(cell["kl"], 1, 3), interval(cell["top1"], 100, 1)]
    found += [interval(cell["s8"], 1, 2), interval(cell["s32"], 1, 2)]
    if not cell["scores"]:
        return [*found, *["—"] * len(SCORES)]
    for of in SCORES.values():
        own = row_of(cell, *of)["compressed"]
        found.append(interval([own["mean"], own["low"], own["high"]], 100, 1))
    return found


def row_of(cell: dict[str, Any], task: str, metric: str) -> dict[str, Any]:
    """The scores of one metric."""
    return next(row for row in cell["scores"] if row["task"] == task and row["metric"] == metric)


def interval(values: list[float], times: float, digits: int) -> str:
    """A value with its interval."""
    value, low, high = (f"{times * value:.{digits}f}" for value in values)
    return f"{value} [{low}, {high}]"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--folder", type=Path, default=Path("repair-bench"))
    parser.add_argument("--limit", type=int, help="the most items of each task")
    parser.add_argument("--long-tokens", type=int, default=256)
    parser.add_argument("--no-tasks", action="store_true", help="only what is read token by token")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.worker is not None:
        measure(options)
        return
    commands = [[sys.executable, __file__, *sys.argv[1:], "--worker", str(worker)] for worker in range(options.workers)]
    running = [subprocess.Popen(command) for command in commands]
    codes = [process.wait() for process in running]
    print(table(options.folder))
    sys.exit(max(codes))


if __name__ == "__main__":
    main()
