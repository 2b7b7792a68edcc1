"""A name for a model's exact content: a hash over its configuration and its tensors' names, shapes and bytes."""

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prunelens.models.opening.checkpoint import check_files, weight_files
from prunelens.models.opening.remembered import remembered
from prunelens.models.opening.sources import resolve_name

VOLATILE = ("_name_or_path", "_model_name_or_path", "transformers_version", "torch_dtype", "dtype")


def fingerprint_files(files: list[Path], config: dict[str, Any], is_stopped: Callable[[], bool] = lambda: False) -> str:
    """Fingerprint of a checkpoint from its safetensors or GGUF files, however they are sharded.

    Args:
        files: all files with weights.
        config: the configuration.
        is_stopped: asked before each tensor; where it says so, the work ends with `StoppedError`.
    """

    def made() -> str:
        digest = _start(config)
        for tensor in sorted(_tensors(files), key=lambda tensor: tensor[0]):
            if is_stopped():
                raise StoppedError
            _add(digest, *tensor)
        return str(digest.hexdigest())

    return remembered("fingerprints", files, _canonical(config), made)


class StoppedError(Exception):
    """Nobody waits for the fingerprint any more."""


@contextmanager
def fingerprinting(files: list[Path], config: dict[str, Any]) -> Iterator[Callable[[dict[str, Any]], str]]:
    """Make the fingerprint while the body loads the same files, so that the disk gives them once.

    Args:
        files: all files with weights.
        config: the configuration as it is known before loading.

    Yields:
        A function from the configuration of the network that was loaded to `fingerprint_files` of it. Only where
        loading has changed the configuration are the files hashed again.
    """
    left = threading.Event()
    with ThreadPoolExecutor(1, "prunelens fingerprint") as pool:
        early = pool.submit(fingerprint_files, files, config, left.is_set)

        def finished(final: dict[str, Any]) -> str:
            if _canonical(final) == _canonical(config):
                return early.result()
            left.set()
            return fingerprint_files(files, final)

        try:
            yield finished
        finally:
            left.set()


def fingerprint_model(model: Any) -> str:
    """Fingerprint of a `PreTrainedModel` that was not opened from files, wherever accelerate keeps its weights."""
    import torch

    from prunelens.models.placement import fetched
    from prunelens.models.sizes import plain_tensors

    digest = _start(model.config.to_dict())
    for name, tensor in sorted(model.state_dict().items()):
        for part in plain_tensors(fetched(model, name, tensor)):
            data = part.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
            _add(digest, name, str(part.dtype), tuple(part.shape), data)
    return digest.hexdigest()


def code_of(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """An entry for the configuration with the hashes of the Python files that a checkpoint brings along, if any.

    Args:
        path: the checkpoint folder.
        config: its configuration, which says under `auto_map` whether it brings code.
    """
    if not config.get("auto_map"):
        return {}
    return {"code": {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(path.glob("*.py"))}}


def _canonical(config: dict[str, Any]) -> str:
    return json.dumps(_kept(config), sort_keys=True, default=str)


def _kept(config: Any) -> Any:
    """What of a configuration, nested ones included, belongs to the model's content."""
    if isinstance(config, dict):
        return {name: _kept(value) for name, value in config.items() if name not in VOLATILE}
    return config


def _start(config: dict[str, Any]) -> Any:
    digest = hashlib.sha256()
    digest.update(_canonical(config).encode())
    return digest


def _add(digest: Any, name: str, dtype: str, shape: tuple[int, ...], data: Any) -> None:
    digest.update(f"\0{name}\0{dtype}\0{shape}\0".encode())
    digest.update(data)


def _tensors(files: list[Path]) -> Iterator[tuple[str, str, tuple[int, ...], Any]]:
    for path in files:
        if path.suffix == ".gguf":
            from gguf import GGUFReader

            for tensor in GGUFReader(path).tensors:
                shape = tuple(int(size) for size in tensor.shape)
                yield tensor.name, tensor.tensor_type.name, shape, tensor.data.reshape(-1).view("uint8")
        else:
            yield from _safetensors(path)


def _safetensors(path: Path) -> Iterator[tuple[str, str, tuple[int, ...], Any]]:
    import numpy as np

    from prunelens.models.sizes import stored_tensors

    content = np.memmap(path, dtype=np.uint8, mode="r")
    for tensor in stored_tensors(path):
        yield tensor.name, tensor.dtype, tensor.shape, content[tensor.begin : tensor.end]


def identify(name: str) -> str:
    """A name for the content of a checkpoint, from its configuration file and its weights.

    It differs from `Model.fingerprint`, for which the configuration is completed by transformers.

    Raises:
        PrunelensError: nothing there, or a damaged checkpoint.
    """
    path = resolve_name(name)
    if path.suffix == ".gguf":
        return fingerprint_files([path], {})
    values = check_files(path)
    return fingerprint_files(weight_files(path, values), values | code_of(path, values))
