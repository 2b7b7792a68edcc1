"""What must be true of a checkpoint before and after it is opened: safetensors, whole, causal, and real numbers."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from prunelens.errors import PrunelensError
from prunelens.models.placement import named_weights
from prunelens.models.repair_files import REPAIRS
from prunelens.models.sizes import plain_tensors
from prunelens.reading import read_json

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def check_files(path: Path) -> None:
    """Look at a checkpoint folder before anything in it is opened.

    Raises:
        PrunelensError: no configuration, no weights, pickled or damaged ones, or an index that does not fit them.
    """
    if not (path / "config.json").is_file():
        raise PrunelensError(f"expected a checkpoint folder with config.json, found none in {path}")
    files = sorted(path.glob("*.safetensors"))
    if not files:
        pickles = [found.name for pattern in PICKLES for found in path.glob(pattern)]
        if pickles:
            raise PrunelensError(
                f"expected safetensors weights in {path}, found the pickle {pickles[0]}, which can run any "
                "code when opened; convert it to safetensors first"
            )
        raise PrunelensError(f"expected *.safetensors weights in {path}, found none")
    for file in files:
        try:
            with safe_open(file, framework="numpy") as opened:
                opened.keys()
        except (SafetensorError, OSError) as error:
            raise PrunelensError(f"{file} is damaged or cut short ({error}); download it again") from error
    _check_index(path)


def weight_files(path: Path, config: Any) -> list[Path]:
    """The files of a checked folder that transformers reads the weights from, and that of repairs."""
    if getattr(config, "transformers_weights", None):  # the configuration names files of its own
        return sorted(path.glob("*.safetensors"))
    names = [WEIGHTS] if (path / WEIGHTS).is_file() else sorted(_shards(path / INDEX))
    return [*(path / name for name in names), *path.glob(REPAIRS)]


def check_causal(config: Any, path: Path) -> None:
    """Refuse a configuration that is not a causal decoder's.

    Raises:
        PrunelensError: it is not.
    """
    classes = config.architectures or []
    causal = [name for name in classes if name.endswith(("CausalLM", "LMHeadModel", "ConditionalGeneration"))]
    if getattr(config, "is_encoder_decoder", False) or (classes and not causal):
        raise PrunelensError(
            f"expected a causal decoder in {path}, found {', '.join(classes) or config.model_type}; "
            "only causal language models can be compared"
        )


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
            f"({', '.join(wrong[:3])}, …); the checkpoint is incomplete or its config.json belongs to another"
        )


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


def _check_index(path: Path) -> None:
    """A checkpoint in several files needs an index that names them all."""
    index = path / INDEX
    if not index.is_file():
        if not (path / WEIGHTS).is_file():
            raise PrunelensError(f"expected {WEIGHTS} or {INDEX} in {path}, found neither; download it again")
        return
    shards = _shards(index)
    strange = sorted(shard for shard in shards if Path(shard).name != shard or not shard.endswith(".safetensors"))
    if strange:
        raise PrunelensError(
            f"expected {index} to name safetensors files in its own folder, found {strange[0]}; convert the "
            "checkpoint or download it again"
        )
    missing = sorted(shard for shard in shards if not (path / shard).is_file())
    if missing:
        raise PrunelensError(f"{path} lacks {missing[0]}, which its index {index} names; download it again")


def _shards(index: Path) -> set[str]:
    try:
        return {str(shard) for shard in read_json(index, "a safetensors index")["weight_map"].values()}
    except (PrunelensError, KeyError, AttributeError, TypeError) as error:
        raise PrunelensError(f"{index} is not a safetensors index; download it again") from error
