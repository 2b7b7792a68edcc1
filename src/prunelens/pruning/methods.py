"""Methods as functions: `@mask` scores the weights of a matrix, `@ranking` the parts of a model.

magnitude, wanda and the cosine ranking, which come with prunelens, are written at the end as any other. sparsegpt
changes the weights that stay while it chooses those that go, so it has a file of its own.
"""

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from prunelens.errors import PrunelensError, check_word, shown
from prunelens.pruning.sources import Source, source_of

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["mask", "ranking"]
NAME = r"[a-z][a-z0-9]*(-[a-z0-9]+)*"
LONGEST_NAME = 40
COSINE, SPARSEGPT = "cosine", "sparsegpt"
TAKEN = (
    *("drop-attention", "drop-mlp", "drop-block", "drop-sublayers", "drop-experts", "repair", "quantize"),
    SPARSEGPT,
)
"""What recipes mean already by these words, so that no mask can be called so."""
PER = ("row", "matrix")


@dataclass(frozen=True, eq=False)
class InputStatistics:
    """What one matrix has read on the calibration texts.

    Attributes:
        squares: Σ x² of each input over the tokens, float64, (columns,).
        num_tokens: tokens that the matrix has read; in a mixture, those sent to its expert.
    """

    squares: "Tensor"
    num_tokens: int


@dataclass(frozen=True, eq=False)
class PartStates:
    """The residual stream around one part for some of the calibration tokens, float32 (float64 in a float64 model).

    Attributes:
        kind: attention, mlp or block.
        layer_idx: of the block that it is, or is in, from 0.
        before: hidden states in front of it, (tokens, hidden).
        after: those with what it adds, (tokens, hidden). Where attention and MLP of a block run side by side, both
            have the block's own `before`, and `after` holds the output of one alone.
    """

    kind: str
    layer_idx: int
    before: "Tensor"
    after: "Tensor"


@dataclass(frozen=True, eq=False)
class Method:
    """A registered function.

    Attributes:
        name: what recipes call it.
        kind: mask or ranking.
        function: as its author wrote it.
        reads_inputs: whether a mask takes input statistics, so that calibration texts are read.
        per: what a threshold counts for, each row or the whole matrix.
        source: where it comes from; None for one that prunelens brings along.
    """

    name: str
    kind: Kind
    function: Callable[..., Any]
    reads_inputs: bool = True
    per: str = "row"
    source: Source | None = None

    @property
    def reference(self) -> "Reference | None":
        """What another process finds it by; None for one that prunelens brings along."""
        return Reference(self.kind, self.name, self.source) if self.source is not None else None

    def record(self) -> dict[str, Any]:
        """For run.json and config.json: its name, and what tells versions of it apart."""
        return {"name": self.name, "kind": self.kind} | (self.source.record() if self.source else {})


@dataclass(frozen=True)
class Reference:
    """A method from outside without its function, which cannot always be sent to another process."""

    kind: Kind
    name: str
    source: Source


_METHODS: dict[tuple[str, str], Method] = {}
Function = TypeVar("Function", bound=Callable[..., Any])


def mask(name: str, per: str = "row") -> Callable[[Function], Function]:
    """Make a function a mask that recipes can name, as in `my-mask:0.5` and `my-mask:2:4`.

    The function gets a matrix (rows are outputs, columns inputs) and, if it takes a second argument, the
    `InputStatistics` of it, and returns a finite score for each weight, of the matrix's shape. The lowest scores
    become zero: int(columns × ratio) of each row, the lower column first among equals; with `per="matrix"` all scores
    up to the one at place int(number × ratio) in ascending order, that one included; with n:m the n lowest of each m
    consecutive columns. A matrix that has read no token is masked by magnitude.

    Args:
        name: lower-case letters, digits and hyphens.
        per: `row` or `matrix`.

    Raises:
        PrunelensError: a name that is malformed or taken, or a function with other arguments.
    """
    _check_name(name, "mask")
    check_word("per", per, PER)

    def register(function: Function) -> Function:
        count = _num_arguments(function)
        if count not in (1, 2):
            raise PrunelensError(
                f"expected the mask {name} to take (weight) or (weight, inputs), found {count} arguments"
            )
        _register(Method(name, "mask", function, count == 2, per))
        return function

    return register


def ranking(name: str) -> Callable[[Function], Function]:
    """Make a function a ranking that recipes can name, as in `drop-attention:8,by=my-ranking`.

    The function gets the `PartStates` of one part for a batch of calibration tokens and returns a finite score for each
    token, (tokens,); higher means more redundant. The score of the part is the mean over all tokens, however they are
    batched. It is called for every attention, MLP and block during a single pass of the model.

    Args:
        name: lower-case letters, digits and hyphens.

    Raises:
        PrunelensError: a name that is malformed or taken, or a function with other arguments.
    """
    _check_name(name, "ranking")

    def register(function: Function) -> Function:
        count = _num_arguments(function)
        if count != 1:
            raise PrunelensError(f"expected the ranking {name} to take one argument (part), found {count}")
        _register(Method(name, "ranking", function))
        return function

    return register


def _check_name(name: Any, kind: Kind) -> None:
    if not isinstance(name, str):
        raise PrunelensError(f'expected @prunelens.{kind}("name") with a name in brackets, found {shown(name)}')
    if not re.fullmatch(NAME, name) or not 2 <= len(name) <= LONGEST_NAME:
        raise PrunelensError(
            f"expected a name of 2 to {LONGEST_NAME} lower-case letters, digits and hyphens ({NAME}) for a {kind}, "
            f"found {shown(name)}"
        )
    if kind == "mask" and name in TAKEN:
        raise PrunelensError(f"the name {name} is taken by prunelens; call the {kind} something else")


def _num_arguments(function: Any) -> int:
    """Arguments without a default that are given by place."""
    if not inspect.isfunction(function):
        raise PrunelensError(f"expected a function to decorate, found {shown(function)}")
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    found = inspect.signature(function).parameters.values()
    return sum(one.kind in kinds and one.default is inspect.Parameter.empty for one in found)


def _register(method: Method) -> None:
    """Put a method under its name; the same function, loaded again, takes its own place."""
    own = method.function.__module__ == __name__
    method = method if own else replace(method, source=source_of(method.function))
    earlier = _METHODS.get((method.kind, method.name))
    if earlier is not None and not (earlier.source and method.source and method.source.replaces(earlier.source)):
        where = f"{earlier.source.file}, line {earlier.source.line}" if earlier.source else "prunelens"
        raise PrunelensError(f"the name {method.name} is taken by {where}; call the {method.kind} something else")
    _METHODS[method.kind, method.name] = method


def registered(kind: Kind) -> tuple[Method, ...]:
    """The methods of a kind that are there now, those of prunelens first."""
    return tuple(method for method in _METHODS.values() if method.kind == kind)


def method_named(kind: Kind, name: str) -> Method | None:
    """A registered method; None where there is none of that name."""
    return _METHODS.get((kind, name))


def built_in(kind: Kind) -> tuple[str, ...]:
    """The names of the methods of a kind that are written here."""
    return tuple(method.name for method in registered(kind) if method.source is None)


def snapshot() -> dict[tuple[str, str], Method]:
    """All that is registered now."""
    return dict(_METHODS)


def restore(methods: dict[tuple[str, str], Method]) -> None:
    """Put back what was registered at a snapshot."""
    _METHODS.clear()
    _METHODS.update(methods)


def forget(file: str) -> None:
    """Remove the methods of a file, before it is loaded again."""
    for key, method in snapshot().items():
        if method.source is not None and method.source.file == file:
            del _METHODS[key]


@mask("magnitude", per="matrix")
def magnitude(weight: "Tensor") -> "Tensor":
    """|W|."""
    return weight.abs()


@mask("wanda")
def wanda(weight: "Tensor", inputs: InputStatistics) -> "Tensor":
    """Wanda: |W|·‖x‖₂, float32."""
    return weight.abs().float() * inputs.squares.sqrt().float()


@ranking(COSINE)
def cosine(part: PartStates) -> "Tensor":
    """LLM-Drop: the cosine of the stream before and after, residual included; 1 = changes nothing."""
    from torch.nn.functional import cosine_similarity

    return cosine_similarity(part.before.double(), part.after.double(), dim=-1, eps=1e-300)
