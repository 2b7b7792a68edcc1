"""What to take out of a model, as one short string or a YAML document; both parse to the same `Recipe`.

drop-attention:8            the 8 most redundant attention sublayers; ,iterative ranks anew after each
drop-attention:8,by=NAME    by a ranking of one's own instead of the cosine
drop-mlp@3,17               exactly these
drop-sublayers:8            attention and MLP ranked together; @a25,m3 names them
drop-block:4,consecutive    the most redundant run of 4 blocks
magnitude:0.5               half of each matrix of the blocks becomes zero (also wanda, sparsegpt, or one's own)
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
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from prunelens.documents import read_yaml
from prunelens.errors import PrunelensError, check_keys, nearest, one_line, shown
from prunelens.pruning.methods import Method, Reference
from prunelens.pruning.steps.base import BaseStep
from prunelens.pruning.steps.drop import DROPS, DropStep
from prunelens.pruning.steps.known import TAGS, AnyStep, kind_of, known_methods
from prunelens.pruning.steps.mask import MaskStep
from prunelens.pruning.steps.quantize import QuantizeStep
from prunelens.pruning.steps.repair import RepairStep
from prunelens.reading import checked_path, is_directory, is_file

if TYPE_CHECKING:
    from prunelens.models.model import Model

Kind = TypeVar("Kind", bound=BaseStep)
MAX_STEPS = 64
MAX_RECIPE = 100_000
"""Characters: every sublayer of ten thousand layers by its name."""
LOOKS_LIKE_A_RECIPE = re.compile(r"\+?(drop-|[a-z][a-z0-9]+(-[a-z0-9]+)*[:@])", re.IGNORECASE)


class Recipe(BaseModel):
    """A sum of steps, applied from left to right."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: tuple[AnyStep, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _in_order(self) -> "Recipe":
        for reason in (step.comes_last for step in self.steps[:-1]):
            if reason:
                raise ValueError(reason)
        methods = [step.method for step in self.steps if step.only_once]
        twice = next((method for method in methods if methods.count(method) > 1), None)
        if twice is not None:
            raise ValueError(f"{twice} is given twice")
        repairs = [index for index, step in enumerate(self.steps) if step.repairs_drops]
        drops = [index for index, step in enumerate(self.steps) if step.drops_parts]
        if repairs and (not drops or drops[-1] > repairs[0]):
            raise ValueError("repair comes after the drops that it repairs, such as drop-attention:4+repair:linear")
        masked = False
        for step in self.steps:
            if masked and step.spoils_zeros:
                raise ValueError(step.spoils_zeros)
            masked = masked or step.makes_zeros
        return self

    def __str__(self) -> str:
        return "+".join(str(step) for step in self.steps)

    def _of(self, kind: type[Kind]) -> tuple[Kind, ...]:
        return tuple(step for step in self.steps if isinstance(step, kind))

    @property
    def drops(self) -> tuple[DropStep, ...]:
        """The steps that take parts out."""
        return self._of(DropStep)

    @property
    def repair(self) -> RepairStep | None:
        """The step that repairs the drops."""
        return next(iter(self._of(RepairStep)), None)

    @property
    def quantize(self) -> QuantizeStep | None:
        """The step to fewer bits."""
        return next(iter(self._of(QuantizeStep)), None)

    @property
    def only_drops(self) -> bool:
        """Whether the dense model's own weights serve, with parts taken out."""
        return all(step.drops_parts for step in self.steps)

    @property
    def needs_ranking(self) -> bool:
        """Whether a count has to be turned into indices by the dense model's cosine scores."""
        return any(step.needs_ranking for step in self.steps)

    @property
    def needs_calibration(self) -> bool:
        """Whether anything is measured on calibration texts."""
        return any(step.needs_calibration for step in self.steps)

    @property
    def outside_methods(self) -> tuple[Method, ...]:
        """The methods from outside that its steps use, each once."""
        return tuple(dict.fromkeys(method for step in self.steps for method in step.outside_methods))

    @property
    def references(self) -> tuple[Reference, ...]:
        """What another process finds those methods by."""
        return tuple(method.reference for method in self.outside_methods if method.reference is not None)

    @property
    def made_with(self) -> dict[str, list[dict[str, Any]]]:
        """Those methods as records under `methods`; nothing where there are none."""
        records = [method.record() for method in self.outside_methods]
        return {"methods": records} if records else {}

    def loads_where(self, model: "Model") -> str:
        """Where a checkpoint of the recipe loads, and whether it is smaller there."""
        return "; ".join(step.loads_where(model, self.steps) for step in self.steps)


def syntax() -> str:
    """What a recipe may be, in a sentence."""
    return (
        f"a recipe is METHOD:COUNT or METHOD@INDEX,INDEX with METHOD one of {', '.join(DROPS)}; or one of "
        f"{', '.join(MaskStep.methods())} with :0.5 or :2:4; or repair:bias, repair:linear, repair:folded after drops; "
        "or drop-experts:0.25, quantize:int8, quantize:int4; or a sum with +"
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


def _parse_step(part: str, text: str) -> BaseStep:
    match = re.fullmatch(r"([a-z0-9-]+)([:@])(.+)", part.strip())
    kind = kind_of(match[1]) if match is not None else None
    if match is None or kind is None:
        _check_method(part.strip(), text)
        raise PrunelensError(f"expected a recipe or a model, found {shown(text)}; {syntax()}")
    method, sign, rest = match[1], match[2], match[3]
    if sign == "@" and not kind.takes_indices:
        raise PrunelensError(f"expected {method}:…, found {shown(part.strip())}; {syntax()}")
    try:
        values = kind.values(method, sign, rest, part)
    except ValueError as error:
        raise PrunelensError(f"{error}; {syntax()}") from error
    step: BaseStep = _validated(kind.model_validate, values, shown(text))
    return step


def _check_method(part: str, text: str) -> None:
    """Say what was meant where a method is misspelt."""
    found = re.match(r"[\w -]+", part)
    name, methods = found[0].strip() if found else "", known_methods()
    hint = nearest(name.lower().replace("_", "-").replace(" ", "-"), methods, 0.7)
    if name and name not in methods and hint:
        raise PrunelensError(f"recipe {shown(text)}: there is no method {shown(name)}{hint}")


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
    kind = kind_of(method)
    if kind is None:
        methods = known_methods()
        hint = nearest(method, methods) if isinstance(method, str) else ""
        raise PrunelensError(f"{where}: there is no method {shown(method)}{hint}; methods: {', '.join(methods)}")
    check_keys(step, kind.model_fields, where)


def _validated(validate: Callable[[Any], Any], values: dict[str, Any], name: str) -> Any:
    try:
        return validate(values)
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        where = ".".join(str(item) for item in first["loc"] if item not in TAGS)
        reason = first["msg"].removeprefix("Value error, ")
        raise PrunelensError(f"recipe {name}: {where + ': ' if where else ''}{reason}; {syntax()}") from error
