"""Apply a recipe to a model: its steps from left to right, each on the model as changed so far."""

from prunelens.errors import PrunelensError, shown
from prunelens.models.model import Model
from prunelens.models.sizes import is_quantized
from prunelens.models.surgery.repairs import installed_repairs
from prunelens.models.surgery.shared_copy import shared_copy_of
from prunelens.progress import Reporter, silent
from prunelens.pruning.checks import check_left, check_parts
from prunelens.pruning.matrices import find_weights
from prunelens.pruning.pruned import NO_TEXTS, Calibration, Pruned, StepInputs
from prunelens.pruning.recipe import Recipe
from prunelens.pruning.redundancy import Ranking


def apply(
    recipe: Recipe,
    model: Model,
    calibration: Calibration = NO_TEXTS,
    ranking: Ranking | None = None,
    reporter: Reporter = silent,
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
    pruned, inputs = Pruned(model, model), StepInputs(str(recipe), calibration, ranking, reporter, seed)
    for step in recipe.steps:
        pruned = step.apply(pruned, inputs)
        check_left(recipe, model, pruned.drop)
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
    for step in recipe.steps:
        step.check(model, str(recipe))
    if not recipe.only_drops:
        shared_copy_of(model)  # refuses what is offloaded
        _check_plain(model)


def _check_plain(model: Model) -> None:
    for block in model.anatomy.blocks:
        for weight in find_weights(block.module, block.name):
            if is_quantized(weight.tensor) or not weight.tensor.is_floating_point():
                raise PrunelensError(
                    f"expected plain numbers in {model.name} to change, found quantised ones in {weight.name}; give "
                    "the checkpoint from before quantisation (drop recipes work on this one)"
                )
