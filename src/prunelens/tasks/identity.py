"""A name for everything that a model's answers depend on: its weights as they are now, its texts, this software."""

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunelens.models.model import Model

PACKAGES = ("prunelens", "torch", "transformers", "tokenizers", "lm_eval")
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def identity_of(model: Model, about: Mapping[str, Any] | None = None) -> str | None:
    """A name for what a model is and how it runs here; None where that cannot be told.

    Args:
        model: as it is in memory, with nothing dropped around the call.
        about: what else was done to it, such as a recipe, that its weights do not show. Without it a model of which
            a module runs a forward that is not its class's has no name.
    """
    words = tokenizer_words(model.tokenizer)
    weights = _weights(model.network)
    if words is None or weights is None or (about is None and _is_patched(model.network)):
        return None
    settings = getattr(model.network, "generation_config", None)
    parts = {
        "fingerprint": model.fingerprint,
        "weights": weights,
        "config": _plain(model.network.config.to_dict()),
        "generation": _plain(settings.to_dict()) if settings is not None else None,
        "attention": getattr(model.network.config, "_attn_implementation", None),
        "tokenizer": words,
        "dtype": str(model.dtype),
        "device": _device(model.device),
        "precision": torch.get_float32_matmul_precision(),
        "manner": str(model.anatomy.manner),
        "software": _software(),
        "about": _plain(about or {}),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _plain(value: Mapping[str, Any]) -> Any:
    return json.loads(json.dumps(value, sort_keys=True, default=str))


def tokenizer_words(tokenizer: Any) -> str | None:
    """A hash of what a fast tokenizer is; another kind cannot be told from its like."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    own = [type(tokenizer).__name__, tokenizer.special_tokens_map, tokenizer.model_max_length]
    own += [tokenizer.padding_side, tokenizer.truncation_side, tokenizer.chat_template]
    own += [getattr(tokenizer, name, None) for name in ("add_bos_token", "add_eos_token")]
    text = backend.to_str() + json.dumps(own, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _weights(network: nn.Module) -> str | None:
    """A hash over sums of the bits of every row of every tensor; None where one is not in memory as it is."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        if type(tensor) is not Tensor or tensor.is_meta:
            return None
        rows = tensor.detach().reshape(-1, tensor.shape[-1] if tensor.ndim > 1 else tensor.numel()).contiguous()
        width = 8 if rows.shape[-1] * rows.element_size() % 8 == 0 else rows.element_size()
        sums = rows.view(BITS[width]).sum(dim=-1, dtype=torch.int64)
        digest.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(sums.cpu().numpy().tobytes())
    return digest.hexdigest()


def _is_patched(network: nn.Module) -> bool:
    return any(
        "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks for module in network.modules()
    )


def _device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@cache
def _software() -> list[str]:
    """Versions of what computes, and a hash of the files of this package that do."""
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"no {package}")
    digest = hashlib.sha256()
    home = Path(__file__).parents[1]
    for path in sorted(home.rglob("*.py")):
        if path.relative_to(home).parts[0] not in ("cli", "report"):
            digest.update(path.read_bytes())
    return [*found, digest.hexdigest()]
