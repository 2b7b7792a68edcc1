"""Open a model safely: a folder, a GGUF file, a hub id or the built-in name; safetensors and GGUF only."""

import functools
import io
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

from prunelens.errors import PrunelensError
from prunelens.models.anatomy import Anatomy, find_anatomy
from prunelens.models.checkpoint import (
    check_causal,
    check_complete,
    check_files,
    check_weights,
    weight_files,
)
from prunelens.models.fingerprint import fingerprint_files, fingerprint_model
from prunelens.models.placement import (
    AUTO,
    DISK,
    Devices,
    Placement,
    input_device,
    is_out_of_memory,
    memory_explained,
    place,
    plan_placement,
)
from prunelens.models.proofs import tolerating
from prunelens.models.quantized import check_method, method_of, rounding_of, settle
from prunelens.models.record import remove_recorded
from prunelens.models.sizes import network_bytes, stored_bytes
from prunelens.models.sources import resolve_name
from prunelens.models.taps import head_of

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
ON_CPU = Placement(torch.device("cpu"))


@dataclass
class Model:
    """An open model: Hugging Face modules, tokenizer, where its parts are, and what it is.

    Attributes:
        name: what the user called it.
        network: the transformers model, in eval mode.
        tokenizer: its tokenizer, or None where the checkpoint has none.
        anatomy: blocks, sublayers, norms and head.
        fingerprint: hash of configuration and weights.
        notes: remarks that a reader of the results should see.
        trust_remote_code: whether it was opened with code of its own allowed; models compared with it are too.
        spread: whether it was opened for several devices or offloading; models compared with it are too.
        stored_dtype: the floating dtype of its checkpoint, where it is known.
        weight_bytes: size of its weights on disk, or in memory where it was not opened from files.
    """

    name: str
    network: Any
    tokenizer: Any
    anatomy: Anatomy
    fingerprint: str
    notes: list[str] = field(default_factory=list)
    trust_remote_code: bool = False
    spread: bool = False
    stored_dtype: torch.dtype | None = None
    weight_bytes: int = 0

    @property
    def device(self) -> torch.device:
        """Where token ids go in, which is where states are collected."""
        return input_device(self.network)

    @property
    def placement(self) -> str | torch.device:
        """The `device` with which a model to be compared is opened."""
        return AUTO if self.spread else self.device

    @property
    def dtype(self) -> torch.dtype:
        """The floating dtype of the states."""
        return self.network.get_input_embeddings().weight.dtype

    @property
    def layers(self) -> list[torch.nn.Module]:
        """The decoder layers in order."""
        return [block.module for block in self.anatomy.blocks]

    @property
    def context_length(self) -> int | None:
        """Longest sequence the positions allow, or None where the family sets no limit."""
        return getattr(self.network.config, "max_position_embeddings", None)

    @property
    def eos_ids(self) -> list[int]:
        """Tokens that end a text."""
        for holder in (self.network.generation_config, self.network.config, self.tokenizer):
            found = getattr(holder, "eos_token_id", None)
            if found is not None:
                return [found] if isinstance(found, int) else list(found)
        return []

    def head(self, states: Tensor) -> Tensor:
        """Logits (rows, V) of states (rows, d) that enter the head."""
        return head_of(self.network)(states)


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
    notes: list[str] = []
    stored = None
    with memory_explained(str(name), placement), quiet():
        if path.suffix == ".gguf":
            network, tokenizer = read_gguf(path, chosen_dtype, placement)
            files = [path]
        else:
            network, tokenizer, notes, stored = _read_folder(path, chosen_dtype, trust_remote_code, placement)
            files = weight_files(path, network.config)
        if placement.device_map is None and not hasattr(network.config, "quantization_config"):
            with _explained(f"{name} could not be moved to the device {placement.device}"):
                network = network.to(placement.device)
        check_weights(network, str(name))
        fingerprint = fingerprint_files(files, network.config.to_dict())
        model = _opened(str(name), network, tokenizer, fingerprint, notes)
        model.weight_bytes = stored_bytes(files)
    model.trust_remote_code = trust_remote_code
    model.spread = placement.device_map is not None
    model.stored_dtype = stored
    model.notes += remove_recorded(network, model.anatomy, model.name, path)
    return model


def wrap(network: Any, tokenizer: Any = None, name: str = "model") -> Model:
    """Use a transformers model that is already in memory, or that accelerate has spread or offloaded.

    The network itself is used, not a copy: it is put in eval mode, and its parameters no longer require gradients.

    Raises:
        PrunelensError: as `load` does for the model itself.
    """
    check_weights(network, name)
    model = _opened(name, network, tokenizer, fingerprint_model(network), [])
    model.weight_bytes = network_bytes(network)
    return model


def _opened(name: str, network: Any, tokenizer: Any, fingerprint: str, notes: list[str]) -> Model:
    network.eval().requires_grad_(False)
    try:
        with tolerating(rounding_of(network)):
            anatomy = find_anatomy(network)
    except PrunelensError as error:
        raise PrunelensError(f"{name}: {error}") from error
    return Model(name, network, tokenizer, anatomy, fingerprint, [*notes, *anatomy.manner.notes])


def read_gguf(path: Path, dtype: torch.dtype = torch.float32, placement: Placement = ON_CPU) -> tuple[Any, Any]:
    """Read and dequantise a GGUF file: (network, tokenizer). Without a map of devices it stays on the CPU.

    Raises:
        PrunelensError: not a GGUF file, damaged, or an architecture transformers cannot read.
    """
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise PrunelensError(f"expected a GGUF file, but {path} does not begin with GGUF; download it again")
    if isinstance(placement.device_map, dict) and DISK in placement.device_map.values():
        raise PrunelensError(
            f"a map of devices cannot put parts of the GGUF file {path} on disk; pass --device auto, or convert it "
            "to a folder of safetensors"
        )
    source: dict[str, Any] = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    what = f"{path} could not be read as a GGUF checkpoint, download it again or check its kind"
    with quiet(), redirect_stderr(io.StringIO()), _explained(what):  # its progress bar knows no other switch
        opener = functools.partial(
            AutoModelForCausalLM.from_pretrained,
            **source,
            quantization_config=GgufConfig(dequantize=True),
            dtype=dtype,
            output_loading_info=True,
        )
        network, found = place(placement, opener)
        tokenizer = AutoTokenizer.from_pretrained(**source)
    check_complete(found, path)
    network.config.quantization_config = None
    del network.config.quantization_config
    return network, tokenizer


def _dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    if dtype is None:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise PrunelensError(f"expected a dtype of {', '.join(DTYPES)}, found {dtype!r}")
    return DTYPES[dtype]


def _read_folder(
    path: Path, dtype: torch.dtype, trust: bool, placement: Placement
) -> tuple[Any, Any, list[str], torch.dtype | None]:
    check_files(path)
    with _explained(f"{path} could not be opened as a causal language model"):
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust)
    check_causal(config, path)
    stored = config.dtype if isinstance(config.dtype, torch.dtype) else None
    check_method(config, path)
    quantized = method_of(config) is not None
    more: dict[str, Any] = {}
    if quantized:  # its scales are made for one dtype, and it is not moved once it is open
        dtype = stored or dtype
        more = {"device_map": {"": placement.device}} if placement.device_map is None else {}
    with _explained(f"{path} could not be opened as a causal language model"):
        opener = functools.partial(
            AutoModelForCausalLM.from_pretrained,
            path,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=trust,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            **more,
        )
        with redirect_stderr(io.StringIO()) if quantized else nullcontext():  # progress bars without another switch
            network, found = place(placement, opener)
            notes = settle(network) if quantized else []
    check_complete(found, path)
    if found["unexpected_keys"]:
        extra = sorted(map(str, found["unexpected_keys"]))
        notes.append(f"{len(extra)} tensors in {path} are not read by the model ({', '.join(extra[:3])}, …)")
    return network, _tokenizer(path, trust), notes, stored


def _tokenizer(path: Path, trust: bool) -> Any:
    if not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        return None
    with _explained(f"the tokenizer in {path} could not be opened"):
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust)


@contextmanager
def _explained(what: str) -> Iterator[None]:
    try:
        yield
    except PrunelensError:
        raise
    except Exception as error:  # libraries raise anything when they read a damaged or hostile file
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        hint = "; pass --trust-remote-code to run it" if "trust_remote_code" in str(error) else ""
        if "on the meta device" in reason:
            hint = "; the map of devices must put tied weights, often the embedding and the head, together"
        raise PrunelensError(f"{what}: {reason}{hint}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Keep progress bars and remarks of transformers and accelerate off the terminal while a model opens."""
    remarks = logging.getLogger("accelerate")
    level = remarks.level
    remarks.setLevel(logging.ERROR)
    verbosity = transformers.logging.get_verbosity()
    bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        remarks.setLevel(level)
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()
