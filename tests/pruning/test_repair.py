"""Repairs fitted on calibration texts: against an oracle on what hooks record while the repaired model runs."""

import functools
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import repair_oracle
from conftest import shared_network, tiny_model, tiny_network
from prunelens.errors import PrunelensError
from prunelens.models.anatomy.hooks import input_tensor
from prunelens.models.model import Model
from prunelens.models.opening.loading import wrap
from prunelens.models.surgery.drop import Drop, dropped
from prunelens.models.surgery.repairs import Repair, installed_repairs
from prunelens.models.surgery.shared_copy import shared_copy_of
from prunelens.pruning.apply import apply
from prunelens.pruning.folding import find_cuts, fold_repairs, num_folding_runs
from prunelens.pruning.least_squares import STRENGTHS, Moments
from prunelens.pruning.pruned import Calibration, Pruned
from prunelens.pruning.recipe import parse_recipe
from prunelens.pruning.repair import RepairFit, RepairSpan, find_gaps, fit_repairs, num_block_runs
from prunelens.pruning.values import RepairForm

Texts = list[list[int]]
LENGTHS = (9, 25, 14, 20, 11, 17, 25, 8, 19, 13)
EVERY = 5  # one text of so many is held out, the last of them


def some_texts(lengths: Iterable[int] = LENGTHS, seed: int = 5) -> Texts:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 97, (length,), generator=generator).tolist() for length in lengths]


TEXTS = some_texts()
FEW = some_texts((24, 25, 18, 22, 20))
IDS = torch.tensor(some_texts([16, 16], seed=8))
LINEAR = RepairForm("linear")
BIAS = RepairForm("bias")
FOLDED = RepairForm("folded")
NORM_AFTER = ("gemma2", "gemma3", "glm4", "olmo2", "olmo3")


@functools.cache
def opened(family: str) -> Model:
    return wrap(shared_network(family))


def applied(recipe: str, model: Model, texts: Texts = TEXTS) -> Pruned:
    return apply(parse_recipe(recipe), model, Calibration(texts, texts))


def logits(network: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        found: Tensor = network(ids, use_cache=False).logits
        return found


def logits_of(pruned: Pruned) -> Tensor:
    with pruned.variant.running() as model:
        return logits(model.network)


def first_of(value: Any) -> Tensor:
    found: Tensor = value[0] if isinstance(value, tuple) else value
    return found


def record(model: Model, gap: RepairSpan, texts: Texts = TEXTS) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """For each text, run alone: what the part reads, what it adds to the stream, and the stream after it."""
    caught: dict[str, Tensor] = {}
    first, last = (model.anatomy.blocks[layer_idx] for layer_idx in (gap.first, gap.last))
    part = None if gap.kind == "block" else first.find(gap.kind)  # type: ignore[arg-type]
    reads, starts, ends = (
        (first.module, first.module, last.module) if part is None else (part.body[0], part.chain[0], part.chain[-1])
    )

    def before(name: str) -> Any:
        def hook(_module: nn.Module, args: Any, kwargs: Any) -> None:
            source = input_tensor(args, kwargs)
            assert source is not None
            caught[name] = source.clone()

        return hook

    def after(name: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            caught[name] = first_of(output).clone()

        return hook

    others = part.beside if part is not None else ()
    handles = [
        reads.register_forward_pre_hook(before("read"), with_kwargs=True),
        starts.register_forward_pre_hook(before("stream"), with_kwargs=True),
        ends.register_forward_hook(after("output")),
        *(other.chain[-1].register_forward_hook(after(other.name)) for other in others),
    ]
    found = []
    for text in texts:
        logits(model.network, torch.tensor([text]))
        read, stream, output = (caught[name].reshape(len(text), -1).double() for name in ("read", "stream", "output"))
        added = output - stream if part is None or part.adds_residual else part.scale * output
        for other in others:
            added = added + other.scale * caught[other.name].reshape(len(text), -1).double()
        found.append((read.numpy(), added.numpy(), (stream + added).numpy()))
    for handle in handles:
        handle.remove()
    return found


Columns = tuple[np.ndarray, np.ndarray, np.ndarray]


def columns(texts: Sequence[Columns], weighted: bool = False) -> Columns:
    """Inputs, targets and weights of all tokens."""
    inputs, targets, after = (np.concatenate([text[place] for text in texts]) for place in range(3))
    return inputs, targets, 1 / np.mean(after**2, axis=1) if weighted else np.ones(len(inputs))


def split(texts: Sequence[Columns], weighted: bool = False) -> tuple[Columns, Columns]:
    """The tokens that fit, and those that are held out."""
    fit = [text for index, text in enumerate(texts) if index % EVERY != EVERY - 1]
    return columns(fit, weighted), columns(texts[EVERY - 1 :: EVERY], weighted)


def solution_of(repair: Repair) -> tuple[np.ndarray, np.ndarray]:
    down = repair.down
    assert down is not None
    return (down if repair.up is None else down @ repair.up).double().numpy(), repair.bias.double().numpy()


def assert_same_map(repair: Repair, expected: tuple[np.ndarray, np.ndarray], inputs: np.ndarray, within: float) -> None:
    """What both predict for these inputs."""
    found = solution_of(repair)
    size = np.abs(inputs @ expected[0] + expected[1]).max()
    assert np.abs(inputs @ (found[0] - expected[0]) + found[1] - expected[1]).max() < within * size


class OwnPosition(nn.Module):
    """An attention that is an exact linear map of its normed input."""

    def __init__(self, dim: int = 32, seed: int = 1) -> None:
        super().__init__()
        values = 0.3 * torch.randn(dim, dim, generator=torch.Generator().manual_seed(seed))
        self.map = nn.Parameter(values, requires_grad=False)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        return hidden_states @ self.map, None


class Weighed(nn.Module):
    """In the place of a norm: the stream as it is."""

    def __init__(self, dim: int = 32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim), requires_grad=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states * self.weight


def linear_at(*layers: int) -> Any:
    network = tiny_network("llama")
    for layer_idx in layers:
        network.model.layers[layer_idx].self_attn = OwnPosition(seed=layer_idx)
    return network.double()


# ------------------------------------------------------------------------------------------- a part restored


@pytest.mark.parametrize("layers", [[1], [0], [0, 1, 3]])
def test_an_attention_that_is_linear_is_put_back(layers: list[int]) -> None:
    network = linear_at(*layers)
    recipe = f"drop-attention@{','.join(map(str, layers))}"
    pruned = applied(f"{recipe}+repair:linear", wrap(network))
    expected = logits(network)
    assert not torch.allclose(logits_of(applied(recipe, wrap(network))), expected, atol=0.1)
    assert torch.allclose(logits_of(pruned), expected, atol=1e-5)
    assert all(found.explained == pytest.approx(1, abs=1e-6) for found in pruned.repaired)


def test_a_linear_map_of_limited_rank_is_put_back_at_its_rank() -> None:
    network = linear_at(1)
    mixer = network.model.layers[1].self_attn
    mixer.map = nn.Parameter(mixer.map[:, :3] @ torch.randn(3, 32, dtype=torch.float64), requires_grad=False)
    expected = logits(network)
    enough, short = (applied(f"drop-attention@1+repair:linear,rank={rank}", wrap(network)) for rank in (3, 2))
    assert torch.allclose(logits_of(enough), expected, atol=1e-5)
    assert not torch.allclose(logits_of(short), expected, atol=1e-2)
    assert enough.repairs[0].num_parameters == 32 * 3 + 3 * 32 + 32


@pytest.mark.parametrize("family", ["llama", "gpt2", "granite", "bloom"])
def test_a_repair_brings_the_logits_nearer(family: str) -> None:
    model = opened(family)
    expected = logits(model.network)
    errors = [
        (logits_of(applied(recipe, model)) - expected).square().mean()
        for recipe in ("drop-mlp@1", "drop-mlp@1+repair:bias", "drop-mlp@1+repair:linear")
    ]
    assert errors[2] < errors[1] < errors[0]


# ------------------------------------------------------------------------------------------------ the bias


@pytest.mark.parametrize("batch_tokens", [1, 40, 10_000])
def test_a_bias_is_the_mean_of_what_the_attention_returns_at_all_tokens(batch_tokens: int) -> None:
    model = tiny_model("llama", torch.float64)
    outputs: list[Tensor] = []
    hook = model.network.model.layers[1].self_attn.register_forward_hook(
        lambda _module, _args, output: outputs.append(output[0][0])
    )
    for text in TEXTS:
        logits(model.network, torch.tensor([text]))
    hook.remove()
    [repair], [fitted] = fit_repairs(model, BIAS, Drop(attention=frozenset([1])), TEXTS, batch_tokens=batch_tokens)
    assert sum(map(len, outputs)) == sum(LENGTHS)
    assert torch.allclose(repair.bias, torch.cat(outputs).mean(0), rtol=1e-10, atol=1e-12)
    assert repair.down is None
    assert fitted.strength is None


def test_a_weighted_bias_counts_tokens_by_the_stream_after_them() -> None:
    model = tiny_model("llama", torch.float64)
    step = RepairForm("bias", weighted=True)
    [repair], _ = fit_repairs(model, step, Drop(mlp=frozenset([2])), TEXTS)
    _, targets, weights = columns(record(model, RepairSpan("mlp", 2, 2)), weighted=True)
    assert np.allclose(repair.bias.numpy(), repair_oracle.bias(targets, weights), rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------- against the oracle

DROPS = {
    "two attentions": Drop(attention=frozenset([1, 2])),
    "both halves of a block": Drop(attention=frozenset([1]), mlp=frozenset([1])),
    "a block behind an mlp": Drop(mlp=frozenset([0]), block=frozenset([2])),
    "an attention behind two blocks": Drop(attention=frozenset([3]), block=frozenset([1, 2])),
}


def oracle_strength(texts: Sequence[Columns], weighted: bool, rank: int | None) -> float:
    """The one whose map of full rank does best on the held-out texts."""
    fit, held_out = split(texts, weighted)
    errors = [
        (repair_oracle.squared_error(*held_out, *repair_oracle.ridge(*fit, strength)), strength)
        for strength in STRENGTHS
    ]
    return min(errors)[1]


def check_against_oracle(
    model: Model,
    drop: Drop,
    step: RepairForm,
    repairs: Sequence[Repair],
    fitted: Sequence[RepairFit],
    within: float,
    metric: np.ndarray | None = None,
    read: Texts = TEXTS,
) -> None:
    """Each map against the oracle on inputs and targets of the model with the maps before it."""
    earlier = Drop()
    for index, found in enumerate(fitted):
        with dropped(model.anatomy, earlier, repairs[:index]):
            texts = record(model, found.gap, read)
        inputs, targets, weights = columns(texts, step.weighted)
        assert found.strength is not None
        fit, held_out = split(texts, step.weighted)
        if step.rank is None:
            expected = repair_oracle.ridge(inputs, targets, weights, found.strength)
            tried = repair_oracle.ridge(*fit, found.strength)
        else:
            expected = repair_oracle.reduced_rank(inputs, targets, weights, found.strength, step.rank, metric)
            tried = repair_oracle.reduced_rank(*fit, found.strength, step.rank, metric)
        assert_same_map(repairs[index], expected, inputs, within)
        error = repair_oracle.squared_error(*held_out, *tried)
        whole = repair_oracle.squared_error(*held_out, np.zeros_like(tried[0]), np.zeros_like(tried[1]))
        assert found.explained == pytest.approx(1 - error / whole, abs=max(within, 1e-6))
        earlier |= found.gap.drop
    assert earlier == drop


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("drop", DROPS)
def test_each_map_is_fitted_on_what_the_repaired_model_reads(drop: str, weighted: bool) -> None:
    model = tiny_model("llama", torch.float64)
    step = RepairForm("linear", weighted=weighted)
    repairs, fitted = fit_repairs(model, step, DROPS[drop], TEXTS, batch_tokens=60)
    check_against_oracle(model, DROPS[drop], step, repairs, fitted, 1e-5 if weighted else 1e-7)
    texts = record(model, fitted[0].gap)
    assert fitted[0].strength == oracle_strength(texts, weighted, None)


@pytest.mark.parametrize("with_metric", [False, True])
def test_maps_of_limited_rank_equal_the_oracle(with_metric: bool) -> None:
    model = tiny_model("llama", torch.float64)
    step = RepairForm("linear", rank=4, weighted=True)
    root = torch.randn(32, 32, dtype=torch.float64)
    metric = root @ root.T + torch.eye(32, dtype=torch.float64) if with_metric else None
    drop = DROPS["two attentions"]
    repairs, fitted = fit_repairs(model, step, drop, TEXTS, metric)
    assert [tuple(repair.up.shape) for repair in repairs if repair.up is not None] == [(4, 32), (4, 32)]
    numbers = None if metric is None else metric.numpy()
    check_against_oracle(model, drop, step, repairs, fitted, 1e-5, numbers)


def test_maps_in_every_family_equal_the_oracle(any_family: str) -> None:
    """An attention, an MLP and a block, each where the family has one, in float32."""
    model = opened(any_family)
    mixers, mlps = ([part.layer_idx for part in model.anatomy.sublayers(kind)] for kind in ("attention", "mlp"))
    drop = Drop(
        attention=frozenset([layer for layer in mixers if layer < 3][-1:]),
        mlp=frozenset([layer for layer in mlps if layer < 3][-1:]),
        block=frozenset([3]),
    )
    repairs, fitted = fit_repairs(model, LINEAR, drop, FEW)
    assert len(repairs) == len(drop.attention) + len(drop.mlp) + len(drop.block)
    check_against_oracle(model, drop, LINEAR, repairs, fitted, 2e-3, read=FEW)


def test_the_order_matters() -> None:
    """The second map is another one than on the dense model's streams."""
    model = tiny_model("llama", torch.float64)
    both, _ = fit_repairs(model, LINEAR, Drop(attention=frozenset([1, 2])), TEXTS)
    alone, _ = fit_repairs(model, LINEAR, Drop(attention=frozenset([2])), TEXTS)
    assert not torch.allclose(both[1].bias, alone[0].bias, atol=1e-3)


@pytest.mark.parametrize("drop", DROPS)
def test_sizes_of_batches_do_not_matter(drop: str) -> None:
    model = tiny_model("llama", torch.float64)
    narrow, wide = (fit_repairs(model, LINEAR, DROPS[drop], TEXTS, batch_tokens=size) for size in (1, 10_000))
    for one, other in zip(narrow[0], wide[0], strict=True):
        assert torch.allclose(one.bias, other.bias, rtol=1e-6, atol=1e-6)
        assert torch.allclose(solution(one), solution(other), rtol=1e-6, atol=1e-6)
    assert [found.strength for found in narrow[1]] == [found.strength for found in wide[1]]


def solution(repair: Repair) -> Tensor:
    return torch.from_numpy(solution_of(repair)[0])


def test_a_few_texts_hold_out_their_ends() -> None:
    model = tiny_model("llama", torch.float64)
    texts = some_texts([60, 45])
    [repair], [fitted] = fit_repairs(model, LINEAR, Drop(mlp=frozenset([1])), texts)
    found = record(model, RepairSpan("mlp", 1, 1), texts)
    inputs, targets, weights = columns(found)
    assert fitted.strength is not None
    assert_same_map(repair, repair_oracle.ridge(inputs, targets, weights, fitted.strength), inputs, 1e-7)


def most_sums(step: RepairForm, num_texts: int) -> int:
    """The most `Moments` that live at once while one map is fitted, one batch a text."""
    alive: list[int] = []
    made: list[weakref.ref[Moments]] = []
    whole = Moments.__init__

    def noted(moments: Moments, *sums: Tensor) -> None:
        whole(moments, *sums)
        made.append(weakref.ref(moments))

    def count(_tokens: int) -> None:
        alive.append(sum(one() is not None for one in made))

    model, texts = opened("llama"), some_texts([12] * num_texts)
    drop = Drop(attention=frozenset([1]))
    fit, what = (fold_repairs, (drop,)) if step.fit == "folded" else (fit_repairs, (step, drop))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Moments, "__init__", noted)
        fit(shared_copy_of(model), *what, texts, batch_tokens=12, advance=count)
    assert len(alive) == num_texts
    assert len(made) >= num_texts
    return max(alive)


@pytest.mark.parametrize("step", [BIAS, LINEAR, FOLDED], ids=lambda step: step.fit)
def test_more_batches_keep_no_more_sums(step: RepairForm) -> None:
    few, many = most_sums(step, 4), most_sums(step, 16)
    assert 0 < many <= few


# ------------------------------------------------------------------------------------------ gaps and counts


def test_blocks_that_follow_one_another_get_one_map_at_the_first() -> None:
    model = tiny_model("llama", torch.float64)
    repairs, fitted = fit_repairs(model, LINEAR, Drop(block=frozenset([1, 2])), TEXTS)
    assert [(repair.kind, repair.layer_idx) for repair in repairs] == [("block", 1)]
    assert [found.gap for found in fitted] == [RepairSpan("block", 1, 2)]
    found = applied("drop-block@1,2+repair:linear", model)
    assert [name for name, _ in installed_repairs(found.variant.model.network)] == ["model.layers.1"]


def test_gaps_are_in_the_order_in_which_a_token_passes_them() -> None:
    model = opened("llama")
    drop = Drop(attention=frozenset([2, 1]), mlp=frozenset([2, 3]), block=frozenset([0, 3]))
    expected = [
        RepairSpan("block", 0, 0),
        RepairSpan("attention", 1, 1),
        RepairSpan("attention", 2, 2),
        RepairSpan("mlp", 2, 2),
        RepairSpan("block", 3, 3),
    ]
    assert find_gaps(model, drop) == expected
    assert find_gaps(model, Drop(block=frozenset([0, 1, 3]))) == [RepairSpan("block", 0, 1), RepairSpan("block", 3, 3)]
    assert find_gaps(model, Drop()) == []


@pytest.mark.parametrize("drop", DROPS)
def test_as_many_block_runs_are_counted_as_happen(drop: str) -> None:
    network = tiny_network("llama")
    model = wrap(network)
    passed, ran = [], []
    for layer in network.model.layers:  # a hook is copied with the network
        layer.self_attn.register_forward_hook(lambda _module, _args, output: ran.append(output[0].shape[1]))
    fit_repairs(model, BIAS, DROPS[drop], TEXTS, batch_tokens=1, advance=passed.append)
    tokens = sum(LENGTHS)
    assert sum(passed) == num_block_runs(find_gaps(model, DROPS[drop])) * tokens
    if not DROPS[drop].block:  # in a block that is out, attention does not run
        assert sum(passed) == sum(ran)


# -------------------------------------------------------------------------------------------------- folded


def contributions(model: Model, kind: str, layer_idx: int, texts: Texts = TEXTS) -> np.ndarray:
    return columns(record(model, RepairSpan(kind, layer_idx, layer_idx), texts))[1]


def test_an_attention_that_is_linear_in_what_the_mlp_before_it_wrote_is_put_back() -> None:
    """Everything before writes the first half of the stream, that MLP the second, and the attention reads that one."""
    network = linear_at(2)
    half, layers = 16, network.model.layers
    network.model.embed_tokens.weight.data[:, half:] = 0
    for module in (layers[0].self_attn.o_proj, layers[0].mlp.down_proj, layers[1].self_attn.o_proj):
        module.weight.data[half:] = 0
    layers[1].mlp.down_proj.weight.data[:half] = 0
    layers[2].input_layernorm = Weighed().double()
    layers[2].self_attn.map[:half] = 0
    model = wrap(network)
    expected = logits(network)
    pruned = applied("drop-attention@2+repair:folded", model)
    assert not torch.allclose(logits_of(applied("drop-attention@2", model)), expected, atol=0.1)
    assert torch.allclose(logits_of(pruned), expected, atol=1e-5)
    assert not pruned.repairs
    assert pruned.repaired[0].explained == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    ("recipe", "gap"),
    [
        ("drop-attention@2", RepairSpan("attention", 2, 2)),
        ("drop-block@2", RepairSpan("block", 2, 2)),
        ("drop-block@2,3", None),
    ],
)
def test_a_folded_map_is_the_ridge_of_what_the_cut_adds(recipe: str, gap: RepairSpan | None) -> None:
    model = tiny_model("llama", torch.float64)
    pruned = applied(f"{recipe}+repair:folded", model)
    gap = gap or RepairSpan("block", 2, 3)
    [fitted] = pruned.repaired
    assert fitted.gap == gap
    inputs, targets = contributions(model, "mlp", 1), columns(record(model, gap))[1]
    assert fitted.strength is not None
    map_, _ = repair_oracle.ridge(inputs, targets, None, fitted.strength, with_bias=False)
    old, new = (network.model.layers[1].mlp.down_proj.weight for network in (model.network, pruned.model.network))
    found = torch.linalg.lstsq(old.T, new.T).solution - torch.eye(32, dtype=torch.float64)
    assert torch.allclose(found, torch.from_numpy(map_), rtol=1e-6, atol=1e-7)
    layer = model.network.model.layers[1].mlp
    hook = layer.register_forward_hook(lambda _module, _args, output: output + output @ found)
    with dropped(model.anatomy, pruned.drop):
        expected = logits(model.network)
    hook.remove()
    assert torch.allclose(logits_of(pruned), expected, atol=1e-8)
    changed = {name for name, weight in model.network.named_parameters() if weight is not dict_of(pruned)[name]}
    assert changed == {"model.layers.1.mlp.down_proj.weight"}


def dict_of(pruned: Pruned) -> dict[str, Tensor]:
    return dict(pruned.model.network.named_parameters())


def test_a_cut_behind_an_attention_goes_into_its_projection_with_its_bias() -> None:
    model = tiny_model("gpt2", torch.float64)
    pruned = applied("drop-mlp@1+repair:folded", model)
    inputs, targets = contributions(model, "attention", 1), contributions(model, "mlp", 1)
    [fitted] = pruned.repaired
    assert fitted.strength is not None
    map_, shift = repair_oracle.ridge(inputs, targets, None, fitted.strength)
    expected = inputs + inputs @ map_ + shift
    assert np.allclose(contributions(pruned.model, "attention", 1), expected, rtol=1e-6, atol=1e-7)


def test_the_second_cut_is_fitted_behind_the_first_that_is_folded() -> None:
    model = tiny_model("llama", torch.float64)
    twin = shared_copy_of(model)
    fitted = fold_repairs(twin, Drop(attention=frozenset([1, 3])), TEXTS, batch_tokens=50)
    first = shared_copy_of(model)
    fold_repairs(first, Drop(attention=frozenset([1])), TEXTS)
    with dropped(first.anatomy, Drop(attention=frozenset([1]))):
        inputs, targets = contributions(first, "mlp", 2), contributions(first, "attention", 3)
    assert fitted[1].strength is not None
    map_, _ = repair_oracle.ridge(inputs, targets, None, fitted[1].strength, with_bias=False)
    old, new = (network.model.layers[2].mlp.down_proj.weight for network in (model.network, twin.network))
    found = torch.linalg.lstsq(old.T, new.T).solution - torch.eye(32, dtype=torch.float64)
    assert torch.allclose(found, torch.from_numpy(map_), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("recipe", ["drop-attention@0", "drop-block@0", "drop-block@0,2"])
def test_nothing_can_be_folded_before_the_first_layer(recipe: str) -> None:
    with pytest.raises(PrunelensError, match="nothing comes before"):
        applied(f"{recipe}+repair:folded", opened("llama"))


@pytest.mark.parametrize("recipe", ["drop-attention@1", "drop-mlp@1"])
def test_half_of_a_parallel_block_cannot_be_folded(recipe: str) -> None:
    with pytest.raises(PrunelensError, match="side by side"):
        applied(f"{recipe}+repair:folded", opened("phi"))


def test_folding_works_unless_a_norm_follows_the_sublayer(any_family: str) -> None:
    """Where it works, what the sublayer before writes is the ridge's map of what it wrote."""
    model = opened(any_family)
    if any_family in NORM_AFTER:
        with pytest.raises(PrunelensError, match="not made by one product"):
            applied("drop-block@1+repair:folded", model, FEW)
        return
    pruned = applied("drop-block@1+repair:folded", model, FEW)
    [fitted] = pruned.repaired
    [cut] = find_cuts(model, Drop(block=frozenset([1])))
    before = cut.before
    inputs, targets = (
        contributions(model, before.kind, before.layer_idx, FEW),
        columns(record(model, RepairSpan("block", 1, 1), FEW))[1],
    )
    found = contributions(pruned.model, before.kind, before.layer_idx, FEW)
    assert fitted.strength is not None
    errors = []
    for with_bias in (True, False):
        map_, shift = repair_oracle.ridge(inputs, targets, None, fitted.strength, with_bias)
        expected = inputs + inputs @ map_ + shift
        errors.append(np.abs(found - expected).max() / np.abs(expected).max())
    assert min(errors) < 2e-3
    assert torch.isfinite(logits_of(pruned)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["olmo2", "gemma2"])
def test_a_norm_that_follows_is_found_however_little_the_cut_adds(family: str, dtype: torch.dtype) -> None:
    """The map is nearly the identity, so that rounding hides what the norm makes of it."""
    network = tiny_network(family, dtype)
    scale = {torch.float32: 1e-5, torch.bfloat16: 0.02}[dtype]
    for name, weight in network.model.layers[2].named_parameters():
        if "post" in name and weight.ndim == 1:
            weight.data.fill_(scale - 1 if family == "gemma2" else scale)
    model = wrap(network)
    silent = logits_of(applied("drop-block@2", model))
    assert (silent - logits(network)).norm() < 0.1 * logits(network).norm()
    with pytest.raises(PrunelensError, match="not made by one product"):
        applied("drop-block@2+repair:folded", model)


@pytest.mark.parametrize("share", [0.02, 0.2])
def test_a_block_that_is_nearly_silent_is_folded_in_half_precision(share: float) -> None:
    """It brings the logits nearer on the texts of the fit, although the map is nearly the identity."""
    network = tiny_network("llama", torch.bfloat16)
    for weight in (network.model.layers[2].self_attn.o_proj.weight, network.model.layers[2].mlp.down_proj.weight):
        weight.data.mul_(share)
    model, ids = wrap(network), torch.tensor([text for text in TEXTS if len(text) == 25])
    dense, errors = logits(network, ids).float(), []
    for recipe in ("drop-block@2+repair:folded", "drop-block@2"):
        with applied(recipe, model).variant.running() as found:
            errors.append((logits(found.network, ids).float() - dense).norm())
    assert errors[0] <= errors[1] < 0.3 * dense.norm()


def test_cuts_are_runs_of_sublayers_that_are_out() -> None:
    model = opened("llama")
    drop = Drop(attention=frozenset([1, 2]), mlp=frozenset([1]), block=frozenset([3]))
    found = find_cuts(model, drop)
    assert [(cut.before.kind, cut.before.layer_idx) for cut in found] == [("mlp", 0), ("mlp", 2)]
    assert [[(part.kind, part.layer_idx) for _, part in cut.places] for cut in found] == [
        [("attention", 1), ("mlp", 1), ("attention", 2)],
        [("attention", 3), ("mlp", 3)],
    ]
    passed: list[int] = []
    fold_repairs(shared_copy_of(model), drop, TEXTS, advance=passed.append)
    assert sum(passed) == num_folding_runs(found) * sum(LENGTHS)


# ------------------------------------------------------------------------------------- what stays as it was


@pytest.mark.parametrize("fit", ["bias", "linear", "linear,rank=2,weighted", "folded"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_dense_model_stays_as_it_was(family: str, fit: str) -> None:
    model = tiny_model(family)
    before = {name: weight.clone() for name, weight in model.network.state_dict().items()}
    expected = logits(model.network)
    pruned = applied(f"drop-attention@1+drop-block@3+repair:{fit}", model)
    assert not torch.allclose(logits_of(pruned), expected, atol=1e-3)
    after = model.network.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())
    assert torch.equal(logits(model.network), expected)
    assert all("forward" not in module.__dict__ for module in model.network.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.network.modules())


@pytest.mark.parametrize("fit", ["bias", "linear", "folded"])
def test_no_texts_to_fit_on_are_refused(fit: str) -> None:
    with pytest.raises(PrunelensError, match="at least one token"):
        applied(f"drop-attention@1+repair:{fit}", opened("llama"), [])


OVERFLOWS = 50
"""The token at which `overflowing` has no finite state."""


def overflowing() -> Model:
    """In float16, with an embedding near the largest number, to which the first MLP adds more."""
    network = tiny_network("llama").half()
    embedded, first = network.model.embed_tokens.weight.data, network.model.layers[0]
    embedded[:, 0] = 0
    embedded[OVERFLOWS] = 0
    embedded[OVERFLOWS, 0] = 65000
    first.self_attn.o_proj.weight.data.zero_()
    for module, value in ((first.mlp.gate_proj, 4), (first.mlp.up_proj, 4), (first.mlp.down_proj, 30)):
        module.weight.data[0] = 0
        module.weight.data[0, 0] = value
    return wrap(network)


@pytest.mark.parametrize(
    "fit", ["bias", "bias,weighted", "linear", "linear,rank=4", "linear,rank=4,weighted", "folded", "folded,weighted"]
)
def test_states_that_overflow_are_refused(fit: str) -> None:
    model, bad = overflowing(), [5, OVERFLOWS, 7, 8]
    texts = [[token for token in text if token != OVERFLOWS] for text in TEXTS]
    assert not torch.isfinite(logits(model.network, torch.tensor([bad]))).all()
    assert torch.isfinite(logits_of(applied(f"drop-block@2+repair:{fit}", model, texts))).all()
    for place in (0, 4, 10):  # 4 is held out
        with pytest.raises(PrunelensError, match=r"expected finite .* use float32"):
            applied(f"drop-block@2+repair:{fit}", model, [*texts[:place], bad, *texts[place:]])


def test_logits_that_overflow_are_refused_where_they_weigh() -> None:
    """The states are finite; of the fits, only one of limited rank that is weighted reads the logits."""
    network, bad = tiny_network("llama").half(), [5, OVERFLOWS, 7, 8]
    with torch.no_grad():
        state = network.model(torch.tensor([bad])).last_hidden_state[0, 1].float()
    network.lm_head.weight.data[3] = (state * 12_000 / state.norm()).half()
    model, texts = wrap(network), [*TEXTS, bad]
    assert torch.isinf(logits(network, torch.tensor([bad]))).any()
    assert torch.isfinite(logits(network)).all()
    assert applied("drop-attention@2+repair:linear,weighted", model, texts).repaired[0].explained > 0
    with pytest.raises(PrunelensError, match=r"expected finite .* use float32"):
        applied("drop-attention@2+repair:linear,rank=4,weighted", model, texts)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_folding_works_in_half_precision(dtype: torch.dtype) -> None:
    pruned = applied("drop-block@2+repair:folded", tiny_model("llama", dtype))
    weight = pruned.model.network.model.layers[1].mlp.down_proj.weight
    assert weight.dtype == dtype
    expected = applied("drop-block@2+repair:folded", tiny_model("llama")).model.network.model.layers[1].mlp.down_proj
    assert torch.allclose(weight.float(), expected.weight, rtol=0.1, atol=0.1)


def test_maps_are_in_the_dtype_of_the_model() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        pruned = applied("drop-mlp@1+repair:linear", tiny_model("llama", dtype))
        assert {weight.dtype for weight in pruned.repairs[0].parameters()} == {dtype}
        assert torch.isfinite(logits_of(pruned)).all()
