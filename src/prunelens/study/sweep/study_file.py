"""A study as a YAML document: one model, recipes × strengths × seeds, what is asked of each, and the thresholds."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    ValidationError,
    field_validator,
)

from prunelens.documents import read_yaml
from prunelens.errors import LONGEST_VALUE, PrunelensError, cut, nearest, one_line, shown
from prunelens.pruning.recipe import parse_recipe
from prunelens.reading import checked_path
from prunelens.study.compare.settings import Settings
from prunelens.study.evaluate.measure import TaskSettings
from prunelens.study.evaluate.verdict import Thresholds
from prunelens.tasks.suite import parse_tasks

Tasks = StrictStr | list[StrictStr] | dict[str, list[StrictStr]]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Comparing(_Part):
    """What is compared in each cell, as the options of `compare`."""

    prompts: StrictStr = "core"
    num_prompts: StrictInt | None = Field(default=16, ge=1)
    max_new_tokens: StrictInt = 48
    temperature: StrictFloat = 1.0
    batch_size: StrictInt = 32
    chat_template: StrictBool = True
    lens_steps: StrictInt = 0

    def settings(self, seed: int) -> Settings:
        """As `compare` takes them; anchors are left out, since they would be the same in every cell."""
        values = self.model_dump(exclude={"prompts", "num_prompts"})
        return Settings(**values, seed=seed, anchors=())


class Asking(_Part):
    """How tasks are run in each cell, as the options of `evaluate`."""

    limit: StrictInt | None = None
    batch_size: StrictInt = 40
    chat_template: StrictBool = False
    long_tokens: StrictInt = 96
    long_samples: StrictInt = 1
    pooling: StrictStr = "mean"
    all_items: StrictBool = False

    def settings(self, seed: int) -> TaskSettings:
        """As `evaluate` takes them."""
        return TaskSettings(**self.model_dump(), seed=seed)


class Study(_Part):
    """One model and everything that is tried on it.

    `recipes` holds recipes, or one method with its strengths (`drop-attention: [1, 2, 4]`). `tasks` is what
    `evaluate` takes, or lists of tasks by class of use; null runs none. `compare` and `evaluate` say how; a null
    `compare` leaves the comparison out.
    """

    model: StrictStr
    recipes: tuple[StrictStr, ...] = Field(min_length=1)
    seeds: tuple[StrictInt, ...] = Field(default=(0,), min_length=1)
    tasks: Tasks | None = "core"
    compare: Comparing | None = Comparing()
    evaluate: Asking = Asking()
    thresholds: Thresholds = Thresholds()
    calibration: StrictStr | None = None
    dtype: StrictStr | None = None
    device: StrictStr | None = None
    trust_remote_code: StrictBool = False

    @field_validator("recipes", mode="before")
    @classmethod
    def _strengths(cls, given: Any) -> Any:
        if not isinstance(given, list | tuple):
            raise ValueError("expected a list of recipes")
        return tuple(recipe for item in given for recipe in _recipes(item))

    @field_validator("tasks", mode="before")
    @classmethod
    def _lists(cls, given: Any) -> Any:
        """A class without tasks is an empty list, one task is a list of one."""
        if not isinstance(given, dict):
            return given
        return {
            use: [names] if isinstance(names, str) else [] if names is None else names for use, names in given.items()
        }


class Cell(_Part):
    """One recipe with one seed; `key` names what made it."""

    recipe: str
    seed: int
    key: str


def read_study(path: Path) -> Study:
    """Read a study.

    Raises:
        PrunelensError: no such file, no YAML, an unknown key (with the nearest known one), a bad value, a malformed
            recipe, an unknown class or one without tasks.
    """
    document = read_yaml(path, "a study")
    if not isinstance(document, dict):
        raise PrunelensError(f"expected a study with `model:` and `recipes:` in {path}, found {_kind(document)}")
    return parse_study(document, str(path))


def parse_study(document: Mapping[str, Any], name: str = "the study") -> Study:
    """Check a study that was read already.

    Raises:
        PrunelensError: as `read_study`.
    """
    try:
        study = Study.model_validate(dict(document))
    except ValidationError as error:
        raise PrunelensError(f"{name}: {_first_fault(error)}") from error
    try:
        _check(study)
    except PrunelensError as error:
        raise PrunelensError(f"{name}: {error}") from error
    return study


def _check(study: Study) -> None:
    recipes = [str(parse_recipe(recipe)) for recipe in study.recipes]
    several: tuple[tuple[str, list[Any]], ...] = (("recipe", recipes), ("seed", list(study.seeds)))
    for kind, items in several:
        twice = next((item for item in items if items.count(item) > 1), None)
        if twice is not None:
            raise PrunelensError(f"the {kind} {twice} is given twice; name each once")
    if study.tasks is None and study.compare is None:
        raise PrunelensError("neither tasks nor compare is asked for; leave one of them on")
    if study.tasks is not None:
        parse_tasks(study.tasks)
    for path, what in ((study.model, "a model"), (study.calibration, "calibration texts")):
        if path is not None:
            checked_path(path, what)
    for seed in study.seeds:
        study.evaluate.settings(seed).check()
        if study.compare is not None:
            study.compare.settings(seed).check()


def _recipes(item: Any) -> list[str]:
    """A recipe, or one method with its strengths."""
    if isinstance(item, str):
        return [item]
    if not isinstance(item, dict) or not item:
        raise ValueError(f"expected a recipe such as drop-attention:4, or a method with strengths, found {shown(item)}")
    found = []
    for method, strengths in item.items():
        if not isinstance(strengths, list) or not strengths:
            raise ValueError(
                f"expected a list of strengths for {one_line(cut(method, 60))}, such as [1, 2, 4], "
                f"found {shown(strengths)}"
            )
        found += [f"{method}:{_strength(strength)}" for strength in strengths]
    return found


def _strength(strength: Any) -> str:
    if isinstance(strength, bool) or not isinstance(strength, int | float | str):
        raise ValueError(f"expected a strength such as 4, 0.5 or '2:4', found {shown(strength)}")
    return str(strength)


def _first_fault(error: ValidationError) -> str:
    fault = error.errors(include_url=False)[0]
    where = cut(one_line(".".join(str(part) for part in fault["loc"])), LONGEST_VALUE)
    if fault["type"] == "extra_forbidden":
        known = _known_keys([str(part) for part in fault["loc"][:-1]])
        return f"there is no key '{where}'{nearest(str(fault['loc'][-1]), known)}; known keys: {', '.join(known)}"
    if fault["type"] == "missing":
        return f"the key {where!r} is missing"
    if fault["type"] == "value_error":
        return f"{where}: {fault['msg'].removeprefix('Value error, ')}"
    return f"{where}: {fault['msg']}, found {shown(fault['input'])}"


def _known_keys(path: list[str]) -> list[str]:
    parts: dict[str, type[BaseModel]] = {"compare": Comparing, "evaluate": Asking, "thresholds": Thresholds}
    return list((parts.get(path[0], Study) if path else Study).model_fields)


def _kind(document: Any) -> str:
    return "nothing" if document is None else type(document).__name__


def cells_of(study: Study, fingerprint: str, texts: str) -> list[Cell]:
    """The cells of a study, each named by the hash of what makes it.

    Args:
        study: the study; its thresholds make a cell where they may end a class early. Where all items are run they
            are applied to what was measured.
        fingerprint: of the model's files.
        texts: a hash of the prompts, of the calibration texts and of the tasks' own files.
    """
    found = []
    chosen = parse_tasks(study.tasks) if study.tasks is not None else None
    for recipe in study.recipes:
        for seed in study.seeds:
            parsed = parse_recipe(recipe)
            name = str(parsed)
            made = {
                "version": 1,
                "fingerprint": fingerprint,
                "texts": texts,
                "recipe": name,
                "compare": asdict(study.compare.settings(seed)) if study.compare else None,
                "evaluate": _asked(study, seed) if chosen else None,
                "tasks": [chosen.tasks, chosen.uses] if chosen else None,
                "dtype": study.dtype,
                "device": study.device,
            } | parsed.made_with
            found.append(Cell(recipe=name, seed=seed, key=key_of(made)))
    return found


def _asked(study: Study, seed: int) -> dict[str, Any]:
    """What decides which items are run, and how."""
    found = asdict(study.evaluate.settings(seed))
    return found if found.pop("all_items") else found | {"raced": study.thresholds.model_dump()}


def key_of(made: Mapping[str, Any]) -> str:
    """A name of 16 hexadecimal digits for what makes a result."""
    return hashlib.sha256(json.dumps(made, sort_keys=True, default=list).encode()).hexdigest()[:16]
