"""Make the weights of a model sparse block by block, each block reading what the sparse blocks before it write.

All matrices of a block are judged by one pass over the calibration tokens with the block still dense; a second
pass of the block, now sparse, gives the next one its inputs. Only the streams between two blocks and one block's
statistics are in memory.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from prunelens.models.anatomy.parts import Block
from prunelens.models.batches import equal_batches, with_tokens
from prunelens.models.model import Model
from prunelens.models.surgery.drop import NOTHING, Drop, dropped
from prunelens.models.surgery.repairs import Repair
from prunelens.models.surgery.run_span import run_span
from prunelens.models.surgery.shared_copy import set_weight
from prunelens.pruning.calling import mask_scores
from prunelens.pruning.masks import lowest
from prunelens.pruning.matrices import BlockStatistics, Products, Squares, Weight, find_weights, watched_inputs
from prunelens.pruning.methods import SPARSEGPT, InputStatistics, Method, method_named
from prunelens.pruning.sparsegpt import Curvature, curvature, sparsegpt_weight
from prunelens.pruning.values import Pattern

BATCH_TOKENS = 2048
BY_SIZE = "magnitude"
"""What masks a matrix that has read no token."""


@dataclass
class Masked:
    """What was made sparse.

    Attributes:
        zeros, total: zero weights in the matrices, and all.
        without_tokens: matrices that read no calibration token, masked by magnitude instead.
        left_dense: matrices whose inputs cannot be divided into groups of m.
    """

    zeros: int = 0
    total: int = 0
    without_tokens: list[str] = field(default_factory=list)
    left_dense: list[str] = field(default_factory=list)

    @property
    def notes(self) -> list[str]:
        """What a reader of the results should know."""
        found = []
        if self.without_tokens:
            found.append(
                f"{len(self.without_tokens)} matrices read no calibration token and were masked by magnitude "
                f"({_some(self.without_tokens)})"
            )
        if self.left_dense:
            found.append(
                f"{len(self.left_dense)} matrices stayed dense, since m does not divide the number of their inputs "
                f"({_some(self.left_dense)})"
            )
        return found


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def mask_weights(
    model: Model,
    method: str,
    pattern: Pattern,
    sequences: Sequence[Sequence[int]] = (),
    drop: Drop = NOTHING,
    repairs: Sequence[Repair] = (),
    batch_tokens: int = BATCH_TOKENS,
    advance: Callable[[int], None] = lambda tokens: None,
) -> Masked:
    """Make every matrix inside the blocks of a twin sparse; embedding, head and norms stay.

    Args:
        model: a twin (`shared_copy_of`), whose weights are replaced.
        method: the name of a registered mask, or sparsegpt.
        pattern: how many weights become zero.
        sequences: token ids of the calibration texts; not needed for a mask that reads no inputs.
        drop: parts that are out while the calibration texts are read; their matrices stay as they are.
        repairs: what stands in for them.
        batch_tokens: tokens run at once.
        advance: called with the number of tokens a block has read, each block twice.

    Raises:
        PrunelensError: no calibration tokens, activations that are no numbers, or a mask from outside that fails.
    """
    found = Masked()
    masker = _Masker(method, pattern, sum(1 for sequence in sequences if len(sequence)))
    if not masker.reads_inputs:
        for block in model.anatomy.blocks:
            for weight in _weights(block, drop):
                _replace(weight, masker, None, found, pattern.group)
        return found
    sequences = with_tokens(sequences)
    batches = [
        torch.tensor(batch, device=model.device)
        for batch in equal_batches(sequences, batch_tokens, model.anatomy.batching)
    ]
    outputs: list[Any] = [None] * len(batches)
    with torch.no_grad(), dropped(model.anatomy, drop, repairs), _eager_experts(model):
        for block in model.anatomy.blocks:
            weights = _weights(block, drop)
            statistics = BlockStatistics(Products if method == SPARSEGPT else Squares)
            if weights:
                for ids, output in zip(batches, outputs, strict=True):
                    with watched_inputs(weights, statistics.take):
                        run_span(model, block.layer_idx, block.layer_idx + 1, ids, output)
                    advance(ids.numel())
            for weight in weights:
                _replace(weight, masker, statistics, found, pattern.group)
            if block is not model.anatomy.blocks[-1]:
                for place, ids in enumerate(batches):
                    outputs[place] = run_span(model, block.layer_idx, block.layer_idx + 1, ids, outputs[place])
                    advance(ids.numel())
    return found


def _weights(block: Block, drop: Drop) -> list[Weight]:
    """The matrices of what is left of a block."""
    if block.layer_idx in drop.block:
        return []
    gone = {
        module
        for part in block.sublayers
        if block.layer_idx in getattr(drop, part.kind)
        for core in part.body
        for module in core.modules()
    }
    return [weight for weight in find_weights(block.module, block.name) if weight.module not in gone]


@contextmanager
def _eager_experts(model: Model) -> Iterator[None]:
    """Let mixtures of experts multiply one expert after the other, so that each product can be seen."""
    network = model.network
    before = getattr(network.config, "_experts_implementation", None)
    if before is None or not network._can_set_experts_implementation():
        yield
        return
    network.set_experts_implementation("eager")
    try:
        yield
    finally:
        network.set_experts_implementation(before)


def _replace(weight: Weight, masker: "_Masker", statistics: BlockStatistics | None, found: Masked, group: int) -> None:
    """Put the sparse weight into its module."""
    stored = weight.tensor.clone()
    if group and weight.matrix(0).shape[1] % group:
        found.left_dense.append(weight.name)
    else:
        for expert in range(weight.num_experts):
            statistic = statistics.of((weight.name, expert)) if statistics else None
            if statistics and statistic is None:
                found.without_tokens.append(_expert_name(weight, expert))
            new = masker.sparse(weight.matrix(expert), statistic)
            target = stored[expert] if stored.ndim == 3 else stored
            target.copy_(new.T if weight.inputs_first else new)
        set_weight(weight.module, weight.attribute, stored)
    found.zeros += int((stored == 0).sum())
    found.total += stored.numel()


def _expert_name(weight: Weight, expert: int) -> str:
    return f"{weight.name}[{expert}]" if weight.tensor.ndim == 3 else weight.name


class _Masker:
    """Makes matrices sparse one after the other; neighbours with the same inputs share their curvature."""

    def __init__(self, name: str, pattern: Pattern, num_sequences: int) -> None:
        self._mask = None if name == SPARSEGPT else _known(name)
        self._by_size = _known(BY_SIZE)
        self._pattern = pattern
        self._num_sequences = num_sequences
        self._last: tuple[Tensor, Curvature] | None = None

    @property
    def reads_inputs(self) -> bool:
        """Whether calibration texts have to be read."""
        return self._mask is None or self._mask.reads_inputs

    def sparse(self, matrix: Tensor, statistic: InputStatistics | Tensor | None) -> Tensor:
        """The sparse matrix (rows, columns), by magnitude where nothing is known of its inputs."""
        if isinstance(statistic, Tensor):
            if self._last is None or self._last[0] is not statistic:
                self._last = (statistic, curvature(statistic, self._num_sequences))
            return sparsegpt_weight(matrix, self._last[1], self._pattern)
        unread = statistic is None and self.reads_inputs
        mask = self._by_size if self._mask is None or unread else self._mask
        return matrix.masked_fill(lowest(mask_scores(mask, matrix, statistic), self._pattern, mask.per), 0)


def _known(name: str) -> Method:
    found = method_named("mask", name)
    assert found is not None, name  # steps are checked when a recipe is parsed
    return found
