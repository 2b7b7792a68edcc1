"""Which weights make a sublayer add exactly nothing when they are zero: its output projections, found by running."""

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from prunelens.errors import PrunelensError
from prunelens.models.anatomy.hooks import Call, decoder_of, input_tensor, run_decoder
from prunelens.models.anatomy.parts import Block, Sublayer
from prunelens.models.anatomy.probe import probe_ids
from prunelens.models.anatomy.streams import BlockPass, watched_blocks
from prunelens.models.model import Model
from prunelens.models.surgery.drop import Drop, dropped, own_modules


def silencing_weights(model: Model, drop: Drop) -> set[str]:
    """Names of the parameters that take the dropped sublayers out when they are zero.

    Of all parameters that serve only the sublayer, those are left out, from the first that is used to the last, that
    the others do not need: what remains is what is used last. All experts count as one.

    Args:
        model: an open model.
        drop: sublayers; whole blocks are not looked at.

    Raises:
        PrunelensError: zeroed weights do not take a sublayer out.
    """
    parts = [
        (block, part)
        for block in model.anatomy.blocks
        for part in block.sublayers
        if block.layer_idx in getattr(drop, part.kind) and block.layer_idx not in drop.block
    ]
    found: set[str] = set()
    if parts:
        with torch.inference_mode():
            calls = _record(model, [block for block, _ in parts])
            for block, part in parts:
                found |= _silencing(model, block, part, *calls[block.layer_idx])
    return found


@torch.no_grad()
def added(model: Model, part: Sublayer) -> Tensor:
    """What a sublayer adds to the stream of a short text, (1, T, d)."""
    found: list[Tensor] = []

    def visit(passed: BlockPass) -> None:
        found.extend(one.added for one in passed.sublayers if one.sublayer.kind == part.kind)

    with watched_blocks([model.anatomy.blocks[part.layer_idx]], visit):
        run_decoder(decoder_of(model.network), probe_ids(model.network))
    return found[0]


def _record(model: Model, blocks: list[Block]) -> dict[int, tuple[Call, Tensor]]:
    """What each block was called with in a short pass, and a copy of the stream it read."""
    calls: dict[int, tuple[Call, Tensor]] = {}
    handles = []
    for block in blocks:

        def record(module: nn.Module, args: Any, kwargs: Any, layer_idx: int = block.layer_idx) -> None:
            source = input_tensor(args, kwargs)
            assert source is not None
            calls[layer_idx] = Call(args, kwargs, None), source.clone()

        handles.append(block.module.register_forward_pre_hook(record, with_kwargs=True))
    try:
        run_decoder(decoder_of(model.network), probe_ids(model.network))
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _silencing(model: Model, block: Block, part: Sublayer, call: Call, source: Tensor) -> set[str]:
    with dropped(model.anatomy, Drop(**{part.kind: frozenset({block.layer_idx})})):
        silent = _run(block.module, call, source)
    groups = _groups(block, part, call, source)
    chosen = set(groups)

    def is_silent(names: Collection[str]) -> bool:
        with _zeros(block.module, [name for group in names for name in groups[group]]):
            return torch.equal(_run(block.module, call, source), silent)

    if not is_silent(chosen):
        raise PrunelensError(
            f"expected zeroed weights to take the {part.kind} of layer {block.layer_idx} out of {model.name}, found "
            "that they do not; drop the whole block instead"
        )
    for group in groups:
        if is_silent(chosen - {group}):
            chosen.remove(group)
    return {f"{block.name}.{name}" for group in chosen for name in groups[group]}


def _run(module: nn.Module, call: Call, source: Tensor) -> Tensor:
    return call.again(module, source.clone())


def _groups(block: Block, part: Sublayer, call: Call, source: Tensor) -> dict[str, list[str]]:
    """The sublayer's own parameters by name within the block, experts together.

    Norms come first, then from the first used to the last: projections are rather zeroed than norms.
    """
    own = {id(weight) for module in own_modules(block, part.kind) for weight in module.parameters()}
    body = {id(weight) for module in part.body for weight in module.parameters()}
    order = _order_of_use(block.module, call, source)
    named = [(name, weight) for name, weight in block.module.named_parameters() if id(weight) in own]
    named.sort(key=lambda item: (id(item[1]) in body, order[item[0].rpartition(".")[0]]))
    groups: dict[str, list[str]] = {}
    for name, _ in named:
        groups.setdefault(re.sub(r"\.\d+\.", ".*.", name), []).append(name)
    return groups


def _order_of_use(module: nn.Module, call: Call, source: Tensor) -> dict[str, int]:
    """For each part of a block by name, when it was first called; one that is not, when what holds it was."""
    order: dict[str, int] = {}
    handles = []
    for name, part in module.named_modules():

        def note(*_: Any, name: str = name) -> None:
            order.setdefault(name, len(order))

        handles.append(part.register_forward_pre_hook(note))
    try:
        _run(module, call, source)
    finally:
        for handle in handles:
            handle.remove()
    for name, _ in module.named_modules():
        order.setdefault(name, order[name.rpartition(".")[0]])
    return order


@contextmanager
def _zeros(module: nn.Module, names: list[str]) -> Iterator[None]:
    """Let these parameters be zero for a while; the tensors themselves stay as they are."""
    owners = [(module.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in names]
    before = [owner.get_parameter(name) for owner, name in owners]
    try:
        for (owner, name), weight in zip(owners, before, strict=True):
            owner._parameters[name] = nn.Parameter(torch.zeros_like(weight), requires_grad=False)
        yield
    finally:
        for (owner, name), weight in zip(owners, before, strict=True):
            owner._parameters[name] = weight
