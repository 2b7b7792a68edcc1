"""See where pruning damages a language model: in embeddings, logits or token probabilities, and for how long."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prunelens.api import advise, benchmark, compare, evaluate, inspect, prune, sweep
    from prunelens.errors import PrunelensError
    from prunelens.models.model import Model
    from prunelens.models.opening.loading import load, wrap
    from prunelens.models.surgery.drop import Drop, dropped
    from prunelens.pruning.methods import InputStatistics, PartStates, mask, ranking
    from prunelens.pruning.recipe import Recipe, parse_recipe
    from prunelens.pruning.redundancy import rank_redundancy
    from prunelens.results import Advice, Comparison, Evaluation, Sweep
    from prunelens.study.benchmark.record import SpeedSettings
    from prunelens.study.evaluate.verdict import Thresholds
    from prunelens.study.prune.prune import PruneResult
    from prunelens.tasks.prompts import prompts

_HOMES = {
    "Advice": "prunelens.results",
    "Comparison": "prunelens.results",
    "Drop": "prunelens.models.surgery.drop",
    "Evaluation": "prunelens.results",
    "InputStatistics": "prunelens.pruning.methods",
    "Model": "prunelens.models.model",
    "PartStates": "prunelens.pruning.methods",
    "PruneResult": "prunelens.study.prune.prune",
    "PrunelensError": "prunelens.errors",
    "Recipe": "prunelens.pruning.recipe",
    "SpeedSettings": "prunelens.study.benchmark.speed",
    "Sweep": "prunelens.results",
    "Thresholds": "prunelens.study.evaluate.verdict",
    "advise": "prunelens.api",
    "benchmark": "prunelens.api",
    "compare": "prunelens.api",
    "dropped": "prunelens.models.surgery.drop",
    "evaluate": "prunelens.api",
    "inspect": "prunelens.api",
    "load": "prunelens.models.opening.loading",
    "mask": "prunelens.pruning.methods",
    "parse_recipe": "prunelens.pruning.recipe",
    "prompts": "prunelens.tasks.prompts",
    "prune": "prunelens.api",
    "rank_redundancy": "prunelens.pruning.redundancy",
    "ranking": "prunelens.pruning.methods",
    "sweep": "prunelens.api",
    "wrap": "prunelens.models.opening.loading",
}

__all__ = [
    "Advice",
    "Comparison",
    "Drop",
    "Evaluation",
    "InputStatistics",
    "Model",
    "PartStates",
    "PruneResult",
    "PrunelensError",
    "Recipe",
    "SpeedSettings",
    "Sweep",
    "Thresholds",
    "advise",
    "benchmark",
    "compare",
    "dropped",
    "evaluate",
    "inspect",
    "load",
    "mask",
    "parse_recipe",
    "prompts",
    "prune",
    "rank_redundancy",
    "ranking",
    "sweep",
    "wrap",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that `import prunelens` stays light."""
    import importlib
    import importlib.metadata

    if name == "__version__":
        return importlib.metadata.version("prunelens")
    if name not in _HOMES:
        raise AttributeError(f"module 'prunelens' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """The public names, none of which is imported by being listed."""
    return sorted([*__all__, "__version__"])
