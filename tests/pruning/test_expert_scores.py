"""REAP's score against plain loops over the weights, and the choice by hand."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import ALL_FAMILIES, VOCAB_SIZE, tiny_model
from prunelens.errors import PrunelensError
from prunelens.models.model import Model
from prunelens.models.surgery.mixtures import Mixture, find_mixtures
from prunelens.pruning.expert_scores import ExpertScores, choose_experts, score_experts

FAMILIES = ["mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "qwen3_next"]


def sequences() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, VOCAB_SIZE, (n,), generator=generator).tolist() for n in (7, 5, 7, 1, 5, 7)]


def silu(value: Tensor) -> Tensor:
    return value / (1 + torch.exp(-value))


def chosen_by_hand(family: str, router: Any, state: Tensor) -> dict[int, float]:
    """Experts and their weights for one token, in plain steps."""
    logits = [float(row.double() @ state) for row in router.weight]
    if family == "deepseek_v3":
        scores = [1 / (1 + math.exp(-logit)) for logit in logits]
        biased = [score + float(bias) for score, bias in zip(scores, router.e_score_correction_bias, strict=True)]
        best_group = max((0, 1), key=lambda group: biased[2 * group] + biased[2 * group + 1])
        experts = [2 * best_group, 2 * best_group + 1]  # groups of two, one group of two experts is chosen
        total = scores[experts[0]] + scores[experts[1]] + 1e-20
        return {expert: scores[expert] / total * router.routed_scaling_factor for expert in experts}
    exponentials = [math.exp(logit) for logit in logits]
    scores = [one / sum(exponentials) for one in exponentials]
    experts = sorted(range(len(scores)), key=lambda expert: -scores[expert])[: router.top_k]
    total = sum(scores[expert] for expert in experts) if getattr(router, "norm_topk_prob", True) else 1.0
    return {expert: scores[expert] / total for expert in experts}


def scores_by_hand(family: str, model: Model) -> dict[int, tuple[list[float], list[int]]]:
    """One sequence at a time, one token at a time, one expert at a time."""
    found = {}
    for layer_idx, layer in enumerate(model.layers):
        if not hasattr(layer.mlp, "experts"):
            continue
        states: list[Tensor] = []
        handle = layer.mlp.register_forward_pre_hook(lambda module, args, into=states: into.extend(args[0][0].double()))
        with torch.inference_mode():
            for sequence in sequences():
                model.network(input_ids=torch.tensor([sequence]))
        handle.remove()
        values: list[list[float]] = [[] for _ in layer.mlp.gate.weight]
        for state in states:
            for expert, weight in chosen_by_hand(family, layer.mlp.gate, state).items():
                gate, up = (layer.mlp.experts.gate_up_proj[expert].double() @ state).chunk(2)
                output = layer.mlp.experts.down_proj[expert].double() @ (silu(gate) * up)
                values[expert].append(weight * math.sqrt(sum(float(one) ** 2 for one in output)))
        found[layer_idx] = ([sum(one) / len(one) if one else 0.0 for one in values], [len(one) for one in values])
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_reaps(family: str) -> None:
    model = tiny_model(family)
    read: list[int] = []
    found = score_experts(model, sequences(), batch_tokens=14, advance=read.append)
    expected = scores_by_hand(family, model)
    assert list(found) == list(expected)
    for layer_idx, (scores, counts) in expected.items():
        assert found[layer_idx].counts.tolist() == counts
        assert found[layer_idx].scores.dtype == torch.float64
        assert found[layer_idx].scores.tolist() == pytest.approx(scores, rel=1e-4)
        assert sum(counts) == 2 * 32
    assert read == [14, 7, 10, 1]


def test_an_expert_that_saw_nothing_has_count_and_score_0() -> None:
    found = score_experts(tiny_model("mixtral"), [[5]])
    assert len(found) == 4
    for one in found.values():
        assert sorted(one.counts.tolist()) == [0, 0, 1, 1]
        assert (one.scores[one.counts == 0] == 0).all()
        assert (one.scores[one.counts == 1] > 0).all()


def test_scoring_leaves_no_hooks_and_needs_tokens() -> None:
    model = tiny_model("mixtral")
    score_experts(model, [[5, 6]])
    assert not any(module._forward_pre_hooks for module in model.network.modules())
    with pytest.raises(PrunelensError, match="expected calibration text with at least one token, found none"):
        score_experts(model, [[]])
    with pytest.raises(PrunelensError, match="expected a mixture of experts, found none"):
        score_experts(tiny_model("llama"), [[5, 6]])


def mixtures(num_experts: int, num_groups: int = 1, num_layers: int = 1) -> dict[int, Mixture]:
    nothing = torch.nn.Module()
    shape = {"num_experts": num_experts, "top_k": 2, "num_groups": num_groups, "min_kept": 2 * num_groups}
    return {
        layer_idx: Mixture(layer_idx, nothing, nothing, nothing, index_at=2, rows_at=(0,), **shape)
        for layer_idx in range(num_layers)
    }


def scored(*values: float) -> ExpertScores:
    return ExpertScores(torch.tensor(values, dtype=torch.float64), torch.ones(len(values), dtype=torch.int64))


def test_the_lowest_scores_go_and_among_equals_the_higher_index() -> None:
    found = {0: scored(3, 0, 1, 7, 1, 1, 9, 2), 1: scored(0, 0, 0, 0, 0, 0, 0, 0)}
    two_layers = mixtures(8, num_layers=2)
    assert choose_experts(two_layers, 0.25, found) == {0: (1, 5), 1: (6, 7)}
    assert choose_experts(two_layers, 0.49, found) == {0: (1, 4, 5), 1: (5, 6, 7)}
    assert choose_experts(two_layers, 0.75, found) == {0: (0, 1, 2, 4, 5, 7), 1: (2, 3, 4, 5, 6, 7)}


def test_every_group_loses_the_same_share() -> None:
    found = {0: scored(3, 0, 1, 7, 10, 11, 19, 12)}
    assert choose_experts(mixtures(8, 2), 0.25, found) == {0: (1, 4)}
    assert choose_experts(mixtures(8, 2), 0.5, found) == {0: (1, 2, 4, 5)}


def test_a_fraction_that_is_a_whole_number_of_experts_is_met() -> None:
    assert len(choose_experts(mixtures(100), 0.29, None)[0]) == 29


def test_random_choice_follows_its_seed_and_is_uniform() -> None:
    three_layers = mixtures(8, 2, num_layers=3)
    first = choose_experts(three_layers, 0.25, None, seed=1)
    assert first == choose_experts(three_layers, 0.25, None, seed=1)
    assert first != choose_experts(three_layers, 0.25, None, seed=2)
    times = [0] * 8
    for seed in range(400):
        low, high = choose_experts(mixtures(8, 2), 0.25, None, seed=seed)[0]
        assert low < 4 <= high
        times[low] += 1
        times[high] += 1
    assert all(60 < count < 140 for count in times)  # 100 expected, 8.7 standard deviation


@pytest.mark.parametrize(
    ("fraction", "num_groups", "message"),
    [
        (0.0, 1, "expected a fraction of experts to drop between 0 and 1, found 0.0"),
        (1.0, 1, "expected a fraction of experts to drop between 0 and 1, found 1.0"),
        (0.1, 1, "drops at least one expert, found 0.1 of the 8 in layer 0; ask for 0.125 or more"),
        (0.2, 2, "found 0.2 of the 4 in each group in layer 0; ask for 0.25 or more"),
        (0.9, 1, "expected at least 2 experts left in layer 0, whose router chooses 2 for each token, found 1"),
        (0.75, 2, "expected at least 4 experts left .* in 2 groups, found 2"),
    ],
)
def test_fractions_that_cannot_be_are_refused(fraction: float, num_groups: int, message: str) -> None:
    with pytest.raises(PrunelensError, match=message):
        choose_experts(mixtures(8, num_groups), fraction, None)


def test_chosen_experts_fit_a_model() -> None:
    kind, values = ALL_FAMILIES["mixtral"]
    assert kind(**values).num_local_experts == 4
    model = tiny_model("mixtral")
    chosen = choose_experts(find_mixtures(model), 0.5, score_experts(model, sequences()))
    assert {layer_idx: len(experts) for layer_idx, experts in chosen.items()} == dict.fromkeys(range(4), 2)
