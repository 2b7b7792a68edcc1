"""What recipes are calibrated on: texts that the user gives, or the dense model's own."""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from importlib import resources
from itertools import accumulate
from pathlib import Path

from prunelens.cache import cache_dir, write_whole
from prunelens.documents import read_json
from prunelens.errors import PrunelensError
from prunelens.models.model import Model
from prunelens.progress import Reporter
from prunelens.pruning.calibration import read_calibration
from prunelens.pruning.pruned import Calibration
from prunelens.pruning.recipe import Recipe
from prunelens.study.compare.settings import Settings
from prunelens.tasks.encoding import encode, encode_each
from prunelens.tasks.prompts import Prompt, prompts
from prunelens.tracing.generate import Greedy, Rule, Sampled, uniforms, write

REPAIR_PROMPTS = "calibration_prompts.jsonl"
OTHER_TEXTS = "pass --calibration"
REPAIR_SEEDS = (0, 1)
REPAIR_TOKENS = 96
REPAIR_ROWS = 96
"""Texts written side by side."""
ANCHOR = 16
"""So many characters of a prompt are looked up at every place of a text, and the rest only where they stand."""

Texts = Sequence[Sequence[int]]


def calibrate(
    recipes: Sequence[Recipe], model: Model, path: Path | None, reporter: Reporter, reported: Sequence[str] = ()
) -> Calibration:
    """The texts that these recipes need.

    Args:
        recipes: what will be applied.
        model: the dense model.
        path: text, JSONL or .npy of token ids; None for the dense model's own texts.
        reporter: progress display.
        reported: prompts and questions that results will be reported on; no repair is fitted on a text with one.

    Raises:
        PrunelensError: as `read_calibration` and `unseen`, or a model that cannot write texts of its own.
    """
    texts = read_calibration(path, model) if path is not None else None
    counted = any(recipe.needs_calibration for recipe in recipes)
    made_on = Calibration(texts or (own_texts(model, reporter) if counted else ()))
    return with_repair_texts(made_on, recipes, model, texts, reported, reporter)


def with_repair_texts(
    made_on: Calibration,
    recipes: Sequence[Recipe],
    model: Model,
    texts: Texts | None,
    reported: Sequence[str],
    reporter: Reporter,
) -> Calibration:
    """With what repairs are fitted on, where one of the recipes repairs; `texts` are the user's, if there are any.

    Raises:
        PrunelensError: as `repair_texts` and `unseen`.
    """
    if not any(recipe.repair is not None for recipe in recipes):
        return made_on
    kept, notes = unseen(texts or repair_texts(model, reporter), reported, model)
    return replace(made_on, repair=kept, notes=notes)


def own_texts(model: Model, reporter: Reporter) -> list[list[int]]:
    """The dense model's greedy texts on the core prompts, as `compare` takes them.

    Raises:
        PrunelensError: the model cannot read those prompts, or has no room to answer them.
    """
    settings = Settings()
    try:
        encoded = encode(prompts(), model, settings.chat_template, settings.max_new_tokens, OTHER_TEXTS)
    except PrunelensError as error:
        raise PrunelensError(
            f"expected to calibrate on the model's own answers to the built-in prompts, found that it cannot give them "
            f"({error}); pass a text with --calibration"
        ) from error
    ids = [prompt.token_ids for prompt in encoded]
    advance = reporter("writing calibration texts", len(ids) * settings.max_new_tokens)
    rules = [Greedy() for _ in ids]
    written = write(model, ids, rules, settings.max_new_tokens, settings.batch_size, advance)
    return [[*prompt, *text.token_ids] for prompt, text in zip(ids, written, strict=True)]


def repair_texts(model: Model, reporter: Reporter) -> list[list[int]]:
    """The dense model's samples on prompts that nothing is reported on, several a prompt; kept in the cache folder.

    Raises:
        PrunelensError: no tokenizer, or a context too short for every prompt.
    """
    source = Path(str(resources.files("prunelens.tasks").joinpath(REPAIR_PROMPTS)))
    asked = _fitting(source, model)
    made_of = [model.fingerprint, str(model.dtype), asked, sorted(model.eos_ids), REPAIR_SEEDS, REPAIR_TOKENS]
    key = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:32]
    kept = cache_dir() / "texts" / f"{key}.json"
    stored = _stored(kept)
    if stored is None:
        stored = _sample(model, asked, reporter)
        with suppress(OSError):  # a cache that cannot be written is none
            write_whole(kept, json.dumps(stored))
    return stored


def _stored(path: Path) -> list[list[int]] | None:
    """Texts that were kept; None where there are none, or the file is damaged."""
    try:
        found = read_json(path, "kept texts")
    except PrunelensError:
        return None
    rows = found if isinstance(found, list) else []
    whole = all(isinstance(row, list) and row and all(type(token) is int for token in row) for row in rows)
    return rows if rows and whole else None


def _fitting(source: Path, model: Model) -> list[tuple[int, ...]]:
    """The prompts that leave room for a text in the model's context."""
    found = encode_each(prompts(source), model, True, REPAIR_TOKENS, OTHER_TEXTS)
    fitting = [one.token_ids for one in found if isinstance(one, Prompt)]
    if not fitting:
        raise PrunelensError(
            f"{model.name} cannot write calibration texts for a repair ({found[-1]}); pass --calibration"
        )
    return fitting


def _sample(model: Model, ids: list[tuple[int, ...]], reporter: Reporter) -> list[list[int]]:
    rows = [prompt for _ in REPAIR_SEEDS for prompt in ids]
    seeds = [seed for seed in REPAIR_SEEDS for _ in ids]
    rules: list[Rule] = [
        Sampled(uniforms(seed, "calibration", prompt, 0, REPAIR_TOKENS), 1.0)
        for seed, prompt in zip(seeds, rows, strict=True)
    ]
    advance = reporter("writing calibration texts for the repair", len(rows) * REPAIR_TOKENS)
    written = write(model, rows, rules, REPAIR_TOKENS, REPAIR_ROWS, advance)
    return [[*prompt, *text.token_ids] for prompt, text in zip(rows, written, strict=True)]


def unseen(texts: Texts, reported: Sequence[str], model: Model) -> tuple[list[Sequence[int]], tuple[str, ...]]:
    """(the calibration texts that hold nothing that is reported on, a note where some do).

    White space does not count. A text holds a prompt if it holds all of its lines, as a chat does between the marks
    of its template; neighbours hold one that begins in the first and ends in the second.

    Raises:
        PrunelensError: all hold something, or no tokenizer to tell.
    """
    if not reported:
        return list(texts), ()
    if model.tokenizer is None:
        raise PrunelensError(f"{model.name} has no tokenizer; put its tokenizer files beside config.json")
    decoded = [_squeezed(model.tokenizer.decode(text)) for text in texts]
    asked = [[_squeezed(line) for line in text.splitlines() if line.strip()] for text in reported]
    held = _in_a_row(decoded, ["".join(lines) for lines in asked])
    chats = [lines for lines in asked if len(lines) > 1]
    held |= {index for index, text in enumerate(decoded) if any(all(line in text for line in lines) for lines in chats)}
    kept = [text for index, text in enumerate(texts) if index not in held]
    if not kept:
        raise PrunelensError(
            "expected calibration texts for the repair other than the prompts and tasks that are reported on, found "
            "that each holds one of them; give another --calibration, or other --prompts or --tasks"
        )
    note = f"{len(held)} of {len(texts)} calibration texts hold what is reported on and were left out of the fit"
    return kept, (note,) if held else ()


def _in_a_row(texts: Sequence[str], wanted: Sequence[str]) -> set[int]:
    """The texts in which something wanted stands, or a part of it that goes on in the next text."""
    by_start: dict[str, list[str]] = {}
    for whole in wanted:
        by_start.setdefault(whole[:ANCHOR], []).append(whole)
    lengths = {len(start) for start in by_start} - {0}
    joined, ends = "".join(texts), list(accumulate(map(len, texts)))
    found: set[int] = set()
    for place in range(len(joined)):
        for length in lengths:
            for whole in by_start.get(joined[place : place + length], ()):
                if joined.startswith(whole, place):
                    last = place + len(whole) - 1
                    found |= set(range(bisect_right(ends, place), bisect_right(ends, last) + 1))
    return found


def _squeezed(text: str) -> str:
    return "".join(text.split())
