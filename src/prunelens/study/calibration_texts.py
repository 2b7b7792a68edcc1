"""What recipes are calibrated on: texts that the user gives, or the dense model's own."""

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from importlib import resources
from pathlib import Path

from prunelens.errors import PrunelensError
from prunelens.models.cache import cache_dir, write_whole
from prunelens.models.loading import Model
from prunelens.pruning.apply import Calibration
from prunelens.pruning.calibration import read_calibration
from prunelens.pruning.recipe import Recipe
from prunelens.study.settings import Reporter, Settings
from prunelens.tasks.prompts import Prompt, encode, prompts
from prunelens.tracing.generate import Greedy, Rule, Sampled, uniforms, write

REPAIR_PROMPTS = "calibration_prompts.jsonl"
REPAIR_SEEDS = (0, 1)
REPAIR_TOKENS = 96
REPAIR_ROWS = 96
"""Texts written side by side."""

Texts = Sequence[Sequence[int]]


def calibrate(recipes: Sequence[Recipe], model: Model, path: Path | None, reporter: Reporter) -> Calibration:
    """The texts that these recipes need.

    Args:
        recipes: what will be applied.
        model: the dense model.
        path: text, JSONL or .npy of token ids; None for the dense model's own texts.
        reporter: progress display.

    Raises:
        PrunelensError: as `read_calibration`, or a model that cannot write texts of its own.
    """
    if path is not None:
        texts = read_calibration(path, model)
        return Calibration(texts, texts)
    counted = any(recipe.needs_calibration for recipe in recipes)
    repaired = any(recipe.repair is not None for recipe in recipes)
    return Calibration(own_texts(model, reporter) if counted else (), repair_texts(model, reporter) if repaired else ())


def own_texts(model: Model, reporter: Reporter) -> list[list[int]]:
    """The dense model's greedy texts on the core prompts, as `compare` takes them."""
    settings = Settings()
    encoded = encode(prompts(), model, settings.chat_template, settings.max_new_tokens)
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
    made_of = [model.fingerprint, str(model.dtype), source.read_text(encoding="utf-8"), REPAIR_SEEDS, REPAIR_TOKENS]
    key = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:32]
    kept = cache_dir() / "texts" / f"{key}.json"
    stored = _stored(kept)
    if stored is None:
        stored = _sample(model, _fitting(source, model), reporter)
        with suppress(OSError):  # a cache that cannot be written is none
            write_whole(kept, json.dumps(stored))
    return stored


def _stored(path: Path) -> list[list[int]] | None:
    """Texts that were kept; None where there are none, or the file is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    rows = found if isinstance(found, list) else []
    whole = all(isinstance(row, list) and row and all(type(token) is int for token in row) for row in rows)
    return rows if rows and whole else None


def _fitting(source: Path, model: Model) -> list[tuple[int, ...]]:
    """The prompts that leave room for a text in the model's context."""
    fitting: list[tuple[int, ...]] = []
    fault: PrunelensError | None = None
    for text in prompts(source):
        try:
            fitting += [prompt.token_ids for prompt in encode([text], model, True, REPAIR_TOKENS)]
        except PrunelensError as error:
            fault = error
    if not fitting:
        raise PrunelensError(f"{model.name} cannot write calibration texts for a repair ({fault}); pass --calibration")
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


def unseen(texts: Texts, reported: Sequence[Prompt], model: Model) -> tuple[list[Sequence[int]], int]:
    """(the calibration texts that hold none of the reported prompts, how many hold one).

    Raises:
        PrunelensError: all hold one.
    """
    asked = [prompt.text.strip() for prompt in reported]
    kept = [text for text in texts if not _holds_any(model, text, asked)]
    if not kept:
        raise PrunelensError(
            "expected calibration texts for the repair other than the prompts that are reported on, found that each "
            "holds one of them; give another --calibration or other --prompts"
        )
    return kept, len(texts) - len(kept)


def _holds_any(model: Model, text: Sequence[int], asked: Sequence[str]) -> bool:
    decoded = model.tokenizer.decode(text)
    return any(prompt in decoded for prompt in asked)
