"""What is compared with the dense model: a recipe on its own weights, or another model."""

import gc
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from prunelens.errors import PrunelensError, shown
from prunelens.models.model import Model
from prunelens.models.opening.loading import load
from prunelens.models.surgery.drop import num_parameters
from prunelens.models.surgery.variant import Variant
from prunelens.pruning.apply import check_recipe
from prunelens.pruning.matrices import zero_share
from prunelens.pruning.pruned import Pruned
from prunelens.pruning.recipe import Recipe, is_recipe, parse_recipe

Compressible = str | Path | Recipe | Model


@dataclass
class Candidate:
    """A compressed model: a recipe on the dense one, `pruned` once it was applied, or a model.

    Attributes:
        name: what `model` is opened from; None for one in memory.
        fingerprint: of the model that was opened from there first.
    """

    label: str
    recipe: Recipe | None = None
    model: Model | None = None
    pruned: Pruned | None = None
    name: str | Path | None = None
    fingerprint: str | None = None

    def shares_weights(self, dense: Model) -> bool:
        """Whether it runs on the dense model's own weights."""
        return self.recipe.only_drops if self.recipe is not None else self.model is dense

    def let_go(self) -> None:
        """Free what can be made or opened once more: weights that a recipe has changed, a model from files."""
        self.pruned = None
        if self.name is not None:
            self.model = None
        gc.collect()  # networks hold themselves in circles

    def open(self, dense: Model) -> None:
        """Open a model from files that was let go.

        Raises:
            PrunelensError: another model stands there meanwhile.
        """
        if self.name is None or self.model is not None:
            return
        found = _open_model(self.name, dense)
        if found.fingerprint != self.fingerprint:
            raise PrunelensError(
                f"expected {shown(self.label)} as it was when the comparison began, found other weights or settings "
                "there; compare again when nothing writes into it any more"
            )
        self.model = found.model

    def variant(self, dense: Model) -> Variant:
        """The compressed model as the traces see it."""
        if self.pruned is not None:
            return self.pruned.variant
        return Variant(self._whole(dense))

    def num_parameters(self, dense: Model) -> int:
        """Parameters that are read."""
        if self.pruned is not None:
            return self.pruned.num_parameters
        model = self._whole(dense)
        return num_parameters(model.network, model.anatomy)

    def num_bytes(self, dense: Model) -> int:
        """Bytes of its weights: the files of a model, what is read of a recipe's result."""
        return self.pruned.num_bytes if self.pruned is not None else self._whole(dense).weight_bytes

    def zero_share(self, dense: Model) -> float:
        """Share of exact zeros among the numbers of the blocks' matrices."""
        if self.pruned is not None:
            return self.pruned.zero_share
        return zero_share(self._whole(dense).anatomy.blocks)

    def _whole(self, dense: Model) -> Model:
        """The model by itself; the dense one where there is none."""
        assert self.model is not None or self.name is None, f"{self.label} was let go"
        return self.model or dense


def open_candidates(dense: Model, compressed: Sequence[Compressible], in_turn: bool = False) -> list[Candidate]:
    """Parse recipes and open models, and refuse what cannot be compared before anything runs.

    Args:
        dense: the model that they are compared with.
        compressed: recipes, models, or what `load` takes.
        in_turn: let a model from files go again once it was checked; `Candidate.open` brings it back. A single one
            stays.

    Raises:
        PrunelensError: nothing to compare, the same thing twice, a bad recipe, a model that does not open or
            has another vocabulary.
    """
    found: list[Candidate] = []
    recipes = parse_candidates(compressed)
    for recipe in recipes:
        if recipe is not None:
            check_recipe(recipe, dense)
    for item, recipe in zip(compressed, recipes, strict=True):
        found.append(Candidate(str(recipe), recipe) if recipe else _open_model(item, dense))
        if in_turn and len(compressed) > 1:
            found[-1].let_go()
    return found


def parse_candidates(compressed: Sequence[Compressible]) -> list[Recipe | None]:
    """The recipe of each candidate, or None for a model.

    Raises:
        PrunelensError: nothing to compare, a malformed recipe, or the same thing twice.
    """
    if not compressed:
        raise PrunelensError("expected at least one compressed model or recipe, such as drop-attention:1")
    recipes = [_recipe(item) for item in compressed]
    labels = [_label(item, recipe) for item, recipe in zip(compressed, recipes, strict=True)]
    for label in labels:
        if labels.count(label) > 1:
            raise PrunelensError(f"{label} is given twice; name each compressed model once")
    return recipes


def _label(item: Compressible, recipe: Recipe | None) -> str:
    """What tables call a compressed model; `dense` means the dense one."""
    if recipe is not None:
        return str(recipe)
    name = item.name if isinstance(item, Model) else os.path.normpath(str(item)) if str(item) else ""
    return "./dense" if name == "dense" else name


def _recipe(item: Compressible) -> Recipe | None:
    if isinstance(item, Recipe):
        return item
    if isinstance(item, Model):
        return None
    return parse_recipe(str(item)) if is_recipe(str(item)) else None


def _open_model(item: Compressible, dense: Model) -> Candidate:
    assert not isinstance(item, Recipe)
    trust = dense.trust_remote_code
    model = item if isinstance(item, Model) else load(item, dense.dtype, dense.placement, trust)
    _check_vocabulary(dense, model)
    name = None if isinstance(item, Model) else item
    return Candidate(_label(item, None), model=model, name=name, fingerprint=model.fingerprint)


def _check_vocabulary(dense: Model, compressed: Model) -> None:
    sizes = dense.anatomy.vocab_size, compressed.anatomy.vocab_size
    if sizes[0] != sizes[1]:
        raise PrunelensError(
            f"expected the same vocabulary, found {sizes[0]} tokens in {dense.name} and {sizes[1]} in "
            f"{compressed.name}; only models with the same tokens can be compared"
        )
    if dense.tokenizer is None or compressed.tokenizer is None:
        if compressed.tokenizer is None and dense.tokenizer is not None:
            compressed.notes.append(f"{compressed.name} has no tokenizer; the dense model's was used")
        return
    left, right = dense.tokenizer.get_vocab(), compressed.tokenizer.get_vocab()
    if left != right:
        other = next(token for token in (*left, *right) if left.get(token) != right.get(token))
        raise PrunelensError(
            f"expected the same tokenizer in {dense.name} and {compressed.name}, found token {other!r} with id "
            f"{left.get(other)} and {right.get(other)}; only models with the same tokens can be compared"
        )
