"""Watch one short pass of a decoder: what each module read and wrote, and the chains they form inside a block."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from prunelens.models.anatomy.hooks import Call, Returned, first_tensor, returned_by, run_decoder
from prunelens.models.anatomy.proofs import is_close
from prunelens.models.placement import input_device

PROBE_LENGTH = 8


@dataclass(frozen=True, eq=False)
class Seen:
    """One module's run. `result` is the tensor it returned; `value` is what stood in it then.

    (A layer may add to that tensor in place afterwards.)
    """

    module: nn.Module
    call: Call
    source: Tensor
    result: Tensor
    value: Tensor

    @property
    def num_parameters(self) -> int:
        """How many numbers its parameters hold."""
        return sum(weight.numel() for weight in self.module.parameters())

    @property
    def has_matrices(self) -> bool:
        """Whether it computes with more than vectors: not a norm, not an activation."""
        return any(weight.ndim > 1 for weight in (*self.module.parameters(), *self.module.buffers()))


@dataclass(frozen=True, eq=False)
class Chain:
    """Modules in which each reads what the one before wrote; the last one's output goes to the residual stream.

    `residual_at` is the argument, by position or name, in which the last module is also given the stream that the
    first one reads, if it adds that inside.
    """

    links: tuple[Seen, ...]
    residual_at: int | str | None = None

    @property
    def gains(self) -> tuple[float, ...]:
        """For each module, what the output of the one before was multiplied by before it read that."""
        return (1.0, *(_gain(before, after) or 1.0 for before, after in pairwise(self.links)))

    @property
    def source(self) -> Tensor:
        """The stream it reads."""
        return self.links[0].source

    @property
    def contribution(self) -> Tensor:
        """What it adds to the stream, shaped like its output."""
        end = self.links[-1].value
        if self.residual_at is None:
            return end
        return end - self.links[-1].call.arguments[self.residual_at].reshape(end.shape)


def probe_ids(model: nn.Module) -> Tensor:
    """A few random token ids, (1, PROBE_LENGTH)."""
    vocab_size = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocab_size, (1, PROBE_LENGTH), generator=generator).to(input_device(model))


def watch(decoder: nn.Module, modules: Iterable[nn.Module], ids: Tensor) -> tuple[dict[nn.Module, Seen], Tensor]:
    """Run the decoder once; (what each module read and wrote, in the order they returned; the last state)."""
    seen: dict[nn.Module, Seen] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        call, result = Call(args, kwargs, output), first_tensor(output)
        if call.has_source and result is not None:
            seen[module] = Seen(module, call, call.source, result, result.clone())

    handles = [module.register_forward_hook(note, with_kwargs=True) for module in dict.fromkeys(modules)]
    try:
        hidden = run_decoder(decoder, ids)
    finally:
        for handle in handles:
            handle.remove()
    return seen, hidden


@contextmanager
def watched_states(modules: Iterable[nn.Module]) -> Iterator[dict[nn.Module, Returned]]:
    """Note which modules are given a state and return it, while the body lets the model write."""
    found: dict[nn.Module, Returned] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        returned = returned_by(Call(args, kwargs, output))
        if any(place is not None for place in returned.states):
            found[module] = returned

    handles = [module.register_forward_hook(note, with_kwargs=True) for module in modules]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def same(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors are the same memory, whatever their shape."""
    return left.data_ptr() == right.data_ptr() and left.numel() == right.numel()


def find_chains(seen: list[Seen]) -> list[Chain]:
    """The chains among modules of one block, given in the order they returned; a shared head starts several."""
    seen = [one for one in seen if not same(one.source, one.result)]  # dropout at rest
    adding: dict[Seen, Chain] = {}
    for one in seen:
        links = _trace_back(one, [other for other in seen if other not in adding])
        residual_at = _residual_at(links)
        if residual_at is not None:
            adding[one] = Chain(links, residual_at)
    chains = []
    for one in seen:
        if one in adding:
            chains.append(adding[one])
        elif not any(same(one.result, other.source) or _gain(one, other) is not None for other in seen):
            chains.append(Chain(_trace_back(one, [other for other in seen if other not in adding])))
    return chains


def _trace_back(end: Seen, seen: list[Seen]) -> tuple[Seen, ...]:
    links = [end]
    while True:
        others = [one for one in seen if one not in links]
        before = [one for one in others if same(one.result, links[0].source)]
        before = before or [one for one in others if _gain(one, links[0]) is not None]
        if not before:
            return tuple(links)
        links.insert(0, before[0])


def _gain(before: Seen, after: Seen) -> float | None:
    """The number that turns what one module returned into what another read; None where there is none."""
    if same(before.result, after.source):
        return 1.0
    if before.value.numel() != after.source.numel() or before is after:
        return None
    own, read = before.value.double().flatten(), after.source.double().flatten().to(before.value.device)
    size = float(own @ own)
    gain = float(own @ read) / size if size else 0.0
    return gain if gain and is_close((gain * own).to(before.value.dtype), read.to(before.value.dtype)) else None


def _residual_at(links: tuple[Seen, ...]) -> int | str | None:
    """Where the last module is given the stream that the first one reads, if it returns it plus what it computes."""
    end, stream = links[-1], links[0].source
    for place, value in end.call.arguments.items():
        given = isinstance(value, Tensor) and value is not end.source and same(value, stream)
        if given and value.shape == end.value.shape:
            alone = end.call.again(end.module, end.source, {place: torch.zeros_like(value)})
            if is_close(alone + value, end.value):
                return place
    return None
