"""A naive float64 oracle for what single sublayers do (L1, L2, D1).

Everything is written from the definitions. A network is taken apart with hard-coded module names, one
entry a family. A compressed twin of one sublayer is never called by hand: a whole hybrid network is built,
dense but for that sublayer, and run from the tokens. What comes before the sublayer is then dense, so
its input is the dense one beyond doubt. Slow on purpose, and no code is shared with the package it judges.

`compressed` is either a network of the same family or a set of dropped sublayers such as
{(0, "attention"), (3, "mlp")}, where dropped means h' = r.

Parts of a network. A sublayer is its module and the norms that only it uses, before or after it. What
remains is the part "rest": embeddings, norms that several sublayers share, final norm, head.

Networks are converted to float64, but many of their norms, rotary embeddings and softmaxes cast to float32
by themselves. Wrap both the oracle and what it judges in `float64_throughout()` to compare to the last digits.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

import oracle

ATTENTION, MLP, REST = "attention", "mlp", "rest"
Sublayer = tuple[int, str]
Part = Sublayer | str


class _Side(NamedTuple):
    """One sublayer inside a block, by module names: what it owns, what it returns, what it projects with."""

    modules: tuple[str, ...]  # everything that belongs to this sublayer alone
    last: str  # the module whose output is f(r), before a residual multiplier
    projection: str  # zero weight and bias here make f(r) = 0


class _Family(NamedTuple):
    layers: str
    final_norm: str
    attention: _Side
    mlp: _Side
    shared: tuple[str, ...] = ()  # norms that both sublayers read, part of "rest"


_LLAMA = _Family(
    "model.layers",
    "model.norm",
    _Side(("input_layernorm", "self_attn"), "self_attn", "self_attn.o_proj"),
    _Side(("post_attention_layernorm", "mlp"), "mlp", "mlp.down_proj"),
)
_SANDWICH = _Family(
    "model.layers",
    "model.norm",
    _Side(("input_layernorm", "self_attn", "post_attention_layernorm"), "post_attention_layernorm", "self_attn.o_proj"),
    _Side(
        ("pre_feedforward_layernorm", "mlp", "post_feedforward_layernorm"),
        "post_feedforward_layernorm",
        "mlp.down_proj",
    ),
)
_GPT_NEOX = _Family(
    "gpt_neox.layers",
    "gpt_neox.final_layer_norm",
    _Side(("input_layernorm", "attention"), "attention", "attention.dense"),
    _Side(("post_attention_layernorm", "mlp"), "mlp", "mlp.dense_4h_to_h"),
)
_FAMILIES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "phi3": _LLAMA,
    "smollm3": _LLAMA,
    "granite": _LLAMA,
    "stablelm": _LLAMA,
    "starcoder2": _LLAMA._replace(mlp=_Side(("post_attention_layernorm", "mlp"), "mlp", "mlp.c_proj")),
    "gpt2": _Family(
        "transformer.h",
        "transformer.ln_f",
        _Side(("ln_1", "attn"), "attn", "attn.c_proj"),
        _Side(("ln_2", "mlp"), "mlp", "mlp.c_proj"),
    ),
    "gemma2": _SANDWICH,
    "gemma3_text": _SANDWICH,
    "olmo2": _Family(
        "model.layers",
        "model.norm",
        _Side(("self_attn", "post_attention_layernorm"), "post_attention_layernorm", "self_attn.o_proj"),
        _Side(("mlp", "post_feedforward_layernorm"), "post_feedforward_layernorm", "mlp.down_proj"),
    ),
    "gpt_neox": _GPT_NEOX,
    "phi": _Family(
        "model.layers",
        "model.final_layernorm",
        _Side(("self_attn",), "self_attn", "self_attn.dense"),
        _Side(("mlp",), "mlp", "mlp.fc2"),
        shared=("input_layernorm",),
    ),
    "cohere": _Family(
        "model.layers",
        "model.norm",
        _Side(("self_attn",), "self_attn", "self_attn.o_proj"),
        _Side(("mlp",), "mlp", "mlp.down_proj"),
        shared=("input_layernorm",),
    ),
    "bloom": _Family(
        "transformer.h",
        "transformer.ln_f",
        _Side(("input_layernorm", "self_attention"), "self_attention", "self_attention.dense"),
        _Side(("post_attention_layernorm", "mlp"), "mlp", "mlp.dense_4h_to_h"),
    ),
}


def is_parallel(network: Any) -> bool:
    """Whether both sublayers of a block read the block's input."""
    config = network.config
    if config.model_type in ("gpt_neox", "stablelm"):
        return bool(config.use_parallel_residual)
    return config.model_type in ("phi", "cohere")


def _family(network: Any) -> _Family:
    family = _FAMILIES[network.config.model_type]
    if network.config.model_type == "stablelm" and is_parallel(network):
        return family._replace(
            attention=family.attention._replace(modules=("self_attn",)),
            mlp=family.mlp._replace(modules=("mlp",)),
            shared=("input_layernorm",),
        )
    return family


def _layers(network: Any) -> Any:
    return attrgetter(_family(network).layers)(network)


def _side(network: Any, sublayer: str) -> _Side:
    return {ATTENTION: _family(network).attention, MLP: _family(network).mlp}[sublayer]


def sublayers(network: Any) -> list[Sublayer]:
    """(layer_idx, "attention" | "mlp") in the order of the blocks."""
    return [(layer, sublayer) for layer in range(len(_layers(network))) for sublayer in (ATTENTION, MLP)]


# ------------------------------------------------------------------------------------------- float64


def float64(network: Any) -> Any:
    """A deep copy in float64; dropout must be off."""
    if network.training:
        raise ValueError("call network.eval() first: dropout would make the oracle random")
    return copy.deepcopy(network).double()


class _Float64Throughout(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def wider(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        if function is torch.Tensor.float:
            function = torch.Tensor.double
        return function(*map(wider, args), **{name: wider(value) for name, value in (kwargs or {}).items()})


@contextmanager
def float64_throughout() -> Iterator[None]:
    """Within it every request for float32 (casts inside norms, rotary embeddings, softmax) gets float64.

    For float64 networks only: a float32 network would meet float64 inputs.
    """
    with _Float64Throughout():
        yield


# ------------------------------------------------------------------------------------------- streams


class Record(NamedTuple):
    """One sublayer on one sequence of T tokens, float64."""

    layer_idx: int
    sublayer: str
    r: torch.Tensor  # (T, d) the stream it reads
    f: torch.Tensor  # (T, d) what it adds
    after: torch.Tensor  # (T, d) the stream behind it: r + f, but behind the MLP of a parallel block its output


def sublayer_streams(network: Any, ids: Sequence[int]) -> list[Record]:
    """L1, L2: the input and the contribution of each sublayer, in order, on one sequence without padding.

    Sequential blocks: r1 = r + attention(r), r2 = r1 + mlp(r1). Parallel: r2 = r + attention(r) + mlp(r). Norms
    before and after a module, and a residual multiplier, belong to the contribution.
    """
    network = float64(network)
    kind = network.config.model_type
    scale = network.config.residual_multiplier if kind == "granite" else 1.0
    seen: dict[tuple[int, str], torch.Tensor] = {}
    handles = []

    def keep_input(layer: int) -> Any:
        def hook(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen[layer, "input"] = (args[0] if args else kwargs["hidden_states"])[0].detach().clone()

        return hook

    def keep_output(layer: int, name: str) -> Any:
        def hook(_module: Any, _args: Any, output: Any) -> None:
            seen[layer, name] = (output[0] if isinstance(output, tuple) else output)[0].detach().clone()

        return hook

    for i, layer in enumerate(_layers(network)):
        handles.append(layer.register_forward_pre_hook(keep_input(i), with_kwargs=True))
        handles.append(layer.register_forward_hook(keep_output(i, "output")))
        for sublayer in (ATTENTION, MLP):
            module = getattr(layer, _side(network, sublayer).last)
            handles.append(module.register_forward_hook(keep_output(i, sublayer)))
    try:
        with torch.no_grad():
            network(input_ids=torch.tensor([list(ids)]), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()

    records = []
    for i in range(len(_layers(network))):
        r, output = seen[i, "input"], seen[i, "output"]
        if kind == "bloom":  # its modules return r + f
            r1 = seen[i, ATTENTION]
            attention, mlp = r1 - r, seen[i, MLP] - r1
            mlp_input = r1
        else:
            attention, mlp = scale * seen[i, ATTENTION], scale * seen[i, MLP]
            r1 = r + attention
            mlp_input = r if is_parallel(network) else r1
        if (r + attention + mlp - output).abs().max() > 1e-12 * output.abs().max():
            raise AssertionError(f"block {i} is not its input + attention + mlp")
        records.append(Record(i, ATTENTION, r, attention, r1))
        records.append(Record(i, MLP, mlp_input, mlp, output))
    return records


def read(network: Any, stream: torch.Tensor, lens: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The state that the head reads under this lens [..., d] and the logits [..., V], float64.

    "normed": final norm, then head. "raw": the head without the final norm. Bias, scaling and soft-capping of the
    logits are part of the head.
    """
    network = float64(network)
    config, kind = network.config, network.config.model_type
    if lens not in ("normed", "raw"):
        raise ValueError(lens)
    with torch.no_grad():
        h = attrgetter(_family(network).final_norm)(network)(stream) if lens == "normed" else stream
        z = torch.nn.functional.linear(h, network.lm_head.weight, network.lm_head.bias)
        if kind == "granite":
            z = z / config.logits_scaling
        if kind == "cohere":
            z = z * config.logit_scale
        if kind in ("gemma2", "gemma3_text") and config.final_logit_softcapping is not None:
            z = config.final_logit_softcapping * torch.tanh(z / config.final_logit_softcapping)
    return h, z


# --------------------------------------------------------------------------------- changed and hybrid


def drop(network: Any, dropped: Collection[Sublayer]) -> Any:
    """A deep copy in which these sublayers add nothing: the last projection's weight and bias are zero."""
    result = copy.deepcopy(network)
    with torch.no_grad():
        for layer, sublayer in dropped:
            projection = attrgetter(_side(result, sublayer).projection)(_layers(result)[layer])
            projection.weight.zero_()
            if projection.bias is not None:
                projection.bias.zero_()
    return result


def perturb(network: Any, name: str, size: float = 0.3, seed: int = 0) -> Any:
    """A deep copy with noise of `size` times its root mean square on the parameter of this name."""
    result = copy.deepcopy(network)
    weight = dict(result.named_parameters())[name]
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    with torch.no_grad():
        root = weight.double().square().mean().sqrt()
        weight.add_((size * root * noise).to(weight.dtype))
    return result


def perturb_sublayer(network: Any, layer_idx: int, sublayer: str, size: float = 0.3, seed: int = 0) -> Any:
    """`perturb` for the weight of the sublayer's last projection."""
    projection = attrgetter(_side(network, sublayer).projection)(_layers(network)[layer_idx])
    names = [name for name, weight in network.named_parameters() if weight is projection.weight]
    return perturb(network, names[0], size, seed)


def as_network(dense: Any, compressed: Any) -> Any:
    """`compressed` itself, or the dense network with these sublayers dropped."""
    if isinstance(compressed, (set, frozenset)):
        return drop(dense, compressed)
    if compressed.config.model_type != dense.config.model_type or sublayers(compressed) != sublayers(dense):
        raise ValueError("the two networks have different blocks")
    return compressed


def hybrid(dense: Any, compressed: Any, parts: Collection[Part]) -> Any:
    """The dense network with these parts, (layer_idx, sublayer) or "rest", of the compressed one (D1).

    The result shares modules with both networks: run it, do not change it.
    """
    base, other = (compressed, dense) if REST in parts else (dense, compressed)
    result = copy.deepcopy(base)
    for layer, sublayer in sublayers(dense):
        if ((layer, sublayer) in parts) != (REST in parts):
            for name in _side(dense, sublayer).modules:
                setattr(_layers(result)[layer], name, getattr(_layers(other)[layer], name))
    return result


def changed_parts(dense: Any, compressed: Any) -> list[Part]:
    """The parts whose tensors are not all equal, sublayers in order, "rest" last."""

    def split(network: Any) -> dict[Part, dict[str, torch.Tensor]]:
        state = dict(network.state_dict())
        result: dict[Part, dict[str, torch.Tensor]] = {}
        for layer, sublayer in sublayers(network):
            mine: dict[str, torch.Tensor] = {}
            for module in _side(network, sublayer).modules:
                prefix = f"{_family(network).layers}.{layer}.{module}."
                mine |= {name: state.pop(name) for name in list(state) if name.startswith(prefix)}
            result[layer, sublayer] = mine
        result[REST] = state
        return result

    def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
        return a.keys() == b.keys() and all(torch.equal(a[name].double(), b[name].double()) for name in a)

    ours, theirs = split(dense), split(compressed)
    return [part for part in ours if not same(ours[part], theirs[part])]


# -------------------------------------------------------------------------------------- the quantities


def _sequence(prompt_ids: Sequence[int], token_ids: Sequence[int]) -> list[int]:
    """What is read: everything but the last token, which is only predicted."""
    return [*prompt_ids, *token_ids[:-1]]


def _rows(
    dense: tuple[torch.Tensor, torch.Tensor],
    compressed: tuple[torch.Tensor, torch.Tensor],
    prompt_ids: Sequence[int],
    token_ids: Sequence[int],
    steps: Sequence[int],
    temperature: float,
) -> list[oracle.Stats]:
    """H1, H2, Z, P, T, A1, S1 of two pairs (h [T, d], z [T, V]) at steps 1, 2, ... of the continuation."""
    rows = []
    for step in steps:
        at = len(prompt_ids) - 2 + step
        stats: oracle.Stats = {**oracle.vector_stats(dense[0][at], compressed[0][at])}
        stats |= oracle.logit_stats(dense[1][at], compressed[1][at], temperature, token_ids[step - 1])
        rows.append(stats)
    return rows


def local(
    dense: Any,
    compressed: Any,
    prompt_ids: Sequence[int],
    token_ids: Sequence[int],
    steps: Sequence[int],
    temperature: float,
    lens: str,
    only: Collection[Sublayer] | None = None,
) -> dict[Sublayer, list[oracle.Stats]]:
    """L1: the dense sublayer and its twin on the same dense input r; h = r + f(r), h' = r + f'(r).

    Both are read through the dense model's final norm and head. f' is everything between r and the sum, so
    where two sublayers share a norm, the twin reads r through the compressed model's norm.
    `local(dense, set(sublayers(dense)), ...)` takes out every sublayer of the dense model, each alone.
    """
    twin_network = as_network(dense, compressed)
    ids = _sequence(prompt_ids, token_ids)
    result = {}
    for index, record in enumerate(sublayer_streams(dense, ids)):
        where = (record.layer_idx, record.sublayer)
        if only is not None and where not in only:
            continue
        mixed = hybrid(dense, twin_network, {where})
        for name in _family(dense).shared:
            setattr(_layers(mixed)[where[0]], name, getattr(_layers(twin_network)[where[0]], name))
        twin = sublayer_streams(mixed, ids)[index]
        if not torch.equal(twin.r, record.r):
            raise AssertionError(f"the twin of {where} does not read the dense stream")
        ours = read(dense, record.r + record.f, lens)
        theirs = read(dense, twin.r + twin.f, lens)
        result[where] = _rows(ours, theirs, prompt_ids, token_ids, steps, temperature)
    return result


def cumulative(
    dense: Any,
    compressed: Any,
    prompt_ids: Sequence[int],
    token_ids: Sequence[int],
    steps: Sequence[int],
    temperature: float,
    lens: str,
) -> dict[Sublayer, list[oracle.Stats]]:
    """L2: the stream of both models behind each sublayer on the same tokens, each read by its own model's lens.

    In a parallel block the attention's point is input + attention and the MLP's point is the block's output.
    """
    other = as_network(dense, compressed)
    ids = _sequence(prompt_ids, token_ids)
    result = {}
    for record, twin in zip(sublayer_streams(dense, ids), sublayer_streams(other, ids), strict=True):
        ours, theirs = read(dense, record.after, lens), read(other, twin.after, lens)
        rows = _rows(ours, theirs, prompt_ids, token_ids, steps, temperature)
        result[record.layer_idx, record.sublayer] = rows
    return result


def head_logits(network: Any, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> torch.Tensor:
    """L3: the network's own logits [steps, V] before each token of the continuation, float64."""
    network = float64(network)
    with torch.no_grad():
        z = network(input_ids=torch.tensor([_sequence(prompt_ids, token_ids)]), use_cache=False).logits[0]
    return z[len(prompt_ids) - 1 :]


def damage(
    dense: Any, other: Any, prompt_ids: Sequence[int], token_ids: Sequence[int], temperature: float
) -> tuple[float, float]:
    """P2, L3: the means of KL(p || p') and TV at the head over all steps of the continuation."""
    kls, tvs = [], []
    ours, theirs = head_logits(dense, prompt_ids, token_ids), head_logits(other, prompt_ids, token_ids)
    for z, z2 in zip(ours.numpy(), theirs.numpy(), strict=True):
        log_p, log_q = oracle._log_softmax(z, temperature), oracle._log_softmax(z2, temperature)
        kls.append(oracle._kl(log_p, log_q))
        tvs.append(0.5 * float(np.sum(np.abs(np.exp(log_p) - np.exp(log_q)))))
    return float(np.mean(kls)), float(np.mean(tvs))


def attribution(
    dense: Any,
    compressed: Any,
    prompt_ids: Sequence[int],
    token_ids: Sequence[int],
    temperature: float,
    only: Collection[Part] | None = None,
) -> dict[str, Any]:
    """D1: {"num_steps", "kl_all", "tv_all", "sum_alone", "additivity", "parts"}; means over the continuation's steps.

    `parts` maps (layer_idx, sublayer) and, where it differs, "rest" to {"changed", "kl_alone", "tv_alone",
    "kl_all_but", "tv_all_but"}: only this part compressed, and all but it; the latter None where it is not changed.
    For a dropped set, sublayers of the kinds it names that are not in it are there too, and their alone is what
    dropping them would do. `sum_alone` adds the changed parts and needs all of them (`only` left out).
    """
    other = as_network(dense, compressed)
    dropping = isinstance(compressed, (set, frozenset))
    changed: list[Part] = sorted(compressed) if dropping else changed_parts(dense, other)
    listed: list[Part] = [*sublayers(dense), *([REST] if REST in changed else [])]
    if dropping:
        kinds = {sublayer for _, sublayer in compressed}
        listed = [part for part in listed if part[1] in kinds]
    arguments = (prompt_ids, token_ids, temperature)

    parts: dict[Part, dict[str, Any]] = {}
    for part in listed:
        if only is not None and part not in only:
            continue
        source = drop(dense, {part}) if dropping else other
        alone = damage(dense, hybrid(dense, source, {part}), *arguments)
        all_but: tuple[float | None, float | None] = (None, None)
        if part in changed:
            all_but = damage(dense, hybrid(dense, other, {p for p in changed if p != part}), *arguments)
        parts[part] = {
            "changed": part in changed,
            "kl_alone": alone[0],
            "tv_alone": alone[1],
            "kl_all_but": all_but[0],
            "tv_all_but": all_but[1],
        }
    kl_all, tv_all = damage(dense, other, *arguments)
    sum_alone = None
    if only is None:
        sum_alone = float(sum(parts[part]["kl_alone"] for part in changed))
    return {
        "num_steps": len(token_ids),
        "kl_all": kl_all,
        "tv_all": tv_all,
        "sum_alone": sum_alone,
        "additivity": kl_all / sum_alone if sum_alone else None,
        "parts": parts,
    }
