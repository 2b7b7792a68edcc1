"""How many bytes weights take, quantised ones as they really are stored."""

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn


def is_quantized(tensor: Tensor) -> bool:
    """Whether a weight is put together from others (numbers, scales, zero points)."""
    return hasattr(tensor, "__tensor_flatten__")


def plain_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that hold a weight's numbers: itself, or those a quantised one is put together from."""
    if not is_quantized(tensor):
        yield tensor
        return
    names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    for name in names:
        inner = getattr(tensor, name)
        if inner is not None:
            yield from plain_tensors(inner)


def same_numbers(left: Tensor, right: Tensor) -> bool:
    """Whether two weights hold the same numbers in the same way; one on no device equals none."""
    if is_quantized(left) or is_quantized(right):
        pairs = list(plain_tensors(left)), list(plain_tensors(right))
        same_kind = type(left) is type(right) and len(pairs[0]) == len(pairs[1])
        return same_kind and all(same_numbers(*pair) for pair in zip(*pairs, strict=True))
    if left.is_meta or right.is_meta:
        return False
    return left.shape == right.shape and torch.equal(left, right.to(left.device, left.dtype))


def tensor_bytes(tensor: Tensor) -> int:
    """Bytes of one weight as it is stored."""
    return sum(part.numel() * part.itemsize for part in plain_tensors(tensor))


def network_bytes(network: nn.Module) -> int:
    """Bytes of all weights in memory; tied ones count once, scales kept as buffers count too."""
    tied = getattr(network, "all_tied_weights_keys", {})
    held = {
        id(tensor): tensor
        for name, tensor in network.state_dict(keep_vars=True).items()
        if isinstance(tensor, Tensor) and not (tensor.is_meta and name in tied)  # offloading parts tied weights
    }
    return sum(tensor_bytes(tensor) for tensor in held.values())


def stored_bytes(files: Iterable[Path]) -> int:
    """Bytes of weight files: safetensors or GGUF."""
    return sum(file.stat().st_size for file in files)


@dataclass(frozen=True)
class StoredTensor:
    """What the header of a safetensors file says of one tensor: its name and shape, and where its bytes are."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def num_bytes(self) -> int:
        """Bytes in the file."""
        return self.end - self.begin

    @property
    def numel(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


def stored_tensors(path: Path) -> list[StoredTensor]:
    """The tensors of a safetensors file that has been checked, without reading their numbers."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    found = []
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            found.append(StoredTensor(name, entry["dtype"], tuple(entry["shape"]), begin, end))
    return found


def stored_in(files: Iterable[Path]) -> list[StoredTensor]:
    """The tensors of several such files."""
    return [tensor for file in files for tensor in stored_tensors(file)]
