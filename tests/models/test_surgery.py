"""A dropped part equals a zeroed output projection: in one pass, step by step, in generate, in padded batches."""

from typing import Any

import pytest
import torch

import oracle
from conftest import tiny_network
from prunelens.models.anatomy import find_anatomy
from prunelens.models.batches import pad_left
from prunelens.models.surgery import Drop, dropped, num_parameters

PARTS = {
    "first attention": {"attention": [0]},
    "middle attention": {"attention": [2]},
    "last attention": {"attention": [3]},
    "first mlp": {"mlp": [0]},
    "last mlp": {"mlp": [3]},
    "several": {"attention": [0, 2], "mlp": [1, 3]},
    "all attention": {"attention": [0, 1, 2, 3]},
    "first block": {"blocks": [0]},
    "last block": {"blocks": [3]},
    "blocks and attention": {"blocks": [1, 2], "attention": [0]},
}


def as_drop(parts: dict[str, list[int]]) -> Drop:
    return Drop(
        frozenset(parts.get("attention", ())), frozenset(parts.get("mlp", ())), frozenset(parts.get("blocks", ()))
    )


@pytest.fixture(params=PARTS)
def parts(request: pytest.FixtureRequest) -> dict[str, list[int]]:
    return PARTS[request.param]


def step_by_step(network: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Logits of every position, one token at a time with the cache."""
    cache = transformers_cache(network)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    logits = []
    for step in range(ids.shape[1]):
        output = network(
            input_ids=ids[:, step : step + 1],
            attention_mask=mask[:, : step + 1],
            position_ids=positions[:, step : step + 1],
            cache=cache,
            use_cache=True,
        )
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


def transformers_cache(network: Any) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=network.config)


def test_equals_zeroed_output_projections(family: str, parts: dict[str, list[int]]) -> None:
    network = tiny_network(family)
    zeroed = oracle.zeroed(network, **parts)
    anatomy = find_anatomy(network)
    prompts = [torch.randint(3, 97, (length,)).tolist() for length in (9, 4, 7)]
    ids, mask = pad_left(prompts, 0, torch.device("cpu"))
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with torch.inference_mode():
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        expected = zeroed(ids, attention_mask=mask, position_ids=positions).logits
        expected_steps = step_by_step(zeroed, ids, mask)
        expected_texts = zeroed.generate(ids, attention_mask=mask, **settings)
        with dropped(anatomy, as_drop(parts)):
            found = network(ids, attention_mask=mask, position_ids=positions).logits
            found_steps = step_by_step(network, ids, mask)
            found_texts = network.generate(ids, attention_mask=mask, **settings)
    real = mask.bool()
    assert torch.allclose(found[real], expected[real], rtol=1e-5, atol=1e-6)
    assert torch.allclose(found_steps[real], expected_steps[real], rtol=1e-5, atol=1e-6)
    assert torch.allclose(found_steps[real], found[real], rtol=1e-4, atol=1e-4)
    assert torch.equal(found_texts, expected_texts)


def test_everything_is_put_back(family: str) -> None:
    network = tiny_network(family)
    anatomy = find_anatomy(network)
    ids = torch.randint(3, 97, (2, 8))
    with torch.inference_mode():
        before = network(ids).logits
        with dropped(anatomy, Drop(attention=frozenset([0]))):
            once = network(ids).logits
            with dropped(anatomy, Drop(attention=frozenset([0, 1]), block=frozenset([3]))):
                assert not torch.allclose(network(ids).logits, once)
            assert torch.equal(network(ids).logits, once)
        with pytest.raises(TypeError), dropped(anatomy, Drop(mlp=frozenset([0]))):
            network(ids, no_such_argument=1, input_ids=ids)
        assert torch.equal(network(ids).logits, before)
    assert all("forward" not in module.__dict__ for module in network.modules())


def test_num_parameters_counts_what_is_read() -> None:
    network = tiny_network("llama")
    anatomy = find_anatomy(network)
    layer = network.model.layers[0]
    total = sum(weight.numel() for weight in network.parameters())

    def size(module: Any) -> int:
        return sum(weight.numel() for weight in module.parameters())

    assert num_parameters(network, anatomy) == total
    attention = num_parameters(network, anatomy, Drop(attention=frozenset([0])))
    assert attention == total - size(layer.self_attn) - size(layer.input_layernorm)
    assert num_parameters(network, anatomy, Drop(block=frozenset([0]))) == total - size(layer)
    both = Drop(attention=frozenset([0]), mlp=frozenset([0]))
    assert num_parameters(network, anatomy, both) == total - size(layer)
