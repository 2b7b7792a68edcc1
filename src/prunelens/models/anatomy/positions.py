"""Positions whose numbers change with the length of the text: found by asking the modules that make them.

A rotary embedding may choose its frequencies by the largest position of a pass (LongRoPE, dynamic NTK), and keep
them for the next pass. Such a module is made to forget before each pass, so that a text is read as a fresh model
would read it, whatever came before.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunelens.models.anatomy.hooks import Call

FAR = 4  # times the context length: where factors for longer texts have been chosen, if a family knows any
UNKNOWN_CONTEXT = 8192
LIMITS = ("max_position_embeddings", "max_seq_len", "max_target_positions")


def longest_text(config: Any) -> int | None:
    """Tokens that a text may have by a configuration, that of the part that writes first; None where none is named."""
    holders = (config.get_text_config(decoder=True), config)
    found = (getattr(holder, name, None) for holder in holders for name in LIMITS)
    return next((length for length in found if length is not None), None)


@dataclass(frozen=True)
class Placing:
    """A module without weights that turned positions into something, and how it was called."""

    module: nn.Module
    call: Call
    place: int | str

    def at(self, positions: Tensor) -> list[Tensor]:
        """What it makes of positions, (…, T), each tensor it returns."""
        arguments = self.call.arguments | {self.place: positions}
        args = [arguments[place] for place in range(len(self.call.args))]
        kwargs = {name: arguments[name] for name in self.call.kwargs}
        found = self.module(*args, **kwargs)
        return [one.clone() for one in (found if isinstance(found, tuple | list) else [found])]


@contextmanager
def watched_positions(decoder: nn.Module) -> Iterator[list[Placing]]:
    """Collect the runs of modules that are given 0, 1, 2, … while the body runs the decoder on one text."""
    found: list[Placing] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        call = Call(args, kwargs, output)
        place = next((place for place, value in call.arguments.items() if _counts(value)), None)
        if place is not None and _is_tensors(output):
            found.append(Placing(module, call, place))

    makers = [module for module in decoder.modules() if next(module.parameters(), None) is None]
    handles = [module.register_forward_hook(note, with_kwargs=True) for module in makers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def longest_alike(placings: Sequence[Placing], context_length: int | None) -> int | None:
    """Tokens up to which no position depends on the length of the text; None if none ever does.

    The modules that do depend on it forget the lengths they have seen before each pass from now on.
    """
    limits = []
    for placing in placings:
        limit = _limit(placing, context_length)
        if limit is not None:
            limits.append(limit)
            placing.module.register_forward_pre_hook(_forgetting(placing.place), with_kwargs=True)
    return min(limits, default=None)


def _limit(placing: Placing, context_length: int | None) -> int | None:
    near = placing.call.arguments[placing.place]
    expected = placing.at(near)

    def alike(length: int) -> bool:
        placing.at(torch.zeros_like(near))
        found = placing.at(torch.cat([near, near[..., :1] + length - 1], dim=-1))
        return all(map(_begins_with, found, expected))

    longest = FAR * (context_length or UNKNOWN_CONTEXT)
    try:
        if alike(longest):
            return None
    except (RuntimeError, IndexError):  # a table of positions that ends
        return None
    known, unlike = near.shape[-1], longest
    while unlike - known > 1:
        middle = (known + unlike) // 2
        known, unlike = (middle, unlike) if alike(middle) else (known, middle)
    return known


def _begins_with(longer: Tensor, shorter: Tensor) -> bool:
    """Whether a tensor holds another, followed by one position more."""
    for dim, (size, expected) in enumerate(zip(longer.shape, shorter.shape, strict=True)):
        if size == expected + 1:
            longer = longer.narrow(dim, 0, expected)
    return longer.shape == shorter.shape and torch.allclose(longer, shorter, rtol=0, atol=1e-6)


def _forgetting(place: int | str) -> Callable[..., None]:
    busy = False

    def forget(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal busy
        positions = Call(args, kwargs, None).arguments.get(place)
        if busy or positions is None:
            return
        busy = True
        try:
            first = torch.zeros_like(positions)
            module(
                *(first if value is positions else value for value in args),
                **{name: first if value is positions else value for name, value in kwargs.items()},
            )
        finally:
            busy = False

    return forget


def _counts(value: Any) -> bool:
    """Whether a value is 0, 1, 2, … along its last dimension."""
    if not isinstance(value, Tensor) or value.is_floating_point() or value.ndim == 0 or value.shape[-1] < 2:
        return False
    return bool((value == torch.arange(value.shape[-1], device=value.device)).all())


def _is_tensors(value: Any) -> bool:
    values = value if isinstance(value, tuple | list) else [value]
    return bool(values) and all(isinstance(one, Tensor) for one in values)
