"""Maps in the places of parts that are out: against a stream put together by hand, in twins, copies and generation."""

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import FAMILIES, shared_network, tiny_model
from prunelens.models.anatomy.find import Anatomy
from prunelens.models.anatomy.hooks import input_tensor
from prunelens.models.anatomy.parts import Sublayer
from prunelens.models.anatomy.proofs import is_close
from prunelens.models.anatomy.streams import BlockPass, watched_blocks
from prunelens.models.model import Model
from prunelens.models.opening.loading import wrap
from prunelens.models.surgery.drop import Drop, dropped, kept_weights, num_parameters, remove
from prunelens.models.surgery.repairs import Repair, find_repair, installed_repairs
from prunelens.models.surgery.shared_copy import set_weight, shared_copy_of
from prunelens.pruning.apply import apply
from prunelens.pruning.pruned import Calibration
from prunelens.pruning.recipe import parse_recipe

KINDS = ("attention", "mlp", "block")
IDS = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(3))
EOS = 2


@functools.cache
def opened(family: str) -> Model:
    """The shared network of a family, opened once; for tests that leave it as it is."""
    return wrap(shared_network(family))


def layer_for(anatomy: Anatomy, kind: str) -> int:
    """Layer 1, or the nearest later one that has such a part, or the first that has."""
    layers = [block.layer_idx for block in anatomy.blocks if kind == "block" or block.find(kind)]  # type: ignore[arg-type]
    return min(layers, key=lambda layer_idx: (layer_idx < 1, layer_idx), default=-1)


def cases(anatomy: Anatomy) -> list[tuple[str, int]]:
    """Every kind of part that a model has, with a layer."""
    places = [(kind, layer_for(anatomy, kind)) for kind in KINDS]
    return [(kind, layer_idx) for kind, layer_idx in places if layer_idx >= 0]


def only(kind: str, layer_idx: int) -> Drop:
    return Drop(**{kind: frozenset([layer_idx])})


def some_repair(kind: str, layer_idx: int, rank: int | None = None, dim: int = 32) -> Repair:
    """A small random map with a bias."""
    generator = torch.Generator().manual_seed(layer_idx)
    bias = 0.3 * torch.randn(dim, generator=generator)
    down = 0.1 * torch.randn(dim, rank or dim, generator=generator)
    return Repair(kind, layer_idx, bias, down, torch.randn(rank, dim, generator=generator) if rank else None)


def matrix_of(repair: Repair) -> Tensor:
    assert repair.down is not None
    return repair.down if repair.up is None else repair.down @ repair.up


def logits(network: Any, ids: Tensor = IDS) -> Tensor:
    with torch.inference_mode():
        found: Tensor = network(ids, use_cache=False).logits
        return found


def repaired_twin(model: Model, drop: Drop, *repairs: Repair) -> Model:
    twin = shared_copy_of(model)
    remove(twin.anatomy, drop, repairs)
    return twin


@contextmanager
def caught_inputs(*modules: nn.Module) -> Iterator[dict[nn.Module, Tensor]]:
    """Copies of the hidden states that modules are given."""
    caught: dict[nn.Module, Tensor] = {}

    def catch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        source = input_tensor(args, kwargs)
        assert source is not None
        caught[module] = source.clone()

    handles = [module.register_forward_pre_hook(catch, with_kwargs=True) for module in modules]
    yield caught
    for handle in handles:
        handle.remove()


def contribution(part: Sublayer, passed: BlockPass) -> Tensor:
    """What a sublayer that is at work has put on the stream."""
    found = next(one for one in passed.sublayers if one.sublayer.kind == part.kind)
    output = found.calls[-1].output
    output = output[0] if isinstance(output, tuple) else output
    return part.scale * output.reshape(passed.before.shape)


@pytest.mark.parametrize(("kind", "rank"), [("attention", None), ("mlp", 3)])
def test_a_repair_adds_its_map_of_what_the_sublayer_reads(any_family: str, kind: str, rank: int | None) -> None:
    model = opened(any_family)
    layer_idx = layer_for(model.anatomy, kind)
    if layer_idx < 0:
        pytest.skip(f"{any_family} has no {kind}")
    block = model.anatomy.blocks[layer_idx]
    part = next(part for part in block.sublayers if part.kind == kind)
    repair = some_repair(kind, layer_idx, rank)
    starts = [one.chain[0] for one in block.sublayers]
    seen: list[BlockPass] = []
    with (
        dropped(model.anatomy, only(kind, layer_idx), [repair]),
        caught_inputs(block.module, part.body[0], *starts) as inputs,
        watched_blocks([block], seen.append),
    ):
        logits(model.network)
    passed, before = seen[0], inputs[block.module]
    added = inputs[part.body[0]].reshape(before.shape) @ matrix_of(repair) + repair.bias
    later = block.sublayers[block.sublayers.index(part) + 1 :]
    stream = inputs[part.chain[0]].reshape(before.shape)
    if block.layout == "parallel":
        others = sum(contribution(other, passed) for other in block.sublayers if other is not part)
        found, expected = passed.after, before + added + others
    elif later:
        found, expected = inputs[later[0].chain[0]].reshape(before.shape), stream + added
    else:
        found, expected = passed.after, stream + added
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert added.abs().mean() > 0.1


def test_a_repaired_block_adds_its_map_of_the_stream(any_family: str) -> None:
    model = opened(any_family)
    block = model.anatomy.blocks[1]
    repair = some_repair("block", 1)
    seen: list[BlockPass] = []
    with (
        dropped(model.anatomy, only("block", 1), [repair]),
        caught_inputs(block.module, model.anatomy.blocks[2].module) as inputs,
        watched_blocks([block], seen.append),
    ):
        logits(model.network)
    before = inputs[block.module]
    expected = before + before @ matrix_of(repair) + repair.bias
    assert torch.allclose(seen[0].after, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(seen[0].after, inputs[model.anatomy.blocks[2].module])


def test_a_repaired_twin_equals_the_model_with_parts_out(any_family: str) -> None:
    model = opened(any_family)
    dense = logits(model.network)
    for kind, layer_idx in cases(model.anatomy):
        drop, repair = only(kind, layer_idx), some_repair(kind, layer_idx)
        twin = repaired_twin(model, drop, repair)
        with dropped(model.anatomy, drop, [repair]):
            found = logits(model.network)
        with dropped(model.anatomy, drop):
            assert not torch.allclose(found, logits(model.network), atol=1e-3), kind
        assert torch.allclose(logits(twin.network), found, rtol=1e-5, atol=1e-5), kind
        assert torch.equal(logits(model.network), dense), kind


def test_all_kinds_at_once(any_family: str) -> None:
    """A twin repaired part after part, and at once, and the model in a context."""
    model = opened(any_family)
    places = {kind: layer_idx for kind, layer_idx in cases(model.anatomy) if kind != "block"} | {"block": 3}
    drop = Drop(**{kind: frozenset([layer_idx]) for kind, layer_idx in places.items()})
    repairs = [some_repair(kind, layer_idx) for kind, layer_idx in places.items()]
    one_by_one = shared_copy_of(model)
    for repair in repairs:
        remove(one_by_one.anatomy, only(repair.kind, repair.layer_idx), [repair])
    with dropped(model.anatomy, drop, repairs):
        expected = logits(model.network)
    assert torch.allclose(logits(repaired_twin(model, drop, *repairs).network), expected, rtol=1e-5, atol=1e-5)
    assert torch.allclose(logits(one_by_one.network), expected, rtol=1e-5, atol=1e-5)


def test_a_repair_of_zeros_is_a_plain_drop(any_family: str) -> None:
    # falcon and falcon one norm fail as of this writing: their layers add in place to a view of the bias
    model = opened(any_family)
    for kind, layer_idx in cases(model.anatomy):
        drop = only(kind, layer_idx)
        with dropped(model.anatomy, drop):
            expected = logits(model.network)
        nothing = Repair(kind, layer_idx, torch.zeros(32), torch.zeros(32, 2), torch.zeros(2, 32))
        for repair in (nothing, Repair(kind, layer_idx, torch.zeros(32))):
            with dropped(model.anatomy, drop, [repair]):
                assert torch.equal(logits(model.network), expected), kind


def test_a_bias_alone_is_added_at_every_token(any_family: str) -> None:
    # falcon and falcon one norm fail as of this writing, as above
    model = opened(any_family)
    for kind, layer_idx in cases(model.anatomy):
        bias = torch.randn(32)
        alone = Repair(kind, layer_idx, bias)
        mapped = Repair(kind, layer_idx, bias, torch.zeros(32, 32))
        with dropped(model.anatomy, only(kind, layer_idx), [alone]):
            found = logits(model.network)
        with dropped(model.anatomy, only(kind, layer_idx), [mapped]):
            assert torch.allclose(found, logits(model.network), rtol=1e-6, atol=1e-6), kind


def test_a_bias_stays_as_it_is_when_it_has_run(any_family: str) -> None:
    """At one token in one row, as in a step of generation, a view of the bias would be written to by some layers."""
    # falcon and falcon one norm fail as of this writing: the bias is another one after each token
    model = opened(any_family)
    for kind, layer_idx in cases(model.anatomy):
        repair = Repair(kind, layer_idx, torch.ones(32))
        with dropped(model.anatomy, only(kind, layer_idx), [repair]):
            first = logits(model.network, IDS[:1, :1])
            assert torch.equal(repair.bias, torch.ones(32)), kind
            assert torch.equal(logits(model.network, IDS[:1, :1]), first), kind


def test_a_block_removed_for_good_equals_one_that_is_dropped(any_family: str) -> None:
    model = opened(any_family)
    with dropped(model.anatomy, only("block", 1)):
        expected = logits(model.network)
    assert torch.allclose(logits(repaired_twin(model, only("block", 1)).network), expected, rtol=1e-5, atol=1e-5)


def test_everything_is_put_back(any_family: str) -> None:
    model = opened(any_family)
    before = logits(model.network)
    repairs = [some_repair(kind, layer_idx) for kind, layer_idx in cases(model.anatomy)]
    with dropped(model.anatomy, only("block", 1), repairs):
        once = logits(model.network)
        with dropped(model.anatomy, only("block", 2), [some_repair("block", 2)]):
            assert not torch.equal(logits(model.network), once)
        assert torch.equal(logits(model.network), once)
    assert torch.equal(logits(model.network), before)
    assert all("forward" not in module.__dict__ for module in model.network.modules())
    assert not installed_repairs(model.network)


def greedy(network: Any, ids: Tensor, count: int) -> Tensor:
    """Decoding without a cache; the end of text is left out."""
    for _ in range(count):
        last = logits(network, ids)[:, -1].clone()
        last[:, EOS] = -torch.inf
        ids = torch.cat([ids, last.argmax(-1, keepdim=True)], dim=1)
    return ids


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "places",
    [
        [("attention", 0)],
        [("attention", 1), ("mlp", 1)],
        [("block", 0)],
        [("attention", 0), ("block", 1), ("block", 2)],
    ],
    ids=str,
)
def test_cached_generation_equals_reading_everything_again(family: str, places: list[tuple[str, int]]) -> None:
    model = opened(family)
    drop = Drop()
    for place in places:
        drop |= only(*place)
    repairs = [some_repair(*place) for place in places if place != ("block", 2)]
    twin = repaired_twin(model, drop, *repairs).network
    settings: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = greedy(twin, IDS, 6)
    assert torch.equal(twin.generate(IDS, use_cache=True, **settings), expected)
    with dropped(model.anatomy, drop, repairs):
        assert torch.equal(model.network.generate(IDS, use_cache=True, **settings), expected)


@pytest.mark.parametrize("fit", ["bias", "linear", "linear,rank=4,weighted"])
@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_a_stream_that_is_wider_than_the_weights_is_repaired(family: str, fit: str) -> None:
    """Mamba's stream stays in float32."""
    model = tiny_model(family, torch.bfloat16)
    texts = torch.randint(3, 97, (8, 20), generator=torch.Generator().manual_seed(5)).tolist()
    pruned = apply(parse_recipe(f"drop-block@1+repair:{fit}"), model, Calibration(texts, texts))
    assert {weight.dtype for weight in pruned.repairs[0].parameters()} == {torch.bfloat16}
    seen: list[BlockPass] = []
    with pruned.variant.running() as repaired:
        with watched_blocks(repaired.anatomy.blocks, seen.append):
            logits(repaired.network)
        settings: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        found = repaired.network.generate(
            IDS, use_cache=True, output_logits=True, return_dict_in_generate=True, **settings
        )
        whole = logits(repaired.network, found.sequences)
    assert {passed.after.dtype for passed in seen} == {torch.float32}
    assert torch.isfinite(whole).all()
    assert is_close(torch.stack(found.logits, dim=1).bfloat16(), whole[:, IDS.shape[1] - 1 : -1].bfloat16())


def size(*modules: nn.Module) -> int:
    return sum(weight.numel() for module in modules for weight in module.parameters())


def test_num_parameters_counts_the_map_and_the_norm_that_stays() -> None:
    model = opened("llama")
    network, anatomy = model.network, model.anatomy
    layer, total = network.model.layers[1], size(network)
    full, narrow = 32 * 32 + 32, 32 * 3 + 3 * 32 + 32

    def counted(kind: str, rank: int | None = None) -> int:
        return num_parameters(network, anatomy, only(kind, 1), [some_repair(kind, 1, rank)])

    assert counted("attention") == total - size(layer.self_attn) + full
    assert counted("mlp", 3) == total - size(layer.mlp) + narrow
    assert counted("block") == total - size(layer) + full
    assert counted("attention") == num_parameters(network, anatomy, only("attention", 1)) + full + 32
    both = Drop(attention=frozenset([1]), mlp=frozenset([1]))
    repairs = [some_repair("attention", 1)]
    assert num_parameters(network, anatomy, both, repairs) == total - size(layer) + full + 32
    assert num_parameters(network, anatomy, only("attention", 1), [Repair("attention", 1, torch.zeros(32))]) == (
        total - size(layer.self_attn) + 32
    )


def test_a_norm_behind_the_sublayer_goes_with_it() -> None:
    model = opened("gemma2")
    layer = model.network.model.layers[1]
    found = num_parameters(model.network, model.anatomy, only("attention", 1), [some_repair("attention", 1)])
    assert found == size(model.network) - size(layer.self_attn, layer.post_attention_layernorm) + 32 * 32 + 32


def test_a_repaired_twin_has_as_many_numbers_as_are_counted(any_family: str) -> None:
    model = opened(any_family)
    for kind, layer_idx in cases(model.anatomy):
        drop, repair = only(kind, layer_idx), some_repair(kind, layer_idx)
        counted = num_parameters(model.network, model.anatomy, drop, [repair])
        twin = repaired_twin(model, drop, repair)
        assert num_parameters(twin.network, twin.anatomy) == counted, kind
        assert size(twin.network) - counted == size(model.network) - num_parameters(model.network, model.anatomy), kind


def test_kept_weights_are_the_models_own_and_the_repairs_last() -> None:
    model = opened("llama")
    repair = some_repair("mlp", 2, 4)
    found = list(kept_weights(model.network, model.anatomy, only("mlp", 2), [repair]))
    assert all(one is other for one, other in zip(found[-3:], repair.parameters(), strict=True))
    gone = {id(weight) for weight in model.network.model.layers[2].mlp.parameters()}
    own = [weight for weight in model.network.parameters() if id(weight) not in gone]
    assert [id(weight) for weight in found[:-3]] == [id(weight) for weight in own]


def test_nothing_is_removed_from_the_model_that_a_twin_was_made_of(any_family: str) -> None:
    model = opened(any_family)
    before = {name: weight.clone() for name, weight in model.network.named_parameters()}
    repairs = [some_repair(kind, layer_idx) for kind, layer_idx in cases(model.anatomy)]
    drop = Drop()
    for repair in repairs:
        drop |= only(repair.kind, repair.layer_idx)
    remove(shared_copy_of(model).anatomy, drop, [repair for repair in repairs if repair.kind == "block"])
    after = dict(model.network.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())


def test_copies_of_a_repaired_twin_compute_the_same(any_family: str) -> None:
    model = opened(any_family)
    places = {kind: layer_idx for kind, layer_idx in cases(model.anatomy) if kind != "block"} | {"block": 3}
    drop = Drop(**{kind: frozenset([layer_idx]) for kind, layer_idx in places.items()})
    twin = repaired_twin(model, drop, *(some_repair(kind, layer_idx) for kind, layer_idx in places.items()))
    expected, own = logits(twin.network), dict(installed_repairs(twin.network))
    for network in (copy.deepcopy(twin.network), shared_copy_of(twin).network):
        assert torch.equal(logits(network), expected)
        found = dict(installed_repairs(network))
        assert found.keys() == own.keys()
        assert len(found) == len(places)
        for name, repair in found.items():  # what is changed there runs there, and there only
            assert repair is not own[name]
            before = logits(network)
            set_weight(repair, "bias", repair.bias + torch.linspace(0, 1, 32))
            assert not torch.allclose(logits(network), before, atol=1e-3), name
    assert torch.equal(logits(twin.network), expected)


def test_a_repair_is_part_of_the_network() -> None:
    model = tiny_model("llama")
    drop = Drop(attention=frozenset([1]), mlp=frozenset([1]), block=frozenset([2, 3]))
    repairs = [some_repair("attention", 1), some_repair("mlp", 1, 2), some_repair("block", 2)]
    twin = repaired_twin(model, drop, *repairs)
    places = ["model.layers.1.self_attn", "model.layers.1.mlp", "model.layers.2"]
    found = dict(installed_repairs(twin.network))
    assert sorted(found) == sorted(places)
    assert all(found[place] is repair for place, repair in zip(places, repairs, strict=True))
    assert torch.equal(twin.network.state_dict()["model.layers.1.mlp.repair.up"], repairs[1].up)
    assert find_repair(repairs, "mlp", 1) is repairs[1]
    assert find_repair(repairs, "mlp", 2) is None


def test_a_repair_counts_moves_and_rounds() -> None:
    repair = some_repair("mlp", 1, 4)
    source = torch.randn(2, 3, 32)
    assert repair.num_parameters == 32 + 2 * 4 * 32
    moved = repair.at("mlp", 3)
    assert (moved.kind, moved.layer_idx, repair.layer_idx) == ("mlp", 3, 1)
    assert torch.equal(moved(source), repair(source))
    rounded = repair.in_dtype(torch.bfloat16)
    assert {weight.dtype for weight in rounded.parameters()} == {torch.bfloat16}
    assert {weight.dtype for weight in repair.parameters()} == {torch.float32}
    assert torch.allclose(repair(source), source @ matrix_of(repair) + repair.bias, atol=1e-5)


def test_what_is_repaired_is_not_computed() -> None:
    """The matrices of a repaired part may hold anything."""
    model = tiny_model("llama")
    drop = Drop(attention=frozenset([1]), mlp=frozenset([2]), block=frozenset([3]))
    repairs = [some_repair("attention", 1), some_repair("mlp", 2), some_repair("block", 3)]
    layers = model.network.model.layers
    with dropped(model.anatomy, drop, repairs):
        expected = logits(model.network)
        for module in (layers[1].self_attn, layers[2].mlp, layers[3]):
            for weight in module.parameters():
                weight.data.fill_(torch.nan)
        assert torch.equal(logits(model.network), expected)
