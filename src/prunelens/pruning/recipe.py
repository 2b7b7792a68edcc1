"""What to take out of a model, as one short string or a YAML document; both parse to the same `Recipe`.

drop-attention:8            the 8 most redundant attention sublayers; ,iterative ranks anew after each
drop-mlp@3,17               exactly these
drop-sublayers:8            attention and MLP ranked together; @a25,m3 names them
drop-block:4,consecutive    the most redundant run of 4 blocks
magnitude:0.5               half of each matrix of the blocks becomes zero (also wanda, sparsegpt)
wanda:2:4                   2 zeros among each 4 consecutive inputs
drop-attention:4+repair:linear       what a linear map of their inputs can put back of four attentions
repair:bias, repair:folded           their mean; a map that the weights before the cut carry
drop-experts:0.25           a quarter of the experts of each mixture; ,uniform takes them at random
quantize:int8               the blocks' matrices in 8 bits; int4 in 4
drop-attention:4+wanda:2:4  a sum, applied from left to right on the model as changed so far

steps:                      # the same as YAML
  - {method: drop-block, count: 4, consecutive: true}
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from prunelens.documents import read_yaml
from prunelens.errors import PrunelensError, check_keys, nearest, one_line, shown
from prunelens.pruning.steps import (
    DROPS,
    FITS,
    KINDS,
    MASKS,
    METHODS,
    AnyStep,
    ExpertStep,
    MaskStep,
    QuantizeStep,
    RepairStep,
    Step,
)
from prunelens.reading import checked_path, is_directory, is_file

SYNTAX = (
    f"a recipe is METHOD:COUNT or METHOD@INDEX,INDEX with METHOD one of {', '.join(DROPS)}; or one of "
    f"{', '.join(MASKS)} with :0.5 or :2:4; or repair:bias, repair:linear, repair:folded after drops; or "
    "drop-experts:0.25, quantize:int8, quantize:int4; or a sum with +"
)
MAX_STEPS = 64
MAX_RECIPE = 100_000
"""Characters: every sublayer of ten thousand layers by its name."""
ONE_STEP: TypeAdapter[Any] = TypeAdapter(AnyStep)
LOOKS_LIKE_A_RECIPE = re.compile(r"\+?(drop-|[a-z]{2,}(-[a-z]+)*[:@])", re.IGNORECASE)


class Recipe(BaseModel):
    """A sum of steps, applied from left to right."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: tuple[AnyStep, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _in_order(self) -> "Recipe":
        if any(isinstance(step, QuantizeStep) for step in self.steps[:-1]):
            raise ValueError("quantize comes last: nothing can be changed in quantised numbers")
        if sum(isinstance(step, ExpertStep) for step in self.steps) > 1:
            raise ValueError("drop-experts is given twice")
        repairs = [index for index, step in enumerate(self.steps) if isinstance(step, RepairStep)]
        drops = [index for index, step in enumerate(self.steps) if isinstance(step, Step)]
        if len(repairs) > 1:
            raise ValueError("repair is given twice")
        if repairs and (not drops or drops[-1] > repairs[0]):
            raise ValueError("repair comes after the drops that it mends, such as drop-attention:4+repair:linear")
        masks = [index for index, step in enumerate(self.steps) if isinstance(step, MaskStep)]
        if repairs and masks and masks[0] < repairs[0] and self.repair is not None and self.repair.fit == "folded":
            raise ValueError("repair:folded comes before a mask: it would fill the zeros of the weights it changes")
        return self

    def __str__(self) -> str:
        return "+".join(str(step) for step in self.steps)

    @property
    def drops(self) -> tuple[Step, ...]:
        """The steps that take parts out."""
        return tuple(step for step in self.steps if isinstance(step, Step))

    @property
    def repair(self) -> RepairStep | None:
        """The step that mends the drops."""
        return next((step for step in self.steps if isinstance(step, RepairStep)), None)

    @property
    def only_drops(self) -> bool:
        """Whether the dense model's own weights serve, with parts taken out."""
        return len(self.drops) == len(self.steps)

    @property
    def needs_ranking(self) -> bool:
        """Whether a count has to be turned into indices by the dense model's scores."""
        return any(step.count is not None and not step.iterative for step in self.drops)

    @property
    def needs_calibration(self) -> bool:
        """Whether anything is measured on calibration texts."""
        return any(
            (isinstance(step, Step) and step.count is not None)
            or (isinstance(step, MaskStep) and step.method != "magnitude")
            or (isinstance(step, ExpertStep) and not step.uniform)
            for step in self.steps
        )


def is_recipe(text: str) -> bool:
    """Whether a command-line argument means a recipe rather than a model."""
    path = Path(text)
    if path.suffix in (".yaml", ".yml"):
        return True
    return LOOKS_LIKE_A_RECIPE.match(text) is not None and not is_directory(path) and not is_file(path)


def parse_recipe(text: str) -> Recipe:
    """Parse a recipe string, or the YAML document at a path that ends in .yaml or .yml.

    Raises:
        PrunelensError: unknown method, malformed count or indices, an index given twice, more than 64 steps.
    """
    path = Path(text)
    if path.suffix in (".yaml", ".yml"):
        return _from_yaml(checked_path(path, "a recipe"))
    if len(text) > MAX_RECIPE:
        raise PrunelensError(f"expected a recipe of at most {MAX_RECIPE:,} characters, found {len(text):,}")
    parts = text.split("+")
    _check_number(len(parts), shown(text))
    return _validated(Recipe.model_validate, {"steps": tuple(_parse_step(part, text) for part in parts)}, shown(text))


def _check_number(steps: int, where: str) -> None:
    if steps > MAX_STEPS:
        raise PrunelensError(f"recipe {where}: expected at most {MAX_STEPS} steps, found {steps}; put indices together")


def _parse_step(part: str, text: str) -> AnyStep:
    match = re.fullmatch(r"([a-z-]+)([:@])(.+)", part.strip())
    if match is None or match[1] not in METHODS:
        _check_method(part.strip(), text)
        raise PrunelensError(f"expected a recipe or a model, found {shown(text)}; {SYNTAX}")
    method, sign, rest = match[1], match[2], match[3]
    items = [item.strip() for item in rest.split(",")]
    if sign == "@" and method not in DROPS:
        raise PrunelensError(f"expected {method}:…, found {shown(part.strip())}; {SYNTAX}")
    values: dict[str, Any] = {"method": method}
    if sign == "@":
        values["at"] = tuple(items)
    elif method in MASKS:
        values["sparsity"] = rest.strip()
    elif method == "quantize":
        values["to"] = rest.strip()
    elif method == "repair":
        values |= _repair(items, part)
    elif method == "drop-experts":
        values |= _number(items[0], r"0?\.[0-9]{1,9}", "fraction", "a share such as drop-experts:0.25", part)
        values |= _words(items[1:], ("uniform",), "a share such as drop-experts:0.25", part)
    else:
        values |= _number(items[0], r"[0-9]{1,6}", "count", f"a count such as {method}:8", part)
        values |= _words(items[1:], ("consecutive", "iterative"), f"a count such as {method}:8", part)
    return _validated(ONE_STEP.validate_python, values, shown(text))


def _check_method(part: str, text: str) -> None:
    """Say what was meant where a method is misspelt."""
    found = re.match(r"[\w -]+", part)
    name = found[0].strip() if found else ""
    hint = nearest(name.lower().replace("_", "-").replace(" ", "-"), METHODS, 0.7)
    if name and name not in METHODS and hint:
        raise PrunelensError(f"recipe {shown(text)}: there is no method {shown(name)}{hint}")


def _repair(items: list[str], part: str) -> dict[str, Any]:
    example = "repair:bias, repair:linear or repair:folded"
    if items[0] not in FITS:
        raise PrunelensError(f"expected {example}, found {shown(part.strip())}; {SYNTAX}")
    ranks = [match[1] for item in items[1:] if (match := re.fullmatch(r"rank=([0-9]{1,6})", item))]
    if len(ranks) > 1:
        raise PrunelensError(f"expected one rank, found {shown(part.strip())}; {SYNTAX}")
    words = [item for item in items[1:] if not item.startswith("rank=")]
    if len(words) + len(ranks) < len(items) - 1:
        raise PrunelensError(f"expected a rank such as repair:linear,rank=64, found {shown(part.strip())}; {SYNTAX}")
    values: dict[str, Any] = {"fit": items[0]} | ({"rank": int(ranks[0])} if ranks else {})
    return values | _words(words, ("weighted",), example, part)


def _number(item: str, pattern: str, field: str, example: str, part: str) -> dict[str, Any]:
    if not re.fullmatch(pattern, item):
        raise PrunelensError(f"expected {example}, found {shown(part.strip())}; {SYNTAX}")
    return {field: float(item) if "." in item else int(item)}


def _words(items: list[str], known: tuple[str, ...], example: str, part: str) -> dict[str, bool]:
    strange = [item for item in items if item not in known or items.count(item) > 1]
    if strange:
        words = " or ".join(known)
        raise PrunelensError(f"expected {example}, and {words} after a comma, found {shown(part.strip())}; {SYNTAX}")
    return dict.fromkeys(items, True)


def _from_yaml(path: Path) -> Recipe:
    document = read_yaml(path, "a recipe")
    where = one_line(path)
    if not isinstance(document, dict):
        raise PrunelensError(f"expected a recipe with `steps:` in {where}, found {shown(document)}")
    check_keys(document, Recipe.model_fields, where)
    steps = document.get("steps", [])
    if not isinstance(steps, list):
        raise PrunelensError(f"{where}: expected a list of steps under `steps:`, found {shown(steps)}")
    _check_number(len(steps), where)
    for index, step in enumerate(steps):
        _check_step(step, f"{where}: steps.{index}")
    return _validated(Recipe.model_validate, document, shown(str(path)))


def _check_step(step: Any, where: str) -> None:
    """The keys of one step in a document; their values are checked as those of any step."""
    if not isinstance(step, dict) or "method" not in step:
        raise PrunelensError(f"{where}: expected `method:` and how much, such as {{method: drop-mlp, count: 1}}")
    method = step["method"]
    if method not in METHODS:
        hint = nearest(method, METHODS) if isinstance(method, str) else ""
        raise PrunelensError(f"{where}: there is no method {shown(method)}{hint}; methods: {', '.join(METHODS)}")
    kind = next(kind for kind in KINDS if method in get_args(kind.model_fields["method"].annotation))
    check_keys(step, kind.model_fields, where)


def _validated(validate: Callable[[Any], Any], values: dict[str, Any], name: str) -> Any:
    try:
        return validate(values)
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        where = ".".join(str(item) for item in first["loc"] if item not in METHODS)
        reason = first["msg"].removeprefix("Value error, ")
        raise PrunelensError(f"recipe {name}: {where + ': ' if where else ''}{reason}; {SYNTAX}") from error
