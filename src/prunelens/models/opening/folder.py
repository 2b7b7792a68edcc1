"""Open a checkpoint folder: what it claims is checked before memory is taken, what is left unread is told."""

import copy
import functools
import io
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stderr
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer

from prunelens.models.opening.auto_class import auto_class_of, check_causal
from prunelens.models.opening.chat_template import add_processor_template
from prunelens.models.opening.checkpoint import check_complete, check_files, unread_tensors, weight_files
from prunelens.models.opening.claims import (
    CONFIG,
    GENERATION,
    check_fits,
    check_sizes,
    check_token_ids,
    made_without_numbers,
)
from prunelens.models.opening.fingerprint import code_of, fingerprinting
from prunelens.models.opening.ignored import ignored_code, ignored_weights, listed
from prunelens.models.opening.json_files import read_object
from prunelens.models.opening.quantized import check_method, leave_plain, method_of, plain_modules, settle
from prunelens.models.opening.quiet import explained
from prunelens.models.opening.repair_files import REPAIRS
from prunelens.models.placement import Placement, place
from prunelens.models.sizes import StoredTensor, stored_bytes, stored_in


@dataclass(frozen=True)
class Opened:
    """What was read of a file or folder.

    Attributes:
        network: the transformers model.
        tokenizer: its tokenizer, or None.
        fingerprint: hash of configuration and weights, and of code that it brings along.
        num_bytes: size of the weights on disk that are read.
        notes: remarks that a reader of the results should see.
        stored_dtype: the floating dtype that its configuration says it is stored in.
    """

    network: Any
    tokenizer: Any
    fingerprint: str
    num_bytes: int
    notes: list[str] = field(default_factory=list)
    stored_dtype: torch.dtype | None = None


def open_checkpoint(path: Path, dtype: torch.dtype, trust_remote_code: bool, placement: Placement) -> Opened:
    """Read a checkpoint folder.

    Args:
        path: the folder.
        dtype: what to compute in; a quantised checkpoint keeps its own.
        trust_remote_code: run Python code that it brings along.
        placement: where it is to go; on one device, it is left on the CPU unless it is quantised.

    Raises:
        PrunelensError: as `prunelens.models.opening.loading.load`.
    """
    values = check_files(path)
    files = weight_files(path, values)
    tensors = stored_in(file for file in files if file.name != REPAIRS)
    config = _checked_config(path, trust_remote_code, tensors)
    stored = next((one.dtype for one in _both(config) if isinstance(one.dtype, torch.dtype)), None)
    with fingerprinting(files, config.to_dict() | code_of(path, values)) as fingerprint_of:
        network, found, notes = _read(path, config, dtype, trust_remote_code, placement, tensors)
        check_complete(found, path)
        fingerprint = fingerprint_of(network.config.to_dict() | code_of(path, values))
    unread = unread_tensors(found, network, tensors)
    names = sorted({*map(str, found["unexpected_keys"]), *(tensor.name for tensor in unread)})
    if names:
        notes.append(f"{len(names)} tensors in {path} are not read by the model ({listed(names)})")
    notes += [*ignored_weights(path, files), *ignored_code(path, config, trust_remote_code)]
    return Opened(
        network,
        _tokenizer(path, trust_remote_code),
        fingerprint,
        stored_bytes(files) - sum(tensor.num_bytes for tensor in unread),
        notes,
        stored,
    )


def _both(config: Any) -> tuple[Any, Any]:
    """The configuration and that of the part that writes text, which is often the same."""
    return config, config.get_text_config(decoder=True)


def _checked_config(path: Path, trust: bool, tensors: Sequence[StoredTensor]) -> Any:
    """The configuration, refused if it is not a causal decoder's that these weights can be of."""
    with explained(_what(path)):
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust)
        check_causal(config, path, trust)
        vocab_size = getattr(config.get_text_config(decoder=True), "vocab_size", None)
    check_method(config, path)
    check_sizes(config, path)
    for one in _both(config):
        check_token_ids(one.to_dict(), vocab_size, path / CONFIG)
    if (path / GENERATION).exists():
        check_token_ids(read_object(path / GENERATION), vocab_size, path / GENERATION)
    with explained(_what(path)):
        make = functools.partial(auto_class_of(config, trust).from_config, trust_remote_code=trust)
        empty = made_without_numbers(make, copy.deepcopy(config))
    check_fits(empty, tensors, method_of(config) is not None, path)
    return config


def _read(
    path: Path, config: Any, dtype: torch.dtype, trust: bool, placement: Placement, tensors: Sequence[StoredTensor]
) -> tuple[Any, dict[str, Any], list[str]]:
    """The network, what transformers tells about the loading, and remarks."""
    quantized = method_of(config) is not None
    more: dict[str, Any] = {}
    if quantized:  # its scales are made for one dtype, and it is not moved once it is open
        dtype = config.dtype if isinstance(config.dtype, torch.dtype) else dtype
        more = {"device_map": {"": placement.device}} if placement.device_map is None else {}
    opener = functools.partial(
        auto_class_of(config, trust).from_pretrained,
        path,
        dtype=dtype,
        use_safetensors=True,
        trust_remote_code=trust,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are refused afterwards, by name
        **more,
    )
    silenced = redirect_stderr(io.StringIO()) if quantized else nullcontext()  # progress bars without another switch
    with explained(_what(path)), silenced:
        network, found = place(placement, opener)
        plain = plain_modules(found, network, tensors) if quantized else []
        if plain:
            network, found = place(placement, functools.partial(opener, config=leave_plain(config, plain)))
        notes = settle(network) if quantized else []
    if plain:
        notes.append(f"{listed(plain)} in {path} is declared quantised but stored as plain numbers, which are used")
    return network, found, notes


def _what(path: Path) -> str:
    return f"{path} could not be opened as a causal language model"


def _tokenizer(path: Path, trust: bool) -> Any:
    if not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        return None
    with explained(f"the tokenizer in {path} could not be opened"):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust)
    add_processor_template(tokenizer, path)
    return tokenizer
