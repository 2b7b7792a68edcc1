"""D1 against whole networks put together part by part, in float64, and its invariants."""

import copy
from typing import Any

import pytest
import torch

import layer_oracle
from conftest import tiny_model
from prunelens.models.model import Model
from prunelens.models.opening.loading import wrap
from prunelens.models.surgery.drop import Drop
from prunelens.models.surgery.variant import Variant
from prunelens.tracing.attribution import REST, Attribution, Damage, changed_parts
from prunelens.tracing.forced import Trajectory

TRAJECTORIES = [
    Trajectory(0, "greedy", (5, 9, 33), (71, 8, 8, 15), False),
    Trajectory(1, "greedy", (4, 90, 17, 3, 60), (61, 62), True),
]


@pytest.fixture(params=["llama", "gpt2", "granite", "gemma2", "olmo2", "gpt_neox", "bloom"])
def layered(request: pytest.FixtureRequest) -> Model:
    return tiny_model(request.param, torch.float64)


def attribute(dense: Model, variant: Variant, **more: Any) -> dict:
    found = Attribution(dense, {"it": variant}).run(TRAJECTORIES, **{"temperature": 0.7, **more})["it"]
    return {"rest" if part == REST else (part[1], part[0]): damage for part, damage in found.items()}


def expect(found: dict, dense: Model, compressed: Any) -> None:
    for index, text in enumerate(TRAJECTORIES):
        expected = layer_oracle.attribution(dense.network, compressed, text.prompt_ids, text.token_ids, 0.7)
        assert set(found) <= set(expected["parts"])
        for part, values in expected["parts"].items():
            if part not in found:  # a checkpoint's own unchanged sublayers are not run
                assert isinstance(compressed, torch.nn.Module)
                assert values["kl_alone"] == 0
                continue
            damage: Damage = found[part]
            assert damage.changed == values["changed"], part
            for name in ("kl_alone", "tv_alone", "kl_all_but", "tv_all_but"):
                got = getattr(damage, name)[index].item()
                value = values[name]
                assert got == pytest.approx(float("nan") if value is None else value, rel=2e-6, abs=1e-13, nan_ok=True)


def test_drops_equal_oracle(layered: Model) -> None:
    drop = Drop(attention=frozenset([1, 3]))
    expect(attribute(layered, Variant(layered, drop)), layered, {(1, "attention"), (3, "attention")})
    drop = Drop(attention=frozenset([0]), block=frozenset([2]))
    expect(attribute(layered, Variant(layered, drop)), layered, {(0, "attention"), (2, "attention"), (2, "mlp")})


def test_changed_weights_equal_oracle(layered: Model) -> None:
    network = layer_oracle.perturb_sublayer(copy.deepcopy(layered.network), 1, "attention", 0.1)
    network = layer_oracle.perturb_sublayer(network, 3, "mlp", 0.1, seed=1)
    other = wrap(network, layered.tokenizer)
    expect(attribute(layered, Variant(other)), layered, network)


def test_what_is_outside_the_sublayers_is_the_rest() -> None:
    dense = tiny_model("llama", torch.float64)
    network = layer_oracle.perturb_sublayer(copy.deepcopy(dense.network), 2, "mlp", 0.1)
    network.model.norm.weight.data *= 1.2
    network.model.embed_tokens.weight.data += 0.05
    other = wrap(network, dense.tokenizer)
    assert changed_parts(dense, Variant(other)) == [("mlp", 2), REST]
    expect(attribute(dense, Variant(other)), dense, network)


def test_the_same_model_changes_nothing() -> None:
    dense = tiny_model()
    assert attribute(dense, Variant(wrap(copy.deepcopy(dense.network)))) == {}
    assert attribute(dense, Variant(dense)) == {}


@pytest.mark.parametrize("batch_tokens", [1, 7])
def test_batches_and_company_change_nothing(batch_tokens: int) -> None:
    dense = tiny_model("qwen3", torch.float64)
    variants = {"a": Variant(dense, Drop(attention=frozenset([1]))), "b": Variant(dense, Drop(mlp=frozenset([0, 2])))}
    together = Attribution(dense, variants).run(TRAJECTORIES, batch_tokens=batch_tokens)
    for label, variant in variants.items():
        alone = Attribution(dense, {label: variant}).run(TRAJECTORIES)[label]
        assert alone.keys() == together[label].keys()
        for part, damage in alone.items():
            for name, value in vars(damage).items():
                other = getattr(together[label][part], name)
                if isinstance(value, torch.Tensor):
                    assert torch.allclose(value, other, rtol=1e-9, atol=1e-12, equal_nan=True)


def test_all_parts_but_the_only_one_is_exactly_dense() -> None:
    dense = tiny_model()
    found = attribute(dense, Variant(dense, Drop(mlp=frozenset([2]))))
    assert found[2, "mlp"].kl_all_but.tolist() == [0, 0]
    assert found[2, "mlp"].kl_alone.min() > 0
    assert len(found) == 4


def test_progress_reaches_its_total() -> None:
    dense = tiny_model()
    sweep = Attribution(dense, {"it": Variant(dense, Drop(mlp=frozenset([2])))})
    done: list[int] = []
    sweep.run(TRAJECTORIES, advance=done.append)
    assert sum(done) == sweep.num_runs * 6
