"""A naive float64 oracle for the quantities of the theory (H1, T2, S2, ...).

Everything here is written straight from the definitions: softmax, logarithms, sums, growing
prefixes, full enumeration. It is slow on purpose and shares no code with the package it judges.

Conventions: "dense" is the reference model (z, p), "compressed" the other one (z2, q); the fixed
direction is dense -> compressed. Logarithms are natural (nats). V is the vocabulary size and T the
softmax temperature. Ties in a ranking go to the lower token id.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[np.float64]
Stats = dict[str, float | bool | int | None]
Tree = Callable[[tuple[int, ...]], Any]

TOP_K = 10


# --------------------------------------------------------------------------- elementary definitions


def _float64(values: Any) -> Array:
    """A 1-D float64 copy of an array, a sequence or a tensor of any dtype."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().to(torch.float64).numpy()
    array = np.array(values, dtype=np.float64)
    if array.ndim != 1:
        raise ValueError(f"expected a 1-D array, got shape {array.shape}")
    return array


def _norm(u: Array) -> float:
    """Euclidean norm."""
    return float(np.sqrt(np.sum(u * u)))


def _cosine(u: Array, v: Array) -> float:
    """cos(u, v); nan when one of them is zero."""
    norms = _norm(u) * _norm(v)
    if norms == 0.0:
        return float("nan")
    return float(np.sum(u * v)) / norms


def _deviation(u: Array, v: Array) -> float:
    """1 - cos(u, v) as half the squared distance of the unit vectors: accurate when it is tiny."""
    difference = u / _norm(u) - v / _norm(v)
    return 0.5 * float(np.sum(difference * difference))


def _split(u: Array, v: Array) -> tuple[float, float]:
    """H2: alpha = <dv, u>/|u|^2 and rho = |dv - alpha u|/|u| with dv = v - u; nan when u is zero."""
    if _norm(u) == 0.0:
        return float("nan"), float("nan")
    delta = v - u
    alpha = float(np.sum(delta * u)) / float(np.sum(u * u))
    orthogonal = delta - alpha * u
    return alpha, _norm(orthogonal) / _norm(u)


def _log_softmax(z: Array, temperature: float) -> Array:
    """log p with p = softmax(z / T)."""
    scaled = z / temperature
    shifted = scaled - np.max(scaled)
    log_p: Array = shifted - np.log(np.sum(np.exp(shifted)))
    return log_p


def _softmax(z: Array, temperature: float) -> Array:
    """p = softmax(z / T)."""
    return np.exp(_log_softmax(z, temperature))


def _mean(weights: Array, values: Array) -> float:
    """E_w[values] under a distribution w over tokens."""
    return float(np.sum(weights * values))


def _central_moment(weights: Array, values: Array, order: int) -> float:
    """E_w[(values - E_w[values])^order] under a distribution w over tokens."""
    return _mean(weights, (values - _mean(weights, values)) ** order)


def _kl(log_p: Array, log_q: Array) -> float:
    """KL(p || q) = sum p (log p - log q); tokens with p = 0 contribute nothing."""
    p = np.exp(log_p)
    seen = p > 0.0
    return float(np.sum(p[seen] * (log_p[seen] - log_q[seen])))


def _entropy(log_p: Array) -> float:
    """-sum p log p; tokens with p = 0 contribute nothing."""
    p = np.exp(log_p)
    seen = p > 0.0
    return -float(np.sum(p[seen] * log_p[seen]))


def _top(z: Array, k: int) -> list[int]:
    """The ids of the k largest entries, largest first, ties to the lower id."""
    order = sorted(range(len(z)), key=lambda token: (-z[token], token))
    return order[:k]


def _acceptance(p_token: float, q_token: float) -> float:
    """S1: a = min(1, q/p) of one token with p > 0."""
    return min(1.0, q_token / p_token)


# ------------------------------------------------------------------------------ one step, two models


def vector_stats(h: Any, h2: Any) -> dict[str, float]:
    """H1, H2: cosine, parallel part alpha and orthogonal part rho of two head-input states [d]."""
    h, h2 = _float64(h), _float64(h2)
    alpha, rho = _split(h, h2)
    return {"hidden_cosine": _cosine(h, h2), "hidden_alpha": alpha, "hidden_rho": rho}


def logit_stats(z: Any, z2: Any, temperature: float, token_id: int) -> Stats:
    """Z1, Z2, P1, P2, P3, S1, T2, T3, T3+, A1 of two logit vectors [V] on the same context."""
    z, z2 = _float64(z), _float64(z2)
    vocabulary = len(z)
    delta = z2 - z

    log_p, log_q = _log_softmax(z, temperature), _log_softmax(z2, temperature)
    p, q = np.exp(log_p), np.exp(log_q)
    log_middle = np.logaddexp(log_p, log_q) - np.log(2.0)
    r = p**2 / np.sum(p**2)
    uniform = np.full(vocabulary, 1.0 / vocabulary)

    # Z1, Z2
    alpha, rho = _split(z, z2)
    delta_mean = float(np.sum(delta)) / vocabulary

    # P3
    k = min(TOP_K, vocabulary)
    dense_top = _top(z, 1)[0]
    compressed_top = _top(z2, 1)[0]
    shared_top = set(_top(z, k)) & set(_top(z2, k))

    # T2, T3, T3+
    var_r = _central_moment(r, delta, 2)
    kappa2 = _central_moment(p, delta, 2)
    kappa3 = _central_moment(p, delta, 3)
    second_order = kappa2 / (2.0 * temperature**2)
    third_order = kappa3 / (6.0 * temperature**3)
    trust = 0.0 if kappa2 == 0.0 else abs(kappa3) / (3.0 * temperature * kappa2)

    # A1
    logit_deviation = _deviation(z, z2)
    amplification = None if logit_deviation == 0.0 else _deviation(p, q) / logit_deviation
    estimate = None if rho == 0.0 else (var_r / temperature**2) / rho**2

    return {
        "logit_cosine": _cosine(z, z2),
        "logit_alpha": alpha,
        "logit_rho": rho,
        "logit_cosine_centered": _cosine(z - np.mean(z), z2 - np.mean(z2)),
        "logit_rms_delta": float(np.sqrt(np.sum(delta**2) / vocabulary)),
        "logit_var_uniform": _mean(uniform, (delta - delta_mean) ** 2),
        "prob_cosine": _cosine(p, q),
        "kl_dense_compressed": _kl(log_p, log_q),
        "kl_compressed_dense": _kl(log_q, log_p),
        "js": 0.5 * _kl(log_p, log_middle) + 0.5 * _kl(log_q, log_middle),
        "tv": 0.5 * float(np.sum(np.abs(p - q))),
        "same_top1": dense_top == compressed_top,
        "rank_of_dense_top1": 1 + int(np.sum(z2 > z2[dense_top])),
        "topk_overlap": len(shared_top) / k,
        "delta_p_top1": float(q[dense_top] - p[dense_top]),
        "delta_p_token": float(q[token_id] - p[token_id]),
        "entropy_dense": _entropy(log_p),
        "entropy_compressed": _entropy(log_q),
        "acceptance": float(np.exp(min(0.0, log_q[token_id] - log_p[token_id]))),
        "prob_deviation_estimate": var_r / (2.0 * temperature**2),
        "kl_estimate": second_order,
        "kl_estimate_third": second_order + third_order,
        "trust": trust,
        "amplification": amplification,
        "amplification_estimate": estimate,
    }


def option_stats(z: Any, z2: Any, option_ids: Sequence[int], temperature: float, token_index: int) -> Stats:
    """C1: the same quantities on the logits of the option tokens only, plus both models' margins.

    `token_index` points into `option_ids`. Each margin is that model's own best logit minus its
    own second best over the options (not divided by the temperature).
    """
    options = list(option_ids)
    if len(options) < 2:
        raise ValueError("a margin needs at least two options")
    chosen, chosen2 = _float64(z)[options], _float64(z2)[options]
    stats = logit_stats(chosen, chosen2, temperature, token_index)
    first, second = sorted(chosen, reverse=True)[:2]
    stats["margin"] = float(first - second)
    first, second = sorted(chosen2, reverse=True)[:2]
    stats["margin_compressed"] = float(first - second)
    return stats


# ----------------------------------------------------------------------------- whole continuations


def _last_position(model: Any, ids: Sequence[int]) -> tuple[Array, Array]:
    """The state that enters the head [d] and the logits [V] after `ids`: one pass from scratch."""
    if model.training:
        raise ValueError("call model.eval() first: dropout would make the oracle random")
    tokens = torch.tensor([list(ids)], dtype=torch.long, device=model.device)
    with torch.no_grad():
        output = model(input_ids=tokens, use_cache=False, output_hidden_states=True)
    return _float64(output.hidden_states[-1][0, -1]), _float64(output.logits[0, -1])


def step_rows(
    dense: Any,
    compressed: Any,
    prompt_ids: Sequence[int],
    continuation_ids: Sequence[int],
    temperature: float,
) -> list[dict[str, Any]]:
    """L3: both models read the given continuation; one row per continuation token.

    A row holds `vector_stats`, `logit_stats`, `step` (from 1), `position` (0-based index of the
    predicted token in prompt + continuation), `token_id`, and the probabilities `p_token` and
    `q_token` of that token, which `survival` needs.
    """
    rows = []
    for t in range(1, len(continuation_ids) + 1):
        prefix = list(prompt_ids) + list(continuation_ids[: t - 1])
        token_id = int(continuation_ids[t - 1])
        h, z = _last_position(dense, prefix)
        h2, z2 = _last_position(compressed, prefix)
        row: dict[str, Any] = {"step": t, "position": len(prompt_ids) + t - 1, "token_id": token_id}
        row.update(vector_stats(h, h2))
        row.update(logit_stats(z, z2, temperature, token_id))
        row["p_token"] = float(_softmax(z, temperature)[token_id])
        row["q_token"] = float(_softmax(z2, temperature)[token_id])
        rows.append(row)
    return rows


def greedy(model: Any, prompt_ids: Sequence[int], max_new_tokens: int, eos_ids: Collection[int]) -> list[int]:
    """The greedy continuation; it ends with an end token or after `max_new_tokens`."""
    emitted: list[int] = []
    while len(emitted) < max_new_tokens:
        _, z = _last_position(model, list(prompt_ids) + emitted)
        emitted.append(_top(z, 1)[0])
        if emitted[-1] in eos_ids:
            break
    return emitted


def survival(per_prompt: Sequence[Sequence[Mapping[str, Any]]], horizon: int) -> dict[str, Array]:
    """S2, S2', S3 for n = 1..horizon from the teacher-forced rows of each prompt.

    `sampled` and `bound` are unbiased only when the trajectories were sampled from the dense model
    at the temperature of the rows. After the end of a trajectory both models have stopped: every
    later factor is 1 and every later total variation is 0.
    """
    sampled, bound, agreed = np.zeros(horizon), np.zeros(horizon), np.zeros(horizon)
    for rows in per_prompt:
        for n in range(1, horizon + 1):
            product = 1.0
            for row in rows[: n - 1]:
                product *= row["acceptance"]
            tv = rows[n - 1]["tv"] if n <= len(rows) else 0.0
            ratio = 1.0
            for row in rows[:n]:
                ratio *= row["q_token"] / row["p_token"]
            sampled[n - 1] += product * (1.0 - tv)
            bound[n - 1] += min(1.0, ratio)
            agreed[n - 1] += 1.0 if all(row["same_top1"] for row in rows[:n]) else 0.0
    count = len(per_prompt)
    return {"sampled": sampled / count, "bound": bound / count, "greedy": agreed / count}


def exact_survival(p_tree: Tree, q_tree: Tree, depth: int) -> Array:
    """S2 exactly: S(n) = E_{x~p} prod_{t<=n} min(1, q/p) for n = 1..depth, over all V^n sequences.

    A tree maps a prefix to the probabilities of the next token. An end token is modelled by both
    trees repeating it for ever: one-hot at the end token after any prefix that ends with it.
    """
    vocabulary = len(p_tree(()))
    result = np.zeros(depth)
    for n in range(1, depth + 1):
        for sequence in itertools.product(range(vocabulary), repeat=n):
            probability, product = 1.0, 1.0
            for t in range(n):
                p_token = float(p_tree(sequence[:t])[sequence[t]])
                if p_token == 0.0:
                    probability = 0.0
                    break
                q_token = float(q_tree(sequence[:t])[sequence[t]])
                probability *= p_token
                product *= _acceptance(p_token, q_token)
            result[n - 1] += probability * product
    return result


def exact_bound(p_tree: Tree, q_tree: Tree, depth: int) -> Array:
    """S2' exactly: 1 - TV_n of the two joint distributions of n tokens, for n = 1..depth."""
    vocabulary = len(p_tree(()))
    result = np.zeros(depth)
    for n in range(1, depth + 1):
        distance = 0.0
        for sequence in itertools.product(range(vocabulary), repeat=n):
            p_joint, q_joint = 1.0, 1.0
            for t in range(n):
                p_joint *= float(p_tree(sequence[:t])[sequence[t]])
                q_joint *= float(q_tree(sequence[:t])[sequence[t]])
            distance += abs(p_joint - q_joint)
        result[n - 1] = 1.0 - 0.5 * distance
    return result


def simulate_coupling(
    dense: Any,
    compressed: Any,
    prompt_ids: Sequence[int],
    horizon: int,
    temperature: float,
    rng: np.random.Generator,
    eos_ids: Collection[int],
    repeats: int,
) -> list[int]:
    """S3': run the optimal coupling itself; the agreed length of each repeat, in tokens.

    A token is drawn from the dense model and accepted with min(1, q/p). The first rejection ends
    the agreement (the coupled token of the compressed model then differs, so it is never drawn).
    An accepted end token stops both models, which agree from there on: the length is `horizon`.
    The mean length is therefore S(1) + ... + S(horizon).
    """
    known: dict[tuple[int, ...], tuple[Array, Array]] = {}
    lengths = []
    for _ in range(repeats):
        accepted: tuple[int, ...] = ()
        length = 0
        while length < horizon:
            if accepted not in known:
                prefix = list(prompt_ids) + list(accepted)
                _, z = _last_position(dense, prefix)
                _, z2 = _last_position(compressed, prefix)
                known[accepted] = (_softmax(z, temperature), _softmax(z2, temperature))
            p, q = known[accepted]
            token = int(rng.choice(len(p), p=p))
            if rng.random() >= _acceptance(float(p[token]), float(q[token])):
                break
            accepted += (token,)
            length += 1
            if token in eos_ids:
                length = horizon
        lengths.append(length)
    return lengths


# ------------------------------------------------------------------------------- surgery and hooks


class _Paths(NamedTuple):
    """Attribute paths of one family: the layer list, then paths inside one layer."""

    layers: str
    attention: str
    attention_output: str
    mlp: str
    mlp_output: str


_LLAMA = _Paths("model.layers", "self_attn", "self_attn.o_proj", "mlp", "mlp.down_proj")

# All of these are sequential pre-norm: x = x + attention(norm(x)); x = x + mlp(norm(x)).
_FAMILIES: dict[str, _Paths] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "phi3": _LLAMA,
    "smollm3": _LLAMA,
    "granite": _LLAMA,
    "starcoder2": _Paths("model.layers", "self_attn", "self_attn.o_proj", "mlp", "mlp.c_proj"),
    "gpt2": _Paths("transformer.h", "attn", "attn.c_proj", "mlp", "mlp.c_proj"),
}


# Where each family's sublayers write: the layer list, then what the output of a mixer of tokens and of an MLP is
# made with, inside one layer. A layer has at least one of the names (hybrids and mixtures of experts differ by layer).
_OUTPUTS: dict[str, tuple[str, str, str]] = {
    **{family: (paths.layers, paths.attention_output, paths.mlp_output) for family, paths in _FAMILIES.items()},
    **dict.fromkeys(
        "stablelm gemma gemma2 gemma3_text olmo olmo2 olmo3 cohere cohere2 glm glm4 nemotron".split(),
        ("model.layers", "self_attn.o_proj", "mlp.down_proj"),
    ),
    **dict.fromkeys(
        "mixtral qwen3_moe olmoe deepseek_v3".split(),
        ("model.layers", "self_attn.o_proj", "mlp.down_proj mlp.experts.down_proj mlp.shared_experts.down_proj"),
    ),
    "granitemoe": ("model.layers", "self_attn.o_proj", "block_sparse_moe.experts.down_proj"),
    "gpt_oss": ("model.layers", "self_attn.o_proj", "mlp.experts.down_proj mlp.experts.down_proj_bias"),
    "qwen3_next": (
        "model.layers",
        "self_attn.o_proj linear_attn.out_proj",
        "mlp.experts.down_proj mlp.shared_expert.down_proj",
    ),
    "phi": ("model.layers", "self_attn.dense", "mlp.fc2"),
    "gpt_neox": ("gpt_neox.layers", "attention.dense", "mlp.dense_4h_to_h"),
    "gptj": ("transformer.h", "attn.out_proj", "mlp.fc_out"),
    "gpt_bigcode": ("transformer.h", "attn.c_proj", "mlp.c_proj"),
    "falcon": ("transformer.h", "self_attention.dense", "mlp.dense_4h_to_h"),
    "opt": ("model.decoder.layers", "self_attn.out_proj", "fc2"),
    "bloom": ("transformer.h", "self_attention.dense", "mlp.dense_4h_to_h"),
    "mpt": ("transformer.blocks", "attn.out_proj", "ffn.down_proj"),
    "lfm2": ("model.layers", "self_attn.out_proj conv.out_proj", "feed_forward.w2"),
    "lfm2_moe": (
        "model.layers",
        "self_attn.out_proj conv.out_proj",
        "feed_forward.w2 feed_forward.experts.down_proj",
    ),
    "nemotron_h": (
        "model.layers",
        "mixer.o_proj mixer.out_proj",
        "mixer.down_proj mixer.experts.down_proj mixer.shared_experts.down_proj",
    ),
    "jamba": (
        "model.layers",
        "self_attn.o_proj mamba.out_proj",
        "feed_forward.down_proj feed_forward.experts.down_proj",
    ),
    "granitemoeshared": (
        "model.layers",
        "self_attn.o_proj",
        "block_sparse_moe.experts.down_proj shared_mlp.output_linear",
    ),
    "granitemoehybrid": (
        "model.layers",
        "self_attn.o_proj mamba.out_proj",
        "block_sparse_moe.experts.down_proj shared_mlp.output_linear",
    ),
    "falcon_h1": ("model.layers", "self_attn.o_proj mamba.out_proj", "feed_forward.down_proj"),
    "mamba": ("backbone.layers", "mixer.out_proj", ""),
    "mamba2": ("backbone.layers", "mixer.out_proj", ""),
}


def _weights(layer: Any, names: str) -> list[torch.Tensor]:
    """All weights and biases under those of these names that the layer has."""
    found = []
    for name in names.split():
        try:
            part = attrgetter(name)(layer)
        except AttributeError:
            continue
        found += [part] if isinstance(part, torch.Tensor) else list(part.parameters())
    return found


def projections(model: Any) -> list[dict[str, list[torch.Tensor]]]:
    """For each layer, the weights and biases that the output of its mixer of tokens and of its MLP is made with."""
    path, *names = _OUTPUTS[model.config.model_type]
    kinds = dict(zip(("attention", "mlp"), names, strict=True))
    return [{kind: _weights(layer, kinds[kind]) for kind in kinds} for layer in attrgetter(path)(model)]


def outline(model: Any) -> list[tuple[bool, bool]]:
    """For each layer: whether it has a mixer of tokens, and whether it has an MLP."""
    return [(bool(layer["attention"]), bool(layer["mlp"])) for layer in projections(model)]


def zeroed(
    model: Any,
    attention: Iterable[int] = (),
    mlp: Iterable[int] = (),
    blocks: Iterable[int] = (),
) -> Any:
    """A deep copy in which these layers' sublayers add nothing: output weight and bias are zero."""
    result = copy.deepcopy(model)
    layers = projections(result)
    for kind, indices in (("attention", attention), ("mlp", mlp)):
        for i in indices:
            if not layers[i][kind]:
                raise ValueError(f"layer {i} has no output of {kind}")
            for weight in layers[i][kind]:
                weight.data.zero_()
    for i in blocks:
        for weight in layers[i]["attention"] + layers[i]["mlp"]:
            weight.data.zero_()
    return result


def emptied(model: Any, names: Iterable[str]) -> Any:
    """A deep copy in which these modules compute nothing: every weight and bias inside is zero.

    `a.b.fc1+fc2` names the modules `a.b.fc1` and `a.b.fc2`.
    """
    result = copy.deepcopy(model)
    for name in names:
        first, *others = name.split("+")
        parent = first.rpartition(".")[0]
        for module in (first, *(f"{parent}.{other}" for other in others)):
            for weight in result.get_submodule(module).parameters():
                weight.data.zero_()
    return result


def written_alone(
    model: Any, prompt_ids: Sequence[int], max_new_tokens: int, eos_ids: Collection[int] = ()
) -> tuple[list[int], torch.Tensor]:
    """The greedy continuation of one prompt by whole passes, and the logits [steps, V] that chose each token."""
    written: list[int] = []
    logits: list[torch.Tensor] = []
    while len(written) < max_new_tokens and not (written and written[-1] in eos_ids):
        with torch.no_grad():
            logits.append(model(input_ids=torch.tensor([[*prompt_ids, *written]]), use_cache=False).logits[0, -1])
        written.append(_top(_float64(logits[-1]), 1)[0])
    return written, torch.stack(logits)


def _first(output: Any) -> torch.Tensor:
    """The hidden states of a module that returns them alone or first in a tuple."""
    hidden: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def redundancy(model: Any, sequences: Sequence[Sequence[int]]) -> dict[str, Array]:
    """H1 of the residual stream before against after each attention, MLP and block.

    Per layer, the mean over all tokens of all sequences (every token weighs the same).
    """
    if model.training:
        raise ValueError("call model.eval() first: dropout would make the oracle random")
    paths = _FAMILIES[model.config.model_type]
    layers = attrgetter(paths.layers)(model)
    scale = model.config.residual_multiplier if model.config.model_type == "granite" else 1.0
    seen: dict[tuple[str, int], torch.Tensor] = {}
    cosines: dict[str, list[list[float]]] = {kind: [[] for _ in layers] for kind in ("attention", "mlp", "block")}

    def watch_input(layer: int) -> Callable[..., None]:
        def hook(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            seen["input", layer] = hidden[0].detach().clone()

        return hook

    def watch_output(name: str, layer: int) -> Callable[..., None]:
        def hook(_module: Any, _args: Any, output: Any) -> None:
            seen[name, layer] = _first(output)[0].detach().clone()

        return hook

    handles = []
    for i, layer in enumerate(layers):
        handles.append(layer.register_forward_pre_hook(watch_input(i), with_kwargs=True))
        handles.append(layer.register_forward_hook(watch_output("output", i)))
        attention, mlp = attrgetter(paths.attention)(layer), attrgetter(paths.mlp)(layer)
        handles.append(attention.register_forward_hook(watch_output("attention", i)))
        handles.append(mlp.register_forward_hook(watch_output("mlp", i)))
    try:
        for sequence in sequences:
            seen.clear()
            tokens = torch.tensor([list(sequence)], dtype=torch.long, device=model.device)
            with torch.no_grad():
                model(input_ids=tokens, use_cache=False)
            for i in range(len(layers)):
                for position in range(len(sequence)):
                    before = _float64(seen["input", i][position])
                    middle = before + scale * _float64(seen["attention", i][position])
                    after = middle + scale * _float64(seen["mlp", i][position])
                    output = _float64(seen["output", i][position])
                    precision = torch.finfo(seen["output", i].dtype).eps
                    if np.max(np.abs(after - output)) > 100.0 * precision * np.max(np.abs(output)):
                        raise AssertionError(f"layer {i} is not input + attention + mlp")
                    cosines["attention"][i].append(_cosine(before, middle))
                    cosines["mlp"][i].append(_cosine(middle, after))
                    cosines["block"][i].append(_cosine(before, output))
    finally:
        for handle in handles:
            handle.remove()
    return {kind: np.array([np.mean(c) for c in per_layer]) for kind, per_layer in cosines.items()}
