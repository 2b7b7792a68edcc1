"""What to take out of a model, as one short string or a YAML document; both parse to the same `Recipe`.

drop-attention:8            the 8 most redundant attention sublayers
drop-mlp@3,17               exactly these
drop-sublayers:8            attention and MLP ranked together; @a25,m3 names them
drop-block:4,consecutive    the most redundant run of 4 blocks
drop-attention:4+drop-mlp@1 a sum, applied from left to right

steps:                      # the same as YAML
  - {method: drop-block, count: 4, consecutive: true}
"""

import re
from pathlib import Path
from typing import Any, Literal, cast

import yaml
from pydantic import BaseModel, ConfigDict, Field, StrictInt, ValidationError, model_validator

from prunelens.errors import PrunelensError

Method = Literal["drop-attention", "drop-mlp", "drop-block", "drop-sublayers"]
METHODS: tuple[Method, ...] = ("drop-attention", "drop-mlp", "drop-block", "drop-sublayers")
SYNTAX = "a recipe is METHOD:COUNT or METHOD@INDEX,INDEX with METHOD one of " + ", ".join(METHODS)
LOOKS_LIKE_A_RECIPE = re.compile(r"\+?(drop-|[a-z]{2,}(-[a-z]+)*[:@])", re.IGNORECASE)


class Step(BaseModel):
    """One change: the `count` most redundant parts, or those named in `at`.

    `at` holds layer indices as text, for drop-sublayers with a kind in front (`a25`, `m3`).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: Method
    count: StrictInt | None = None
    at: tuple[str, ...] | None = None
    consecutive: bool = False

    @model_validator(mode="before")
    @classmethod
    def _indices_as_text(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("at"), list | tuple):
            return values | {"at": tuple(str(item) for item in values["at"])}
        return values

    @model_validator(mode="after")
    def _one_choice(self) -> "Step":
        if (self.count is None) == (self.at is None):
            raise ValueError("give either a count (METHOD:8) or indices (METHOD@25,26)")
        if self.count is not None and self.count < 1:
            raise ValueError(f"the count must be at least 1, found {self.count}")
        if self.consecutive and (self.method != "drop-block" or self.count is None):
            raise ValueError("consecutive goes with drop-block:COUNT only")
        pattern = r"[am][0-9]+" if self.method == "drop-sublayers" else r"[0-9]+"
        for item in self.at or ():
            if not re.fullmatch(pattern, item):
                example = "a25 or m3" if self.method == "drop-sublayers" else "25"
                raise ValueError(f"{self.method} expects indices such as {example}, found {item!r}")
        if self.at is not None and (not self.at or len(set(self.parts)) < len(self.at)):
            raise ValueError(f"expected each index once, none twice, found {', '.join(self.at) or 'none'}")
        return self

    @property
    def kinds(self) -> tuple[str, ...]:
        """Which parts it takes: attention, mlp, block."""
        return ("attention", "mlp") if self.method == "drop-sublayers" else (self.method.removeprefix("drop-"),)

    @property
    def parts(self) -> tuple[tuple[str, int], ...]:
        """(kind, layer index) of the parts named in `at`, in order of depth."""
        letters = {"a": "attention", "m": "mlp"}
        named = [
            (letters[item[0]], int(item[1:])) if item[0] in letters else (self.kinds[0], int(item))
            for item in self.at or ()
        ]
        return tuple(sorted(named, key=lambda part: (part[1], part[0])))

    def __str__(self) -> str:
        if self.at is not None:
            letters = len(self.kinds) > 1
            items = [f"{kind[0] if letters else ''}{layer_idx}" for kind, layer_idx in self.parts]
            return f"{self.method}@{','.join(items)}"
        return f"{self.method}:{self.count}" + (",consecutive" if self.consecutive else "")


class Recipe(BaseModel):
    """A sum of steps, applied from left to right."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: tuple[Step, ...] = Field(min_length=1)

    def __str__(self) -> str:
        return "+".join(str(step) for step in self.steps)

    @property
    def needs_ranking(self) -> bool:
        """Whether a count has to be turned into indices by scores."""
        return any(step.count is not None for step in self.steps)


def is_recipe(text: str) -> bool:
    """Whether a command-line argument means a recipe rather than a model."""
    path = Path(text)
    if path.suffix in (".yaml", ".yml"):
        return True
    return LOOKS_LIKE_A_RECIPE.match(text) is not None and not _exists(path)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name too long for a path
        return False


def parse_recipe(text: str) -> Recipe:
    """Parse a recipe string, or the YAML document at a path that ends in .yaml or .yml.

    Raises:
        PrunelensError: unknown method, malformed count or indices, an index given twice.
    """
    path = Path(text)
    if path.suffix in (".yaml", ".yml"):
        return _from_yaml(path)
    return Recipe(steps=tuple(_parse_step(part, text) for part in text.split("+")))


def _parse_step(part: str, text: str) -> Step:
    match = re.fullmatch(r"([a-z-]+)([:@])(.+)", part.strip())
    if match is None or match[1] not in METHODS:
        raise PrunelensError(f"expected a recipe or a model, found {text!r}; {SYNTAX}")
    method, sign, rest = cast(Method, match[1]), match[2], match[3]
    values: dict[str, Any] = {"method": method}
    items = [item.strip() for item in rest.split(",")]
    if sign == "@":
        values["at"] = tuple(items)
    else:
        if not re.fullmatch(r"[0-9]{1,6}", items[0]) or items[1:] not in ([], ["consecutive"]):
            raise PrunelensError(f"expected a count such as {method}:8, found {part.strip()!r}; {SYNTAX}")
        values |= {"count": int(items[0]), "consecutive": len(items) > 1}
    return _validated(Step, values, text)


def _from_yaml(path: Path) -> Recipe:
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise PrunelensError(f"expected a recipe in YAML at {path}: {str(error).splitlines()[0]}") from error
    if not isinstance(document, dict) or not all(isinstance(key, str) for key in document):
        raise PrunelensError(f"expected a recipe with `steps:` in {path}, found {type(document).__name__}")
    return _validated(Recipe, document, str(path))


def _validated(kind: type[Any], values: dict[str, Any], text: str) -> Any:
    try:
        return kind(**values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(item) for item in first["loc"])
        reason = first["msg"].removeprefix("Value error, ")
        raise PrunelensError(f"recipe {text!r}: {where + ': ' if where else ''}{reason}; {SYNTAX}") from error
