"""Where a checkpoint of a recipe loads, and whether it is smaller there."""

import copy

from prunelens.errors import PrunelensError
from prunelens.models.model import Model
from prunelens.models.opening.record import KEY as RECORD
from prunelens.models.opening.record import record_of
from prunelens.models.saving.nemotron_nas import check as check_nemotron_nas
from prunelens.models.surgery.drop import Drop
from prunelens.pruning.importance import choose
from prunelens.pruning.recipe import parse_recipe
from prunelens.pruning.steps import MaskStep, QuantizeStep, RepairStep, Step

SERVED = "saved with --format nemotron-nas, vLLM, SGLang and llama.cpp leave them out"
ZEROED = "single sublayers: plain transformers and vLLM load it with zeros in their place, no smaller and no faster"
REPAIRED = {
    "bias": "the repair lies in biases where the family has them, else in a file that prunelens alone reads",
    "linear": "its maps lie in a file that prunelens alone reads: other programs load it without the repair",
    "folded": "the repair lies in the weights before the cut: every program has it",
}


def loads_where(recipe: str, model: Model) -> str:
    """Where a checkpoint of the recipe loads, and whether it is smaller there."""
    steps = parse_recipe(recipe).steps
    said = []
    for step in steps:
        if isinstance(step, MaskStep):
            said.append("the zeros of a mask are plain weights: transformers and vLLM load it, no smaller, no faster")
        elif isinstance(step, QuantizeStep):
            said.append(f"{step.to} weights load in transformers with torchao installed, smaller on disk and in memory")
        elif isinstance(step, Step) and step.kinds == ("block",):
            said.append("whole blocks are cut: plain transformers and vLLM load it, smaller and faster")
        elif isinstance(step, Step):
            others = [other for other in steps if isinstance(other, QuantizeStep | RepairStep)]
            served = all(isinstance(other, RepairStep) and other.fit == "folded" for other in others)
            served = served and _is_served(step, model)
            said.append(f"{ZEROED}; {SERVED if served else 'prunelens leaves them out'}")
        elif isinstance(step, RepairStep):
            said.append(REPAIRED[step.fit])
        else:
            said.append("fewer experts: plain transformers loads it, smaller")
    return "; ".join(said)


def _is_served(step: Step, model: Model) -> bool:
    """Whether the layout of `prune --format nemotron-nas` can express these named drops."""
    if step.at is None:
        return False
    config = copy.deepcopy(model.network.config)
    setattr(config, RECORD, record_of(choose(step, model, None, Drop()), str(step)))
    try:
        check_nemotron_nas(config)
    except PrunelensError:
        return False
    return True
