"""See where pruning damages a language model: in embeddings, logits or token probabilities, and for how long."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prunelens.errors import PrunelensError
    from prunelens.models.loading import Model, load, wrap
    from prunelens.models.surgery import Drop, dropped
    from prunelens.pruning.importance import rank_redundancy
    from prunelens.pruning.recipe import Recipe, parse_recipe
    from prunelens.study.compare import compare
    from prunelens.study.prune import prune
    from prunelens.study.result import Comparison
    from prunelens.tasks.prompts import prompts

_HOMES = {
    "Comparison": "prunelens.study.result",
    "Drop": "prunelens.models.surgery",
    "Model": "prunelens.models.loading",
    "PrunelensError": "prunelens.errors",
    "Recipe": "prunelens.pruning.recipe",
    "compare": "prunelens.study.compare",
    "dropped": "prunelens.models.surgery",
    "load": "prunelens.models.loading",
    "parse_recipe": "prunelens.pruning.recipe",
    "prompts": "prunelens.tasks.prompts",
    "prune": "prunelens.study.prune",
    "rank_redundancy": "prunelens.pruning.importance",
    "wrap": "prunelens.models.loading",
}

__all__ = [
    "Comparison",
    "Drop",
    "Model",
    "PrunelensError",
    "Recipe",
    "compare",
    "dropped",
    "load",
    "parse_recipe",
    "prompts",
    "prune",
    "rank_redundancy",
    "wrap",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that `import prunelens` stays light."""
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module 'prunelens' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
