"""D1: which sublayer causes the damage at the end.

Each sublayer is compressed alone, and all but it, and the model runs to the end. What lies before the sublayer
is shared: a sublayer alone starts from what the dense pass left there, all but it from what the compressed pass
left there. A sweep over all sublayers so costs about half of its passes.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
from jaxtyping import Float64
from torch import Tensor

from prunelens.metrics.head import Pair, stream_divergences
from prunelens.models.anatomy.hooks import decoder_of, run_decoder
from prunelens.models.batches import pad_right, plan_batches
from prunelens.models.model import Model
from prunelens.models.sizes import same_numbers
from prunelens.models.surgery.drop import Drop, dropped, own_modules, swapped
from prunelens.models.surgery.variant import Variant, shared_batching
from prunelens.tracing.forced import Edit, Trajectory, run_edits
from prunelens.tracing.layer_states import Places

BATCH_TOKENS = 1024

Part = tuple[str, int]
"""(kind, layer_idx) of a sublayer."""
REST: Part = ("rest", -1)
"""Embedding, norms that sublayers share, final norm and head."""


@dataclass
class Damage:
    """What one part does to the end: means over the steps of each trajectory, NaN where it was not measured.

    Attributes:
        changed: whether the compressed model changes this part.
        kl_alone, tv_alone: KL(p‖p') in nats and TV with only this part compressed, (trajectories,).
        kl_all_but, tv_all_but: the same with all but this part compressed.
    """

    changed: bool
    kl_alone: Float64[Tensor, " trajectories"]
    tv_alone: Float64[Tensor, " trajectories"]
    kl_all_but: Float64[Tensor, " trajectories"]
    tv_all_but: Float64[Tensor, " trajectories"]


@dataclass(frozen=True)
class _EditedPass:
    """A run of an edited model from its first changed layer on, and whose `alone` or `all_but` it is."""

    start: int
    edit: Edit
    column: str
    serves: list[tuple[str, Part]]


@dataclass
class _Group:
    """Runs of one model that share what its base left before their first layer."""

    model: Model
    base: Edit
    runs: list[_EditedPass] = field(default_factory=list)


class Attribution:
    """A sweep over the parts of compressed models.

    Args:
        dense: the dense model.
        variants: compressed models by label, each aligned with the dense one (`Variant.aligned_with`). Beside the
            sublayers that a recipe drops, all others of the same kinds are dropped alone, once for all recipes.
    """

    def __init__(self, dense: Model, variants: Mapping[str, Variant]) -> None:
        self.dense = dense
        self.damage: dict[str, dict[Part, Damage]] = {label: {} for label in variants}
        self._batching = shared_batching(dense, variants.values())
        self._changed = {label: changed_parts(dense, variant) for label, variant in variants.items()}
        self._dense_group = _Group(dense, nullcontext)
        self._groups = [self._dense_group]
        recipes = {label: variant for label, variant in variants.items() if variant.model is dense}
        self._plan_drops(recipes)
        for label, variant in variants.items():
            if label not in recipes:
                self._plan_weights(label, variant)

    @property
    def num_runs(self) -> int:
        """Runs beside the dense one, the bases of each group among them."""
        return sum(len(group.runs) + 1 for group in self._groups)

    def run(
        self,
        trajectories: Sequence[Trajectory],
        temperature: float = 1.0,
        batch_tokens: int = BATCH_TOKENS,
        advance: Callable[[int], None] = lambda steps: None,
    ) -> dict[str, dict[Part, Damage]]:
        """KL and TV at the head of every part alone, and of all but it, by label and part.

        Args:
            trajectories: the texts all models read.
            temperature: T of the softmax.
            batch_tokens: tokens run at once.
            advance: called with the number of steps compared, `num_runs` times for each batch.
        """
        self._allocate(len(trajectories))
        lengths = [len(trajectory.read_ids) for trajectory in trajectories]
        with torch.inference_mode():
            for batch in plan_batches(lengths, batch_tokens, self._batching):
                ids, _ = pad_right([trajectories[index].read_ids for index in batch], self.dense.device)
                places = Places(trajectories, batch, set())
                states = places.of(run_decoder(decoder_of(self.dense.network), ids), self.dense.device)
                for group in self._groups:
                    self._run_group(group, ids, places, states, temperature)
                    advance(len(places.steps) * (len(group.runs) + 1))
        return self.damage

    def _run_group(self, group: _Group, ids: Tensor, places: Places, states: Tensor, temperature: float) -> None:
        edits = [(run.start, run.edit) for run in group.runs]
        found = run_edits(group.model, ids, edits, group.base)
        next(found)  # the base itself
        pairs = [Pair(places.of(own, states.device), group.model.head) for own in found]
        for run, stats in zip(group.runs, stream_divergences(states, self.dense.head, pairs, temperature), strict=True):
            for label, part in run.serves:
                places.means_into(getattr(self.damage[label][part], f"kl_{run.column}"), stats["kl_dense_compressed"])
                places.means_into(getattr(self.damage[label][part], f"tv_{run.column}"), stats["tv"])

    def _allocate(self, num: int) -> None:
        for group in self._groups:
            for run in group.runs:
                for label, part in run.serves:
                    columns = [torch.full((num,), torch.nan, dtype=torch.float64) for _ in range(4)]
                    self.damage[label].setdefault(part, Damage(part in self._changed[label], *columns))

    def _plan_drops(self, recipes: Mapping[str, Variant]) -> None:
        serves: dict[Part, list[tuple[str, Part]]] = {}
        for label in recipes:
            kinds = {kind for kind, _ in self._changed[label]}
            for block in self.dense.anatomy.blocks:
                for sublayer in block.sublayers:
                    if sublayer.kind in kinds:
                        part: Part = (sublayer.kind, block.layer_idx)
                        serves.setdefault(part, []).append((label, part))
        for each, those in serves.items():
            self._dense_group.runs.append(_EditedPass(each[1], self._drop(each), "alone", those))
        for label in recipes:
            changed = self._changed[label]
            group = _Group(self.dense, self._drop(*changed))
            for each in changed:
                edit = self._drop(*(other for other in changed if other != each))
                group.runs.append(_EditedPass(each[1], edit, "all_but", [(label, each)]))
            self._groups.append(group)

    def _drop(self, *parts: Part) -> Edit:
        layers = {
            kind: frozenset(layer_idx for own, layer_idx in parts if own == kind) for kind in ("attention", "mlp")
        }
        return partial(dropped, self.dense.anatomy, Drop(**layers))

    def _plan_weights(self, label: str, variant: Variant) -> None:
        own, theirs, changed = self.dense.anatomy, variant.model.anatomy, self._changed[label]
        group = _Group(variant.model, nullcontext)
        for part in changed:
            there, back = partial(swapped, own, theirs), partial(swapped, theirs, own)
            if part != REST:
                alone, all_but = partial(there, [part]), partial(back, [part])
                self._dense_group.runs.append(_EditedPass(part[1], alone, "alone", [(label, part)]))
                group.runs.append(_EditedPass(part[1], all_but, "all_but", [(label, part)]))
            else:
                sublayers = [other for other in changed if other != REST]
                group.runs.append(_EditedPass(0, partial(back, sublayers), "alone", [(label, part)]))
                self._dense_group.runs.append(_EditedPass(0, partial(there, sublayers), "all_but", [(label, part)]))
        self._groups.append(group)


def changed_parts(dense: Model, variant: Variant) -> list[Part]:
    """The sublayers that a compressed model changes, in order of depth, and `REST` if anything else differs.

    Weights that lie on no device now (offloaded) count as changed.
    """
    if variant.model is dense:
        drop = variant.drop
        return [
            (part.kind, block.layer_idx)
            for block in dense.anatomy.blocks
            for part in block.sublayers
            if block.layer_idx in drop.block | getattr(drop, part.kind)
        ]
    own, theirs = _tensors_by_part(dense), _tensors_by_part(variant.model)
    return [part for part in own if not _all_equal(own[part], theirs[part])]


def _tensors_by_part(model: Model) -> dict[Part, dict[str, Tensor]]:
    left = dict(model.network.state_dict(keep_vars=True))
    names = {module: name for name, module in model.network.named_modules()}
    found: dict[Part, dict[str, Tensor]] = {}
    for block in model.anatomy.blocks:
        for sublayer in block.sublayers:
            own: dict[str, Tensor] = {}
            for number, module in enumerate(own_modules(block, sublayer.kind)):
                own |= {f"{number}.{name}": tensor for name, tensor in module.state_dict(keep_vars=True).items()}
                inside = f"{names[module]}."
                left = {name: tensor for name, tensor in left.items() if not name.startswith(inside)}
            found[sublayer.kind, block.layer_idx] = own
    return found | {REST: left}


def _all_equal(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(same_numbers(left[name], right[name]) for name in left)
