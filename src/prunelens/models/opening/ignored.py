"""What lies in a checkpoint folder beside the model: adapters, which are refused, and weights that nothing reads."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import nn

from prunelens.errors import PrunelensError
from prunelens.models.opening.json_files import read_object

ADAPTER_CONFIG = "adapter_config.json"
ADAPTERS = (ADAPTER_CONFIG, "adapter_model*.safetensors", "adapter_model*.bin", "adapters.safetensors", "adapters.npz",
            "pytorch_adapter.bin", "*lora*.safetensors")  # fmt: skip
PROMPTS = ("prompt", "prefix", "p_tuning", "cpt")
"""Methods of adapters that are no weights: inputs that are learnt."""
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".npz", ".onnx")
TRAINING = ("optimizer", "scheduler", "rng_state", "training_args", "scaler", "random_states")
"""How files begin that a training run leaves: its state, no weights of the model."""


def check_no_adapter(path: Path) -> None:
    """Refuse a folder with an adapter: transformers applies it or not, depending on whether peft is installed.

    Raises:
        PrunelensError: as said; its kind and base are named, and how to merge it.
    """
    found = sorted({file.name for pattern in ADAPTERS for file in path.glob(pattern)})
    if not found:
        return
    values = read_object(path / ADAPTER_CONFIG) if ADAPTER_CONFIG in found else {}
    kind = str(values.get("peft_type") or values.get("fine_tune_type") or "")[:40]
    base = str(values.get("base_model_name_or_path") or values.get("model") or "")[:200]
    is_prompt = any(word in kind.lower() for word in PROMPTS)
    merging = f"merge it with peft (PeftModel.from_pretrained(model, {str(path)!r}).merge_and_unload()) and save that"
    raise PrunelensError(
        f"expected a whole model in {path}, found an adapter ({kind or found[0]}{f', of {base}' if base else ''}); "
        f"{'it cannot be merged into weights, so name its base' if is_prompt else merging}, or "
        f"move {' and '.join(found[:2])} away to open what is left"
    )


def check_no_adapter_layers(network: nn.Module, name: str) -> None:
    """Refuse a network in memory with adapters in it, whose settings no weight holds and no checkpoint keeps.

    Raises:
        PrunelensError: as said.
    """
    modules = dict(network.named_modules())
    adapted = [part for part, module in modules.items() if type(module).__module__.partition(".")[0] == "peft"]
    if adapted or getattr(network, "_hf_peft_config_loaded", False):
        where = f" ({type(modules[adapted[0]]).__name__} at {adapted[0] or 'the top'})" if adapted else ""
        raise PrunelensError(
            f"expected a whole model, found {name} with adapters of peft in it{where}; merge them with "
            "merge_and_unload() first"
        )


def ignored_weights(path: Path, read: Collection[Path]) -> list[str]:
    """A remark on files of a folder that look like weights and are not read, sub-folders included.

    Args:
        path: the checkpoint.
        read: the files that are.
    """
    found = sorted(
        str(file.relative_to(path))
        for file in (*path.glob("*"), *path.glob("[!.]*/*"), *path.glob("[!.]*/*/*"))
        if file.suffix in WEIGHT_SUFFIXES and file.is_file() and file not in read
        and not file.name.startswith(TRAINING)
    )  # fmt: skip
    if not found:
        return []
    verb = "file looks like weights and is" if len(found) == 1 else "files look like weights and are"
    return [f"{len(found)} {verb} not read in {path} ({listed(found)})"]


def ignored_code(path: Path, config: Any, trust_remote_code: bool) -> list[str]:
    """A remark on Python code that a checkpoint brings along for a family that transformers knows."""
    if trust_remote_code or not getattr(config, "auto_map", None):
        return []
    return [f"{path} brings Python code of its own, which was not run; transformers' {config.model_type} is used"]


def listed(names: list[str]) -> str:
    """The first two of some names, and whether there are more."""
    return ", ".join(names[:2]) + (", …" if len(names) > 2 else "")
