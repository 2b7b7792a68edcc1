"""Recipes applied from left to right: what is changed, what is measured on what, and that the dense model stays."""

from pathlib import Path

import pytest
import torch

import mask_oracle
from conftest import tiny_model, tiny_network
from prunelens import load
from prunelens.errors import PrunelensError
from prunelens.models.model import Model
from prunelens.models.opening.loading import wrap
from prunelens.models.saving.export import export
from prunelens.models.surgery.drop import Drop, dropped, num_parameters
from prunelens.models.surgery.repairs import Repair, installed_repairs
from prunelens.pruning.apply import apply, check_recipe
from prunelens.pruning.pruned import Calibration
from prunelens.pruning.recipe import parse_recipe
from prunelens.pruning.redundancy import rank_redundancy

TEXTS = [
    torch.randint(3, 97, (length,), generator=torch.Generator().manual_seed(length)).tolist() for length in (15, 9)
]
CALIBRATION = Calibration(TEXTS)
IDS = torch.tensor([TEXTS[0]])


def logits(recipe: str, family: str = "llama") -> torch.Tensor:
    variant = apply(parse_recipe(recipe), tiny_model(family), CALIBRATION).variant
    with torch.inference_mode(), variant.running() as model:
        return model.network(IDS).logits


def test_drops_alone_need_no_second_model() -> None:
    model = tiny_model()
    pruned = apply(parse_recipe("drop-attention:1+drop-mlp@2"), model, CALIBRATION)
    assert pruned.model is model
    assert pruned.variant.model is model
    assert pruned.drop.mlp == frozenset([2])
    assert len(pruned.drop.attention) == 1


@pytest.mark.parametrize("recipe", ["drop-attention@1+wanda:0.5", "drop-mlp@2+drop-block@0+sparsegpt:2:4"])
def test_a_mask_is_made_on_what_is_left(recipe: str) -> None:
    """Against the dense network with zeroed outputs, which the oracle masks."""
    import oracle

    network = tiny_network("llama")
    drop = apply(parse_recipe(recipe.rsplit("+", 1)[0]), wrap(network)).drop
    parts = {"attention": sorted(drop.attention), "mlp": sorted(drop.mlp), "blocks": sorted(drop.block)}
    zeroed = oracle.zeroed(network, **parts)
    method, sparsity = recipe.rsplit("+", 1)[1].split(":", 1)
    asked = 0.5 if sparsity == "0.5" else (2, 4)
    expected = mask_oracle.sequential(zeroed, TEXTS, method, asked)
    with torch.inference_mode():
        assert torch.allclose(logits(recipe), expected(IDS).logits, atol=1e-4)


def test_the_other_way_round_the_mask_sees_everything() -> None:
    one, other = logits("drop-mlp@1+wanda:0.5"), logits("wanda:0.5+drop-mlp@1")
    assert not torch.allclose(one, other)


@pytest.mark.parametrize("first", ["wanda:0.5+", ""])
def test_iterative_ranks_what_is_left(first: str) -> None:
    model = tiny_model(seed=3)
    pruned = apply(parse_recipe(f"{first}drop-sublayers:3,iterative"), model, CALIBRATION)
    base = apply(parse_recipe(f"{first}drop-sublayers@a0"), model, CALIBRATION).model
    drop = Drop()
    for _ in range(3):
        with dropped(base.anatomy, drop):
            order = rank_redundancy(base, TEXTS).ordered("attention", "mlp")
        kind, layer_idx = next(key for key in order if key[1] not in getattr(drop, key[0]))
        drop |= Drop(**{kind: frozenset([layer_idx])})
    assert pruned.drop == drop


def test_without_iterative_the_dense_ranking_counts() -> None:
    model = tiny_model(seed=3)
    once = apply(parse_recipe("drop-attention:2"), model, CALIBRATION).drop
    assert apply(parse_recipe("wanda:0.5+drop-attention:1+drop-attention:1"), model, CALIBRATION).drop == once


def test_a_pruned_model_runs_without_what_is_out() -> None:
    pruned = apply(parse_recipe("magnitude:0.5+drop-attention@1"), tiny_model())
    assert pruned.variant.drop == Drop()
    assert pruned.variant.model.network.model.layers[1].self_attn.q_proj.weight.numel() == 0
    assert pruned.model.network.model.layers[1].self_attn.q_proj.weight.numel() > 0  # the one to be saved is whole
    with torch.inference_mode():
        with dropped(pruned.model.anatomy, pruned.drop):
            expected = pruned.model.network(IDS).logits
        assert torch.equal(pruned.variant.model.network(IDS).logits, expected)
        texts = [
            network.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0)
            for network in (pruned.variant.model.network, pruned.model.network)
        ]
    assert texts[0].shape == texts[1].shape


def test_experts_then_masks() -> None:
    model = tiny_model("mixtral")
    pruned = apply(parse_recipe("drop-experts:0.25+wanda:2:4"), model, CALIBRATION)
    assert all(len(experts) == 1 for experts in pruned.experts.values())
    gone = {f"model.layers.{layer}.mlp.experts.down_proj[{expert}]" for layer, (expert,) in pruned.experts.items()}
    assert pruned.masked is not None
    assert gone <= set(pruned.masked.without_tokens)
    expert = sum(weight[0].numel() for name, weight in model.network.named_parameters() if "experts" in name)
    router = 4 * 32
    assert model.network.num_parameters() - pruned.num_parameters == expert + router
    random = apply(parse_recipe("drop-experts:0.25,uniform"), model)
    assert random.experts != pruned.experts


@pytest.mark.parametrize(
    ("family", "recipe", "said"),
    [
        ("llama", "drop-experts:0.25", "mixture"),
        ("mixtral", "drop-experts:0.1", "at least one expert"),
        ("mixtral", "drop-experts:0.75", "expert"),
        ("llama", "drop-attention@9+wanda:0.5", "layer index"),
        ("llama", "wanda:0.5+drop-block:9", "asks for 9"),
    ],
)
def test_what_the_model_does_not_have_is_refused(family: str, recipe: str, said: str) -> None:
    with pytest.raises(PrunelensError, match=said):
        apply(parse_recipe(recipe), tiny_model(family), CALIBRATION)


@pytest.fixture
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRUNELENS_CACHE", str(tmp_path / "cache"))


@pytest.mark.usefixtures("_own_cache")
@pytest.mark.parametrize("chosen", ["@2", "@1", ":2"])  # 1 has no experts
@pytest.mark.parametrize("method", ["drop-mlp", "drop-block"])
@pytest.mark.parametrize("experts_first", [False, True])
@pytest.mark.parametrize("experts", ["drop-experts:0.25", "drop-experts:0.25,uniform"])
def test_experts_of_what_is_out_are_counted_once(
    tmp_path: Path, method: str, chosen: str, experts_first: bool, experts: str
) -> None:
    model, steps = tiny_model("qwen3_moe"), [experts, f"{method}{chosen}"]
    pruned = apply(parse_recipe("+".join(steps if experts_first else steps[::-1])), model, CALIBRATION)
    export(pruned.model, tmp_path / "out", pruned.drop, pruned.experts)
    found = load(tmp_path / "out")
    assert pruned.num_parameters == num_parameters(found.network, found.anatomy)
    assert not [note for note in pruned.notes if "no calibration token" in note]


@pytest.fixture
def repaired(tmp_path: Path, _own_cache: None) -> Model:
    """A checkpoint that carries a repair, opened."""
    repairs = [Repair("attention", 1, torch.ones(32), 0.1 * torch.eye(32))]
    export(tiny_model(), tmp_path / "repaired", Drop(attention=frozenset([1])), repairs=repairs)
    model = load(tmp_path / "repaired")
    assert installed_repairs(model.network)
    return model


@pytest.mark.parametrize(
    "recipe",
    [
        "drop-attention@1",
        "drop-mlp@2",
        "drop-block@1",
        "drop-block:1",
        "drop-sublayers:2,iterative",
        "drop-attention@2+repair:bias",
        "drop-attention@1+repair:linear",
        "drop-block@2+repair:linear,rank=4,weighted",
        "drop-block@2+repair:folded",
        "magnitude:0.5",
        "wanda:2:4",
        "drop-mlp@2+sparsegpt:0.5",
        "drop-experts:0.25",
        "quantize:int8",
    ],
)
def test_what_is_repaired_is_not_changed_again(repaired: Model, recipe: str) -> None:
    said = f"expected a model without repairs to change, found {repaired.name}"
    with pytest.raises(PrunelensError, match=said):
        check_recipe(parse_recipe(recipe), repaired)
    with pytest.raises(PrunelensError, match=said):
        apply(parse_recipe(recipe), repaired, Calibration(TEXTS, TEXTS))
