"""The residual stream around every sublayer, and what a sublayer's twin would have made of the same input."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from prunelens.models.anatomy import Block, Sublayer
from prunelens.models.taps import first_tensor, input_tensor


@dataclass(frozen=True)
class Call:
    """One run of a module: what it was given and what it returned."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any

    @property
    def source(self) -> Tensor:
        """The hidden states it read."""
        found = input_tensor(self.args, self.kwargs)
        assert found is not None
        return found

    def again(self, module: nn.Module, source: Tensor) -> Tensor:
        """What `module` makes of the same call with other hidden states."""
        read = self.source
        args = [source if value is read else value for value in self.args]
        kwargs = {name: source if value is read else value for name, value in self.kwargs.items()}
        found = first_tensor(module(*args, **kwargs))
        assert found is not None
        return found


@dataclass(frozen=True)
class SublayerPass:
    """One run of a sublayer: the stream it read, and that stream with its output added, (B, T, d) each."""

    sublayer: Sublayer
    before: Tensor
    after: Tensor
    calls: tuple[Call, ...]

    def twin_after(self, twin: Sublayer) -> Tensor:
        """The stream with the output of another model's sublayer, run on the same input, (B, T, d)."""
        value = self.calls[0].source
        for call, module in zip(self.calls, twin.chain, strict=True):
            value = call.again(module, value.reshape(call.source.shape))
        same_scale = math.isclose(twin.scale, self.sublayer.scale, rel_tol=1e-4)  # each was solved for on its own
        return (self.sublayer if same_scale else twin).add_to(self.before, value.reshape(self.before.shape))


@dataclass(frozen=True)
class BlockPass:
    """One run of a block: the stream before and after it, (B, T, d), and its sublayers.

    In a parallel block each sublayer's `before` is the block's own, and `after` holds its output alone.
    """

    block: Block
    before: Tensor
    after: Tensor
    sublayers: tuple[SublayerPass, ...]


@contextmanager
def watched_blocks(blocks: Sequence[Block], visit: Callable[[BlockPass], None]) -> Iterator[None]:
    """Call `visit` whenever one of these blocks has run; what it saw is not kept."""
    with ExitStack() as stack:
        for block in blocks:
            _watch(block, visit, stack)
        yield


def _watch(block: Block, visit: Callable[[BlockPass], None], stack: ExitStack) -> None:
    calls: dict[nn.Module, Call] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls[module] = Call(args, kwargs, output)

    def finish(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        found = _block_pass(block, Call(args, kwargs, output), calls)
        calls.clear()
        visit(found)

    for module in dict.fromkeys(module for part in block.sublayers for module in part.chain):
        stack.callback(module.register_forward_hook(note, with_kwargs=True).remove)
    stack.callback(block.module.register_forward_hook(finish, with_kwargs=True).remove)


def _block_pass(block: Block, whole: Call, calls: dict[nn.Module, Call]) -> BlockPass:
    """Put together what was seen of a block."""
    after = first_tensor(whole.output)
    assert after is not None
    before = whole.source.to(after.device)  # the block before may be on another device
    stream, found = before, []
    for part in block.sublayers:
        own = tuple(calls[module] for module in part.chain if module in calls)
        after = stream
        if len(own) == len(part.chain):  # else the block was taken out whole
            output = first_tensor(own[-1].output)
            assert output is not None
            after = part.add_to(stream, output.reshape(stream.shape))
        found.append(SublayerPass(part, stream, after, own))
        stream = before if block.layout == "parallel" else found[-1].after
    return BlockPass(block, before, after, tuple(found))
