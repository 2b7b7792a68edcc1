"""Save a model without some of its parts as a checkpoint that plain transformers opens, and prove it by opening it.

Whole blocks are cut out and the later ones renumbered. Single sublayers stay in place with zeroed output projections,
and config.json names them so that they can be removed on loading. What cannot be said in a family's settings is
refused before anything is written, and nothing is left behind that does not compute what the model computes.
"""

import copy
import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from prunelens import files
from prunelens.errors import PrunelensError
from prunelens.models.model import Model
from prunelens.models.opening.companions import save_weights, write_companions
from prunelens.models.opening.loading import load
from prunelens.models.opening.quiet import quiet
from prunelens.models.opening.record import record_of, recorded_drop
from prunelens.models.opening.repair_files import KEY, REPAIRS, describe, save_repairs
from prunelens.models.saving import nemotron_nas
from prunelens.models.saving.bias_parameters import BiasParameters, bias_parameters, renumbered
from prunelens.models.saving.cutting import check_blocks, check_cache, clean_config, cut_config, skeleton
from prunelens.models.saving.reopening import checked_difference, logits_of, logits_on_reopening
from prunelens.models.saving.zeroing import silencing_weights
from prunelens.models.surgery.drop import NOTHING, Drop, dropped
from prunelens.models.surgery.repairs import Repair, installed_repairs

LAYOUTS = ("transformers", nemotron_nas.MODEL_TYPE)
NUM_STEPS = 3
"""How often `advance` is called: the model is laid out, written, and opened again."""
WHAT = "checkpoint"
CONFIG = "config.json"

Finish = Callable[[Path, Path], None]


@dataclass(frozen=True)
class Exported:
    """A checkpoint on disk.

    Attributes:
        folder: where it is.
        parameters: numbers in its weights before `finish`, tied ones once, zeroed ones included.
        num_bytes: size of the weight files.
        max_difference: largest difference of a logit between the model and the checkpoint; 0.0 is expected.
    """

    folder: Path
    parameters: int
    num_bytes: int
    max_difference: float


def export(
    model: Model,
    target: Path,
    drop: Drop = NOTHING,
    experts: Mapping[int, Sequence[int]] = MappingProxyType({}),
    repairs: Sequence[Repair] = (),
    in_biases: BiasParameters | None = None,
    finish: Finish | None = None,
    layout: str = "transformers",
    card: str = "",
    recipe: str = "",
    methods: Sequence[dict[str, Any]] = (),
    advance: Callable[[int], None] = lambda steps: None,
) -> Exported:
    """Save `model` without the parts in `drop` and `experts`; the model itself stays as it is.

    Args:
        model: an open model with weights in memory; what `experts` leaves out is masked in it already.
        target: a new or empty folder, or an earlier checkpoint of this program, which is replaced.
        drop: whole blocks, cut out, and sublayers, zeroed.
        experts: for each layer with experts, those that go.
        repairs: what stands in for parts of `drop`; a bias goes into a parameter where one is there for it, all else
            into a file of its own, which this program reads.
        in_biases: what `bias_parameters` found for them; None to find it here.
        finish: makes the final weights: called with the folder of the plain checkpoint and an empty one to fill.
        layout: `transformers`, or `nemotron-nas`, which leaves dropped sublayers out instead of zeroing them.
        card: text of README.md; none if empty.
        recipe, methods: what config.json says about how it was made, and with which methods from outside.
        advance: called with 1 when one of `NUM_STEPS` steps is finished.

    Returns:
        Where it is and how large; with `finish`, `max_difference` is what that changed.

    Raises:
        PrunelensError: the parts are not there, the family cannot express the cut, no rights, no space, or the
            checkpoint does not compute what the model computes.
    """
    drop = drop | recorded_drop(model.network.config)
    _check_asked(model, drop, repairs, finish, layout)
    files.check_target(target, is_export, WHAT)
    with quiet():
        in_biases = bias_parameters(model, drop, repairs) if in_biases is None else in_biases
        network = _laid_out(model, drop, experts, repairs, in_biases, (recipe, methods))
        if layout == nemotron_nas.MODEL_TYPE:
            nemotron_nas.check(network.config)
            finish = nemotron_nas.convert
        with dropped(model.anatomy, drop, [repair for index, repair in enumerate(repairs) if index in in_biases]):
            expected = logits_of(model.network, model)
        advance(1)
        with files.new_folder(target, is_export, WHAT) as temporary:
            _write(network, model, temporary, finish, card, partial(save_repairs, repairs, set(in_biases)))
            advance(1)
            found = _logits_again(temporary, model, network, finish, layout)
            difference = checked_difference(expected, found, model.dtype, finish is None or layout != LAYOUTS[0])
            if repairs:
                difference = max(difference, _difference_repaired(temporary, model, drop, repairs, finish))
            num_bytes = sum(path.stat().st_size for path in temporary.glob("*.safetensors"))
    advance(1)
    left_out = nemotron_nas.left_out if layout == nemotron_nas.MODEL_TYPE else lambda name, config: False
    weights = [weight for name, weight in network.named_parameters() if not left_out(name, network.config)]
    return Exported(target, sum(weight.numel() for weight in weights), num_bytes, difference)


def _logits_again(folder: Path, model: Model, network: Any, finish: Finish | None, layout: str) -> Tensor:
    """The logits of the checkpoint as any program opens it."""
    if layout == nemotron_nas.MODEL_TYPE:
        again = nemotron_nas.read_back(folder, type(model.network), network.config)
        return logits_of(again.to(model.device), model)
    return logits_on_reopening(folder, model, finish is not None)


def _difference_repaired(
    folder: Path, model: Model, drop: Drop, repairs: Sequence[Repair], finish: Finish | None
) -> float:
    """The largest difference of a logit between the repaired model and the checkpoint opened by this program."""
    with dropped(model.anatomy, drop, repairs):
        expected = logits_of(model.network, model)
    again = load(folder, model.dtype, model.placement, model.trust_remote_code)
    return checked_difference(expected, logits_of(again.network, again), model.dtype, finish is None)


def is_export(folder: Path) -> bool:
    """Whether a folder is a checkpoint that this program has written."""
    try:
        return isinstance(json.loads((folder / CONFIG).read_text(encoding="utf-8"))[KEY], dict)
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return False


def _check_asked(model: Model, drop: Drop, repairs: Sequence[Repair], finish: Finish | None, layout: str) -> None:
    if layout not in LAYOUTS:
        raise PrunelensError(f"expected a layout of {', '.join(LAYOUTS)}, found {layout!r}")
    if finish is not None and layout != LAYOUTS[0]:
        raise PrunelensError(f"a checkpoint in the layout {layout} cannot be quantised; leave one of the two out")
    if repairs and layout != LAYOUTS[0]:
        raise PrunelensError(f"a checkpoint in the layout {layout} cannot hold repairs; leave one of the two out")
    if installed_repairs(model.network):
        raise PrunelensError(
            f"expected a model without repairs to save, found {model.name}; prune the one it was made of"
        )
    blocks = model.anatomy.blocks
    absent = sorted(drop.block - set(range(len(blocks))))
    for kind in ("attention", "mlp"):
        absent += sorted(getattr(drop, kind) - {part.layer_idx for part in model.anatomy.sublayers(kind)})
    if absent:
        raise PrunelensError(
            f"expected parts of the {len(blocks)} layers of {model.name} to drop, found no such part in layer "
            f"{absent[0]}; `prunelens inspect` lists them"
        )
    if len(drop.block) == len(blocks):
        raise PrunelensError(f"expected at least one block of {model.name} to stay, found all {len(blocks)} dropped")
    if getattr(model.network.config, "quantization_config", None) is not None:
        raise PrunelensError(f"expected whole weights, found that {model.name} is quantised; name the dense model")


def _laid_out(
    model: Model,
    drop: Drop,
    experts: Mapping[int, Sequence[int]],
    repairs: Sequence[Repair],
    in_biases: BiasParameters,
    made_with: tuple[str, Sequence[dict[str, Any]]],
) -> Any:
    """A network of the same class with what stays, sharing its weights with the model."""
    config = clean_config(model.network.config)
    state = _whole_state(model, config)
    for name in silencing_weights(model, drop):
        state[name] = torch.zeros_like(state[name])
    state |= dict(in_biases.values())
    if experts:
        from prunelens.models.surgery.experts import sliced_experts
        from prunelens.models.surgery.mixtures import find_mixtures

        cut = (drop.block & find_mixtures(model).keys()) - experts.keys()  # all must lose equally many, these too
        some = next(iter(experts.values()))
        sliced_experts(model, config, state, {**experts, **dict.fromkeys(cut, some)})
    whole = skeleton(model.network, config)
    kept = [block.layer_idx for block in model.anatomy.blocks if block.layer_idx not in drop.block]
    prefix = model.anatomy.blocks[0].name.rpartition(".")[0]
    network = whole
    if drop.block:
        config = cut_config(whole.config, kept)
        check_cache(whole.config, config)
        network = skeleton(model.network, config)
        before, after = (list(one.get_submodule(prefix).children()) for one in (whole, network))
        check_blocks(before, after, kept, config)
        state = _renumbered(state, prefix, kept)
    _fill(network, state, model.name)
    attention, mlp = (frozenset(kept.index(old) for old in kinds - drop.block) for kinds in (drop.attention, drop.mlp))
    names = {index: _new_name(name, prefix, kept) for index, (name, _) in in_biases.items()}
    entries = describe(renumbered(repairs, kept), names)
    setattr(network.config, KEY, record_of(Drop(attention, mlp), *made_with, repairs=entries))
    if hasattr(model.network, "generation_config"):
        network.generation_config = copy.deepcopy(model.network.generation_config)
    return network


def _whole_state(model: Model, config: Any) -> dict[str, Tensor]:
    """The tensors of the network by name; those that a removed sublayer has let go are zeros again."""
    state = dict(model.network.state_dict())
    if any(tensor.is_meta for tensor in state.values()):
        raise PrunelensError(
            f"{model.name} is offloaded, and a checkpoint can be written only of weights that are in memory whole; "
            "choose a smaller --dtype or a larger device"
        )
    gone = [name for name, tensor in state.items() if not tensor.numel()]
    if gone:
        shapes = skeleton(model.network, config).state_dict()
        state |= {name: state[name].new_zeros(shapes[name].shape) for name in gone}
    return state


def _renumbered(state: dict[str, Tensor], prefix: str, kept: Sequence[int]) -> dict[str, Tensor]:
    named = ((_new_name(name, prefix, kept), tensor) for name, tensor in state.items())
    return {name: tensor for name, tensor in named if name}


def _new_name(name: str, prefix: str, kept: Sequence[int]) -> str:
    """What a tensor is called when only these layers are left; empty for one of another layer."""
    match = re.match(rf"{re.escape(prefix)}\.(\d+)\.", name)
    if match is None:
        return name
    layer_idx = int(match[1])
    return f"{prefix}.{kept.index(layer_idx)}.{name[match.end() :]}" if layer_idx in kept else ""


def _fill(network: Any, state: dict[str, Tensor], name: str) -> None:
    try:
        network.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise PrunelensError(
            f"the weights of {name} do not fit the configuration of the checkpoint ({reason}); drop other parts"
        ) from error
    network.requires_grad_(False)
    network.tie_weights()


def _write(
    network: Any, model: Model, folder: Path, finish: Finish | None, card: str, more: Callable[[Path], None]
) -> None:
    """Write everything below `folder`; its config.json appears last."""
    parts = folder / "parts"
    plain = parts if finish is None else folder / "plain"
    plain.mkdir()
    if card:
        (plain / "README.md").write_text(card, encoding="utf-8")
    try:
        save_weights(network, plain)
    except RuntimeError as error:  # tensors shared in a way that the family does not foresee
        reason = " ".join(str(error).split())[:300]
        raise PrunelensError(f"the weights cannot be written as safetensors: {reason}") from error
    write_companions(network, model.tokenizer, model.source, plain)
    more(plain)
    if finish is not None:
        parts.mkdir()
        finish(plain, parts)
        _complete(plain, parts)
        shutil.rmtree(plain)
    for path in sorted(parts.iterdir(), key=lambda path: path.name == CONFIG):
        if path.is_file():
            path.chmod(0o644)  # safetensors lets only the owner read its files
        path.rename(folder / path.name)
    parts.rmdir()


def _complete(plain: Path, parts: Path) -> None:
    """Put in all that `finish` has not made or has written in a way of its own, and the record in config.json."""
    for path in plain.iterdir():
        if path.is_dir():
            shutil.copytree(path, parts / path.name, dirs_exist_ok=True)
        elif path.name == REPAIRS or (".safetensors" not in path.name and path.name != CONFIG):
            shutil.copy(path, parts / path.name)
    record = json.loads((plain / CONFIG).read_text(encoding="utf-8"))[KEY]
    config = json.loads((parts / CONFIG).read_text(encoding="utf-8"))
    (parts / CONFIG).write_text(json.dumps(config | {KEY: record}, indent=2) + "\n", encoding="utf-8")
