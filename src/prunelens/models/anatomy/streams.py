"""The residual stream around every sublayer, and what a sublayer's twin would have made of the same input."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from prunelens.models.anatomy.hooks import Call, first_tensor
from prunelens.models.anatomy.parts import Block, Sublayer


@dataclass(frozen=True)
class SublayerPass:
    """One run of a sublayer: the stream it read, and that stream with its output added, (B, T, d) each.

    `calls` are those of its first chain, `beside` the runs of its others.
    """

    sublayer: Sublayer
    before: Tensor
    after: Tensor
    calls: tuple[Call, ...]
    beside: tuple["SublayerPass", ...] = ()

    @property
    def added(self) -> Tensor:
        """What the sublayer has added to the stream, (B, T, d), without the rounding of a sum and a difference."""
        output = first_tensor(self.calls[-1].output)
        assert output is not None
        output = output.reshape(self.before.shape)
        added = output - self.before if self.sublayer.adds_residual else self.sublayer.scale * output
        return sum((other.added for other in self.beside), added)

    def twin_after(self, twin: Sublayer) -> Tensor:
        """The stream with the output of another model's sublayer, run on the same input, (B, T, d)."""
        value = self.calls[0].source
        for call, link in zip(self.calls, twin.links, strict=True):
            value = value if link.gain == 1 else value * link.gain
            value = call.again(link.module, value.reshape(call.source.shape))
        same_scale = math.isclose(twin.scale, self.sublayer.scale, rel_tol=1e-4)  # each was solved for on its own
        after = (self.sublayer if same_scale else twin).add_to(
            self.before, value.reshape(self.before.shape).to(self.before.device)
        )
        for other, other_twin in zip(self.beside, twin.beside, strict=True):
            after = after + (other.twin_after(other_twin) - self.before)
        return after


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

    def note_end(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls[module] = Call(args, kwargs, _kept(output))

    def finish(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        found = _block_pass(block, Call(args, kwargs, output), calls)
        calls.clear()
        visit(found)

    ends = [strand.chain[-1] for part in block.sublayers for strand in part.strands]
    for module in dict.fromkeys(module for part in block.sublayers for module in part.modules):
        hook = note_end if module in ends else note
        stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
    stack.callback(block.module.register_forward_hook(finish, with_kwargs=True).remove)


def _kept(output: Any) -> Any:
    """The output with a copy of its tensor: a layer may add to the tensor in place."""
    return (output[0].clone(), *output[1:]) if isinstance(output, tuple) else output.clone()


def _block_pass(block: Block, whole: Call, calls: dict[nn.Module, Call]) -> BlockPass:
    """Put together what was seen of a block."""
    after = first_tensor(whole.output)
    assert after is not None
    before = whole.source.to(after.device)  # the block before may be on another device
    stream, found = before, []
    for part in block.sublayers:
        own = _sublayer_pass(part, stream, calls)
        found.append(own)
        stream = before if block.layout == "parallel" else own.after
    return BlockPass(block, before, after, tuple(found))


def _sublayer_pass(part: Sublayer, stream: Tensor, calls: dict[nn.Module, Call]) -> SublayerPass:
    own = tuple(calls[module] for module in part.chain if module in calls)
    beside = tuple(_sublayer_pass(other, stream, calls) for other in part.beside)
    reached = stream
    if len(own) == len(part.chain):  # else the block was taken out whole
        output = first_tensor(own[-1].output)
        assert output is not None
        reached = sum((other.added for other in beside), part.add_to(stream, output.reshape(stream.shape)))
    return SublayerPass(part, stream, reached, own, beside)
