"""Bytes of weights, and whether two of them hold the same numbers."""

import copy

import torch
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from conftest import tiny_network
from prunelens.models.sizes import network_bytes, plain_tensors, same_numbers, tensor_bytes


def quantized(weight: torch.Tensor) -> torch.Tensor:
    module = torch.nn.Linear(*reversed(weight.shape), bias=False)
    module.weight = torch.nn.Parameter(weight.clone())
    quantize_(torch.nn.Sequential(module), Int8WeightOnlyConfig())
    return module.weight


def test_a_quantised_weight_is_what_it_is_put_together_from() -> None:
    weight = quantized(torch.randn(8, 32))
    inner = [tensor.numel() * tensor.itemsize for tensor in plain_tensors(weight)]
    assert len(inner) > 1
    assert 8 * 32 < tensor_bytes(weight) == sum(inner) < 8 * 32 * 4
    assert tensor_bytes(torch.zeros(8, 32, dtype=torch.bfloat16)) == 512


def test_tied_weights_count_once() -> None:
    network = tiny_network("llama")
    size = network_bytes(network)
    assert size == 4 * sum(weight.numel() for weight in network.parameters())
    network.lm_head.weight = network.model.embed_tokens.weight
    assert network_bytes(network) == size - 97 * 32 * 4


def test_the_same_numbers() -> None:
    one = torch.randn(8, 32)
    assert same_numbers(one, one.clone())
    assert not same_numbers(one, one + 1)
    assert not same_numbers(one, one[:4])
    assert not same_numbers(one, one.to("meta"))
    packed = quantized(one)
    assert same_numbers(packed, copy.deepcopy(packed))
    assert not same_numbers(packed, quantized(one + 1))
    assert not same_numbers(one, packed)
    assert not same_numbers(packed, one)
