"""What stands in for a part that is out: an affine map of what the part read, added to the residual stream."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from prunelens.models.anatomy.hooks import Call, Returned, input_tensor

NAME = "repair"
"""What a repair is called as a child of the module that it stands in for."""
STREAM = "stream"
"""The kind of a repair that stands where blocks were cut out; its layer is the number of blocks before it."""


class Repair(nn.Module):
    """A bias, or a map with a bias, of full or limited rank.

    Attributes:
        kind: attention, mlp, block, or `STREAM`.
        layer_idx: of the sublayer; for blocks that follow one another the first one's.
        bias: what is added at every token, (d,).
        down, up: x · down · up is added as well, (d, r) and (r, d); a full map has `down` (d, d) and no `up`.
    """

    bias: Tensor
    down: Tensor | None
    up: Tensor | None

    def __init__(
        self, kind: str, layer_idx: int, bias: Tensor, down: Tensor | None = None, up: Tensor | None = None
    ) -> None:
        super().__init__()
        self.kind, self.layer_idx = kind, layer_idx
        for name, value in (("bias", bias), ("down", down), ("up", up)):
            parameter = None if value is None else nn.Parameter(value.contiguous(), requires_grad=False)
            self.register_parameter(name, parameter)

    def forward(self, source: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """What is added to the stream where the part has read `source`: its normed input, or a block's stream."""
        bias = self.bias.to(source)  # a stream may be wider than the weights
        if self.down is None:
            return bias.expand(source.shape).clone()  # families add to it in place
        mapped = source @ self.down.to(source)
        return (mapped if self.up is None else mapped @ self.up.to(source)) + bias

    @property
    def num_parameters(self) -> int:
        """Numbers that it adds to the model."""
        return sum(weight.numel() for weight in self.parameters())

    def at(self, kind: str, layer_idx: int) -> "Repair":
        """The same map at another place."""
        return Repair(kind, layer_idx, self.bias, self.down, self.up)

    def in_dtype(self, dtype: torch.dtype) -> "Repair":
        """A copy of the map in another dtype."""
        down, up = (None if value is None else value.to(dtype) for value in (self.down, self.up))
        return Repair(self.kind, self.layer_idx, self.bias.to(dtype), down, up)


def installed_repairs(network: nn.Module) -> list[tuple[str, Repair]]:
    """The repairs that are part of a network, with the names of the modules they belong to."""
    found = ((name, module) for name, module in network.named_modules() if isinstance(module, Repair))
    return [(name.rpartition(".")[0], module) for name, module in found]


def find_repair(repairs: Iterable[Repair], kind: str, layer_idx: int) -> Repair | None:
    """The repair at this place, if there is one."""
    return next((one for one in repairs if (one.kind, one.layer_idx) == (kind, layer_idx)), None)


@dataclass
class RepairSite:
    """Runs in place of the modules of a repaired sublayer; its methods, bound to it, are copied with the network.

    Attributes:
        repair: the map.
        silent: what the first module does where nothing is repaired.
        residual_at: where the end of the chain is given the stream, if it adds that inside.
        scale: what the block multiplies the output by.
        returned: by the module at the end.
        source: what the first module was given, until the end of the chain has run.
    """

    repair: Repair
    silent: Callable[..., Any]
    residual_at: int | str | None
    scale: float
    returned: Returned
    source: Tensor | None = None

    def begin(self, *args: Any, **kwargs: Any) -> Any:
        """Forward of the first module, where others follow."""
        self.source = input_tensor(args, kwargs)
        return self.silent(*args, **kwargs)

    def end(self, *args: Any, **kwargs: Any) -> Any:
        """Forward of the last module: what the map makes of what the first one was given."""
        source, self.source = self.source, None
        assert source is not None
        added = self.repair(source)
        if self.scale != 1:
            added = added / self.scale
        if self.residual_at is not None:
            residual = Call(args, kwargs, None).arguments[self.residual_at]
            added = residual + added.reshape(residual.shape)
        return self.returned.around(added, args, kwargs)

    def whole(self, *args: Any, **kwargs: Any) -> Any:
        """Forward of a module that is first and last."""
        self.begin(*args, **kwargs)
        return self.end(*args, **kwargs)


@dataclass
class BlockRepair:
    """Runs a block and adds a map of the stream, after it or before it; copied with the network."""

    repair: Repair
    own: Any
    before: bool

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Forward of the block."""
        if self.before:
            source = input_tensor(args, kwargs)
            assert source is not None
            there = source + self.repair(source)
            args = tuple(there if value is source else value for value in args)
            kwargs = {name: there if value is source else value for name, value in kwargs.items()}
            return self.own(*args, **kwargs)
        output = self.own(*args, **kwargs)
        stream = output[0] if isinstance(output, tuple) else output
        repaired = stream + self.repair(stream)
        return (repaired, *output[1:]) if isinstance(output, tuple) else repaired
