"""The pruning oracle against cases worked out by hand, closed forms and whole tiny networks."""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal

import mask_oracle
from conftest import tiny_network
from mask_oracle import METHODS, Array, Pattern

IDS = [[1, 5, 9, 33, 60, 7, 4, 80], [4, 96, 11, 18, 23], [70, 3, 44, 44, 52, 8, 13, 90, 61, 29]]


def mask(*rows: str) -> Array:
    """`x` is zeroed, `.` stays."""
    return np.array([[letter == "x" for letter in row] for row in rows])


# ------------------------------------------------------------------------------------ masks by hand


def test_magnitude_masks_the_threshold_and_all_that_equal_it() -> None:
    weight = np.array([[4.0, -1.0, 2.0], [-3.0, 2.0, 0.5]])
    # sorted: 0.5 1 2 2 3 4
    assert_array_equal(mask_oracle.magnitude_mask(weight, 0.1), mask("...", "..x"))  # int(0.6) = 0
    assert_array_equal(mask_oracle.magnitude_mask(weight, 0.2), mask(".x.", "..x"))  # int(1.2) = 1
    assert_array_equal(mask_oracle.magnitude_mask(weight, 0.34), mask(".xx", ".xx"))  # int(2.04) = 2: both twos
    assert_array_equal(mask_oracle.magnitude_mask(weight, 0.5), mask(".xx", ".xx"))
    assert_array_equal(mask_oracle.magnitude_mask(weight, 0.9), mask("xxx", "xxx"))  # int(5.4) = 5: all


def test_wanda_weighs_columns_by_the_norm_of_their_inputs_and_counts_by_row() -> None:
    weight = np.array([[1.0, -2.0, 3.0, 4.0], [-9.0, 1.0, 1.0, 1.0]])
    inputs = np.array([[6.0, 3.0, 0.0, 1.0], [-8.0, 0.0, 0.0, 0.0]])
    # norms: 10 3 0 1; metric: 10 6 0 4 and 90 3 0 1
    assert_array_equal(mask_oracle.wanda_metric(weight, inputs), [[10, 6, 0, 4], [90, 3, 0, 1]])
    assert_array_equal(mask_oracle.wanda_mask(weight, inputs, 0.5), mask("..xx", "..xx"))
    assert_array_equal(mask_oracle.wanda_mask(weight, inputs, 0.9), mask(".xxx", ".xxx"))
    assert_array_equal(mask_oracle.wanda_mask(weight, inputs, 0.24), mask("....", "...."))


def test_wanda_masks_the_first_of_equal_ones() -> None:
    weight = np.array([[5.0, -1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    assert_array_equal(mask_oracle.wanda_mask(weight, np.ones((3, 4)), 0.5), mask(".xx.", "xx.."))


def test_wanda_is_float32() -> None:
    weight = np.array([[1.0 + 1e-12, 1.0]])
    assert mask_oracle.wanda_metric(weight, np.ones((1, 2))).dtype == np.float32
    assert_array_equal(mask_oracle.wanda_mask(weight, np.ones((1, 2)), 0.5), mask("x."))  # equal in float32


def test_n_m_in_each_group_the_first_of_the_smallest() -> None:
    metric = np.array([[4.0, 3.0, 2.0, 1.0, 9.0, 9.0, 9.0, 9.0], [1.0, 5.0, 1.0, 1.0, 0.0, 7.0, 0.0, 3.0]])
    assert_array_equal(mask_oracle.n_m_mask(metric, 2, 4), mask("..xxxx..", "x.x.x.x."))
    assert_array_equal(mask_oracle.n_m_mask(metric, 1, 2), mask(".x.xx.x.", "x.x.x.x."))
    with pytest.raises(ValueError, match="multiple of m"):
        mask_oracle.n_m_mask(metric, 2, 3)


# ------------------------------------------------------------------------------------------ SparseGPT

PAIR = [np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([[1.0, 1.0]])]  # sum x x^T = [[2, 1], [1, 2]], two sequences


def test_sparsegpt_two_columns_by_hand() -> None:
    assert_array_equal(mask_oracle.hessian(PAIR), [[2, 1], [1, 2]])
    # damped: 2.02 on the diagonal. Without w_0, the best w_1 is w_1 + w_0 * 1 / 2.02.
    assert_allclose(mask_oracle.sparsegpt(np.array([[1.0, 3.0]]), PAIR, 0.4), [[0.0, 3.0 + 1.0 / 2.02]], rtol=1e-12)
    # Column 1 comes after column 0, which is fixed by then: nothing makes up for it.
    assert_allclose(mask_oracle.sparsegpt(np.array([[3.0, 1.0]]), PAIR, 0.4), [[3.0, 0.0]], rtol=1e-12)
    # Metric of column 0: w^2 * (2.02 - 1 / 2.02) = 1.525 w^2; of column 1: 2.02 w^2. So 1.1 in column 0 goes first.
    assert_allclose(mask_oracle.sparsegpt(np.array([[1.1, 1.0]]), PAIR, 0.4), [[0.0, 1.0 + 1.1 / 2.02]], rtol=1e-12)
    assert_allclose(mask_oracle.sparsegpt(np.array([[1.2, 1.0]]), PAIR, (1, 2)), [[1.2, 0.0]], rtol=1e-12)


def test_sparsegpt_without_correlation_is_wanda_by_one_threshold() -> None:
    sequences = [np.diag([1.0, 2.0, 3.0, 4.0])]
    weight = np.array([[12.0, 5.0, 1.0, 1.0], [1.0, 1.0, 5.0, -6.0]])
    # (|w| |x|)^2, nearly: 12 10 3 4 and 1 2 15 24
    expected = np.array([[12.0, 5.0, 0.0, 0.0], [0.0, 0.0, 5.0, -6.0]])
    assert_array_equal(mask_oracle.sparsegpt(weight, sequences, 0.375), expected)
    assert_array_equal(mask_oracle.sparsegpt(weight, sequences, (2, 4)), expected)


def test_sparsegpt_dead_columns_are_zeroed_and_touch_nothing() -> None:
    sequences = [np.array([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]), np.array([[1.0, 0.0, 1.0]])]
    # H_11 = 1, so the mean of the diagonal is 5/3. The threshold is the dead column's own metric, 0.
    assert_array_equal(mask_oracle.sparsegpt(np.array([[1.0, 99.0, 3.0]]), sequences, 0.3), [[1.0, 0.0, 3.0]])
    expected = [[0.0, 0.0, 3.0 + 1.0 / (2.0 + 0.01 * 5.0 / 3.0)]]
    assert_allclose(mask_oracle.sparsegpt(np.array([[1.0, 99.0, 3.0]]), sequences, 0.4), expected, rtol=1e-12)


def by_inverses(weight: Array, sequences: Sequence[Array], pattern: Pattern) -> Array:
    """SparseGPT without a factorisation: a fresh inverse of the columns not yet fixed, at every column.

    What column j loses is spread at once on all columns after it, in and behind the block, with the
    first row of the inverse of the damped H of the columns from j on.
    """
    W = np.array(weight)
    columns = W.shape[1]
    tokens = np.concatenate(list(sequences))
    H = 2.0 / len(sequences) * tokens.T @ tokens
    H += 0.01 * np.trace(H) / columns * np.eye(columns)
    inverses = [np.linalg.inv(H[j:, j:]) for j in range(columns)]
    corner = np.array([inverse[0, 0] for inverse in inverses])
    zeroed = np.zeros(W.shape, dtype=bool)
    for j in range(columns):
        if isinstance(pattern, float) and j % 128 == 0:
            metric = W[:, j : j + 128] ** 2 / corner[j : j + 128]
            zeroed[:, j : j + 128] = metric <= np.sort(metric, axis=None)[int(metric.size * pattern)]
        if isinstance(pattern, tuple) and j % pattern[1] == 0:
            metric = W[:, j : j + pattern[1]] ** 2 / corner[j : j + pattern[1]]
            order = np.argsort(metric, axis=1, kind="stable")[:, : pattern[0]]
            np.put_along_axis(zeroed[:, j : j + pattern[1]], order, True, axis=1)
        lost = np.where(zeroed[:, j], W[:, j], 0.0)
        W[:, j:] -= np.outer(lost, inverses[j][0] / corner[j])
        W[zeroed[:, j], j] = 0.0
    return W


@pytest.mark.parametrize("pattern", [0.5, 0.3, (2, 4), (4, 8)])
def test_sparsegpt_over_three_blocks_is_the_optimal_brain_surgeon(pattern: Pattern) -> None:
    rng = np.random.default_rng(3)
    weight, mixing = rng.normal(size=(5, 272)), rng.normal(size=(272, 272)) / 16 + np.eye(272)
    sequences = [rng.normal(size=(tokens, 272)) @ mixing for tokens in (90, 120, 150)]
    new = mask_oracle.sparsegpt(weight, sequences, pattern)
    expected = by_inverses(weight, sequences, pattern)
    assert_array_equal(new == 0, expected == 0)
    assert_allclose(new, expected, rtol=1e-7, atol=1e-9)
    only_masked = np.where(new == 0, 0.0, weight)
    error = mask_oracle.reconstruction_error(weight, new, sequences)
    assert 0 < error < 0.8 * mask_oracle.reconstruction_error(weight, only_masked, sequences)


def test_sparsegpt_does_not_choose_with_a_group_that_crosses_a_block() -> None:
    with pytest.raises(ValueError, match="divide"):
        mask_oracle.sparsegpt(np.ones((1, 12)), [np.ones((1, 12))], (1, 12))


def test_reconstruction_error_by_hand() -> None:
    weight, new = np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([[0.0, 2.0], [3.0, 1.0]])
    sequences = [np.array([[1.0, 2.0], [3.0, 0.0]]), np.array([[0.0, 1.0]])]
    # (W - W') x: (1, 6), (3, 0), (0, 3)
    assert mask_oracle.reconstruction_error(weight, new, sequences) == 37.0 + 9.0 + 9.0


# ------------------------------------------------------------------------------------ whole networks


def shares(network: Any) -> list[dict[str, float]]:
    """The share of zeros of every parameter with two or more dimensions, block by block."""
    return [
        {name: float((weight == 0).double().mean()) for name, weight in layer.named_parameters() if weight.ndim > 1}
        for layer in mask_oracle.layers_of(network)
    ]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_sequential_prunes_all_but_routers_and_leaves_the_original(family: str, method: str) -> None:
    network = tiny_network(family)
    before = copy.deepcopy(network.state_dict())
    result = mask_oracle.sequential(network, IDS, method, (2, 4))
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    for layer in shares(result):
        assert layer == {name: 0.0 if name == "mlp.gate.weight" else 0.5 for name in layer}
    for name, value in result.state_dict().items():
        inside = any(part in name for part in (".h.", ".layers."))
        if not inside or name.endswith("bias") or "norm" in name or "ln_" in name:
            assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_sequential_wanda_reads_what_the_pruned_blocks_before_return(family: str) -> None:
    network = tiny_network(family)
    result = mask_oracle.sequential(network, IDS, "wanda", 0.5)
    for layer_idx, layer in enumerate(network.model.layers):
        hybrid = copy.deepcopy(network)
        for done in range(layer_idx):
            hybrid.model.layers[done].load_state_dict(result.model.layers[done].state_dict())
        inputs = []
        for ids in IDS:
            with torch.no_grad():
                states = hybrid(torch.tensor([ids]), use_cache=False, output_hidden_states=True).hidden_states
                inputs.append(layer.input_layernorm(states[layer_idx])[0].numpy())
        dense = layer.self_attn.q_proj.weight.detach()
        zeroed = torch.from_numpy(mask_oracle.wanda_mask(dense.numpy(), np.concatenate(inputs), 0.5))
        assert torch.equal(result.model.layers[layer_idx].self_attn.q_proj.weight, dense.masked_fill(zeroed, 0.0))


def test_gpt2_matrices_are_read_transposed() -> None:
    network = tiny_network("gpt2")
    result = mask_oracle.sequential(network, IDS, "wanda", 0.25)
    for layer in result.transformer.h:
        for module in (layer.attn.c_attn, layer.attn.c_proj, layer.mlp.c_fc, layer.mlp.c_proj):
            zeros = (module.weight == 0).sum(0)  # (inputs, outputs): the same number for every output
            assert torch.equal(zeros, torch.full_like(zeros, module.weight.shape[0] // 4))


def test_expert_inputs_make_up_what_the_experts_return() -> None:
    network = tiny_network("mixtral")
    layer = network.model.layers[2]
    seen: list[tuple[Any, Any]] = []
    handle = layer.mlp.experts.register_forward_hook(lambda _module, args, output: seen.append((args, output)))
    caught = mask_oracle.catch_inputs(network, IDS, 2)
    handle.remove()
    for sequence, ((hidden, indices, scores), output) in enumerate(seen):
        total = np.zeros(output.shape)
        for expert in range(4):
            tokens, places = np.nonzero(indices.numpy() == expert)
            assert_array_equal(caught[f"mlp.experts.gate_up_proj.{expert}"][sequence], hidden.numpy()[tokens])
            down = layer.mlp.experts.down_proj[expert].detach().numpy()
            returned = caught[f"mlp.experts.down_proj.{expert}"][sequence] @ down.T
            total[tokens] += scores.numpy()[tokens, places][:, None] * returned
        assert_allclose(total, output.numpy(), atol=1e-5)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_an_expert_without_tokens_is_pruned_by_magnitude(method: str) -> None:
    network = tiny_network("mixtral")
    indices: list[Any] = []
    gate = network.model.layers[0].mlp.gate
    handle = gate.register_forward_hook(lambda _module, _args, output: indices.append(output[2]))
    result = mask_oracle.sequential(network, [[5]], method, 0.5)
    network(torch.tensor([[5]]), use_cache=False)
    handle.remove()
    for expert in range(4):
        for kind in ("gate_up_proj", "down_proj"):
            dense, new = (getattr(one.model.layers[0].mlp.experts, kind)[expert].detach() for one in (network, result))
            zeroed = torch.from_numpy(mask_oracle.magnitude_mask(dense.numpy(), 0.5))
            assert torch.equal(new, dense.masked_fill(zeroed, 0.0)) == (expert not in indices[-1].tolist()[0])


def test_sequential_with_layers_without_experts() -> None:
    result = mask_oracle.sequential(tiny_network("qwen3_moe"), IDS, "wanda", (2, 4))
    assert "mlp.up_proj.weight" in shares(result)[1]
    assert all(share == 0.5 for layer in shares(result) for name, share in layer.items() if "mlp.gate." not in name)
