"""Mixtures of experts are found by structure, or refused with the reason."""

import pytest
import transformers
from test_experts import eight_experts, opened

from conftest import COMMON, MOE, tiny_model
from prunelens.errors import PrunelensError
from prunelens.models.surgery.mixtures import find_mixtures


def test_what_a_mixture_is() -> None:
    model = eight_experts("deepseek_v3")
    mixture = find_mixtures(model)[2]
    part = model.layers[2].mlp
    assert (mixture.layer_idx, mixture.holder, mixture.experts, mixture.router) == (2, part, part.experts, part.gate)
    assert (mixture.num_experts, mixture.top_k, mixture.num_groups, mixture.min_kept) == (8, 2, 2, 4)
    assert {(name, axis) for _, name, axis in mixture.tensors()} == {
        ("gate_up_proj", 0),
        ("down_proj", 0),
        ("weight", 0),
        ("e_score_correction_bias", 0),
    }


def test_models_without_a_mixture_are_refused() -> None:
    with pytest.raises(PrunelensError, match=r"expected a mixture of experts, found none in .*\(family llama\)"):
        find_mixtures(tiny_model("llama"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            transformers.HunYuanMoEV1Config(**MOE | {"head_dim": 8, "moe_topk": 2}),
            r"family hunyuan_v1_moe\) cannot be taken out: no module of .* returns the chosen experts",
        ),
        (
            transformers.JetMoeConfig(**COMMON | {"num_local_experts": 4, "kv_channels": 8}),
            r"family jetmoe\) cannot be taken out: its experts are not stacked in 3-D parameters",
        ),
    ],
    ids=["hunyuan", "jetmoe"],
)
def test_other_mixtures_are_refused_with_family_and_reason(config: transformers.PreTrainedConfig, message: str) -> None:
    with pytest.raises(PrunelensError, match=message):
        find_mixtures(opened(config, "other"))
