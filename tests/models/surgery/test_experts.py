"""Experts out of the choice are as good as experts that are not there, in memory and on disk."""

import copy
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM

from conftest import ALL_FAMILIES, VOCAB_SIZE
from prunelens.errors import PrunelensError
from prunelens.models.model import Model
from prunelens.models.opening.loading import wrap
from prunelens.models.surgery.experts import mask_experts, num_dropped_parameters, sliced_experts
from prunelens.models.surgery.mixtures import find_mixtures
from prunelens.models.surgery.shared_copy import set_weight, shared_copy_of

EIGHT = {
    "mixtral": {"num_local_experts": 8},
    "qwen3_moe": {"num_experts": 8},
    "olmoe": {"num_experts": 8},
    "qwen3_next": {"num_experts": 8},
    "deepseek_v3": {"n_routed_experts": 8},
    "granitemoe": {"num_local_experts": 8},
    "gpt_oss": {"num_local_experts": 8},
    "lfm2_moe": {"num_experts": 8},
    "nemotron_h": {"n_routed_experts": 8},
    "jamba": {"num_experts": 8},
}
LAYERS = {
    "qwen3_moe": [0, 2, 3],
    "deepseek_v3": [1, 2, 3],
    "lfm2_moe": [1, 2, 3],
    "nemotron_h": [1],
    "jamba": [1, 3],
}


def eight_experts(family: str) -> Model:
    """A tiny model with eight experts a mixture and correction biases that matter."""
    kind, values = ALL_FAMILIES[family]
    return opened(kind(**values | EIGHT[family]), family)


def opened(config: transformers.PreTrainedConfig, name: str) -> Model:
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(config).eval()
    for weight in network.parameters():
        if weight.ndim > 1 or not weight.data.any():
            weight.data.normal_(0, 0.2)
    for part, buffer in network.named_buffers():
        if part.endswith("bias"):
            buffer.normal_(0, 0.3)
    return wrap(network, name=f"tiny-{name}")


def some_dropped(model: Model) -> dict[int, list[int]]:
    """Two of the eight, one in each half, others in each layer."""
    return {layer_idx: [layer_idx % 4, 4 + (layer_idx + 1) % 4] for layer_idx in find_mixtures(model)}


@torch.inference_mode()
def logits_of(network: torch.nn.Module) -> Tensor:
    ids = torch.randint(3, VOCAB_SIZE, (2, 12), generator=torch.Generator().manual_seed(5))
    return network(input_ids=ids).logits


def smaller(model: Model, dropped: dict[int, list[int]]) -> torch.nn.Module:
    config, state = copy.deepcopy(model.network.config), dict(model.network.state_dict())
    sliced_experts(model, config, state, dropped)
    network = AutoModelForCausalLM.from_config(config).eval()
    network.load_state_dict(state, strict=True)
    return network


@pytest.mark.parametrize("family", EIGHT)
def test_masked_equals_sliced(family: str, tmp_path: Path) -> None:
    model = eight_experts(family)
    before = {name: tensor.clone() for name, tensor in model.network.state_dict().items()}
    dense = logits_of(model.network)
    dropped = some_dropped(model)
    assert list(dropped) == LAYERS.get(family, [0, 1, 2, 3])
    twin = shared_copy_of(model)
    mask_experts(twin, dropped)
    masked = logits_of(twin.network)
    sliced = smaller(model, dropped)
    torch.testing.assert_close(masked, logits_of(sliced), rtol=1e-5, atol=1e-5)
    assert (masked - dense).abs().max() > 0.05
    assert torch.equal(logits_of(model.network), dense)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.network.state_dict().items())

    saved = sum(p.numel() for p in model.network.parameters()) - sum(p.numel() for p in sliced.parameters())
    assert num_dropped_parameters(model, dropped) == saved > 0

    sliced.save_pretrained(tmp_path)
    again, found = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(logits_of(again.eval()), masked, rtol=1e-5, atol=1e-5)


def test_the_chosen_experts_are_among_those_left_and_their_weights_sum_to_one() -> None:
    twin = shared_copy_of(eight_experts("mixtral"))
    mask_experts(twin, {0: [0, 1, 2, 5, 7]})
    router = find_mixtures(twin)[0].router
    with torch.inference_mode():
        rows, weights, index = router(torch.randn(50, 32))
    assert set(index.flatten().tolist()) == {3, 4, 6}
    assert rows.shape == (50, 8)
    assert torch.isinf(rows[:, [0, 1, 2, 5, 7]]).all()
    assert torch.isfinite(rows[:, [3, 4, 6]]).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(50))
    torch.testing.assert_close(weights, torch.softmax(rows, -1).gather(1, index) / weights_sum(rows, index))


def weights_sum(rows: Tensor, index: Tensor) -> Tensor:
    return torch.softmax(rows, -1).gather(1, index).sum(-1, keepdim=True)


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_moe"])
def test_a_masked_model_has_twins_and_takes_new_weights(family: str) -> None:
    model = eight_experts(family)
    dropped = some_dropped(model)
    twin = shared_copy_of(model)
    mask_experts(twin, dropped)
    masked = logits_of(twin.network)
    second = shared_copy_of(twin)
    for mixture in find_mixtures(second).values():
        set_weight(mixture.router, "weight", -mixture.router.weight)
    assert torch.equal(logits_of(twin.network), masked)
    assert (logits_of(second.network) - masked).abs().max() > 0.05
    torch.testing.assert_close(logits_of(second.network), logits_of(smaller(second, dropped)), rtol=1e-5, atol=1e-5)


def test_a_second_mask_replaces_the_first() -> None:
    model = eight_experts("mixtral")
    twice, once = shared_copy_of(model), shared_copy_of(model)
    mask_experts(twice, {1: [0, 1]})
    mask_experts(twice, {1: [6]})
    mask_experts(once, {1: [6]})
    assert torch.equal(logits_of(twice.network), logits_of(once.network))


def test_parameters_by_hand() -> None:
    model = eight_experts("gpt_oss")
    one = (32 * 96 + 96) + (48 * 32 + 32) + (32 + 1)  # gate and up, down, and a row of the router
    assert num_dropped_parameters(model, {0: [1, 2], 3: [4]}) == 3 * one


@pytest.mark.parametrize(
    ("family", "dropped", "message"),
    [
        ("qwen3_moe", {1: [0]}, r"expected a layer of .* with a mixture of experts \(\[0, 2, 3\]\), found 1"),
        ("mixtral", {0: [8]}, "expected experts from 0 to 7 in layer 0, found 8"),
        ("mixtral", {0: range(7)}, "expected at least 2 experts left in layer 0, .* found 1"),
        ("gpt_oss", {2: range(5)}, "expected at least 4 experts left in layer 2, .* found 3"),
        ("deepseek_v3", {1: [0, 1]}, "equally many experts left in each of the 2 groups of layer 1, found from 2 to 4"),
        (
            "deepseek_v3",
            {1: [0, 1, 2, 4, 5, 6]},
            "expected at least 4 experts left in layer 1, .* in 2 groups, found 2",
        ),
    ],
)
def test_what_routers_cannot_do_is_refused(family: str, dropped: dict[int, list[int]], message: str) -> None:
    model = eight_experts(family)
    for act in (mask_experts, num_dropped_parameters):
        with pytest.raises(PrunelensError, match=message):
            act(shared_copy_of(model), dropped)
    with pytest.raises(PrunelensError, match=message):
        sliced_experts(model, copy.deepcopy(model.network.config), model.network.state_dict(), dropped)


@pytest.mark.parametrize("dropped", [{0: [1], 1: [1]}, {0: [1], 1: [1], 2: [1], 3: [1, 2]}])
def test_a_checkpoint_needs_one_number_of_experts(dropped: dict[int, list[int]]) -> None:
    model = eight_experts("mixtral")
    with pytest.raises(PrunelensError, match=r"equally many experts left in every layer.*\(family mixtral\).*found \["):
        sliced_experts(model, copy.deepcopy(model.network.config), model.network.state_dict(), dropped)


def test_a_configuration_without_the_number_is_refused() -> None:
    model = eight_experts("mixtral")
    config = copy.deepcopy(model.network.config)
    config.num_local_experts = 5
    with pytest.raises(PrunelensError, match="does not say in one number that there are 8 experts"):
        sliced_experts(model, config, model.network.state_dict(), {layer_idx: [0] for layer_idx in range(4)})
