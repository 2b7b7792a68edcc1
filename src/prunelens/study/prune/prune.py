"""Make a model smaller by a recipe and save it so that it loads elsewhere; say what was reached."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from prunelens.errors import PrunelensError, check_seed
from prunelens.files import check_apart, probe_target, reserved
from prunelens.models.model import Model
from prunelens.models.opening.quantized import method_of
from prunelens.models.opening.quiet import quiet, reason_of
from prunelens.models.opening.repair_files import REPAIRS
from prunelens.models.saving.bias_parameters import bias_parameters
from prunelens.models.saving.export import LAYOUTS, NUM_STEPS, WHAT, export, is_export
from prunelens.models.saving.reopening import checked_difference, logits_of, logits_on_reopening
from prunelens.models.surgery.drop import dropped, num_parameters
from prunelens.models.surgery.shared_copy import named_owners, set_weight, shared_copy_of
from prunelens.progress import Reporter
from prunelens.pruning.apply import apply, check_recipe
from prunelens.pruning.matrices import zero_share
from prunelens.pruning.pruned import Calibration, Pruned
from prunelens.pruning.recipe import Recipe, parse_recipe
from prunelens.pruning.steps.quantize import QuantizeStep
from prunelens.study.calibration_texts import calibrate
from prunelens.study.compare.schemas import RUN
from prunelens.study.prune.card import model_card
from prunelens.study.store import open_run, rendered

OTHER_TEXTS = "what was found is of the recipe with --calibration {}, this checkpoint was made with {}"
OTHER_METHODS = "what was found is of the recipe with another version of a method in it"
ONLY_TEXT = "{} reads more than text: its other parts are saved unchanged, and only what it makes of text was checked"
NEEDS_US = f"its repairs lie in {REPAIRS} and are read by prunelens alone; other programs load it without them"


@dataclass(frozen=True)
class PruneResult:
    """What pruning reached.

    Attributes:
        folder: the checkpoint.
        recipe: how it was made.
        parameters, dense_parameters: numbers that are read, after and before.
        num_bytes, dense_bytes: size of the weights on disk, after and before.
        sparsity, dense_sparsity: share of zeros in the matrices of the blocks that are left, after and before.
        max_difference: largest difference of a logit when plain transformers opened it again.
        notes: what a reader should know.
    """

    folder: str
    recipe: str
    parameters: int
    dense_parameters: int
    num_bytes: int
    dense_bytes: int
    sparsity: float
    dense_sparsity: float
    max_difference: float
    notes: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """All of it by name."""
        return asdict(self)


def run_prune(
    model: Model,
    recipe: Recipe,
    target: Path,
    calibration: Path | None,
    layout: str,
    run: Path | None,
    seed: int,
    reporter: Reporter,
) -> PruneResult:
    """Apply a recipe to an open model and save the result; the arguments are those of `prunelens.prune`.

    Raises:
        PrunelensError: as `prunelens.prune`.
    """
    _check_dense(model)
    check_recipe(recipe, model)
    check_apart(target, [model.name])
    with reserved(target, is_export, WHAT):
        return _pruned(model, recipe, target, calibration, layout, run, seed, reporter)


def _pruned(
    model: Model,
    recipe: Recipe,
    target: Path,
    calibration: Path | None,
    layout: str,
    run: Path | None,
    seed: int,
    reporter: Reporter,
) -> PruneResult:
    findings, reported, about = _findings(run, recipe, model, calibration)
    texts = calibrate([recipe], model, calibration, reporter, reported)
    quantized = recipe.quantize
    plain = _unquantized(recipe, model, texts, seed, reporter)
    sparsities = plain.zero_share, zero_share(model.anatomy.blocks)
    stored = _as_stored(plain)
    with quiet():
        in_biases = bias_parameters(stored.model, stored.drop, stored.repairs)
    finish = _Quantizer(stored, in_biases, quantized) if quantized else None
    in_weights = len(in_biases) == len(stored.repairs)
    whole = (*(finish.notes if finish else ()), *(() if in_weights else (NEEDS_US,)), *_about_other_inputs(model))
    notes = (*model.notes, *about, *plain.notes, *whole)
    card, fault = rendered(findings, lambda found: model_card(model, recipe, calibration, notes, found, in_weights))
    exported = export(
        stored.model,
        target,
        plain.drop,
        plain.experts,
        stored.repairs,
        in_biases,
        finish=finish,
        layout=layout,
        card=card or "",
        recipe=str(recipe),
        methods=recipe.made_with.get("methods", []),
        advance=reporter("saving and opening again", NUM_STEPS),
    )
    if fault is not None:
        raise PrunelensError(
            f"the model card could not be made ({reason_of(fault)}); the checkpoint in {target} is whole but for it"
        ) from fault
    dense_parameters = num_parameters(model.network, model.anatomy)
    return PruneResult(
        folder=str(target),
        recipe=str(recipe),
        parameters=plain.num_parameters - _num_taken_in(stored, in_biases),
        dense_parameters=dense_parameters,
        num_bytes=exported.num_bytes,
        dense_bytes=model.weight_bytes,
        sparsity=sparsities[0],
        dense_sparsity=sparsities[1],
        max_difference=finish.max_difference if finish else exported.max_difference,
        notes=notes,
    )


def check_request(given: str | Recipe, output: str | Path, layout: str, seed: int) -> tuple[Recipe, Path]:
    """The recipe and the folder, refused before a model is opened where they cannot be.

    Raises:
        PrunelensError: a malformed recipe, an output that cannot be written, or a layout that is not there or cannot
            hold the result.
    """
    recipe, target = parse_recipe(given) if isinstance(given, str) else given, Path(output)
    check_seed(seed)
    probe_target(target, is_export, WHAT)
    if layout not in LAYOUTS:
        raise PrunelensError(f"expected a --format of {' or '.join(LAYOUTS)}, found {layout!r}")
    if layout != LAYOUTS[0] and recipe.quantize:
        raise PrunelensError(f"--format {layout} cannot hold quantised weights; leave one of the two out")
    if layout != LAYOUTS[0] and recipe.repair is not None and recipe.repair.fit != "folded":
        raise PrunelensError(
            f"--format {layout} cannot hold repairs other than repair:folded; leave one of the two out"
        )
    return recipe, target


def _about_other_inputs(model: Model) -> list[str]:
    """A remark on a model that reads more than text."""
    config = model.network.config
    return [] if config.get_text_config(decoder=True) is config else [ONLY_TEXT.format(model.name)]


def _check_dense(model: Model) -> None:
    if method_of(model.network.config) is not None:
        raise PrunelensError(
            f"expected a dense model to prune, found that {model.name} is quantised; name the one it was made from"
        )


def _unquantized(recipe: Recipe, model: Model, texts: Calibration, seed: int, reporter: Reporter) -> Pruned:
    """The model after all steps but that to fewer bits."""
    steps = tuple(step for step in recipe.steps if step is not recipe.quantize)
    if not steps:
        return Pruned(model, model)
    return apply(Recipe(steps=steps), model, texts, reporter=reporter, seed=seed)


def _as_stored(pruned: Pruned) -> Pruned:
    """The same in the dtype of the checkpoint that the dense model was opened from."""
    twin = _in_stored_dtype(pruned.model, pruned.dense)
    return replace(pruned, model=twin, repairs=tuple(repair.in_dtype(twin.dtype) for repair in pruned.repairs))


def _num_taken_in(pruned: Pruned, in_biases: Iterable[int]) -> int:
    """Numbers of the maps of cut blocks that a parameter of another sublayer carries."""
    return sum(pruned.repairs[index].num_parameters for index in in_biases if pruned.repairs[index].kind == "block")


class _Quantizer:
    """Makes the quantised checkpoint of a plain one, and checks it against the model quantised in memory.

    Attributes:
        max_difference: largest difference of a logit between both.
        notes: what a reader should know, such as what stays as it is.
    """

    def __init__(self, pruned: Pruned, in_biases: Iterable[int], step: QuantizeStep) -> None:
        from prunelens.pruning.quantize import quantization_notes

        self._pruned = pruned
        self._in_weights = [pruned.repairs[index] for index in in_biases]
        self._to = step.to
        self.max_difference = 0.0
        self.notes = tuple(quantization_notes(pruned.model, step.to))

    def __call__(self, plain: Path, target: Path) -> None:
        """Fill `target` from the checkpoint in `plain`."""
        from prunelens.pruning.quantize import quantize, save_quantized

        save_quantized(plain, target, self._to)
        twin = shared_copy_of(self._pruned.model)
        quantize(twin, self._to)
        with dropped(twin.anatomy, self._pruned.drop, self._in_weights):
            expected = logits_of(twin.network, twin)
        found = logits_on_reopening(target, twin, finished=True)
        self.max_difference = checked_difference(expected, found, twin.dtype, is_exact=True)


def _in_stored_dtype(changed: Model, dense: Model) -> Model:
    """The model in the dtype of the checkpoint it was opened from."""
    dtype = dense.stored_dtype
    if dtype is None or dtype == changed.dtype:
        return changed
    twin = shared_copy_of(changed)
    for module, name in named_owners(twin.network).values():
        value = module._parameters[name]
        if value is not None and value.is_floating_point():
            set_weight(module, name, value.to(dtype))
    twin.network.tie_weights()
    _say_dtype(twin.network.config, dtype)
    return twin


def _say_dtype(config: Any, dtype: Any) -> None:
    """Write a dtype into a configuration and those inside it."""
    config.dtype = dtype
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if part is not None:
            _say_dtype(part, dtype)


def _findings(
    run: Path | None, recipe: Recipe, model: Model, calibration: Path | None
) -> tuple[dict[str, Any] | None, list[str], list[str]]:
    """What a run of compare says of this recipe on this model, the prompts that it says it of, and remarks on it."""
    if run is None:
        return None, [], []
    result = open_run(run, RUN)
    if result.info["dense"]["fingerprint"] != model.fingerprint:
        raise PrunelensError(
            f"expected a run of {model.name} in {run}, found one of another model ({result.info['dense']['name']}); "
            "run compare on this one"
        )
    for record in result.info["summary"]:
        if record["compressed"] == str(recipe):
            theirs, ours = result.info["settings"]["calibration"] or "none", str(calibration or "none")
            differ = theirs != ours and (recipe.needs_calibration or recipe.repair is not None)
            remarks = [OTHER_TEXTS.format(theirs, ours)] if differ else []
            made = next(one for one in result.info["compressed"] if one["label"] == str(recipe))
            if made.get("methods", []) != recipe.made_with.get("methods", []):
                remarks.append(OTHER_METHODS)
            return record, result.tables["prompts"]["text"].to_pylist(), remarks
    known = ", ".join(record["compressed"] for record in result.info["summary"])
    raise PrunelensError(f"expected a run with the recipe {recipe} in {run}, found {known}; run compare with it")
