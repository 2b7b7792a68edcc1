"""Nothing that was found in a model is believed before these have been checked on real numbers."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from prunelens.models.anatomy.hooks import Call, decoder_of, replay_from, run_decoder

TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-4, torch.float16: 3e-2, torch.bfloat16: 6e-2}
# of float64 too: some families round in between


_AT_LEAST: ContextVar[float] = ContextVar("tolerance", default=0.0)


@contextmanager
def tolerating(share: float) -> Iterator[None]:
    """Take differences up to this share for rounding while the body runs."""
    before = _AT_LEAST.set(share)
    try:
        yield
    finally:
        _AT_LEAST.reset(before)


def tolerated() -> float:
    """The share that is taken for rounding beyond that of a dtype; 0 outside of `tolerating`."""
    return _AT_LEAST.get()


def _tolerance(*dtypes: torch.dtype) -> float:
    return max(_AT_LEAST.get(), *(TOLERANCE.get(dtype, 0.1) for dtype in dtypes))


class UnprovedError(Exception):
    """Says what was expected of a model, and what was found."""


def is_close(found: Tensor, expected: Tensor) -> bool:
    """Whether the difference is rounding, relative to the norm of what was expected."""
    return difference(found, expected) <= _tolerance(found.dtype, expected.dtype)


def difference(found: Tensor, expected: Tensor) -> float:
    """How far a tensor is from what was expected, as a share of the norm of that; NaN where either holds NaN."""
    gap = float((found.to(expected.device).double() - expected.double()).norm())
    size = float(expected.double().norm())
    return gap / size if size else gap and math.inf


def expect_close(found: Tensor, expected: Tensor, part: str) -> None:
    """Refuse a part that does not rebuild."""
    if found.shape != expected.shape or not is_close(found, expected):
        raise UnprovedError(f"expected the {part} to be what the model's parts make of it, found other numbers")


def solve_scales(source: Tensor, result: Tensor, parts: Sequence[Tensor], name: str) -> list[float]:
    """Numbers s with result = source + Σ s·part; 1 for every family without a residual multiplier.

    NaN for a part that is zero throughout, as in a checkpoint with zeroed weights: any number would do.
    """
    if not parts or any(part.numel() != source.numel() for part in parts):
        raise UnprovedError(f"expected parts in {name} that add up to its residual stream, found none")
    wanted = (result - source).double().flatten().cpu()
    matrix = torch.stack([part.double().flatten().cpu() for part in parts], dim=1)
    tolerance = _tolerance(result.dtype, *(part.dtype for part in parts))
    tolerance *= max(float(source.double().norm()), float(result.double().norm()))
    told = matrix.any(dim=0)
    solution = torch.full((len(parts),), torch.nan, dtype=torch.float64)
    if float((matrix.sum(dim=1) - wanted).norm()) <= tolerance:
        solution[told] = 1.0
        return [float(value) for value in solution]
    solution[told] = torch.linalg.lstsq(matrix[:, told], wanted.unsqueeze(1)).solution.squeeze(1)
    if float((matrix[:, told] @ solution[told] - wanted).norm()) > tolerance:
        raise UnprovedError(
            f"expected {name} to add its sublayers' outputs to the residual stream, found other numbers"
        )
    return [float(value) for value in solution]


def is_position_wise(module: nn.Module, call: Call) -> bool:
    """Whether what a module returns for one position does not change with another position's input."""
    changed = call.source.clone()
    changed[..., 0, :] = call.source[..., -1, :]
    before, after = (call.again(module, source) for source in (call.source, changed))
    return is_close(after[..., 1:, :], before[..., 1:, :])


def keeps_zeros(modules: Sequence[tuple[nn.Module, Call]], zeros: Tensor) -> bool:
    """Whether modules run one after the other on zeros return zeros."""
    for module, call in modules:
        zeros = call.again(module, zeros.reshape(call.source.shape))
    return not bool(zeros.any())


def check_causality(model: nn.Module, ids: Tensor, hidden: Tensor) -> None:
    """Change the last token: no state before it may change."""
    vocab_size = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    changed = ids.clone()
    changed[:, -1] = (changed[:, -1] + 1) % vocab_size
    if not is_close(run_decoder(decoder_of(model), changed)[:, :-1], hidden[:, :-1]):
        raise UnprovedError("expected a causal decoder, found that a token changes the states before it")


def check_replay(
    model: nn.Module, layers: Sequence[nn.Module], outputs: Sequence[Any], ids: Tensor, hidden: Tensor
) -> None:
    """Run the second half of the layers from what the first half returned."""
    start = len(layers) // 2
    if start == 0:
        return
    with replay_from(layers, start, outputs[start - 1]):
        expect_close(run_decoder(decoder_of(model), ids), hidden, f"replay from layer {start}")


def check_head(model: nn.Module, head: Callable[[Tensor], Tensor], ids: Tensor, hidden: Tensor) -> Tensor:
    """Logits from the last states alone must be the model's own, (1, T, V)."""
    logits = model(input_ids=ids, use_cache=False).logits
    expect_close(head(hidden.flatten(0, 1)), logits.flatten(0, 1), "language-model head")
    return logits
