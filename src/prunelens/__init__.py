"""See where pruning damages a language model: in embeddings, logits or token probabilities, and for how long."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prunelens.errors import PrunelensError
    from prunelens.models.loading import Model, load, wrap
    from prunelens.models.surgery import Drop, dropped
    from prunelens.pruning.importance import rank_redundancy
    from prunelens.pruning.recipe import Recipe, parse_recipe
    from prunelens.study.advice import Advice
    from prunelens.study.advise import advise
    from prunelens.study.benchmark import benchmark
    from prunelens.study.compare import compare
    from prunelens.study.evaluate import evaluate
    from prunelens.study.evaluation import Evaluation
    from prunelens.study.prune import PruneResult, prune
    from prunelens.study.result import Comparison
    from prunelens.study.speed import SpeedSettings
    from prunelens.study.sweep import Sweep, sweep
    from prunelens.study.verdict import Thresholds
    from prunelens.tasks.prompts import prompts

_HOMES = {
    "Advice": "prunelens.study.advice",
    "Comparison": "prunelens.study.result",
    "Drop": "prunelens.models.surgery",
    "Evaluation": "prunelens.study.evaluation",
    "Model": "prunelens.models.loading",
    "PruneResult": "prunelens.study.prune",
    "PrunelensError": "prunelens.errors",
    "Recipe": "prunelens.pruning.recipe",
    "SpeedSettings": "prunelens.study.speed",
    "Sweep": "prunelens.study.sweep",
    "Thresholds": "prunelens.study.verdict",
    "advise": "prunelens.study.advise",
    "benchmark": "prunelens.study.benchmark",
    "compare": "prunelens.study.compare",
    "dropped": "prunelens.models.surgery",
    "evaluate": "prunelens.study.evaluate",
    "load": "prunelens.models.loading",
    "parse_recipe": "prunelens.pruning.recipe",
    "prompts": "prunelens.tasks.prompts",
    "prune": "prunelens.study.prune",
    "rank_redundancy": "prunelens.pruning.importance",
    "sweep": "prunelens.study.sweep",
    "wrap": "prunelens.models.loading",
}

__all__ = [
    "Advice",
    "Comparison",
    "Drop",
    "Evaluation",
    "Model",
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
    "load",
    "parse_recipe",
    "prompts",
    "prune",
    "rank_redundancy",
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
