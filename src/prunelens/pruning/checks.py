"""Whether a model has the parts that a recipe takes out, and something is left of it then."""

from prunelens.errors import PrunelensError, shown
from prunelens.models.model import Model
from prunelens.models.surgery.drop import Drop
from prunelens.pruning.recipe import Recipe
from prunelens.pruning.redundancy import Key
from prunelens.pruning.steps.drop import DropStep


def check_parts(recipe: Recipe, model: Model) -> None:
    """Refuse, before anything runs, a recipe that asks for parts the model does not have.

    Raises:
        PrunelensError: an index out of range, a part named twice, a count beyond the number of parts, or nothing left.
    """
    named: set[Key] = set()
    counted: dict[tuple[str, ...], int] = {}
    for step in recipe.drops:
        for kind, layer_idx in step.parts:
            if layer_idx not in _layers(kind, model):
                raise PrunelensError(
                    f"recipe {shown(str(step))}: expected a layer index from 0 to {len(model.anatomy.blocks) - 1} "
                    f"that has {kind}, found {layer_idx}"
                )
            if _overlaps((kind, layer_idx), named):
                raise PrunelensError(f"recipe {shown(str(recipe))} takes out {kind} {layer_idx} twice")
            named.add((kind, layer_idx))
        if step.count is not None:
            _check_count(step, model, named, counted)
    sizes = {block.layer_idx: len(block.sublayers) for block in model.anatomy.blocks}
    if sum(_fewest_out(step, sizes) for step in recipe.drops) >= sum(sizes.values()):
        raise _nothing_left(recipe, model)


def check_left(recipe: Recipe, model: Model, drop: Drop) -> None:
    """Refuse what was chosen if no sublayer of the model is left.

    Raises:
        PrunelensError: as said.
    """
    parts = [(part.kind, block.layer_idx) for block in model.anatomy.blocks for part in block.sublayers]
    if all(layer_idx in getattr(drop, kind) | drop.block for kind, layer_idx in parts):
        raise _nothing_left(recipe, model)


def _fewest_out(step: DropStep, sizes: dict[int, int]) -> int:
    """How many sublayers a step takes out at least; the steps of a recipe take no part twice."""
    if step.count is None:
        return sum(sizes[layer_idx] if kind == "block" else 1 for kind, layer_idx in step.parts)
    return sum(sorted(sizes.values())[: step.count]) if step.kinds == ("block",) else step.count


def _nothing_left(recipe: Recipe, model: Model) -> PrunelensError:
    return PrunelensError(
        f"recipe {shown(str(recipe))} takes out every attention and MLP of {model.name}, so that nothing is left to "
        "run; leave at least one"
    )


def _overlaps(key: Key, named: set[Key]) -> bool:
    kind, layer_idx = key
    others = ("attention", "mlp", "block") if kind == "block" else (kind, "block")
    return any((other, layer_idx) in named for other in others)


def _check_count(step: DropStep, model: Model, named: set[Key], counted: dict[tuple[str, ...], int]) -> None:
    assert step.count is not None
    keys = [(kind, layer_idx) for kind in step.kinds for layer_idx in _layers(kind, model)]
    left = sum(not _overlaps(key, named) for key in keys) - counted.get(step.kinds, 0)
    if step.count > left:
        gone = f", of which {left} parts are left" if left < len(keys) else ""
        raise PrunelensError(
            f"recipe {shown(str(step))} asks for {step.count}{' consecutive' if step.consecutive else ''} parts, but "
            f"{model.name} has {len(keys)} ({' + '.join(step.kinds)}){gone}"
        )
    counted[step.kinds] = counted.get(step.kinds, 0) + step.count


def _layers(kind: str, model: Model) -> list[int]:
    return [block.layer_idx for block in model.anatomy.blocks if kind == "block" or block.find(kind)]  # type: ignore[arg-type]
