"""The model card of a pruned checkpoint: how it was made, and what `compare` found."""

import shlex
from pathlib import Path
from typing import Any

from prunelens.errors import LONGEST_SENTENCE, cut, one_line
from prunelens.models.model import Model
from prunelens.models.opening.repair_files import REPAIRS
from prunelens.pruning.recipe import Recipe

IN_WEIGHTS = "The weights carry it: every program that loads this checkpoint has it."
IN_FILE = (
    f"It lies in `{REPAIRS}`, and **only prunelens reads it** (`prunelens.load`). Other programs, plain transformers "
    "among them, load this checkpoint without its repair: what they run is worse than what was measured here."
)


def model_card(
    model: Model,
    recipe: Recipe,
    calibration: Path | None,
    notes: tuple[str, ...],
    findings: dict[str, Any] | None,
    in_weights: bool = True,
) -> str:
    """Markdown with the front matter that model hubs read.

    Args:
        model: the dense model.
        recipe: what was done to it.
        calibration: the user's calibration texts.
        notes: what a reader should know.
        findings: what `compare` said of it.
        in_weights: whether every program that loads the checkpoint has its repairs, if there are any.
    """
    place = IN_WEIGHTS if in_weights else IN_FILE
    calibrated = str(calibration) if calibration else "the dense model's own greedy texts on the core prompts"
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags:",
        "- pruned",
        "- prunelens",
        "---",
        "",
        f"# {_text(model.name)}, {_text(str(recipe))}",
        "",
        f"Made from {_text(model.name)} (fingerprint `{model.fingerprint[:16]}`) by prunelens:",
        "",
        f"    prunelens prune {shlex.quote(_line(model.name))} {recipe}",
        "",
    ]
    lines += [_method(record) for record in recipe.made_with.get("methods", [])]
    if recipe.needs_calibration:
        lines += [f"Calibration: {_text(calibrated)}.", ""]
    if recipe.repair is not None:
        fitted = str(calibration) if calibration else "samples of the dense model on prompts of their own"
        lines += [f"Repair: fitted on {_text(fitted)}. {place}", ""]
    lines += [f"- {_text(note)}" for note in notes]
    lines += ["", "## What was found against the dense model", ""]
    lines += _found(findings) if findings else ["Nothing was measured. `prunelens compare` measures it."]
    return "\n".join(lines) + "\n"


def _method(record: dict[str, Any]) -> str:
    """Where a method from outside came from."""
    package = f"{record['distribution']} {record['version']}, " if "distribution" in record else ""
    file = f"{package}{record['file']}"
    return f"The {record['kind']} {_text(record['name'])} is from {_text(file)} (sha256 `{record['sha256'][:16]}`).\n"


def _found(record: dict[str, Any]) -> list[str]:
    kl, top1, length = record["kl"], record["same_top1"], record["faithful_length"]
    more = "more than " if length["beyond_horizon"] else ""
    rows = [
        ("KL per token, mean (nats)", f"{_number(kl['mean'])} [{_number(kl['low'])}, {_number(kl['high'])}]"),
        ("KL, 95th percentile (nats)", _number(kl["p95"])),
        ("same most likely token", "unknown" if top1["mean"] is None else f"{100 * top1['mean']:.1f} %"),
        ("faithful length, tokens", f"{more}{length['median']}"),
    ]
    rows += [
        (
            f"probability that {_text(n)} sampled tokens agree",
            f"{_number(found['value'], 3)} [{_number(found['low'], 3)}, {_number(found['high'], 3)}]",
        )
        for n, found in record["survival"].items()
    ]
    table = ["| quantity | value [95 % interval over prompts] |", "|---|---|"]
    return [*table, *(f"| {name} | {value} |" for name, value in rows)]


def _number(value: float | None, digits: int = 4) -> str:
    return "unknown" if value is None else f"{value:.{digits}f}"


def _text(value: str) -> str:
    """One line without anything that Markdown or HTML would take for more than text."""
    return "".join(f"\\{letter}" if letter in "<>|`*~&[]\\" else letter for letter in _line(value))


def _line(value: str) -> str:
    return cut(one_line(value), LONGEST_SENTENCE)
