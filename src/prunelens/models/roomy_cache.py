"""A cache layer with room for the tokens to come, so that a step copies one token and not all before it."""

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


def make_room(cache: Any, length: int) -> None:
    """Let the plain layers of an empty cache hold `length` tokens; all others, and other caches, stay as they are."""
    if isinstance(cache, Cache):
        cache.layers = [_RoomyLayer(length) if type(layer) is DynamicLayer else layer for layer in cache.layers]


class _RoomyLayer(DynamicLayer):
    """Keys and values, each the first part of a larger tensor."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self._length = length
        self._rooms: dict[str, Tensor] = {}
        self._held: dict[str, Tensor] = {}

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add keys and values, (B, heads, tokens, size) each, and return all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        self.keys = self._add("keys", self.keys, key_states)
        self.values = self._add("values", self.values, value_states)
        return self.keys, self.values

    def _add(self, name: str, held: Tensor, new: Tensor) -> Tensor:
        start = held.shape[-2] if held.numel() else 0
        stop = start + new.shape[-2]
        if held is not self._held.get(name) or stop > self._rooms[name].shape[-2]:  # the rows have changed, or no room
            self._rooms[name] = new.new_empty(*new.shape[:-2], max(stop, self._length), new.shape[-1])
            if start:
                self._rooms[name][..., :start, :] = held
        self._rooms[name][..., start:stop, :] = new
        self._held[name] = self._rooms[name][..., :stop, :]
        return self._held[name]
