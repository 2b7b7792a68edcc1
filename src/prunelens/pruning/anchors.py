"""Anchors: the dense model with its weights rounded, changes that everybody accepts, as a scale for all others (A2).

The weights of a block are rounded when it runs and put back after it, so that no second model is held.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from prunelens.models.anatomy.hooks import replaced_forward
from prunelens.models.model import Model
from prunelens.models.sizes import is_quantized
from prunelens.models.surgery.shared_copy import set_weight
from prunelens.pruning.matrices import find_weights

AnchorKind = Literal["bfloat16", "int8"]
ANCHORS: tuple[AnchorKind, ...] = get_args(AnchorKind)
MEANT = {
    "bfloat16": "the dense model, every weight rounded to bfloat16",
    "int8": "the dense model, the blocks' matrices rounded to int8, one scale a row",
}
LEVELS = 127

Place = tuple[nn.Module, str]


class Anchor:
    """The dense model with rounded weights while it runs inside `running`, and the head that belongs to it."""

    def __init__(self, dense: Model, kind: AnchorKind) -> None:
        self.kind = kind
        self._dense = dense
        self._outside = dict(_outside(dense)) if kind == "bfloat16" else {}

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run the body with the weights rounded; they are the same tensors as before afterwards."""
        blocks = {block.module: self._around(block.module, block.name) for block in self._dense.anatomy.blocks}
        with _exchanged(self._outside), replaced_forward(blocks):
            yield

    def head(self, states: Float[Tensor, "rows d"]) -> Float[Tensor, "rows V"]:
        """Logits of states that the rounded model gave."""
        with _exchanged(self._outside):
            return self._dense.head(states)

    def _around(self, block: nn.Module, name: str) -> Callable[..., Any]:
        forward = block.forward

        def run(*args: Any, **kwargs: Any) -> Any:
            with _exchanged(dict(self._rounded(block, name))):
                return forward(*args, **kwargs)

        return run

    def _rounded(self, block: nn.Module, name: str) -> Iterator[tuple[Place, Tensor]]:
        if self.kind == "int8":
            for weight in find_weights(block, name):
                if _is_plain(weight.tensor):
                    yield (weight.module, weight.attribute), round_rows(weight.tensor, weight.inputs_first)
            return
        for place, tensor in _own(block):
            yield place, to_bfloat16(tensor)


def why_no_anchor(dense: Model, kind: AnchorKind) -> str:
    """Why the model cannot be rounded so; empty if it can."""
    tensors = list(dense.network.parameters())
    if any(tensor.is_meta for tensor in tensors):
        return f"parts of {dense.name} are offloaded, and weights are rounded where they are in memory"
    inside = [weight for block in dense.anatomy.blocks for weight in find_weights(block.module, block.name)]
    if not any(_is_plain(weight.tensor) for weight in inside):
        return f"{dense.name} is quantised already: its blocks hold no matrix of plain numbers"
    if kind == "bfloat16" and all(torch.equal(to_bfloat16(tensor), tensor) for tensor in tensors if _is_plain(tensor)):
        return f"every weight of {dense.name} is a bfloat16 number already, so that nothing changes"
    return ""


def to_bfloat16(tensor: Tensor) -> Tensor:
    """The nearest bfloat16 numbers, ties to even, in the tensor's own dtype."""
    return tensor.to(torch.bfloat16).to(tensor.dtype)


def round_rows(tensor: Tensor, inputs_first: bool) -> Tensor:
    """A2: s · round(w / s) with s = max |w| / 127 over each row, ties to even; a row of zeros stays.

    Args:
        tensor: (outputs, inputs), or (experts, outputs, inputs); the last two the other way round if `inputs_first`.
        inputs_first: how it is stored.
    """
    values = tensor.float()
    scales = values.abs().amax(dim=-2 if inputs_first else -1, keepdim=True) / LEVELS
    scales = torch.where(scales > 0, scales, 1.0)
    return (torch.round(values / scales) * scales).to(tensor.dtype)


def _outside(dense: Model) -> Iterator[tuple[Place, Tensor]]:
    """What lies outside the blocks, rounded; a tensor that two modules share is rounded once."""
    inside = {module for block in dense.anatomy.blocks for module in block.module.modules()}
    made: dict[int, Tensor] = {}
    for place, tensor in _own(dense.network):
        if place[0] not in inside:
            yield place, made.setdefault(id(tensor), to_bfloat16(tensor))


def _own(network: nn.Module) -> Iterator[tuple[Place, Tensor]]:
    for module in network.modules():
        for name, tensor in module._parameters.items():
            if tensor is not None and _is_plain(tensor):
                yield (module, name), tensor


def _is_plain(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and not is_quantized(tensor)


@contextmanager
def _exchanged(values: dict[Place, Tensor]) -> Iterator[None]:
    """Run the body with other tensors in these places."""
    before = {(module, name): module._parameters[name] for module, name in values}
    try:
        for (module, name), value in values.items():
            set_weight(module, name, value)
        yield
    finally:
        for (module, name), own in before.items():
            module._parameters[name] = own
