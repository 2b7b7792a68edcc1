"""Whole models made sparse block by block, against an oracle that runs the whole network for every block."""

from typing import Any

import pytest
import torch

import mask_oracle
from conftest import shared_network, tiny_network
from prunelens.errors import PrunelensError
from prunelens.models.model import Model
from prunelens.models.opening.loading import wrap
from prunelens.models.surgery.drop import Drop
from prunelens.models.surgery.shared_copy import shared_copy_of
from prunelens.pruning.sequential import Masked, mask_weights
from prunelens.pruning.steps.mask import MaskStep

SPARSITIES: dict[str, mask_oracle.Pattern] = {"0.5": 0.5, "2:4": (2, 4)}


def some_sequences(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, 97, (length,), generator=generator).tolist() for length in lengths]


def masked(
    network: Any, method: str, sparsity: str, sequences: list[list[int]] | None = None, **options: Any
) -> tuple[Model, Masked]:
    twin = shared_copy_of(wrap(network))
    texts = some_sequences(12, 9, 12, 20) if sequences is None else sequences
    return twin, mask_weights(twin, method, MaskStep(method=method, sparsity=sparsity).pattern, texts, **options)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "mixtral"])
@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_equals_the_slow_oracle(family: str, sparsity: str, method: str) -> None:
    network = tiny_network(family)
    before = {name: weight.clone() for name, weight in network.state_dict().items()}
    expected = mask_oracle.sequential(network, some_sequences(12, 9, 12, 20), method, SPARSITIES[sparsity])
    twin, _ = masked(network, method, sparsity)
    own = twin.network.state_dict()
    for name, weight in expected.state_dict().items():
        assert torch.equal(own[name] == 0, weight == 0), name
        if method != "sparsegpt":
            assert torch.equal(own[name], weight), name
        assert torch.allclose(own[name], weight, rtol=0, atol=1e-4), name
    assert all(torch.equal(before[name], weight) for name, weight in network.state_dict().items())


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_every_matrix_of_every_family_is_seen(any_family: str, method: str) -> None:
    network = shared_network(any_family)
    twin, found = masked(network, method, "1:2", some_sequences(24, 24, 24, 24, 24, 24, 11))
    assert not found.left_dense
    assert all("experts" in name or "input_linear" in name or "output_linear" in name for name in found.without_tokens)
    for block in twin.anatomy.blocks:
        for module in block.module.modules():
            if isinstance(module, torch.nn.Linear):
                assert (module.weight.unflatten(1, (-1, 2)) == 0).any(dim=-1).all()
    linear = sum(
        module.weight.numel()
        for block in twin.anatomy.blocks
        for module in block.module.modules()
        if isinstance(module, torch.nn.Linear)
    )
    assert found.total >= linear
    assert found.zeros == found.total // 2
    assert torch.isfinite(twin.network(torch.tensor(some_sequences(8))).logits).all()


def test_only_what_is_masked_is_replaced() -> None:
    network = tiny_network("llama")
    twin, _ = masked(network, "wanda", "0.5")
    own = dict(network.named_parameters())
    for name, weight in twin.network.named_parameters():
        assert (weight is own[name]) == (not name.endswith("proj.weight"))


def test_sizes_of_batches_do_not_matter() -> None:
    network = tiny_network("llama")
    wide, narrow = (masked(network, "sparsegpt", "0.5", batch_tokens=size)[0] for size in (10_000, 1))
    for name, weight in wide.network.state_dict().items():
        assert torch.allclose(weight, narrow.network.state_dict()[name], atol=1e-5), name


def test_what_is_dropped_is_neither_read_nor_masked() -> None:
    network = tiny_network("llama")
    drop = Drop(attention=frozenset([1]), mlp=frozenset([2]), block=frozenset([0]))
    twin, found = masked(network, "wanda", "0.5", drop=drop)
    own = dict(network.named_parameters())
    for name, weight in twin.network.named_parameters():
        gone = any(part in name for part in ("layers.0.", "layers.1.self_attn", "layers.2.mlp"))
        assert (weight is own[name]) == (gone or not name.endswith("proj.weight")), name
    assert not found.without_tokens
    zeroed = mask_oracle.sequential(network, some_sequences(12, 9, 12, 20), "wanda", 0.5)
    name = "model.layers.3.mlp.up_proj.weight"
    assert not torch.equal(twin.network.state_dict()[name] == 0, zeroed.state_dict()[name] == 0)


def test_an_expert_without_tokens_falls_back_to_magnitude() -> None:
    network = tiny_network("mixtral")
    twin, found = masked(network, "wanda", "0.5", [[5]])
    assert len(found.without_tokens) == 4 * 2 * 2  # two of four experts read the token, both matrices, four layers
    assert "read no calibration token" in found.notes[0]
    name = found.without_tokens[0].removesuffix("]").rsplit("[", 1)
    weight = dict(network.named_parameters())[name[0]][int(name[1])]
    own = twin.network.state_dict()[name[0]][int(name[1])]
    assert torch.equal(own == 0, torch.from_numpy(mask_oracle.magnitude_mask(weight.numpy(), 0.5)))


def test_matrices_that_cannot_be_grouped_stay_dense() -> None:
    twin, found = masked(tiny_network("mamba"), "wanda", "2:4")
    assert [name.split(".")[-2] for name in found.left_dense] == ["dt_proj"] * 4
    assert "stayed dense" in found.notes[0]
    assert twin.network.backbone.layers[0].mixer.dt_proj.weight.all()


def test_no_calibration_tokens_are_refused() -> None:
    with pytest.raises(PrunelensError, match="at least one token"):
        masked(tiny_network("llama"), "wanda", "0.5", [])
