"""Where a model's weights are: on one device, on several, or waiting in main memory or on disk until they are used.

Spreading and offloading are accelerate's. A part that waits elsewhere has its parameters on the `meta` device;
a hook around its forward fetches their numbers and lets them go again.
"""

import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunelens.cache import cache_dir, scratch_folder
from prunelens.errors import PrunelensError, shown
from prunelens.memory import is_out_of_memory as is_out_of_memory

AUTO = "auto"
DISK = "disk"

Device = str | int | torch.device
Devices = str | torch.device | Mapping[str, Device]
"""A device, `auto`, or for each part of the network by name a device or `disk`."""


@dataclass(frozen=True)
class Placement:
    """Where a model is to go.

    Attributes:
        device: the device that computes (with several, the first of them).
        device_map: what accelerate is asked for, or None for one device.
    """

    device: torch.device
    device_map: str | dict[str, Device] | None = None

    def __str__(self) -> str:
        return str(self.device) if self.device_map is None else "the available memory"


def plan_placement(device: Devices | None) -> Placement:
    """Check what was asked for.

    Raises:
        PrunelensError: a device that is not there or holds no numbers, a map of parts within parts, or no accelerate.
    """
    if isinstance(device, Mapping):
        _need_accelerate("a map of devices")
        return _planned_map(device)
    if device == AUTO:
        _need_accelerate("--device auto")
        return Placement(_checked(None), AUTO)
    return Placement(_checked(device))


def check_device(device: Devices | None, is_here: bool = True) -> None:
    """Refuse a device by its name, without a model and without touching a GPU, whose memory stays free.

    Args:
        device: as `plan_placement` takes it.
        is_here: whether this machine is to have it; else only the name is checked.

    Raises:
        PrunelensError: no device, or none that is there.
    """
    if device in (None, "", AUTO) or isinstance(device, Mapping):
        return
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise _no_device(device) from error
    if chosen.type == "cuda":
        if is_here and (chosen.index or 0) >= torch.cuda.device_count():
            raise _no_device(device)
    elif is_here or chosen.type == "meta":
        _checked(device)


def place(placement: Placement, opener: Callable[..., Any]) -> Any:
    """Let transformers open a network where it is to stay.

    What must be written anew to be offloaded goes to a folder that is removed with the network.

    Args:
        placement: where it goes.
        opener: `from_pretrained` with all its other arguments; returns a network, or a tuple that begins with it.

    Returns:
        What `opener` returns.

    Raises:
        PrunelensError: a map names a part that the network does not have, or puts tied weights apart.
    """
    if placement.device_map is None:
        return opener()
    folder = _scratch_folder()
    try:
        opened = opener(device_map=placement.device_map, offload_folder=str(folder))
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    network = opened[0] if isinstance(opened, tuple) else opened
    if isinstance(placement.device_map, dict):
        _check_map(placement.device_map, network)
    if any(folder.iterdir()):
        weakref.finalize(network, shutil.rmtree, folder, ignore_errors=True)
    else:
        folder.rmdir()
    return opened


@contextmanager
def memory_explained(name: str, placement: Placement) -> Iterator[None]:
    """Turn running out of memory in the body into one sentence."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        advice = "pass --device auto, which also uses main memory and disk, or choose a smaller --dtype"
        if placement.device_map is not None:
            advice = "its largest part does not, even alone; choose a smaller --dtype or a machine with more memory"
        raise PrunelensError(f"{name} does not fit into {placement}: {advice}") from error


def input_device(network: Any) -> torch.device:
    """Where token ids go in: the device on which the embedding computes."""
    embedding = network.get_input_embeddings()
    for hook in _hooks(embedding):
        if getattr(hook, "execution_device", None) is not None:
            return torch.device(hook.execution_device)
    return embedding.weight.device


def fetched(network: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """A parameter or buffer with its numbers: itself, or what the hook of an offloaded part keeps of it.

    Raises:
        PrunelensError: its numbers are missing, or those that are kept have another shape.
    """
    if tensor.device.type != "meta":
        return tensor
    parts = name.split(".")
    for depth in range(len(parts) - 1, -1, -1):
        for hook in _hooks(network.get_submodule(".".join(parts[:depth]))):
            try:
                kept = hook.weights_map[".".join(parts[depth:])]
            except (AttributeError, KeyError, TypeError):  # a hook of another kind, or of other weights
                continue
            if kept.shape != tensor.shape:
                raise PrunelensError(
                    f"expected {name} of shape {tuple(tensor.shape)}, found {tuple(kept.shape)}; the checkpoint's "
                    "config.json belongs to another"
                )
            return kept.to(tensor.dtype)
    raise PrunelensError(
        f"the weights of {name} are missing (it is on the device meta, and no offloading hook keeps it); load "
        "the network's weights first, and place tied weights together"
    )


def named_weights(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter with its numbers, offloaded ones fetched one at a time (tied ones under each name)."""
    for name, weight in network.named_parameters():
        yield name, fetched(network, name, weight)


def counted_parameters(network: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter once; offloading gives a tied one a placeholder of its own."""
    tied = getattr(network, "all_tied_weights_keys", {})
    for name, weight in network.named_parameters():
        if name not in tied or weight.device.type != "meta":
            yield name, weight


def _hooks(module: nn.Module) -> list[Any]:
    hook = getattr(module, "_hf_hook", None)
    return list(getattr(hook, "hooks", [hook] if hook is not None else []))


def _planned_map(device_map: Mapping[str, Device]) -> Placement:
    if not device_map:
        raise PrunelensError("expected a map from the network's parts to devices, found an empty one")
    for outer in device_map:
        inner = next((name for name in device_map if name != outer and _holds(outer, name)), None)
        if inner is not None:
            raise PrunelensError(
                f"expected a map of devices whose parts do not overlap, found {inner!r} inside {outer!r}; name "
                "the parts beside it instead"
            )
    places = [_checked(device) for device in device_map.values() if device != DISK]
    computing = [device for device in places if device.type != "cpu"] or [torch.device("cpu")]
    return Placement(computing[0], dict(device_map))


def _check_map(device_map: dict[str, Device], network: nn.Module) -> None:
    known = {name for name, _ in (*network.named_modules(), *network.named_parameters(), *network.named_buffers())}
    unexpected = [name for name in device_map if name not in known]
    if unexpected:
        raise PrunelensError(
            f"the map of devices names {unexpected[0]!r}, which {type(network).__name__} does not have; "
            "`prunelens inspect` lists its layers"
        )
    for tied in getattr(network, "all_tied_weights_keys", {}).items():
        places = [next(device for part, device in device_map.items() if _holds(part, name)) for name in tied]
        if places[0] != places[1] and DISK in places:
            raise PrunelensError(
                f"the map of devices puts the tied weights {' and '.join(tied)} apart; put both on disk"
            )


def _holds(outer: str, inner: str) -> bool:
    return outer in ("", inner) or inner.startswith(f"{outer}.")


def _checked(device: Device | None) -> torch.device:
    try:
        chosen = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device in (None, "") else device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise _no_device(device) from error
    if chosen.type == "meta":
        raise PrunelensError("expected a device such as cpu or cuda:0, found meta, which holds no numbers")
    return chosen


def _no_device(device: Device | None) -> PrunelensError:
    return PrunelensError(f"expected auto or an available device such as cpu or cuda:0, found {shown(device)}")


def _need_accelerate(what: str) -> None:
    try:
        import accelerate  # noqa: F401
    except ImportError as error:
        raise PrunelensError(
            f"{what} needs the package accelerate; install it with `pip install accelerate`"
        ) from error


def _scratch_folder() -> Path:
    """A new folder in the user's cache, which is on a disk, or where that cannot be written among temporary files."""
    try:
        return scratch_folder(cache_dir() / "offload")
    except OSError:
        return scratch_folder(Path(tempfile.gettempdir()))
