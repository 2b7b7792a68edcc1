"""Store the matrices inside the blocks with fewer bits, through torchao; activations stay as they are."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunelens.errors import PrunelensError
from prunelens.models.anatomy.hooks import decoder_of, run_decoder
from prunelens.models.anatomy.probe import probe_ids
from prunelens.models.model import Model
from prunelens.models.opening.quiet import quiet
from prunelens.pruning.matrices import find_weights
from prunelens.pruning.values import Format

GROUP = 32
"""Numbers that share a scale in int4; in int8 a whole row shares one."""


def check_quantizable(model: Model, to: Format) -> None:
    """Refuse, before anything runs, a model without matrices that torchao takes, or a machine without torchao.

    Raises:
        PrunelensError: as said.
    """
    _config(to)
    if not any(_linears(model, to)):
        raise PrunelensError(
            f"expected linear layers inside the blocks of {model.name} to quantise to {to}, found none that torchao "
            "takes; choose another recipe"
        )


def quantize(model: Model, to: Format) -> None:
    """Quantise every linear layer inside the blocks of a twin; embedding, head, norms and experts stay.

    int8: one scale for each row; int4: one for each 32 inputs. What stays is told in `model.notes`.

    Args:
        model: a twin (`shared_copy_of`), whose weights are replaced.
        to: the format.

    Raises:
        PrunelensError: as `check_quantizable`.
    """
    from torchao.quantization import quantize_

    check_quantizable(model, to)
    chosen = {module for _, module in _linears(model, to)}
    model.notes.extend(quantization_notes(model, to))
    with quiet():
        quantize_(model.network, _config(to), filter_fn=lambda module, name: module in chosen)
    model.network.config._is_quantized = True  # as transformers marks it; some families then multiply in another order


def quantization_notes(model: Model, to: Format) -> list[str]:
    """What a reader should know of the format, and what of a model not quantised yet would stay as it is."""
    chosen = {module for _, module in _linears(model, to)}
    weights = [weight for block in model.anatomy.blocks for weight in find_weights(block.module, block.name)]
    total = sum(weight.tensor.numel() for weight in weights)
    done = sum(weight.tensor.numel() for weight in weights if weight.module in chosen)
    notes: list[str] = []
    if done < total:
        notes.append(
            f"quantize:{to} took {100 * done / total:.1f} % of the blocks' matrices; experts in one tensor, Conv1D, "
            f"and layers whose inputs are no multiple of {GROUP} (int4) stay as they are"
        )
    if to == "int4":
        notes.append("quantize:int4: torchao stores these 4-bit numbers in one byte each, so disk and memory hold 8")
    return notes


def save_quantized(plain: Path, target: Path, to: Format) -> None:
    """Write the checkpoint that transformers makes of a plain one with torchao.

    Args:
        plain: a checkpoint folder.
        target: an empty folder to fill.
        to: the format.
    """
    from transformers import TorchAoConfig

    from prunelens.models.opening.auto_class import auto_class_of
    from prunelens.models.opening.loading import load

    opened = load(plain)
    chosen = {name for name, _ in _linears(opened, to)}
    others = [name for name, module in opened.network.named_modules() if isinstance(module, nn.Linear)]
    config = TorchAoConfig(_config(to), modules_to_not_convert=[name for name in others if name not in chosen])
    dtype = opened.stored_dtype or opened.dtype
    auto = auto_class_of(opened.network.config, opened.trust_remote_code)
    del opened
    with quiet():
        network: Any = auto.from_pretrained(plain, quantization_config=config, device_map="cpu", dtype=dtype)
        network.save_pretrained(target)
    for file in plain.iterdir():
        if not (target / file.name).exists() and not file.name.startswith("model"):
            shutil.copy2(file, target)


def _linears(model: Model, to: Format) -> Iterator[tuple[str, nn.Linear]]:
    """Linear layers inside the blocks that are called as such; a weight that is read directly must stay plain."""
    called: set[nn.Module] = set()
    handles = [
        module.register_forward_hook(lambda module, args, output: called.add(module))
        for module in model.network.modules()
        if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    ]
    try:
        with torch.inference_mode():
            run_decoder(decoder_of(model.network), probe_ids(model.network))
    finally:
        for handle in handles:
            handle.remove()
    for block in model.anatomy.blocks:
        for name, module in block.module.named_modules(prefix=block.name):
            fits = (
                module in called and isinstance(module, nn.Linear) and (to == "int8" or module.in_features % GROUP == 0)
            )
            if fits and module.weight.numel():
                yield name, module


def _config(to: Format) -> Any:
    try:
        from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup
    except ImportError as error:
        raise PrunelensError(
            f'quantize:{to} needs the library torchao; install it with `pip install "prunelens[quantize]"`'
        ) from error
    if to == "int8":
        return Int8WeightOnlyConfig()
    return IntxWeightOnlyConfig(weight_dtype=getattr(torch, to), granularity=PerGroup(GROUP))
