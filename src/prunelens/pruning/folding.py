"""Repair by weights that are there already: what the sublayer before a cut writes is mapped, and its output
projection takes the map in. The checkpoint stays one that any program loads."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from prunelens.errors import PrunelensError
from prunelens.models.anatomy.parts import Block, Sublayer
from prunelens.models.anatomy.proofs import is_close
from prunelens.models.anatomy.streams import BlockPass, SublayerPass
from prunelens.models.model import Model
from prunelens.models.saving.zeroing import added, silencing_weights
from prunelens.models.surgery.drop import Drop, remove
from prunelens.models.surgery.shared_copy import named_owners, set_weight, shared_copy_of
from prunelens.progress import Advance, unreported
from prunelens.pruning.least_squares import choose_strength, solve
from prunelens.pruning.matrices import find_weights
from prunelens.pruning.repair import BATCH_TOKENS, Passes, Prefix, RepairFit, RepairSpan, Walk, explained

Place = tuple[Block, Sublayer]


@dataclass(frozen=True)
class Cut:
    """Sublayers that follow one another and are out, and the one before them, whose weights take the map in."""

    before: Sublayer
    places: tuple[Place, ...]

    @property
    def drop(self) -> Drop:
        """What is out."""
        kinds: dict[str, set[int]] = {"attention": set(), "mlp": set()}
        for block, part in self.places:
            kinds[part.kind].add(block.layer_idx)
        return Drop(frozenset(kinds["attention"]), frozenset(kinds["mlp"]))

    @property
    def gap(self) -> RepairSpan:
        """The same in words: a sublayer, or all blocks that it touches."""
        first, last = self.places[0], self.places[-1]
        kind = first[1].kind if len(self.places) == 1 else "block"
        return RepairSpan(kind, first[0].layer_idx, last[0].layer_idx)


def find_cuts(model: Model, drop: Drop) -> list[Cut]:
    """What is out, in the order in which a token passes it, with what is before each run of it.

    Raises:
        PrunelensError: nothing is before the first, or half of a parallel block is out.
    """
    cuts: list[list[Place]] = []
    before: list[Place | None] = []
    last: Place | None = None
    for block in model.anatomy.blocks:
        out = [part for part in block.sublayers if block.layer_idx in drop.block | getattr(drop, part.kind)]
        if block.layout == "parallel" and out and len(out) < len(block.sublayers):
            raise _unfoldable(f"the sublayers of layer {block.layer_idx} run side by side; drop the whole block")
        for part in block.sublayers:
            if part not in out:
                last = (block, _mlp_of(block) if block.layout == "parallel" else part)
            elif cuts and cuts[-1] and before[-1] is last:
                cuts[-1].append((block, part))
            else:
                cuts.append([(block, part)])
                before.append(last)
    if any(place is None for place in before):
        raise _unfoldable("nothing comes before the first part that is out; drop later ones")
    return [Cut(place[1], tuple(cut)) for place, cut in zip(before, cuts, strict=True) if place is not None]


def _mlp_of(block: Block) -> Sublayer:
    return block.find("mlp") or block.sublayers[-1]


def fold_repairs(
    model: Model,
    drop: Drop,
    sequences: Sequence[Sequence[int]],
    weighted: bool = False,
    prefix: Prefix | None = None,
    batch_tokens: int = BATCH_TOKENS,
    advance: Advance = unreported,
) -> list[RepairFit]:
    """Fit a map for every cut, in order, and multiply the output projection before it by the map.

    Args:
        model: a twin with all parts at work; the weights before the cuts are replaced.
        drop: what is out.
        sequences: token ids of the calibration texts.
        weighted: whether a token counts as it moves the probabilities (R4).
        prefix: streams of an earlier fit on the same texts.
        batch_tokens: tokens run at once.
        advance: called with the number of tokens that have passed a block.

    Raises:
        PrunelensError: no calibration tokens, nothing before a cut, or weights there that cannot take a map in.
    """
    working = shared_copy_of(model)
    walk = Walk(working, sequences, weighted, batch_tokens, advance)
    cuts = find_cuts(model, drop)
    if cuts:
        walk.reach(cuts[0].before.layer_idx, prefix)
    found = []
    for cut in cuts:
        names = silencing_weights(working, Drop(**{cut.before.kind: frozenset([cut.before.layer_idx])}))
        _check_foldable(working, cut.before, names)
        with_bias = _has_bias(working, names)
        last = cut.places[-1][0].layer_idx
        fit, held_out = walk.moments(cut.before.layer_idx, last, partial(_read_cut, cut))
        strength, error = choose_strength(fit, held_out, with_bias)
        fitted = solve(fit + held_out, strength, with_bias)
        matrix = torch.eye(len(fitted.weight), dtype=torch.float64, device=fitted.weight.device) + fitted.weight
        for owner in (model, working):
            _fold(owner, cut.before, names, matrix, fitted.bias)
        remove(working.anatomy, cut.drop)
        found.append(RepairFit(cut.gap, strength, explained(error, held_out)))
    return found


def num_folding_runs(cuts: Sequence[Cut]) -> int:
    """How many blocks each calibration token passes while the cuts are repaired."""
    reached = [0, *(cut.before.layer_idx for cut in cuts)]
    return sum(cut.places[-1][0].layer_idx + 1 - at for cut, at in zip(cuts, reached, strict=False))


def _read_cut(cut: Cut, passes: Passes) -> tuple[Tensor, Tensor, Tensor]:
    """What the sublayer before has added, what the cut has added, and the stream after it."""
    before = passes[cut.before.kind, cut.before.layer_idx]
    assert isinstance(before, SublayerPass)
    start = _stream(cut.places[0], passes, after=False)
    end = _stream(cut.places[-1], passes, after=True)
    return before.added.to(end.device), end - start.to(end.device), end


def _stream(place: Place, passes: Passes, after: bool) -> Tensor:
    """The stream before or after a sublayer; at the edge of its block it is the block's."""
    block, part = place
    edge = part == block.sublayers[-1 if after else 0] or block.layout == "parallel"
    passed = passes["block" if edge else part.kind, block.layer_idx]
    assert isinstance(passed, BlockPass | SublayerPass)
    return passed.after if after else passed.before


def _has_bias(model: Model, names: set[str]) -> bool:
    return any(model.network.get_parameter(name).ndim == 1 for name in names)


def _check_foldable(model: Model, part: Sublayer, names: set[str]) -> None:
    """Refuse weights that a norm or anything else follows, by folding a map in that is nothing like the identity.

    A fitted map may be so close to it that rounding hides whether it does anything.
    """
    size, generator = model.anatomy.hidden_size, torch.Generator().manual_seed(0)
    before = added(model, part).double()
    shuffled = torch.eye(size, dtype=torch.float64)[torch.randperm(size, generator=generator)]
    bias = torch.randn(size, generator=generator, dtype=torch.float64).to(before.device)
    bias *= before.square().mean().sqrt() if _has_bias(model, names) else 0
    _fold(shared_copy_of(model), part, names, 2 * shuffled.to(before.device), bias)


def _fold(model: Model, part: Sublayer, names: set[str], matrix: Tensor, bias: Tensor) -> None:
    """Let weights write what they wrote, times `matrix` (d, d), plus `bias`; proved by running them."""
    part = next(own for own in model.anatomy.blocks[part.layer_idx].sublayers if own.kind == part.kind)
    wanted = added(model, part).double() @ matrix + bias
    block = model.anatomy.blocks[part.layer_idx]
    stored = {weight.name: weight for weight in find_weights(block.module, block.name)}
    owners = named_owners(model.network)
    for name in names:
        tensor = model.network.get_parameter(name)
        value = tensor.double()
        if tensor.shape[-1] != len(matrix) and name not in stored:
            raise _unfoldable(f"{name} has no side of {len(matrix)} outputs")
        outputs_first = name in stored and not stored[name].inputs_first
        value = matrix.T @ value if outputs_first else value @ matrix
        if name not in stored and value.ndim == 1:
            value = value + bias / part.scale
        set_weight(*owners[name], value.to(tensor.dtype))
    if not is_close(added(model, part), wanted.to(model.dtype)):
        raise _unfoldable(f"what {part.name} adds is not made by one product with {', '.join(sorted(names))}")


def _unfoldable(why: str) -> PrunelensError:
    return PrunelensError(
        f"repair:folded cannot be used here: {why}, or use repair:linear, which is a module of its own"
    )
