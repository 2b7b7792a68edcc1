"""A dropped part equals a zeroed output projection: in one pass, step by step, in generate, in padded batches."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import oracle
from conftest import shared_network, tiny_network
from prunelens import load
from prunelens.errors import PrunelensError
from prunelens.models.anatomy.find import Anatomy, find_anatomy
from prunelens.models.batches import pad_left
from prunelens.models.opening.loading import wrap
from prunelens.models.saving.export import export
from prunelens.models.surgery.drop import Drop, dropped, num_parameters

Parts = dict[str, list[int]]

# Which mixers, MLPs and blocks go: slices of the lists of those layers that have one.
PARTS: dict[str, dict[str, slice]] = {
    "first attention": {"attention": slice(1)},
    "second attention": {"attention": slice(1, 2)},
    "last attention and first mlp": {"attention": slice(-1, None), "mlp": slice(1)},
    "several": {"attention": slice(0, None, 2), "mlp": slice(1, None, 2)},
    "all attention": {"attention": slice(None)},
    "first block": {"blocks": slice(1)},
    "blocks and attention": {"blocks": slice(1, None, 2), "attention": slice(1)},
}
SETTINGS = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}


def parts_of(network: Any, name: str) -> Parts:
    layers = oracle.outline(network)
    lists = {
        "attention": [index for index, (mixes, _) in enumerate(layers) if mixes],
        "mlp": [index for index, (_, thinks) in enumerate(layers) if thinks],
        "blocks": list(range(len(layers))),
    }
    return {kind: lists[kind][chosen] for kind, chosen in PARTS[name].items()}


def as_drop(parts: Parts) -> Drop:
    return Drop(
        frozenset(parts.get("attention", ())), frozenset(parts.get("mlp", ())), frozenset(parts.get("blocks", ()))
    )


def step_by_step(network: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits of every position, one token at a time; the position is what the cache says."""
    cache = DynamicCache(config=network.config)
    steps = [network(ids[:, step : step + 1], cache=cache, use_cache=True).logits for step in range(ids.shape[1])]
    return torch.cat(steps, dim=1)


def run(network: Any, ids: torch.Tensor, padded: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """Logits and texts in every way a model is run here.

    A batch with left padding is begun in one pass, as generation does; a recurrent state cannot be padded step by step.
    """
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.inference_mode():
        return {
            "whole": network(ids, use_cache=False).logits,
            "steps": step_by_step(network, ids),
            "padded": network(padded, attention_mask=mask, position_ids=positions, use_cache=False).logits[mask.bool()],
            "texts": network.generate(padded, attention_mask=mask, **SETTINGS),
        }


@pytest.fixture(scope="module")
def anatomies() -> dict[str, Anatomy]:
    return {}


@pytest.mark.parametrize("name", PARTS)
def test_equals_zeroed_output_projections(any_family: str, name: str, anatomies: dict[str, Anatomy]) -> None:
    network = shared_network(any_family)
    if any_family not in anatomies:
        anatomies[any_family] = find_anatomy(network)
    parts = parts_of(network, name)
    ids = torch.randint(3, 97, (2, 6))
    padded, mask = pad_left([torch.randint(3, 97, (length,)).tolist() for length in (9, 4, 7)], 0, torch.device("cpu"))
    expected = run(oracle.zeroed(network, **parts), ids, padded, mask)
    with dropped(anatomies[any_family], as_drop(parts)):
        found = run(network, ids, padded, mask)
    for way in ("whole", "steps", "padded"):
        assert torch.allclose(found[way], expected[way], rtol=1e-5, atol=1e-5), way
    assert torch.allclose(found["steps"], found["whole"], rtol=1e-3, atol=1e-3)
    assert torch.equal(found["texts"], expected["texts"])


def test_everything_is_put_back(any_family: str) -> None:
    network = shared_network(any_family)
    anatomy = find_anatomy(network)
    ids = torch.randint(3, 97, (2, 8))
    mlps = [block.layer_idx for block in anatomy.blocks if block.find("mlp")]
    with torch.inference_mode():
        before = network(ids).logits
        with dropped(anatomy, Drop(attention=frozenset([0]))):
            once = network(ids).logits
            assert not torch.allclose(once, before)
            with dropped(anatomy, Drop(attention=frozenset([0]), mlp=frozenset(mlps[:1]), block=frozenset([3]))):
                assert not torch.allclose(network(ids).logits, once)
            assert torch.equal(network(ids).logits, once)
        with pytest.raises(TypeError), dropped(anatomy, Drop(block=frozenset([0]))):
            network(ids, input_ids=ids)
        assert torch.equal(network(ids).logits, before)
    assert all("forward" not in module.__dict__ for module in network.modules())


def size(*modules: Any) -> int:
    return sum(weight.numel() for module in modules for weight in module.parameters())


def test_num_parameters_counts_what_is_read() -> None:
    network = shared_network("llama")
    anatomy = find_anatomy(network)
    layer, total = network.model.layers[0], size(network)
    assert num_parameters(network, anatomy) == total
    attention = num_parameters(network, anatomy, Drop(attention=frozenset([0])))
    assert attention == total - size(layer.self_attn, layer.input_layernorm)
    assert num_parameters(network, anatomy, Drop(block=frozenset([0]))) == total - size(layer)
    both = Drop(attention=frozenset([0]), mlp=frozenset([0]))
    assert num_parameters(network, anatomy, both) == total - size(layer)


def test_num_parameters_of_a_mlp_that_is_no_module() -> None:
    network = shared_network("opt")
    anatomy = find_anatomy(network)
    layer = network.model.decoder.layers[2]
    gone = size(layer.fc1, layer.fc2, layer.final_layer_norm)
    assert num_parameters(network, anatomy, Drop(mlp=frozenset([2]))) == size(network) - gone
    assert num_parameters(network, anatomy, Drop(block=frozenset([2]))) == size(network) - size(layer)


def test_a_shared_norm_stays() -> None:
    network = shared_network("phi")
    anatomy = find_anatomy(network)
    layer = network.model.layers[1]
    left = num_parameters(network, anatomy, Drop(attention=frozenset([1])))
    assert left == size(network) - size(layer.self_attn)


def sharing() -> Any:
    """A tiny llama in which the MLPs of layers 1 and 2, each a module of its own, have the same weights."""
    network = tiny_network("llama")
    first, second = (network.model.layers[layer_idx].mlp for layer_idx in (1, 2))
    for name in ("gate_proj", "up_proj", "down_proj"):
        getattr(second, name).weight = getattr(first, name).weight
    return network


def test_weights_that_another_layer_shares_stay() -> None:
    network = sharing()
    anatomy, layer = find_anatomy(network), network.model.layers[1]
    total, norm = size(network), 32
    assert total == size(shared_network("llama")) - size(layer.mlp)
    assert num_parameters(network, anatomy) == total
    assert num_parameters(network, anatomy, Drop(mlp=frozenset([1]))) == total - norm
    assert num_parameters(network, anatomy, Drop(block=frozenset([2]))) == total - size(layer) + size(layer.mlp)
    both = Drop(mlp=frozenset([1, 2]))
    assert num_parameters(network, anatomy, both) == total - 2 * norm - size(layer.mlp)
    assert num_parameters(network, anatomy, both | Drop(block=frozenset([1]))) == total - size(layer) - norm


def test_a_checkpoint_of_shared_weights_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRUNELENS_CACHE", str(tmp_path / "cache"))
    model = wrap(sharing())
    for drop in (Drop(), Drop(mlp=frozenset([1])), Drop(attention=frozenset([3]))):
        before = list(tmp_path.rglob("*"))
        with pytest.raises(PrunelensError, match="cannot be written as safetensors"):
            export(model, tmp_path / "out", drop)
        assert list(tmp_path.rglob("*")) == before
    for layer_idx in (1, 2):  # one of the two is left
        drop = Drop(block=frozenset([layer_idx]))
        export(model, tmp_path / "out", drop)
        found = load(tmp_path / "out")
        assert num_parameters(found.network, found.anatomy) == num_parameters(model.network, model.anatomy, drop)


@pytest.mark.parametrize("family", ["llama", "opt", "mixtral", "mamba"])
def test_what_is_dropped_is_not_computed(family: str) -> None:
    """The matrices of a dropped sublayer may hold anything."""
    network = tiny_network(family)
    anatomy = find_anatomy(network)
    ids = torch.randint(3, 97, (1, 8))
    drop = Drop(attention=frozenset([1]), mlp=frozenset([2] if anatomy.blocks[2].find("mlp") else []))
    with torch.inference_mode(), dropped(anatomy, drop):
        expected = network(ids).logits
        for block in anatomy.blocks:
            for part in block.sublayers:
                if part.layer_idx in getattr(drop, part.kind):
                    for weight in (weight for module in part.body for weight in module.parameters()):
                        weight.fill_(torch.nan)
        assert torch.equal(network(ids).logits, expected)


def test_a_dtype_that_a_family_cannot_compute_in_is_refused() -> None:
    with pytest.raises(PrunelensError, match=r"MixtralForCausalLM .*float64.*another dtype"):
        find_anatomy(tiny_network("mixtral", torch.float64))
