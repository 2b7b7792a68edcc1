"""Apply a recipe to a model: its steps from left to right, each on the model as changed so far."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

from torch import Tensor

from prunelens.errors import PrunelensError, shown
from prunelens.models.model import Model
from prunelens.models.sizes import is_quantized, tensor_bytes
from prunelens.models.surgery.drop import NOTHING, Drop, dropped, kept_weights, num_parameters, remove
from prunelens.models.surgery.experts import mask_experts, num_dropped_parameters
from prunelens.models.surgery.mixtures import find_mixtures
from prunelens.models.surgery.repairs import Repair, installed_repairs
from prunelens.models.surgery.shared_copy import twin_of
from prunelens.models.surgery.variant import Variant
from prunelens.pruning.expert_scores import choose_experts, score_experts
from prunelens.pruning.folding import find_cuts, fold_repairs, num_folding_runs
from prunelens.pruning.head_metric import head_metric
from prunelens.pruning.importance import Ranking, check_left, check_parts, choose, rank_redundancy
from prunelens.pruning.matrices import find_weights, zero_share
from prunelens.pruning.recipe import Recipe
from prunelens.pruning.repair import Fitted, Prefix, find_gaps, fit_repairs, num_block_runs
from prunelens.pruning.sequential import Masked, mask_weights
from prunelens.pruning.steps import ExpertStep, MaskStep, QuantizeStep, RepairStep, Step

Advance = Callable[[int], None]
Reporter = Callable[[str, int], Advance]
Texts = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Calibration:
    """Token ids of calibration texts.

    Attributes:
        texts: rank sublayers and experts, and say which weights count.
        repair: what repairs are fitted on; nothing that results are reported on may be among it.
        notes: what a reader of repaired models should know of `repair`.
        prefix: streams of `repair`, which the fits of several recipes share.
    """

    texts: Texts = ()
    repair: Texts = ()
    notes: tuple[str, ...] = ()
    prefix: Prefix = field(default_factory=Prefix, compare=False, repr=False)

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
        mended: how well each repair does, those folded into weights of `model` too.
        notes: remarks that a reader of the results should see.
    """

    dense: Model
    model: Model
    drop: Drop = NOTHING
    experts: dict[int, tuple[int, ...]] = field(default_factory=dict)
    quantized: Literal["int8", "int4"] | None = None
    masked: Masked | None = None
    repairs: tuple[Repair, ...] = ()
    mended: tuple[Fitted, ...] = ()
    notes: tuple[str, ...] = ()

    @cached_property
    def variant(self) -> Variant:
        """The model as it runs: the dense one with parts taken out, or a twin without them."""
        if self.drop == NOTHING or (self.model is self.dense and not self.repairs):
            return Variant(self.model, self.drop)
        twin = twin_of(self.model)
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


def apply(
    recipe: Recipe,
    model: Model,
    calibration: Calibration = NO_TEXTS,
    ranking: Ranking | None = None,
    reporter: Reporter = lambda stage, total: lambda done: None,
    seed: int = 0,
) -> Pruned:
    """Make a model smaller; the given model stays as it is.

    Args:
        recipe: the steps.
        model: the dense model.
        calibration: `texts` where `recipe.needs_calibration`, `repair` where the recipe repairs.
        ranking: scores of the dense model's sublayers, if they are known; else they are measured on the texts.
        reporter: progress display.
        seed: of experts that are dropped at random.

    Raises:
        PrunelensError: parts, experts or matrices that the model does not have, or no calibration texts.
    """
    check_recipe(recipe, model)
    if recipe.needs_ranking and ranking is None:
        ranking = _rank(model, calibration.texts, reporter)
    pruned, texts = Pruned(model, model), calibration.texts
    for step in recipe.steps:
        if isinstance(step, Step):
            pruned = replace(pruned, drop=_dropped_more(step, pruned, texts, ranking, reporter))
            check_left(recipe, model, pruned.drop)
        elif isinstance(step, RepairStep):
            pruned = _repaired(step, pruned, calibration, str(recipe), reporter)
        else:
            pruned = _changed(step, _with_twin(pruned, str(recipe)), texts, reporter, seed)
    return pruned


def check_recipe(recipe: Recipe, model: Model) -> None:
    """Refuse, before anything runs, a recipe that asks for what the model does not have.

    Raises:
        PrunelensError: as `check_parts` (nothing may be left empty), no experts, too few of them, or a missing library.
    """
    if installed_repairs(model.network):
        raise PrunelensError(
            f"recipe {shown(str(recipe))}: expected a model without repairs to change, found {model.name}; name "
            "the one that it was made from"
        )
    check_parts(recipe, model)
    if recipe.repair is not None and (recipe.repair.rank or 0) > model.anatomy.hidden_size:
        raise PrunelensError(
            f"recipe {shown(str(recipe))}: expected a rank of at most {model.anatomy.hidden_size}, the hidden size of "
            f"{model.name}, found {recipe.repair.rank}"
        )
    for step in recipe.steps:
        if isinstance(step, ExpertStep):
            choose_experts(find_mixtures(model), step.fraction, None)
        if isinstance(step, QuantizeStep):
            from prunelens.pruning.quantize import check_quantizable

            check_quantizable(model, step.to)
    if not recipe.only_drops:
        twin_of(model)  # refuses what is offloaded
        _check_plain(model)


def _check_plain(model: Model) -> None:
    for block in model.anatomy.blocks:
        for weight in find_weights(block.module, block.name):
            if is_quantized(weight.tensor) or not weight.tensor.is_floating_point():
                raise PrunelensError(
                    f"expected plain numbers in {model.name} to change, found quantised ones in {weight.name}; give "
                    "the checkpoint from before quantisation (drop recipes work on this one)"
                )


def _with_twin(pruned: Pruned, name: str) -> Pruned:
    if pruned.model is not pruned.dense:
        return pruned
    return replace(pruned, model=twin_of(pruned.dense, name))


def _rank(model: Model, texts: Texts, reporter: Reporter) -> Ranking:
    return rank_redundancy(model, texts, advance=reporter("ranking sublayers", sum(map(len, texts))))


def _dropped_more(step: Step, pruned: Pruned, texts: Texts, ranking: Ranking | None, reporter: Reporter) -> Drop:
    if not step.iterative:
        return pruned.drop | choose(step, pruned.dense, ranking, pruned.drop)
    assert step.count is not None
    drop, model = pruned.drop, pruned.model
    advance = reporter(f"{step}: ranking anew", step.count * sum(map(len, texts)))
    for _ in range(step.count):
        with dropped(model.anatomy, drop):
            ranking = rank_redundancy(model, texts, advance=advance)
        drop |= choose(step.model_copy(update={"count": 1}), model, ranking, drop)
    return drop


def _repaired(step: RepairStep, pruned: Pruned, calibration: Calibration, name: str, reporter: Reporter) -> Pruned:
    """With what the drops have taken out put back as far as the step can."""
    texts, notes = calibration.repair, pruned.notes + tuple(f"{step}: {note}" for note in calibration.notes)
    prefix = calibration.prefix_of(pruned.dense) if pruned.model is pruned.dense else None
    tokens = sum(map(len, texts))
    if tokens < pruned.model.anatomy.hidden_size and step.fit != "bias":
        notes += (
            f"{step}: fitted on {tokens} tokens, fewer than the {pruned.model.anatomy.hidden_size} inputs of a map",
        )
    if step.fit == "folded":
        pruned = _with_twin(pruned, name)
        advance = reporter(f"{step}: fitting", num_folding_runs(find_cuts(pruned.model, pruned.drop)) * tokens)
        mended = fold_repairs(pruned.model, step, pruned.drop, texts, prefix, advance=advance)
        return replace(pruned, mended=tuple(mended), notes=notes)
    metric = calibration.metric_of(pruned.dense) if step.weighted and step.rank is not None else None
    advance = reporter(f"{step}: fitting", num_block_runs(find_gaps(pruned.model, pruned.drop)) * tokens)
    repairs, mended = fit_repairs(pruned.model, step, pruned.drop, texts, metric, prefix, advance=advance)
    return replace(pruned, repairs=tuple(repairs), mended=tuple(mended), notes=notes)


def _changed(
    step: MaskStep | ExpertStep | QuantizeStep, pruned: Pruned, texts: Texts, reporter: Reporter, seed: int
) -> Pruned:
    """The recipe's twin after one more step that changes weights."""
    if isinstance(step, MaskStep):
        return _masked(step, pruned, texts, reporter)
    if isinstance(step, ExpertStep):
        return _without_experts(step, pruned, texts, reporter, seed)
    from prunelens.pruning.quantize import quantize

    before = len(pruned.model.notes)
    quantize(pruned.model, step.to)
    notes = tuple(pruned.model.notes[before:])
    return replace(pruned, quantized=step.to, notes=pruned.notes + notes)


def _masked(step: MaskStep, pruned: Pruned, texts: Texts, reporter: Reporter) -> Pruned:
    blocks = len(pruned.model.anatomy.blocks)
    advance = reporter(f"{step}, block by block", (2 * blocks - 1) * sum(map(len, texts)))
    masked = mask_weights(pruned.model, step, texts, pruned.drop, pruned.repairs, advance=advance)
    return replace(pruned, masked=masked, notes=pruned.notes + tuple(f"{step}: {note}" for note in masked.notes))


def _without_experts(step: ExpertStep, pruned: Pruned, texts: Texts, reporter: Reporter, seed: int) -> Pruned:
    mixtures = find_mixtures(pruned.model)
    scores, notes = None, pruned.notes
    if not step.uniform:
        advance = reporter(f"{step}: scoring experts", sum(map(len, texts)))
        with dropped(pruned.model.anatomy, pruned.drop, pruned.repairs):
            scores = score_experts(pruned.model, texts, advance=advance, mixtures=mixtures)
        out = pruned.drop.block | pruned.drop.mlp
        unseen = sum(int((found.counts == 0).sum()) for layer_idx, found in scores.items() if layer_idx not in out)
        if unseen:
            notes += (f"{step}: {unseen} experts read no calibration token; their score is 0",)
    experts = choose_experts(mixtures, step.fraction, scores, seed)
    mask_experts(pruned.model, experts)
    return replace(pruned, experts=experts, notes=notes)
