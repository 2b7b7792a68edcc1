"""Redundancy scores against the oracle, and recipes turned into parts."""

import pytest
import torch

import oracle
from conftest import tiny_model
from prunelens.errors import PrunelensError
from prunelens.models.surgery.drop import Drop
from prunelens.pruning.apply import apply
from prunelens.pruning.recipe import parse_recipe
from prunelens.pruning.redundancy import Ranking, rank_redundancy

SEQUENCES = [[5, 9, 33, 71, 8], [4, 90], [17, 3, 3, 60, 61, 62, 88, 12], [20]]


@pytest.mark.parametrize("batch_tokens", [1, 12, 1000])
def test_scores_equal_oracle(family: str, batch_tokens: int) -> None:
    model = tiny_model(family, torch.float64)
    found = rank_redundancy(model, SEQUENCES, batch_tokens)
    assert found.num_tokens == 16
    for kind, scores in oracle.redundancy(model.network, SEQUENCES).items():
        for layer_idx, score in enumerate(scores):
            assert found.scores[kind, layer_idx] == pytest.approx(score, rel=1e-9), (kind, layer_idx)


def test_no_calibration_text() -> None:
    with pytest.raises(PrunelensError, match="at least one token"):
        rank_redundancy(tiny_model(), [[]])


SCORES = {
    **{("attention", i): score for i, score in enumerate([0.1, 0.9, 0.8, 0.9])},
    **{("mlp", i): score for i, score in enumerate([0.95, 0.2, 0.3, 0.85])},
    **{("block", i): score for i, score in enumerate([0.5, 0.6, 0.2, 0.9])},
}


@pytest.mark.parametrize(
    ("recipe", "attention", "mlp", "block"),
    [
        ("drop-attention:1", [1], [], []),
        ("drop-attention:3", [1, 3, 2], [], []),
        ("drop-mlp:2", [], [0, 3], []),
        ("drop-sublayers:3", [1, 3], [0], []),
        ("drop-sublayers@a2,m1", [2], [1], []),
        ("drop-block:2", [], [], [3, 1]),
        ("drop-block:2,consecutive", [], [], [0, 1]),
        ("drop-block:3,consecutive", [], [], [1, 2, 3]),
        ("drop-attention@1+drop-attention:1", [1, 3], [], []),
        ("drop-block@3+drop-attention:1", [1], [], [3]),
        ("drop-attention@3+drop-block:1", [3], [], [1]),
    ],
)
def test_resolve(recipe: str, attention: list[int], mlp: list[int], block: list[int]) -> None:
    found = apply(parse_recipe(recipe), tiny_model(), ranking=Ranking(SCORES, 1)).drop
    assert found == Drop(frozenset(attention), frozenset(mlp), frozenset(block))


@pytest.mark.parametrize(
    "recipe",
    [
        "drop-attention:5",
        "drop-block:4,consecutive",
        "drop-attention:4+drop-mlp:4",
        "drop-sublayers:8",
        "drop-sublayers:9",
        "drop-block:5,consecutive",
        "drop-mlp@4",
        "drop-sublayers@a4",
        "drop-attention@1+drop-attention@1",
        "drop-block@1+drop-mlp@1",
        "drop-mlp@1+drop-block@1",
        "drop-attention@0,1,2,3+drop-attention:1",
        "drop-attention@01,1",
    ],
)
def test_parts_that_are_not_there_are_refused(recipe: str) -> None:
    with pytest.raises(PrunelensError):
        apply(parse_recipe(recipe), tiny_model(), ranking=Ranking(SCORES, 1))
