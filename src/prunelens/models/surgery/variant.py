"""A compressed model as the traces see it: a model, and what is taken out of it."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from prunelens.models.batches import Batching
from prunelens.models.model import Model
from prunelens.models.surgery.drop import NOTHING, Drop, dropped


@dataclass(frozen=True)
class Variant:
    """The dense model with parts taken out, or a model with weights of its own."""

    model: Model
    drop: Drop = NOTHING

    @contextmanager
    def running(self) -> Iterator[Model]:
        """The model, ready to run in the body."""
        with dropped(self.model.anatomy, self.drop):
            yield self.model

    def aligned_with(self, dense: Model) -> str:
        """Why its sublayers cannot be set beside those of `dense` one by one; empty if they can."""
        own, other = self.model.anatomy, dense.anatomy
        if own.hidden_size != other.hidden_size:
            return f"its hidden size is {own.hidden_size}, the dense model's is {other.hidden_size}"
        if self.model.dtype != dense.dtype:
            return f"it computes in {self.model.dtype}, the dense model in {dense.dtype}".replace("torch.", "")
        if len(own.blocks) != len(other.blocks):
            return f"it has {len(own.blocks)} blocks, the dense model has {len(other.blocks)}"
        for left, right in zip(own.blocks, other.blocks, strict=True):
            if [part.kind for part in left.sublayers] != [part.kind for part in right.sublayers]:
                return f"block {left.layer_idx} has other sublayers than the dense model's"
            chains = [
                [len(strand.chain) for part in block.sublayers for strand in part.strands] for block in (left, right)
            ]
            if chains[0] != chains[1] or left.layout != right.layout:
                return f"block {left.layer_idx} is put together in another way than the dense model's"
        return ""


def shared_batching(dense: Model, variants: Iterable[Variant]) -> Batching:
    """Which rows may share a batch that the dense model and all variants read."""
    found = dense.anatomy.batching
    for variant in variants:
        found &= variant.model.anatomy.batching
    return found
