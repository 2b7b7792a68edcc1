"""A naive oracle for pruning masks: magnitude, Wanda, SparseGPT, one matrix or a whole tiny network.

Written from the definitions in numpy float64 and plain loops. Slow on purpose, and no code is shared with the
package it judges. A weight is (rows, columns) = (outputs, inputs). In a mask True means zeroed. A pattern is
a ratio r with 0 < r < 1, or (n, m): n zeros among each m consecutive columns of a row. Inputs are
(tokens, columns); `sequences` is one such array for each calibration sequence (it may have no rows: an expert
that saw nothing of a sequence).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

Array = np.ndarray
Pattern = float | tuple[int, int]
METHODS = ("magnitude", "wanda", "sparsegpt")
BLOCK_COLUMNS = 128  # SparseGPT updates this many columns before it touches the others
DAMPING = 0.01  # of the mean of the diagonal of H


# ------------------------------------------------------------------------------- masks of one matrix


def _smallest(values: Sequence[float], count: int) -> list[int]:
    """Where the `count` smallest are; among equal ones the first (Python's sort is stable)."""
    return sorted(range(len(values)), key=lambda index: values[index])[:count]


def _check_ratio(ratio: float) -> None:
    if not 0.0 < ratio < 1.0:
        raise ValueError(f"expected a ratio between 0 and 1, found {ratio}")


def _below_threshold(metric: Array, ratio: float) -> Array:
    """Mask of all that is not above the entry number int(numel * ratio) in sorted order, counted from 0."""
    _check_ratio(ratio)
    ordered = sorted(metric.flatten().tolist())
    threshold = ordered[int(len(ordered) * ratio)]
    return np.array([[value <= threshold for value in row] for row in metric.tolist()])


def n_m_mask(metric: Array, n: int, m: int) -> Array:
    """In each m consecutive columns of each row the n smallest; among equal ones the first."""
    rows, columns = metric.shape
    if not 0 < n < m or columns % m != 0:
        raise ValueError(f"expected 0 < n < m and a multiple of m columns, found n={n} m={m} columns={columns}")
    mask = np.zeros((rows, columns), dtype=bool)
    for row in range(rows):
        for start in range(0, columns, m):
            for index in _smallest(metric[row, start : start + m].tolist(), n):
                mask[row, start + index] = True
    return mask


def magnitude_mask(weight: Array, ratio: float) -> Array:
    """|W|, one threshold for the whole matrix, itself masked."""
    return _below_threshold(np.abs(np.asarray(weight)), ratio)


def wanda_metric(weight: Array, inputs: Array) -> Array:
    """|W_ij| * ||x_j||_2 in float32; the norm over all tokens is summed in float64 and cast."""
    weight32 = np.abs(np.asarray(weight)).astype(np.float32)
    columns = weight32.shape[1]
    norms = np.zeros(columns, dtype=np.float64)
    for token in np.asarray(inputs, dtype=np.float64).reshape(-1, columns):
        norms += token * token
    norms32 = np.sqrt(norms).astype(np.float32)
    return np.array([[w * norm for w, norm in zip(row, norms32, strict=True)] for row in weight32])


def wanda_mask(weight: Array, inputs: Array, ratio: float) -> Array:
    """In every row the int(columns * ratio) smallest of the metric; among equal ones the first."""
    _check_ratio(ratio)
    metric = wanda_metric(weight, inputs)
    rows, columns = metric.shape
    mask = np.zeros((rows, columns), dtype=bool)
    for row in range(rows):
        for column in _smallest(metric[row].tolist(), int(columns * ratio)):
            mask[row, column] = True
    return mask


# ----------------------------------------------------------------------------------------- SparseGPT


def hessian(sequences: Sequence[Array]) -> Array:
    """2/n times the sum of x x^T over all tokens; n is the number of sequences, also of those without rows."""
    columns = np.asarray(sequences[0]).shape[1]
    total = np.zeros((columns, columns), dtype=np.float64)
    for sequence in sequences:
        for token in np.asarray(sequence, dtype=np.float64).reshape(-1, columns):
            total += np.outer(token, token)
    return 2.0 / len(sequences) * total


def _factor(H: Array) -> Array:
    """The upper triangular U with H^-1 = U^T U, after damping."""
    damped = H + DAMPING * np.mean(np.diag(H)) * np.eye(len(H))
    return np.asarray(np.linalg.cholesky(np.linalg.inv(damped)).T)


def _saliency(weight: Array, diagonal: Array) -> Array:
    """(W_ij / U_jj)^2 in the columns given."""
    return np.array([[(w / u) ** 2 for w, u in zip(row, diagonal, strict=True)] for row in weight])


def _fix_column(W: Array, U: Array, j: int, end: int, masked: Array) -> Array:
    """Zero what is masked in column j, spread it on the columns before `end`, in place; the errors by row."""
    errors = np.zeros(len(W))
    for row in range(len(W)):
        kept = 0.0 if masked[row] else W[row, j]
        errors[row] = (W[row, j] - kept) / U[j, j]
        W[row, j] = kept
        for later in range(j + 1, end):
            W[row, later] -= errors[row] * U[j, later]
    return errors


def sparsegpt(weight: Array, sequences: Sequence[Array], pattern: Pattern) -> Array:
    """The new weight, float64: masked entries are zero, the others made up for them."""
    W = np.array(weight, dtype=np.float64)
    rows, columns = W.shape
    if isinstance(pattern, tuple) and (columns % pattern[1] != 0 or BLOCK_COLUMNS % pattern[1] != 0):
        raise ValueError(f"expected m to divide {columns} and {BLOCK_COLUMNS}, found {pattern}")
    H = hessian(sequences)
    for column in range(columns):
        if H[column, column] == 0.0:
            H[column, column] = 1.0
            W[:, column] = 0.0
    U = _factor(H)
    diagonal = np.diag(U)
    for start in range(0, columns, BLOCK_COLUMNS):
        end = min(start + BLOCK_COLUMNS, columns)
        mask, errors = np.zeros((rows, end - start), dtype=bool), np.zeros((rows, end - start))
        if not isinstance(pattern, tuple):
            mask = _below_threshold(_saliency(W[:, start:end], diagonal[start:end]), pattern)
        for j in range(start, end):
            if isinstance(pattern, tuple) and j % pattern[1] == 0:
                stop = j + pattern[1]
                mask[:, j - start : stop - start] = n_m_mask(_saliency(W[:, j:stop], diagonal[j:stop]), *pattern)
            errors[:, j - start] = _fix_column(W, U, j, end, mask[:, j - start])
        W[:, end:] -= errors @ U[start:end, end:]
    return W


# --------------------------------------------------------------------------------- one matrix, by name


def pruned(weight: Array, sequences: Sequence[Array], method: str, pattern: Pattern) -> Array:
    """The new weight, float64, by one of METHODS; without any token it falls back to magnitude."""
    weight = np.asarray(weight)
    seen = any(len(sequence) > 0 for sequence in sequences)
    if method not in METHODS:
        raise ValueError(f"expected one of {METHODS}, found {method}")
    if method == "sparsegpt" and seen:
        return sparsegpt(weight, sequences, pattern)
    wanda = method == "wanda" and seen
    inputs = np.concatenate(list(sequences)) if wanda else np.zeros((0, weight.shape[1]))
    if isinstance(pattern, tuple):
        mask = n_m_mask(wanda_metric(weight, inputs) if wanda else np.abs(weight), *pattern)
    else:
        mask = wanda_mask(weight, inputs, pattern) if wanda else magnitude_mask(weight, pattern)
    result = np.array(weight, dtype=np.float64)
    result[mask] = 0.0
    return result


def reconstruction_error(weight: Array, new: Array, sequences: Sequence[Array]) -> float:
    """||(W - W') X||_F^2 over all tokens of all sequences."""
    difference = np.asarray(weight, dtype=np.float64) - np.asarray(new, dtype=np.float64)
    total = 0.0
    for sequence in sequences:
        for token in np.asarray(sequence, dtype=np.float64):
            total += float(np.sum((difference @ token) ** 2))
    return total


# ------------------------------------------------------------------------------------- whole networks


def _numpy(tensor: torch.Tensor) -> Array:
    """A copy: float64 if the tensor is, else float32 (which holds float16 and bfloat16 exactly)."""
    exact = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    result: Array = tensor.detach().to("cpu", exact).numpy().copy()
    return result


def layers_of(network: Any) -> Any:
    """The list of blocks of a network like Llama or like GPT-2."""
    return network.transformer.h if hasattr(network, "transformer") else network.model.layers


def _matrices(layer: nn.Module) -> dict[str, nn.Module]:
    """The modules of a block that are pruned as one matrix, by name; a router is not."""
    return {
        name: module
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and name != "mlp.gate"
    }


def _mixture(layer: nn.Module) -> Any:
    """The mixture of experts of a block with 3-D parameters, or None."""
    mlp = getattr(layer, "mlp", None)
    return mlp if hasattr(mlp, "experts") and hasattr(mlp, "gate") else None


def _run(network: Any, ids: Sequence[Sequence[int]], hooks: dict[nn.Module, Callable[..., None]]) -> None:
    """Whole plain forwards, one a sequence, with these forward hooks in place."""
    handles = [module.register_forward_hook(hook) for module, hook in hooks.items()]
    try:
        for sequence in ids:
            tokens = torch.tensor([list(sequence)], dtype=torch.long, device=network.device)
            with torch.no_grad():
                network(input_ids=tokens, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()


def catch_inputs(network: Any, ids: Sequence[Sequence[int]], layer_idx: int) -> dict[str, list[Array]]:
    """What the matrices of a block read: by name, one (tokens, columns) array for each sequence.

    An expert's matrices are named mlp.experts.gate_up_proj.E and mlp.experts.down_proj.E with E its index.
    """
    layer = layers_of(network)[layer_idx]
    caught: dict[str, list[Array]] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(_module: Any, args: tuple[Any, ...], _output: Any) -> None:
            caught.setdefault(name, []).append(_numpy(args[0].reshape(-1, args[0].shape[-1])))

        return hook

    def watch_router(_module: Any, args: tuple[Any, ...], output: Any) -> None:
        indices = [part for part in output if not part.is_floating_point()]
        hidden = args[0].reshape(-1, args[0].shape[-1])
        for name, inputs in _expert_inputs(_mixture(layer).experts, hidden, indices[0]).items():
            caught.setdefault(name, []).append(_numpy(inputs))

    hooks: dict[nn.Module, Callable[..., None]] = {module: watch(name) for name, module in _matrices(layer).items()}
    if _mixture(layer) is not None:
        hooks[_mixture(layer).gate] = watch_router
    _run(network, ids, hooks)
    for name, arrays in caught.items():
        assert len(arrays) == len(ids), f"{name} ran {len(arrays)} times for {len(ids)} sequences"
    return caught


def _expert_inputs(experts: Any, hidden: torch.Tensor, indices: torch.Tensor) -> dict[str, torch.Tensor]:
    """What every expert's two matrices read: only the tokens, in order, that have it among their top-k."""
    inputs = {}
    for expert in range(len(experts.gate_up_proj)):
        rows = [token for token, chosen in enumerate(indices.tolist()) if expert in chosen]
        states = hidden[rows]
        both = states @ experts.gate_up_proj[expert].T
        half = both.shape[-1] // 2
        inputs[f"mlp.experts.gate_up_proj.{expert}"] = states
        inputs[f"mlp.experts.down_proj.{expert}"] = experts.act_fn(both[:, :half]) * both[:, half:]
    return inputs


def _targets(layer: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of a block as (outputs, inputs) views, by the names of `catch_inputs`."""
    targets: dict[str, torch.Tensor] = {}
    for name, module in _matrices(layer).items():
        weight: Any = module.weight
        targets[name] = weight.data.T if isinstance(module, Conv1D) else weight.data
    if _mixture(layer) is not None:
        for kind in ("gate_up_proj", "down_proj"):
            for expert, weight in enumerate(getattr(_mixture(layer).experts, kind).data):
                targets[f"mlp.experts.{kind}.{expert}"] = weight
    return targets


def sequential(network: Any, ids: Sequence[Sequence[int]], method: str, pattern: Pattern) -> Any:
    """A pruned copy: block after block, each with the inputs it gets behind the pruned blocks before it.

    For every block the whole network reads all of `ids`, with the block itself still dense; then all
    its matrices are pruned. Networks like Llama (nn.Linear), GPT-2 (Conv1D) and Mixtral (3-D experts).
    """
    if network.training:
        raise ValueError("call network.eval() first: dropout would make the oracle random")
    result = copy.deepcopy(network)
    for layer_idx, layer in enumerate(layers_of(result)):
        inputs = catch_inputs(result, ids, layer_idx)
        targets = _targets(layer)
        assert set(inputs) == set(targets), f"block {layer_idx}: {set(inputs) ^ set(targets)} did not run or is unknown"
        for name, weight in targets.items():
            new = pruned(_numpy(weight), inputs[name], method, pattern)
            weight.copy_(torch.from_numpy(new))
    return result
