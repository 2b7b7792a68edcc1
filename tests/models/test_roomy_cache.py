"""A layer of the cache with room holds what transformers' growing one holds, and copies only what is new."""

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from conftest import shared_network
from prunelens.models.roomy_cache import _RoomyLayer, make_room


def new(tokens: int, rows: int = 2) -> torch.Tensor:
    return torch.randn(rows, 3, tokens, 4, generator=torch.Generator().manual_seed(tokens + rows))


def test_it_holds_what_a_growing_layer_holds() -> None:
    roomy, growing = _RoomyLayer(9), DynamicLayer()
    for tokens in (4, 1, 1, 2, 5, 1):  # beyond its room at the end
        for own, other in zip(
            roomy.update(new(tokens), -new(tokens)), growing.update(new(tokens), -new(tokens)), strict=True
        ):
            assert torch.equal(own, other)
        assert roomy.get_seq_length() == growing.get_seq_length()
        assert roomy.get_mask_sizes(1) == growing.get_mask_sizes(1)


def test_rows_leave_and_go_on() -> None:
    roomy, growing = _RoomyLayer(9), DynamicLayer()
    for layer in (roomy, growing):
        layer.update(new(4), -new(4))
        layer.reorder_cache(torch.tensor([1, 0, 1]))
        layer.update(new(1, rows=3), -new(1, rows=3))
        layer.crop(-2)
        layer.update(new(2, rows=3), -new(2, rows=3))
    assert torch.equal(roomy.keys, growing.keys)
    assert torch.equal(roomy.values, growing.values)


def test_a_step_copies_one_token() -> None:
    layer = _RoomyLayer(9)
    keys, values = layer.update(new(4), new(4))
    for _ in range(5):
        more_keys, more_values = layer.update(new(1), new(1))
        assert (more_keys.data_ptr(), more_values.data_ptr()) == (keys.data_ptr(), values.data_ptr())


def test_only_plain_layers_get_room() -> None:
    config = shared_network("llama").config
    cache = DynamicCache(config=config)
    cache.layers[1] = DynamicSlidingWindowLayer(sliding_window=4)
    make_room(cache, 9)
    kinds = [type(layer) for layer in cache.layers]
    assert kinds[0] is _RoomyLayer
    assert kinds[1] is DynamicSlidingWindowLayer
    make_room(None, 9)
