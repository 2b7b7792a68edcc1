"""Checkpoints that are quantised already: the library each needs, and what makes their networks ready to run."""

import copy
import importlib.util
import logging
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunelens.errors import PrunelensError
from prunelens.models.anatomy.probe import probe_ids
from prunelens.models.anatomy.proofs import TOLERANCE
from prunelens.models.sizes import StoredTensor

BITSANDBYTES = "bitsandbytes"
NEEDS: dict[str, tuple[str, ...]] = {
    "torchao": ("torchao",),
    BITSANDBYTES: (BITSANDBYTES,),
    "compressed-tensors": ("compressed_tensors",),
    "gptq": ("gptqmodel", "optimum"),
    "awq": ("gptqmodel",),
    "auto-round": ("auto_round",),
    "hqq": ("hqq",),
    "quanto": ("optimum.quanto",),
}
"""Modules that transformers imports to open a checkpoint of each method."""
SCALES = re.compile(r"\.(weight|input|output)_(scale|zero_point|global_scale|g_idx)$")
"""How compressed-tensors calls what it keeps beside a quantised weight."""
PLAIN = ("F64", "F32", "F16", "BF16")
"""What safetensors calls the dtypes of weights that are not quantised."""


def method_of(config: Any) -> str | None:
    """The method a configuration says its checkpoint is quantised with, or None for a dense one."""
    text_config = config.get_text_config(decoder=True)
    found = getattr(config, "quantization_config", None) or getattr(text_config, "quantization_config", None)
    if not found:
        return None
    values = found if isinstance(found, dict) else found.to_dict()
    if values.get("load_in_8bit") or values.get("load_in_4bit"):
        return BITSANDBYTES
    return str(getattr(values.get("quant_method"), "value", values.get("quant_method")))


def check_method(config: Any, path: Path) -> None:
    """Refuse a quantised checkpoint that cannot be opened here, before anything of it is read.

    Raises:
        PrunelensError: a method transformers does not know, or a library that is not installed.
    """
    method = method_of(config)
    if method is None:
        return
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    if method != BITSANDBYTES and method not in AUTO_QUANTIZER_MAPPING:
        raise PrunelensError(
            f"{path} is quantised by {method!r}, which transformers cannot open; compare the dense checkpoint, or "
            "one quantised by torchao, bitsandbytes or compressed-tensors"
        )
    packages = [name.replace("_", "-").replace(".", "-") for name in NEEDS.get(method, ()) if not _is_installed(name)]
    if packages:
        raise PrunelensError(
            f"{path} is quantised by {method}, which needs {' and '.join(packages)} to open; install with "
            f"`pip install {' '.join(packages)}`"
        )


def plain_modules(found: dict[str, Any], network: Any, tensors: Iterable[StoredTensor]) -> list[str]:
    """Modules that a configuration counts as quantised though their weights are stored as plain numbers.

    A head that is tied to the embedding is the common case: nothing is stored for it, so its scales are missing.

    Args:
        found: what transformers tells about the loading.
        network: the network as it was opened.
        tensors: what the weight files hold.
    """
    missing = set(map(str, found["missing_keys"]))
    dtypes = {tensor.name: tensor.dtype for tensor in tensors}
    tied = network.all_tied_weights_keys
    lacking = sorted({name.rpartition(".")[0] for name in missing if SCALES.search(name)})
    weights = {name: f"{name}.weight" for name in lacking}
    return [name for name in lacking if dtypes.get(tied.get(weights[name], weights[name])) in PLAIN]


def leave_plain(config: Any, modules: Sequence[str]) -> Any:
    """A copy of a configuration of compressed-tensors that leaves these modules out of quantisation."""
    config = copy.deepcopy(config)
    for one in (config, config.get_text_config(decoder=True)):
        values = getattr(one, "quantization_config", None)
        if isinstance(values, dict):
            values["ignore"] = sorted({*(values.get("ignore") or ()), *modules})
    return config


def settle(network: Any) -> list[str]:
    """Make a quantised network ready to be looked at: weights that are unpacked on first use are unpacked.

    Returns:
        Remarks that a reader of the results should see.
    """
    notes = _settle_bitsandbytes(network)
    with torch.no_grad():
        network.eval()(input_ids=probe_ids(network), use_cache=False)
    return notes


def rounding_of(network: nn.Module) -> float:
    """Share by which states differ for no other reason than other tokens in the batch; 0 where they do not."""
    coarse = any(type(module).__name__ == "Linear8bitLt" for module in network.modules())
    return TOLERANCE[torch.float16] if coarse else 0.0


def _settle_bitsandbytes(network: nn.Module) -> list[str]:
    layers = [module for module in network.modules() if type(module).__module__.startswith(f"{BITSANDBYTES}.")]
    for layer in layers:
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            # on CPUs with these instructions it would rearrange its weights on first use and round to bfloat16
            layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    if not any(type(layer).__name__ == "Linear8bitLt" for layer in layers):
        return []
    # it would say so at every layer of every pass; it is said once, in the notes
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    return [
        "the int8 layers of bitsandbytes round what they read, and treat a column otherwise if any token in the batch "
        "has an outlier there, so that a token can change the states before it by a percent or two"
    ]


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # the package around it is not there
        return False
