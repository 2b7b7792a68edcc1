"""Open a model safely: a folder, a GGUF file, a hub id or the built-in name; safetensors and GGUF only."""

from pathlib import Path
from typing import Any

import torch
import transformers

from prunelens.errors import PrunelensError
from prunelens.models.anatomy.find import find_anatomy
from prunelens.models.anatomy.proofs import tolerating
from prunelens.models.model import Model, text_config
from prunelens.models.opening.builtin import about_place
from prunelens.models.opening.checkpoint import check_weights
from prunelens.models.opening.claims import check_token_ids
from prunelens.models.opening.fingerprint import fingerprint_files, fingerprint_model
from prunelens.models.opening.folder import Opened, open_checkpoint
from prunelens.models.opening.gguf import read_gguf
from prunelens.models.opening.ignored import check_no_adapter_layers
from prunelens.models.opening.quantized import rounding_of
from prunelens.models.opening.quiet import explained, quiet
from prunelens.models.opening.record import remove_recorded
from prunelens.models.opening.sources import resolve_name
from prunelens.models.placement import Devices, check_device, memory_explained, plan_placement
from prunelens.models.sizes import network_bytes, stored_bytes

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


def load(
    name: str | Path,
    dtype: str | torch.dtype | None = None,
    device: Devices | None = None,
    trust_remote_code: bool = False,
) -> Model:
    """Open a model and prove its anatomy.

    Args:
        name: a folder, a `.gguf` file (dequantised), a hub id, or the built-in name `smollm2`.
        dtype: float64, float32, float16 or bfloat16; default float32 on a CPU and bfloat16 on a GPU.
        device: a torch device; default the first GPU, else the CPU. `auto` lets accelerate spread a model that
            is larger than one device over all GPUs, main memory and disk; a map from parts of the network
            (`model.layers.3`, side by side, none left out) to devices or `disk` places it by hand.
        trust_remote_code: run Python code that a checkpoint brings along; off unless asked.

    Raises:
        PrunelensError: nothing there, pickled or damaged weights, NaN or infinite weights, missing tensors,
            a model that is not a causal decoder, a family whose parts do not rebuild, a device that is not
            there, or a model that fits nowhere.
    """
    placement = plan_placement(device)
    chosen_dtype = _dtype(dtype, placement.device)
    path = resolve_name(str(name))
    with memory_explained(str(name), placement), quiet():
        if path.suffix == ".gguf":
            network, tokenizer = read_gguf(path, chosen_dtype, placement)
            fingerprint = fingerprint_files([path], network.config.to_dict())
            opened = Opened(network, tokenizer, fingerprint, stored_bytes([path]))
        else:
            opened = open_checkpoint(path, chosen_dtype, trust_remote_code, placement)
        network = opened.network
        if placement.device_map is None and not hasattr(network.config, "quantization_config"):
            with explained(f"{name} could not be moved to the device {placement.device}"):
                network = network.to(placement.device)
        check_weights(network, str(name))
        model = _opened(str(name), network, opened.tokenizer, opened.fingerprint, opened.notes)
    model.weight_bytes = opened.num_bytes
    model.trust_remote_code = trust_remote_code
    model.spread = placement.device_map is not None
    model.stored_dtype = opened.stored_dtype
    model.source = path if path.is_dir() else None
    model.notes += about_place(path)
    model.notes += remove_recorded(network, model.anatomy, model.name, path)
    return model


def check_opening(dtype: str | torch.dtype | None, devices: Devices | None, is_here: bool = True) -> None:
    """Refuse a dtype or a device by its name, before any model is read.

    Args:
        dtype, devices: as `load` takes them.
        is_here: whether the model is opened on this machine; elsewhere there may be other devices.

    Raises:
        PrunelensError: as said.
    """
    check_device(devices, is_here)
    _dtype(dtype, torch.device("cpu"))


def wrap(network: Any, tokenizer: Any = None, name: str = "model") -> Model:
    """Use a transformers model that is already in memory, or that accelerate has spread or offloaded.

    The network itself is used, not a copy: it is put in eval mode, and its parameters no longer require gradients.

    Raises:
        PrunelensError: as `load` does for the model itself.
    """
    _check_network(network, name)
    check_weights(network, name)
    model = _opened(name, network, tokenizer, fingerprint_model(network), [])
    model.weight_bytes = network_bytes(network)
    return model


def _check_network(network: Any, name: str) -> None:
    """Refuse what is no whole language model of transformers."""
    if isinstance(network, torch.nn.Module):
        check_no_adapter_layers(network, name)
    if not isinstance(network, transformers.PreTrainedModel):
        raise PrunelensError(
            f"expected a causal language model of transformers, found {type(network).__name__}; open it with "
            "AutoModelForCausalLM.from_pretrained"
        )
    with explained(f"{name} ({type(network).__name__}) could not be used as a causal language model"):
        is_headless = not network.can_generate() and network.get_output_embeddings() is None
        if not network.config.is_encoder_decoder:  # which the proof refuses by name; not each knows its embedding
            _check_ends(network, name)
    if is_headless:
        raise PrunelensError(
            f"expected a causal language model, found {type(network).__name__}, which has no head over the vocabulary; "
            "open it with AutoModelForCausalLM.from_pretrained"
        )


def _check_ends(network: Any, name: str) -> None:
    """Refuse settings in memory under which a text ends with what is no token."""
    rows = network.get_input_embeddings().weight.shape[0]
    for holder in (getattr(network, "generation_config", None), network.config, text_config(network)):
        check_token_ids({"eos_token_id": getattr(holder, "eos_token_id", None)}, rows, f"the settings of {name}")


def _opened(name: str, network: Any, tokenizer: Any, fingerprint: str, notes: list[str]) -> Model:
    network.eval().requires_grad_(False)
    try:
        with tolerating(rounding_of(network)):
            anatomy = find_anatomy(network)
    except PrunelensError as error:
        raise PrunelensError(f"{name}: {error}") from error
    return Model(name, network, tokenizer, anatomy, fingerprint, [*notes, *anatomy.manner.notes])


def _dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    if dtype is None:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise PrunelensError(f"expected a dtype of {', '.join(DTYPES)}, found {dtype!r}")
    return DTYPES[dtype]
