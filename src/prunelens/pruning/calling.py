"""Call a method and check what it gives; a fault of one from outside is one sentence that names its file and line."""

from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from prunelens.errors import PrunelensError, one_line, shown
from prunelens.pruning.faults import is_stop, place_in, reason
from prunelens.pruning.methods import InputStatistics, Method, PartStates


def mask_scores(
    method: Method, weight: Float[Tensor, "rows columns"], inputs: InputStatistics | None
) -> Float[Tensor, "rows columns"]:
    """The scores that a mask gives the weights of a matrix; `inputs` may be None where it reads none.

    Raises:
        PrunelensError: the function fails, or gives anything but finite numbers of the matrix's shape.
    """
    with torch.no_grad():
        weight = weight.detach()
        if method.source is None:
            return method.function(weight, inputs) if method.reads_inputs else method.function(weight)
        given: list[Any] = [weight.clone()]  # a function that works in place must not reach the model's own
        if method.reads_inputs:
            assert inputs is not None
            given.append(InputStatistics(inputs.squares.clone(), inputs.num_tokens))
        return _called(method, given, tuple(weight.shape), "the matrix").to(weight.device)


def part_score(method: Method, part: PartStates) -> float:
    """The sum over tokens of what a ranking gives each.

    Raises:
        PrunelensError: the function fails, or gives anything but one finite number for each token.
    """
    if method.source is None:
        scores: Float64[Tensor, " tokens"] = method.function(part)
        return float(scores.sum())
    return float(_called(method, [part], (len(part.before),), "the tokens").double().sum())


def _called(method: Method, given: list[Any], shape: tuple[int, ...], of: str) -> Tensor:
    assert method.source is not None
    what = f"the {method.kind} {method.name}"
    try:
        found = method.function(*given)
    except BaseException as error:
        if is_stop(error):
            raise
        raise PrunelensError(f"{what} failed in {place_in(error, method.source.file)}: {reason(error)}") from error
    fault = _fault(found, shape, of)
    if fault:
        place = f"{one_line(method.source.file)}, line {method.source.line}"
        raise PrunelensError(f"expected {what} in {place} to return {fault}")
    return found


def _fault(found: Any, shape: tuple[int, ...], of: str) -> str:
    """What was expected and found; empty where all is well."""
    if not isinstance(found, Tensor):
        return f"a tensor of scores, found {shown(found)}"
    if tuple(found.shape) != shape:
        return f"scores of the shape of {of}, {shape}, found {tuple(found.shape)}"
    if not found.is_floating_point():
        return f"floating-point scores, found {str(found.dtype).removeprefix('torch.')}"
    if not bool(torch.isfinite(found).all()):
        return "finite scores, found NaN or infinity among them"
    return ""
