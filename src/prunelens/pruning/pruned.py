"""A model as a recipe has made it so far, and what its steps are given to work with."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from torch import Tensor

from prunelens.models.model import Model
from prunelens.models.sizes import is_quantized, tensor_bytes
from prunelens.models.surgery.drop import NOTHING, Drop, kept_weights, num_parameters, remove
from prunelens.models.surgery.experts import num_dropped_parameters
from prunelens.models.surgery.repairs import Repair
from prunelens.models.surgery.shared_copy import shared_copy_of
from prunelens.models.surgery.variant import Variant
from prunelens.progress import Reporter
from prunelens.pruning.head_metric import head_metric
from prunelens.pruning.matrices import zero_share
from prunelens.pruning.methods import COSINE
from prunelens.pruning.redundancy import Ranking, rank_redundancy
from prunelens.pruning.repair import Prefix, RepairFit
from prunelens.pruning.sequential import Masked
from prunelens.pruning.values import Format

Texts = Sequence[Sequence[int]]


@dataclass
class Rankings:
    """Scores of one model's parts on the same texts, by the name of the ranking, which several recipes share."""

    owner: Any = None
    texts: Texts | None = None
    known: dict[str, Ranking] = field(default_factory=dict)

    def of(self, by: str, model: Model, texts: Texts, reporter: Reporter) -> Ranking:
        """The scores, measured at the first call; those of another model or other texts are forgotten."""
        if self.owner is not model.network or self.texts is not texts:
            self.owner, self.texts, self.known = model.network, texts, {}
        if by not in self.known:
            stage = "ranking sublayers" if by == COSINE else f"ranking sublayers by {by}"
            self.known[by] = rank_redundancy(model, texts, advance=reporter(stage, sum(map(len, texts))), by=by)
        return self.known[by]


@dataclass(frozen=True)
class Calibration:
    """Token ids of calibration texts.

    Attributes:
        texts: rank sublayers and experts, and say which weights count.
        repair: what repairs are fitted on; nothing that results are reported on may be among it.
        notes: what a reader of repaired models should know of `repair`.
        prefix: streams of `repair`, which the fits of several recipes share.
        rankings: what `texts` have shown of the dense model's parts.
    """

    texts: Texts = ()
    repair: Texts = ()
    notes: tuple[str, ...] = ()
    prefix: Prefix = field(default_factory=Prefix, compare=False, repr=False)
    rankings: Rankings = field(default_factory=Rankings, compare=False, repr=False)

    def prefix_of(self, model: Model) -> Prefix:
        """The streams of this model; those of another are forgotten."""
        if self.prefix.owner is not model.network:
            prefix = self.prefix
            prefix.at, prefix.outputs, prefix.owner, prefix.metric = 0, [], model.network, None
        return self.prefix

    def metric_of(self, model: Model) -> Tensor:
        """M of this model's head on the texts of `repair`, made once."""
        prefix = self.prefix_of(model)
        if prefix.metric is None:
            prefix.metric = head_metric(model, self.repair)
        return prefix.metric


NO_TEXTS = Calibration()


@dataclass(frozen=True)
class Pruned:
    """A model made smaller by a recipe.

    Attributes:
        dense: the model before.
        model: a twin with other weights, or the dense model itself; nothing is taken out of it.
        drop: the parts to take out.
        experts: dropped experts by layer; the routers of `model` pass them over already.
        quantized: the format of the blocks' matrices.
        masked: what the last mask left.
        repairs: what stands in for parts of `drop`.
        repaired: how well each repair does, those folded into weights of `model` too.
        notes: remarks that a reader of the results should see.
    """

    dense: Model
    model: Model
    drop: Drop = NOTHING
    experts: dict[int, tuple[int, ...]] = field(default_factory=dict)
    quantized: Format | None = None
    masked: Masked | None = None
    repairs: tuple[Repair, ...] = ()
    repaired: tuple[RepairFit, ...] = ()
    notes: tuple[str, ...] = ()

    def with_own_weights(self, name: str) -> "Pruned":
        """The same with a twin whose weights a step may change, if it has none yet."""
        return self if self.model is not self.dense else replace(self, model=shared_copy_of(self.dense, name))

    @cached_property
    def variant(self) -> Variant:
        """The model as it runs: the dense one with parts taken out, or a twin without them."""
        if self.drop == NOTHING or (self.model is self.dense and not self.repairs):
            return Variant(self.model, self.drop)
        twin = shared_copy_of(self.model)
        remove(twin.anatomy, self.drop, self.repairs)
        return Variant(twin)

    @property
    def num_parameters(self) -> int:
        """Parameters that are read."""
        found = num_parameters(self.model.network, self.model.anatomy, self.drop, self.repairs)
        return found - self._num_in_experts

    @property
    def num_bytes(self) -> int:
        """Bytes of the weights that are read: quantised ones as they are, others as in the dense checkpoint."""
        each = self.dense.weight_bytes / num_parameters(self.dense.network, self.dense.anatomy)
        found = -self._num_in_experts * each
        for weight in kept_weights(self.model.network, self.model.anatomy, self.drop, self.repairs):
            found += tensor_bytes(weight) if is_quantized(weight) else weight.numel() * each
        return round(found)

    @property
    def zero_share(self) -> float:
        """Share of exact zeros among the numbers of the matrices that are left in the blocks."""
        variant = self.variant
        return zero_share(block for block in variant.model.anatomy.blocks if block.layer_idx not in variant.drop.block)

    @property
    def _num_in_experts(self) -> int:
        left = {layer: gone for layer, gone in self.experts.items() if layer not in self.drop.block | self.drop.mlp}
        return num_dropped_parameters(self.model, left) if left else 0


@dataclass(frozen=True)
class StepInputs:
    """What the steps of one recipe are given.

    Attributes:
        recipe: the whole recipe as text, which names a changed model.
        calibration: texts.
        ranking: cosine scores of the dense model, where they are known already.
        reporter: progress display.
        seed: of what is chosen at random.
    """

    recipe: str
    calibration: Calibration
    ranking: Ranking | None
    reporter: Reporter
    seed: int

    def ranking_of(self, dense: Model, by: str | None) -> Ranking:
        """Scores of the dense model's parts by a ranking, None for the cosine."""
        if by is None and self.ranking is not None:
            return self.ranking
        return self.calibration.rankings.of(by or COSINE, dense, self.calibration.texts, self.reporter)
