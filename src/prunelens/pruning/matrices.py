"""The matrices inside a block that can be made sparse, and what they multiply while the model runs.

A matrix is the weight of an `nn.Linear` or `Conv1D`, or one expert of a 3-D parameter. Which of its two sides
faces the inputs is not taken from names: the products themselves are watched.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

from prunelens.models.anatomy.parts import Block
from prunelens.models.sizes import is_quantized
from prunelens.pruning.methods import InputStatistics

LEFT_TIMES_RIGHT = {
    torch.matmul,
    torch.mm,
    Tensor.matmul,
    Tensor.mm,
    Tensor.__matmul__,
}


@dataclass(eq=False)
class Weight:
    """A parameter that holds one matrix, or one for each expert.

    Attributes:
        name: its full name.
        module, attribute: where it is.
        inputs_first: whether it is stored as (inputs, outputs).
    """

    name: str
    module: nn.Module
    attribute: str
    inputs_first: bool

    @property
    def tensor(self) -> Tensor:
        """The parameter as it is now."""
        return self.module._parameters[self.attribute]  # type: ignore[return-value]

    @property
    def num_experts(self) -> int:
        """Matrices it holds."""
        return self.tensor.shape[0] if self.tensor.ndim == 3 else 1

    def matrix(self, expert: int) -> Float[Tensor, "rows columns"]:
        """One matrix as (outputs, inputs)."""
        stored = self.tensor[expert] if self.tensor.ndim == 3 else self.tensor
        return stored.T if self.inputs_first else stored


def find_weights(block: nn.Module, prefix: str) -> list[Weight]:
    """Every matrix of a decoder block: of linear layers, and of experts that are held in one parameter."""
    found = []
    for path, module in block.named_modules(prefix=prefix):
        if isinstance(module, nn.Linear | Conv1D):
            found.append(Weight(f"{path}.weight", module, "weight", isinstance(module, Conv1D)))
        elif not isinstance(module, nn.modules.conv._ConvNd):
            stacks = [name for name, value in module._parameters.items() if value is not None and value.ndim == 3]
            transposed = bool(getattr(module, "is_transposed", False))
            found += [Weight(f"{path}.{name}", module, name, transposed) for name in stacks]
    return [weight for weight in found if weight.tensor.numel() and not weight.tensor.is_meta]


def zero_share(blocks: Iterable[Block]) -> float:
    """Share of exact zeros among the numbers of the blocks' matrices; quantised ones are not counted."""
    zeros = total = 0
    for block in blocks:
        for weight in find_weights(block.module, block.name):
            if not is_quantized(weight.tensor) and weight.tensor.is_floating_point():
                zeros += int((weight.tensor == 0).sum())
                total += weight.tensor.numel()
    return zeros / total if total else 0.0


Key = tuple[str, int]
"""(name of the weight, expert)."""


@dataclass
class _Watch(TorchFunctionMode):
    """Sees every product with one of the weights."""

    weights: list[Weight]
    take: Callable[[Key, Tensor], None]
    starts: dict[int, Weight] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()
        for weight in self.weights:
            for expert in range(weight.num_experts):
                self.starts[weight.matrix(expert).data_ptr()] = weight

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.linear:
            inputs, weight = args[0], args[1] if len(args) > 1 else kwargs["weight"]
            self._note(weight, inputs, faces_inputs=-1)
        elif func in LEFT_TIMES_RIGHT:
            self._note(args[1], args[0], faces_inputs=0)
            self._note(args[0], args[1].mT, faces_inputs=-1)
        elif func in (torch.addmm, Tensor.addmm):
            self._note(args[2], args[1], faces_inputs=0)
        return func(*args, **kwargs)

    def _note(self, matrix: Tensor, inputs: Tensor, faces_inputs: int) -> None:
        if matrix.ndim != 2:
            return
        weight = self.starts.get(matrix.data_ptr())
        if weight is None or matrix.shape[faces_inputs] != inputs.shape[-1]:
            return
        stored_plainly = matrix.is_contiguous() or matrix.shape[1] == 1
        weight.inputs_first = (faces_inputs == 0) == stored_plainly
        offset = matrix.storage_offset() - weight.tensor.storage_offset()
        expert = offset // weight.tensor.stride(0) if weight.tensor.ndim == 3 else 0
        self.take((weight.name, expert), inputs)


@contextmanager
def watched_inputs(weights: list[Weight], take: Callable[[Key, Tensor], None]) -> Iterator[None]:
    """Call `take` with (…, inputs) whatever one of the matrices multiplies while the body runs."""
    with _Watch(weights, take):
        yield


class Squares:
    """Σ x² of each input, float64, and how many tokens: what masks by scores get."""

    def __init__(self) -> None:
        self.total: InputStatistics | None = None

    def add(self, inputs: Float[Tensor, "tokens columns"]) -> None:
        """Take more tokens in."""
        found, num_tokens = inputs.double().square_().sum(dim=0), len(inputs)
        if self.total is not None:
            found, num_tokens = self.total.squares + found, self.total.num_tokens + num_tokens
        self.total = InputStatistics(found, num_tokens)


class Products:
    """Σ x xᵀ over tokens, multiplied in float32 and added up in float64: what SparseGPT needs."""

    def __init__(self) -> None:
        self.total: Tensor | None = None

    def add(self, inputs: Float[Tensor, "tokens columns"]) -> None:
        """Take more tokens in."""
        values = inputs.to(torch.promote_types(inputs.dtype, torch.float32))
        found = (values.T @ values).double()
        self.total = found if self.total is None else self.total.add_(found)


class BlockStatistics:
    """One statistic for each matrix of a block; matrices that read the same tensor share it.

    Args:
        kind: `Squares` or `Products`.
    """

    def __init__(self, kind: type[Squares] | type[Products]) -> None:
        self._kind = kind
        self._by_key: dict[Key, Squares | Products] = {}
        self._last: tuple[Tensor, Squares | Products] | None = None

    def take(self, key: Key, inputs: Tensor) -> None:
        """Add what a matrix reads, (…, columns); a tensor is added once for all that share it."""
        if self._last is not None and self._last[0] is inputs:
            shared = self._last[1]
            if self._by_key.setdefault(key, shared) is shared:
                return
        own = self._by_key.setdefault(key, self._kind())
        if inputs.numel():
            own.add(inputs.detach().reshape(-1, inputs.shape[-1]))
        self._last = (inputs, own)

    def of(self, key: Key) -> Tensor | InputStatistics | None:
        """The statistic of a matrix, or None if it read no token."""
        found = self._by_key.get(key)
        return None if found is None else found.total
