"""One run of a model, a prefill and then decoding: its seconds, its cache, and what it adds to memory."""

import ctypes
import inspect
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers.cache_utils import Cache

from prunelens.errors import PrunelensError
from prunelens.models.model import Model
from prunelens.models.sizes import tensor_bytes
from prunelens.models.surgery.variant import Variant

RESIDENT = Path("/proc/self/statm")
SAMPLING_SECONDS = 0.001


@dataclass(frozen=True)
class CacheSize:
    """What a cache holds after the prefill.

    Attributes:
        kv_bytes: keys and values of all rows; they grow with the text.
        state_bytes: states of all rows that do not (convolutions, state spaces).
        windows: for each layer that keeps only its last tokens, how many at most.
    """

    kv_bytes: int
    state_bytes: int
    windows: tuple[int, ...]


@dataclass(frozen=True)
class Timing:
    """Seconds of the prefill and of all decoding, and the cache between them."""

    prefill_seconds: float
    decode_seconds: float
    cache: CacheSize


def time_once(variant: Variant, ids: Int64[Tensor, "B T"], context: int) -> Timing:
    """Read the first `context` tokens in one pass, and the others one by one with the cache.

    Args:
        variant: the model.
        ids: token ids, none of them padding.
        context: tokens of the prefill, fewer than T.

    Raises:
        PrunelensError: the model returns no cache.
    """
    with variant.running() as model, torch.inference_mode():
        network, devices, ids = model.network, cuda_devices(model), ids.to(model.device)
        last_only = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(network.forward).parameters else {}
        _wait(devices, model.device)
        start = time.perf_counter()
        output = network(input_ids=ids[:, :context], use_cache=True, **last_only)
        _wait(devices, model.device)
        prefill = time.perf_counter() - start
        name = _cache_name(output, model)
        size = _size_of(output[name])
        start = time.perf_counter()
        for token in ids[:, context:].split(1, dim=1):
            output = network(input_ids=token, use_cache=True, **{name: output[name]})
            _wait(devices, model.device)
        return Timing(prefill, time.perf_counter() - start, size)


def _cache_name(output: Any, model: Model) -> str:
    """What the family calls its cache, in its output and as an argument."""
    name = next((name for name, value in output.items() if isinstance(value, Cache)), None)
    if name is None:
        raise PrunelensError(
            f"expected {model.name} to return a cache of what it read, found none, so that its decoding cannot be "
            "timed; leave it out"
        )
    return name


def _size_of(cache: Cache) -> CacheSize:
    growing: list[Tensor] = []
    fixed: list[Tensor] = []
    windows = []
    for layer in cache.layers:
        parts = [getattr(layer, name, None) for name in ("keys", "values", "indexer_keys")]
        kept = [part for part in parts if isinstance(part, Tensor)]
        growing += kept
        for name in ("conv_states", "recurrent_states"):
            fixed += [state for state in getattr(layer, name, {}).values() if state is not None]
        window = getattr(layer, "sliding_window", None)
        if kept and window is not None:
            windows.append(int(window) - 1)  # the token that is read brings its own
    return CacheSize(sum(map(tensor_bytes, growing)), sum(map(tensor_bytes, fixed)), tuple(windows))


@dataclass
class Added:
    """The most bytes that were in use beyond those before, and what was watched; None where nothing can be."""

    num_bytes: int | None = None
    source: str | None = None


@contextmanager
def added_memory(model: Model) -> Iterator[Added]:
    """Watch memory while the body runs a model; what is yielded is filled in at the end.

    On GPUs the allocator counts exactly. On a CPU the memory of the whole process is sampled: what the body takes
    from memory that was freed before and not given back to the system is not seen.
    """
    added = Added()
    devices = cuda_devices(model)
    if devices:
        before = sum(map(torch.cuda.memory_allocated, devices))
        for device in devices:
            torch.cuda.reset_peak_memory_stats(device)
        yield added
        added.num_bytes = sum(map(torch.cuda.max_memory_allocated, devices)) - before
        added.source = "the CUDA allocator's peak"
    elif model.device.type == "cpu" and RESIDENT.is_file():
        _give_memory_back()
        before = _resident()
        with _sampled_peak() as peak:
            yield added
        added.num_bytes = max(0, peak() - before)
        added.source = "resident memory of the process, sampled"
    else:
        yield added


def cuda_devices(model: Model) -> list[torch.device]:
    """The GPUs that a model uses."""
    places = {model.device, *(weight.device for weight in model.network.parameters())}
    return sorted((place for place in places if place.type == "cuda"), key=str)


def _wait(devices: list[torch.device], computing: torch.device) -> None:
    """Let the devices finish what they were given."""
    for device in devices:
        torch.cuda.synchronize(device)
    if not devices and computing.type != "cpu":
        torch.accelerator.synchronize(computing)


def _resident() -> int:
    """Bytes of main memory that this process holds now."""
    return int(RESIDENT.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _give_memory_back() -> None:
    """Return freed memory to the system where the C library can, so that the next run has to ask for its own."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


@contextmanager
def _sampled_peak() -> Iterator[Callable[[], int]]:
    """Watch the process's memory while the body runs; the function gives the most that was seen, in bytes."""
    seen = [_resident()]
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(SAMPLING_SECONDS):
            seen[0] = max(seen[0], _resident())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield lambda: seen[0]
        seen[0] = max(seen[0], _resident())
    finally:
        stop.set()
        thread.join()
