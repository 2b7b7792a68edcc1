"""The layer oracle against what must hold of it: sums, identities and whole hybrid networks."""

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import layer_oracle
import oracle
from conftest import COMMON, FAMILIES, GPT2
from layer_oracle import ATTENTION, MLP, REST

OTHERS: dict[str, tuple[type, dict[str, Any]]] = {
    "stablelm": (transformers.StableLmConfig, COMMON),
    "stablelm-parallel": (transformers.StableLmConfig, COMMON | {"use_parallel_residual": True}),
    "gemma2": (transformers.Gemma2Config, COMMON | {"head_dim": 8, "final_logit_softcapping": 2.0}),
    "gemma3_text": (transformers.Gemma3TextConfig, COMMON | {"head_dim": 8, "sliding_window": 6}),
    "olmo2": (transformers.Olmo2Config, COMMON),
    "gpt_neox": (transformers.GPTNeoXConfig, COMMON),
    "gpt_neox-sequential": (transformers.GPTNeoXConfig, COMMON | {"use_parallel_residual": False}),
    "phi": (transformers.PhiConfig, COMMON),
    "cohere": (transformers.CohereConfig, COMMON | {"logit_scale": 0.3}),
    "bloom": (transformers.BloomConfig, GPT2 | {"hidden_size": 32}),
}
ALL = {**FAMILIES, **OTHERS}
PARALLEL = {"stablelm-parallel", "gpt_neox", "phi", "cohere"}
PROMPT, TOKENS, STEPS = [1, 5, 9, 33, 60], [7, 4, 80, 4, 96, 11], [1, 3, 6]
READ = [*PROMPT, *TOKENS[:-1]]
TEMPERATURE = 0.7


def tiny(name: str, seed: int = 0) -> Any:
    """A random network of two blocks whose every tensor has a visible size."""
    kind, values = ALL[name]
    torch.manual_seed(seed)
    network = AutoModelForCausalLM.from_config(kind(**(values | {"num_hidden_layers": 2, "n_layer": 2}))).eval()
    for weight in network.parameters():
        if weight.ndim > 1:
            weight.data.normal_(0, 0.2)
        elif not weight.data.any():
            weight.data.normal_(0, 0.1)
    return network


def replaced(network: Any, seed: int = 9) -> Any:
    """A copy with noise on every parameter."""
    for index, (name, _) in enumerate(list(network.named_parameters())):
        network = layer_oracle.perturb(network, name, 0.2, seed + index)
    return network


@pytest.fixture(params=ALL)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    with layer_oracle.float64_throughout():
        yield


def test_streams_rebuild_the_logits(name: str) -> None:
    network = tiny(name)
    records = layer_oracle.sublayer_streams(network, READ)
    assert [record[:2] for record in records] == [(0, ATTENTION), (0, MLP), (1, ATTENTION), (1, MLP)]
    assert layer_oracle.is_parallel(network) == (name in PARALLEL)
    assert torch.equal(records[2].r, records[1].after)
    for attention, mlp in (records[:2], records[2:]):
        assert torch.equal(mlp.r, attention.r if name in PARALLEL else attention.after)
        torch.testing.assert_close(attention.after, attention.r + attention.f, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(mlp.after, attention.r + attention.f + mlp.f, rtol=1e-12, atol=1e-12)
        assert attention.f.abs().max() > 1e-3
        assert mlp.f.abs().max() > 1e-3
    h, z = layer_oracle.read(network, records[-1].after, "normed")
    with torch.no_grad():
        output = layer_oracle.float64(network)(input_ids=torch.tensor([READ]), output_hidden_states=True)
    torch.testing.assert_close(h, output.hidden_states[-1][0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(z, output.logits[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer_oracle.head_logits(network, PROMPT, TOKENS), z[4:], rtol=1e-12, atol=1e-12)


def test_everything_runs_in_float64() -> None:
    network = tiny("llama")
    norm = layer_oracle.float64(network).model.norm
    x = torch.randn(3, 32, dtype=torch.float64)
    root = (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()
    with torch.no_grad():
        torch.testing.assert_close(norm(x), norm.weight * x / root, rtol=1e-14, atol=1e-14)


def test_blocks_by_hand() -> None:
    """A llama block written out."""
    network = layer_oracle.float64(tiny("llama"))
    layer, records = network.model.layers[1], layer_oracle.sublayer_streams(network, READ)
    r = records[2].r[None]
    with torch.no_grad():
        positions = torch.arange(len(READ))[None]
        hidden = layer.input_layernorm(r)
        rotary = network.model.rotary_emb(hidden, positions)
        mask = torch.full((len(READ), len(READ)), -math.inf, dtype=torch.float64).triu(1)[None, None]
        a = layer.self_attn(hidden_states=hidden, position_embeddings=rotary, attention_mask=mask)[0]
        r1 = r + a
        m = layer.mlp(layer.post_attention_layernorm(r1))
    torch.testing.assert_close(records[2].f, a[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(records[3].r, r1[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(records[3].f, m[0], rtol=1e-12, atol=1e-12)


def test_identical_networks_differ_by_nothing(name: str) -> None:
    network = tiny(name)
    twin = copy.deepcopy(network)
    lens = "raw" if name in ("llama", "gpt2", "cohere") else "normed"
    arguments = (PROMPT, TOKENS, STEPS, TEMPERATURE, lens)
    for found in (layer_oracle.local(network, twin, *arguments), layer_oracle.cumulative(network, twin, *arguments)):
        assert list(found) == layer_oracle.sublayers(network)
        for stats in (stats for rows in found.values() for stats in rows):
            for column in ("hidden_alpha", "hidden_rho", "logit_rms_delta", "kl_dense_compressed", "tv"):
                assert stats[column] == 0.0
            assert stats["hidden_cosine"] == pytest.approx(1.0, abs=1e-15)
    assert layer_oracle.changed_parts(network, twin) == []
    found = layer_oracle.attribution(network, twin, PROMPT, TOKENS, TEMPERATURE)
    assert found["kl_all"] == found["sum_alone"] == 0.0
    assert found["additivity"] is None
    assert all(part["kl_alone"] == 0.0 and part["kl_all_but"] is None for part in found["parts"].values())


def test_dropped_sublayer_leaves_its_input(name: str) -> None:
    """h' = r, and nothing else changes; each is out alone."""
    network = tiny(name)
    records = layer_oracle.sublayer_streams(network, READ)
    found = layer_oracle.local(network, set(layer_oracle.sublayers(network)), PROMPT, TOKENS, STEPS, TEMPERATURE, "raw")
    for record in records:
        for step, stats in zip(STEPS, found[record[:2]], strict=True):
            r, f = record.r[len(PROMPT) - 2 + step], record.f[len(PROMPT) - 2 + step]
            expected = oracle.vector_stats(r + f, r)
            for column, value in expected.items():
                assert stats[column] == pytest.approx(value, rel=1e-11, abs=1e-12)
    dropped = layer_oracle.sublayer_streams(layer_oracle.drop(network, {(0, MLP)}), READ)
    assert torch.equal(dropped[1].f, torch.zeros_like(dropped[1].f))
    assert torch.equal(dropped[0].f, records[0].f)


@pytest.mark.parametrize("name", oracle._FAMILIES)
def test_dropped_set_is_the_zeroed_network(name: str) -> None:
    network = tiny(name)
    zeroed = oracle.zeroed(network, attention=[0], mlp=[1])
    dropped = layer_oracle.drop(network, {(0, ATTENTION), (1, MLP)})
    assert dropped.state_dict().keys() == zeroed.state_dict().keys()
    assert all(torch.equal(weight, zeroed.state_dict()[key]) for key, weight in dropped.state_dict().items())


def test_hybrids(name: str) -> None:
    """Of no part: dense. Of every part: compressed. Of one part: dense up to it, compressed in it."""
    dense = tiny(name)
    compressed = replaced(dense)
    everything = [*layer_oracle.sublayers(dense), REST]
    assert layer_oracle.changed_parts(dense, compressed) == everything
    before = {key: weight.clone() for key, weight in dense.state_dict().items()}

    def logits(parts: list[Any]) -> torch.Tensor:
        return layer_oracle.head_logits(layer_oracle.hybrid(dense, compressed, parts), PROMPT, TOKENS)

    assert torch.equal(logits([]), layer_oracle.head_logits(dense, PROMPT, TOKENS))
    assert torch.equal(logits(everything), layer_oracle.head_logits(compressed, PROMPT, TOKENS))
    for part in everything:
        mixed = layer_oracle.hybrid(dense, compressed, [part])
        assert layer_oracle.changed_parts(dense, mixed) == [part]
        mixed = layer_oracle.hybrid(dense, compressed, [p for p in everything if p != part])
        assert layer_oracle.changed_parts(compressed, mixed) == [part]
    assert all(torch.equal(weight, before[key]) for key, weight in dense.state_dict().items())


def test_one_changed_sublayer(name: str) -> None:
    """Zero rows everywhere else in L1; in L2 zero before it; in D1 alone is all and all but it is nothing."""
    dense = tiny(name)
    compressed = layer_oracle.perturb_sublayer(dense, 1, ATTENTION)
    assert layer_oracle.changed_parts(dense, compressed) == [(1, ATTENTION)]
    arguments = (PROMPT, TOKENS, STEPS, TEMPERATURE, "normed")
    local = layer_oracle.local(dense, compressed, *arguments)
    cumulative = layer_oracle.cumulative(dense, compressed, *arguments)
    for where in layer_oracle.sublayers(dense):
        for ours, along in zip(local[where], cumulative[where], strict=True):
            assert (ours["kl_dense_compressed"] > 1e-6) == (where == (1, ATTENTION))
            assert (along["kl_dense_compressed"] > 1e-6) == (where[0] == 1)
            if where != (1, ATTENTION):
                assert ours["kl_dense_compressed"] == 0.0
            elif name != "bloom":  # whose sums round in another order
                assert ours == along
    found = layer_oracle.attribution(dense, compressed, PROMPT, TOKENS, TEMPERATURE)
    assert set(found["parts"]) == set(layer_oracle.sublayers(dense))
    for where, part in found["parts"].items():
        assert part["changed"] == (where == (1, ATTENTION))
        assert part["kl_alone"] == (found["kl_all"] if part["changed"] else 0.0)
        assert part["tv_alone"] == (found["tv_all"] if part["changed"] else 0.0)
        assert part["kl_all_but"] == (0.0 if part["changed"] else None)
    assert found["additivity"] == 1.0


def test_end_of_the_depth_is_the_teacher_forced_step(name: str) -> None:
    """L2 behind the last sublayer = L3, through each model's own norm and head."""
    dense = tiny(name)
    compressed = replaced(dense)
    rows = layer_oracle.cumulative(dense, compressed, PROMPT, TOKENS, STEPS, TEMPERATURE, "normed")[1, MLP]
    ours, theirs = layer_oracle.float64(dense), layer_oracle.float64(compressed)
    forced = oracle.step_rows(ours, theirs, PROMPT, TOKENS, TEMPERATURE)
    for step, row in zip(STEPS, rows, strict=True):
        for column, value in row.items():
            assert value == pytest.approx(forced[step - 1][column], rel=1e-8, abs=1e-11), column
    kl, tv = layer_oracle.damage(dense, compressed, PROMPT, TOKENS, TEMPERATURE)
    assert kl == pytest.approx(sum(row["kl_dense_compressed"] for row in forced) / len(TOKENS), rel=1e-9)
    assert tv == pytest.approx(sum(row["tv"] for row in forced) / len(TOKENS), rel=1e-9)


def test_attribution_of_a_dropped_set() -> None:
    """Other sublayers of its kinds are listed as what dropping them alone would do."""
    dense = tiny("llama")
    found = layer_oracle.attribution(dense, {(0, ATTENTION)}, PROMPT, TOKENS, TEMPERATURE)
    assert set(found["parts"]) == {(0, ATTENTION), (1, ATTENTION)}
    inside, outside = found["parts"][0, ATTENTION], found["parts"][1, ATTENTION]
    assert (inside["changed"], outside["changed"]) == (True, False)
    arguments = (PROMPT, TOKENS, TEMPERATURE)
    assert inside["kl_alone"] == layer_oracle.damage(dense, oracle.zeroed(dense, attention=[0]), *arguments)[0]
    assert outside["kl_alone"] == layer_oracle.damage(dense, oracle.zeroed(dense, attention=[1]), *arguments)[0]
    assert (inside["kl_all_but"], outside["kl_all_but"]) == (0.0, None)

    pair = layer_oracle.attribution(dense, {(0, ATTENTION), (1, MLP)}, *arguments)
    assert len(pair["parts"]) == 4
    assert pair["parts"][0, ATTENTION]["kl_all_but"] == pair["parts"][1, MLP]["kl_alone"]
    assert pair["parts"][1, MLP]["kl_all_but"] == inside["kl_alone"]
    assert pair["sum_alone"] == inside["kl_alone"] + pair["parts"][1, MLP]["kl_alone"]
    assert pair["additivity"] == pair["kl_all"] / pair["sum_alone"]


def test_attribution_of_the_rest() -> None:
    """A changed head is a part of its own; changes of depth and head undo each other's all-but."""
    dense = tiny("llama")
    head = layer_oracle.perturb(dense, "lm_head.weight")
    both = layer_oracle.perturb_sublayer(head, 0, MLP)
    found = layer_oracle.attribution(dense, both, PROMPT, TOKENS, TEMPERATURE)
    alone = layer_oracle.damage(dense, head, PROMPT, TOKENS, TEMPERATURE)
    assert (found["parts"][REST]["kl_alone"], found["parts"][REST]["tv_alone"]) == alone
    assert (found["parts"][0, MLP]["kl_all_but"], found["parts"][0, MLP]["tv_all_but"]) == alone
    assert found["parts"][REST]["kl_all_but"] == found["parts"][0, MLP]["kl_alone"]
    local = layer_oracle.local(dense, head, PROMPT, TOKENS, STEPS, TEMPERATURE, "normed")
    assert all(stats["kl_dense_compressed"] == 0.0 for rows in local.values() for stats in rows)


@pytest.mark.parametrize("name", ["phi", "cohere", "stablelm-parallel"])
def test_shared_norm_is_in_the_twin_and_in_the_rest(name: str) -> None:
    dense = tiny(name)
    compressed = layer_oracle.perturb(dense, "model.layers.1.input_layernorm.weight")
    assert layer_oracle.changed_parts(dense, compressed) == [REST]
    local = layer_oracle.local(dense, compressed, PROMPT, TOKENS, STEPS, TEMPERATURE, "normed")
    for (layer, _), rows in local.items():
        assert all((stats["kl_dense_compressed"] > 0.0) == (layer == 1) for stats in rows)
