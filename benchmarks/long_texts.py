"""How many long texts decide: by excess NLL, by plain cost and by atypical texts, all of the same texts.

Each model draws texts on the first prompts of core_long, and the dense model reads them. The table gives each number's
difference to the dense model with its 95 % interval, its standard deviation over prompts at the null (the dense model
drawn again with other numbers), and how many prompts bring the half-width of an interval there to what `safe` allows.
Texts are kept in the folder, one file a model, so a stopped run resumes.

    python benchmarks/long_texts.py [MODEL] [RECIPE ...] [--folder long-texts-bench] [--prompts 24] [--tokens 64]
"""

import argparse
import copy
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path

import numpy as np

from prunelens.models.model import Model
from prunelens.models.opening.loading import load, wrap
from prunelens.models.surgery.shared_copy import set_weight
from prunelens.models.surgery.variant import Variant
from prunelens.progress import silent
from prunelens.pruning.anchors import round_rows
from prunelens.pruning.matrices import find_weights
from prunelens.study.candidates import open_candidates
from prunelens.study.evaluate.scores import score_rows
from prunelens.study.prepare import prepare
from prunelens.tasks.encoding import encode
from prunelens.tasks.prompts import PromptText
from prunelens.tasks.suite import long_items
from prunelens.tracing.long_scores import held_against, score_long
from prunelens.tracing.long_texts import LongPlan, LongText, write_long

RECIPES = ("drop-attention:1", "drop-attention:4")
NULL, INT8 = "null", "int8 by row"
NUMBERS = {"excess_nll": ("excess NLL", 1, 0.1), "nll_dense": ("mean -log p", 1, 0.1), "atypical": ("atypical", 100, 5)}
"""Metrics in words, what they are multiplied by, and the most that is safe."""


def rounded(model: Model) -> Variant:
    """The dense model with the matrices of its blocks rounded to int8 by row."""
    other = wrap(copy.deepcopy(model.network), model.tokenizer, name=INT8)
    for block in other.anatomy.blocks:
        for weight in find_weights(block.module, block.name):
            set_weight(weight.module, weight.attribute, round_rows(weight.tensor, weight.inputs_first))
    return Variant(other)


def pruned(model: Model, recipes: Sequence[str]) -> dict[str, Variant]:
    """What recipes make of it, calibrated and ranked once."""
    candidates = open_candidates(model, recipes)
    prepare(candidates, model, None, silent, 0)
    return {candidate.label: candidate.variant(model) for candidate in candidates}


def read_texts(path: Path, make: Callable[[], list[LongText]]) -> list[LongText]:
    """The texts in a file, made and written where it is not there."""
    if not path.exists():
        whole = path.with_suffix(".partial")
        whole.write_text(json.dumps([asdict(text) for text in make()]), encoding="utf-8")
        whole.rename(path)
        print(path, flush=True)
    rows = json.loads(path.read_text(encoding="utf-8"))
    return [LongText(**row | {"token_ids": tuple(row["token_ids"])}) for row in rows]


def table(texts: dict[str, list[LongText]]) -> str:
    """One line a number: its difference for each model, then its spread at the null and the prompts that decide."""
    reference = [*texts["dense"], *texts[NULL]]
    scored = {label: score_long(held_against(reference, own)) for label, own in texts.items()}
    others = [label for label in texts if label != "dense"]
    rows = {label: {row["metric"]: row for row in score_rows(scored["dense"], scored[label])} for label in others}
    lines = [
        f"| against the dense model | {' | '.join(others)} | sd at the null | prompts |",
        "|---" * (len(others) + 3) + "|",
    ]
    for metric, (name, times, safe) in NUMBERS.items():
        cells = []
        for label in others:
            ends = rows[label][metric]["difference"]
            low, mean, high = (f"{times * ends[end]:.3g}".replace("-", "−") for end in ("low", "mean", "high"))
            cells.append(f"{mean} [{low}, {high}]")
        before, after = (
            next(one.values for one in scored[label] if one.metric.name == metric) for label in ("dense", NULL)
        )
        spread = times * float(np.std([after[key] - before[key] for key in before], ddof=1))
        cells += [f"{spread:.2g}", f"{math.ceil((1.96 * spread / safe) ** 2)} for {safe}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    loops = [f"{100 * np.mean([text.loops for text in own]):.0f} % {label}" for label, own in texts.items()]
    return "\n".join([*lines, "", f"looping texts: {', '.join(loops)}"])


def measure(options: argparse.Namespace, recipes: Sequence[str]) -> dict[str, list[LongText]]:
    """The texts of all models, by label."""
    model = load(options.model)
    asked = [PromptText(one["id"], one["kind"], ({"role": "user", "content": one["prompt"]},)) for one in long_items()]
    prompts = encode(asked[: options.prompts], model, True, options.tokens)
    plan, found = LongPlan(max_new_tokens=options.tokens), {}
    made = cache(lambda: pruned(model, recipes))
    for label in ("dense", NULL, INT8, *recipes):

        def make(label: str = label) -> list[LongText]:
            variant = rounded(model) if label == INT8 else made()[label] if label in recipes else Variant(model)
            return write_long(model, variant, prompts, plan.null if label == NULL else plan, options.prompts)

        name = f"{label.replace(':', '-').replace(' ', '-')}-{options.prompts}-{options.tokens}.json"
        found[label] = read_texts(options.folder / name, make)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("recipes", nargs="*")
    parser.add_argument("--folder", type=Path, default=Path("long-texts-bench"))
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=64)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    print(table(measure(options, options.recipes or RECIPES)))


if __name__ == "__main__":
    main()
