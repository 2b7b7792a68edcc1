"""What must be true of a checkpoint before and after it is opened: safetensors, whole, and real numbers."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from prunelens.errors import PrunelensError
from prunelens.models.opening.claims import CONFIG, GENERATION, check_claims, check_token_ids
from prunelens.models.opening.ignored import check_no_adapter, listed
from prunelens.models.opening.json_files import read_object
from prunelens.models.opening.repair_files import REPAIRS
from prunelens.models.placement import named_weights
from prunelens.models.sizes import StoredTensor, plain_tensors, stored_in

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TEXT_SECTIONS = ("text_config", "decoder", "generator")
"""Where transformers looks for the configuration of the part that writes text."""


def check_files(path: Path) -> dict[str, Any]:
    """Look at a checkpoint folder before anything in it is opened.

    Returns:
        The content of config.json.

    Raises:
        PrunelensError: no configuration, one that claims the absurd, an adapter, no weights, pickled or damaged ones,
            or an index that does not fit them.
    """
    check_no_adapter(path)
    if not (path / CONFIG).is_file():
        raise PrunelensError(f"expected a checkpoint folder with {CONFIG}, found none in {path}")
    values = read_object(path / CONFIG)
    files = sorted(path.glob("*.safetensors"))
    if not files:
        pickles = [found.name for pattern in PICKLES for found in path.glob(pattern)]
        if pickles:
            raise PrunelensError(
                f"expected safetensors weights in {path}, found the pickle {pickles[0]}, which can run any "
                "code when opened; convert it to safetensors first"
            )
        raise PrunelensError(f"expected *.safetensors weights in {path}, found none")
    named = weight_files(path, values)
    for file in named:
        _check_whole(file)
    check_claims(values, path, stored_in(named))
    for part in _sections(values):
        check_token_ids(part, None, path / CONFIG)
    if (path / GENERATION).exists():
        check_token_ids(read_object(path / GENERATION), None, path / GENERATION)
    return values


def weight_files(path: Path, values: dict[str, Any]) -> list[Path]:
    """The files of a folder that transformers reads the weights from, and that of repairs.

    Args:
        path: the checkpoint.
        values: the content of its config.json.

    Raises:
        PrunelensError: they are not there, or not in the folder.
    """
    own = values.get("transformers_weights")  # the configuration names a file of its own
    if own is not None and (not isinstance(own, str) or Path(own).name != own):
        raise PrunelensError(
            f"expected transformers_weights in {path / CONFIG} to name a file of its folder, found {str(own)[:80]!r}; "
            "remove the entry"
        )
    whole = path / (own or WEIGHTS)
    index = whole if whole.name.endswith(".index.json") else path / INDEX
    if whole != index and (own or whole.is_file()):
        names = [whole.name]
    elif index.is_file():
        names = _shards(index)
    else:
        raise PrunelensError(f"expected {WEIGHTS} or {INDEX} in {path}, found neither; download it again")
    missing = sorted(name for name in names if not (path / name).is_file())
    if missing:
        what = f"its index {index}" if index.is_file() else CONFIG
        raise PrunelensError(f"{path} lacks {missing[0]}, which {what} names; download it again")
    return [*(path / name for name in names), *path.glob(REPAIRS)]


def check_complete(found: dict[str, Any], path: Path) -> None:
    """Refuse a checkpoint with gaps, which transformers fills with random numbers.

    Args:
        found: what transformers tells about the loading.
        path: the checkpoint.

    Raises:
        PrunelensError: tensors are missing or have another shape.
    """
    mismatched = [key if isinstance(key, str) else key[0] for key in found["mismatched_keys"]]
    wrong = sorted({*map(str, found["missing_keys"]), *map(str, mismatched)})
    if wrong:
        raise PrunelensError(
            f"{path}: {len(wrong)} tensors that the configuration asks for are missing or have another shape "
            f"({listed(wrong)}); the checkpoint is incomplete or its config.json belongs to another"
        )


def unread_tensors(found: dict[str, Any], network: Any, tensors: Iterable[StoredTensor]) -> list[StoredTensor]:
    """The stored tensors that an opened network does not read, those that its family leaves out by name included.

    Args:
        found: what transformers tells about the loading.
        network: the network.
        tensors: what the weight files hold.
    """
    patterns = [re.compile(one) for one in network._keys_to_ignore_on_load_unexpected or ()]
    unexpected, own = set(map(str, found["unexpected_keys"])), network.state_dict().keys()
    return [
        tensor
        for tensor in tensors
        if tensor.name in unexpected
        or (tensor.name not in own and any(pattern.search(tensor.name) for pattern in patterns))
    ]


def check_weights(network: Any, name: str) -> None:
    """Refuse weights that are no numbers; offloaded ones are read one at a time.

    Raises:
        PrunelensError: NaN or infinite weights.
    """
    for part, whole in named_weights(network):
        bad = [weight for weight in plain_tensors(whole) if not _is_finite(weight)]
        if not bad:
            continue
        weight = bad[0]
        if weight.dtype == torch.float16 and not bool(torch.isnan(weight).any()):
            raise PrunelensError(f"{name}: the weights {part} exceed the range of float16; use --dtype bfloat16")
        raise PrunelensError(f"{name}: the weights {part} hold NaN or infinite values; the file is damaged")


def _is_finite(weight: torch.Tensor) -> bool:
    return not weight.is_floating_point() or bool(torch.isfinite(weight.float()).all())


def _check_whole(file: Path) -> None:
    try:
        with safe_open(file, framework="numpy") as opened:
            opened.keys()
    except (SafetensorError, OSError) as error:
        raise PrunelensError(f"{file} is damaged or cut short ({error}); download it again") from error


def _sections(values: dict[str, Any]) -> list[dict[str, Any]]:
    """The configuration itself and that of its text decoder, where it is told apart."""
    return [values, *(values[name] for name in TEXT_SECTIONS if isinstance(values.get(name), dict))]


def _shards(index: Path) -> list[str]:
    """The files that an index names."""
    found = read_object(index).get("weight_map")
    if not isinstance(found, dict) or not found or not all(isinstance(shard, str) for shard in found.values()):
        raise PrunelensError(
            f"expected {index} to name a file for each tensor under weight_map, found no safetensors index; "
            "download it again"
        )
    shards = sorted(set(found.values()))
    unexpected = [shard for shard in shards if Path(shard).name != shard or not shard.endswith(".safetensors")]
    if unexpected:
        raise PrunelensError(
            f"expected {index} to name safetensors files in its own folder, found {unexpected[0][:120]}; convert the "
            "checkpoint or download it again"
        )
    return shards
