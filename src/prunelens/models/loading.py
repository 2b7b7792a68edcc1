"""Open a model safely: a folder, a GGUF file, a hub id or the built-in name; safetensors and GGUF only."""

import io
import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

from prunelens.errors import PrunelensError
from prunelens.models import builtin
from prunelens.models.anatomy import Anatomy, find_anatomy
from prunelens.models.fingerprint import fingerprint_files, fingerprint_model
from prunelens.models.taps import head_of

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken"]


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
    """

    name: str
    network: Any
    tokenizer: Any
    anatomy: Anatomy
    fingerprint: str
    notes: list[str] = field(default_factory=list)
    trust_remote_code: bool = False

    @property
    def device(self) -> torch.device:
        """Where token ids go in."""
        return self.network.get_input_embeddings().weight.device

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
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
) -> Model:
    """Open a model and prove its anatomy.

    Args:
        name: a folder, a `.gguf` file (dequantised), a hub id, or the built-in name `smollm2`.
        dtype: float64, float32, float16 or bfloat16; default float32 on a CPU and bfloat16 on a GPU.
        device: a torch device; default the first GPU, else the CPU.
        trust_remote_code: run Python code that a checkpoint brings along; off unless asked.

    Raises:
        PrunelensError: nothing there, pickled or damaged weights, NaN or infinite weights, missing tensors,
            a model that is not a causal decoder, or a family whose parts do not rebuild.
    """
    chosen_device = _device(device)
    chosen_dtype = _dtype(dtype, chosen_device)
    path = _resolve(str(name))
    notes: list[str] = []
    with _quiet():
        if path.suffix == ".gguf":
            network, tokenizer = read_gguf(path, chosen_dtype)
            files = [path]
        else:
            network, tokenizer, notes = _read_folder(path, chosen_dtype, trust_remote_code)
            files = sorted(path.glob("*.safetensors"))
        with _explained(f"{name} could not be moved to the device {chosen_device}"):
            network = network.to(chosen_device)
    _check_weights(network, str(name))
    fingerprint = fingerprint_files(files, network.config.to_dict())
    model = _opened(str(name), network, tokenizer, fingerprint, notes)
    model.trust_remote_code = trust_remote_code
    return model


def wrap(network: Any, tokenizer: Any = None, name: str = "model") -> Model:
    """Use a transformers model that is already in memory.

    Raises:
        PrunelensError: as `load` does for the model itself.
    """
    _check_weights(network, name)
    return _opened(name, network, tokenizer, fingerprint_model(network), [])


def _opened(name: str, network: Any, tokenizer: Any, fingerprint: str, notes: list[str]) -> Model:
    network.eval().requires_grad_(False)
    try:
        anatomy = find_anatomy(network)
    except PrunelensError as error:
        raise PrunelensError(f"{name}: {error}") from error
    return Model(name, network, tokenizer, anatomy, fingerprint, notes)


def read_gguf(path: Path, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Read and dequantise a GGUF file: (network, tokenizer).

    Raises:
        PrunelensError: not a GGUF file, damaged, or an architecture transformers cannot read.
    """
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise PrunelensError(f"expected a GGUF file, but {path} does not begin with GGUF; download it again")
    source: dict[str, Any] = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    what = f"{path} could not be read as a GGUF checkpoint, download it again or check its kind"
    with _quiet(), redirect_stderr(io.StringIO()), _explained(what):  # its progress bar knows no other switch
        opened: Any = AutoModelForCausalLM.from_pretrained(
            **source, quantization_config=GgufConfig(dequantize=True), dtype=dtype, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(**source)
    network, found = opened
    _check_complete(found, path)
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


def _device(device: str | torch.device | None) -> torch.device:
    try:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise PrunelensError(f"expected a device such as cpu or cuda:0 that is there, found {device}") from error
    if chosen.type == "meta":
        raise PrunelensError("expected a device such as cpu or cuda:0, found meta, which holds no numbers")
    return chosen


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name too long for a path
        return False


def _resolve(name: str) -> Path:
    """The folder or GGUF file that a name means; hub files are downloaded without any pickle."""
    if not name.strip():
        raise PrunelensError("expected a checkpoint folder, a .gguf file, a hub id or smollm2, found an empty name")
    path = Path(name).expanduser()
    if path.suffix == ".gguf" or _exists(path):
        if path.suffix == ".gguf" and path.is_dir():
            raise PrunelensError(f"expected a GGUF file at {name}, found a folder; name the file in it")
        if not _exists(path):
            raise PrunelensError(f"expected a GGUF file at {name}, found nothing there; check the path")
        if path.is_file() and path.suffix != ".gguf":
            raise PrunelensError(
                f"expected a checkpoint folder or a .gguf file, found the file {name}; name its folder"
            )
        return path
    if name == builtin.BUILTIN:
        gguf = builtin.packaged_gguf()
        if gguf is not None:
            return builtin.converted(gguf)
        return _from_hub(builtin.HUB_ID, f"install the built-in model with `{builtin.HINT}`")
    if name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise PrunelensError(f"expected a checkpoint folder at {name}, found nothing there; check the path")
    return _from_hub(name, "give the path of a checkpoint folder, or check the name and the network")


def _from_hub(hub_id: str, advice: str) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=HUB_FILES))
    except (OSError, ValueError, HFValidationError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise PrunelensError(
            f"no file or folder {hub_id}, and the hub did not give it ({reason[:160]}); {advice}"
        ) from error
    except Exception as error:  # the hub client's network errors come from several libraries
        if not type(error).__module__.startswith(("httpx", "httpcore", "requests", "urllib3")):
            raise
        raise PrunelensError(f"no file or folder {hub_id}, and the hub cannot be reached; {advice}") from error


def _read_folder(path: Path, dtype: torch.dtype, trust: bool) -> tuple[Any, Any, list[str]]:
    _check_files(path)
    with _explained(f"{path} could not be opened as a causal language model"):
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust)
    _check_causal(config, path)
    with _explained(f"{path} could not be opened as a causal language model"):
        opened: Any = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=trust,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
        )
    network, found = opened
    _check_complete(found, path)
    notes = []
    if found["unexpected_keys"]:
        extra = sorted(map(str, found["unexpected_keys"]))
        notes.append(f"{len(extra)} tensors in {path} are not read by the model ({', '.join(extra[:3])}, …)")
    return network, _tokenizer(path, trust), notes


def _check_complete(found: dict[str, Any], path: Path) -> None:
    """Refuse a checkpoint with gaps, which transformers fills with random numbers."""
    mismatched = [key if isinstance(key, str) else key[0] for key in found["mismatched_keys"]]
    wrong = sorted({*map(str, found["missing_keys"]), *map(str, mismatched)})
    if wrong:
        raise PrunelensError(
            f"{path}: {len(wrong)} tensors that the configuration asks for are missing or have another shape "
            f"({', '.join(wrong[:3])}, …); the checkpoint is incomplete or its config.json belongs to another"
        )


def _check_files(path: Path) -> None:
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


def _check_index(path: Path) -> None:
    """A checkpoint in several files needs an index that names them all."""
    index = path / "model.safetensors.index.json"
    if not index.is_file():
        if not (path / "model.safetensors").is_file():
            raise PrunelensError(
                f"expected model.safetensors or {index.name} in {path}, found neither; download it again"
            )
        return
    try:
        shards = {str(shard) for shard in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise PrunelensError(f"{index} is not a safetensors index; download it again") from error
    strange = sorted(shard for shard in shards if Path(shard).name != shard or not shard.endswith(".safetensors"))
    if strange:
        raise PrunelensError(
            f"expected {index} to name safetensors files in its own folder, found {strange[0]}; convert the "
            "checkpoint or download it again"
        )
    missing = sorted(shard for shard in shards if not (path / shard).is_file())
    if missing:
        raise PrunelensError(f"{path} lacks {missing[0]}, which its index {index} names; download it again")


def _check_causal(config: Any, path: Path) -> None:
    classes = config.architectures or []
    causal = [name for name in classes if name.endswith(("CausalLM", "LMHeadModel", "ConditionalGeneration"))]
    if getattr(config, "is_encoder_decoder", False) or (classes and not causal):
        raise PrunelensError(
            f"expected a causal decoder in {path}, found {', '.join(classes) or config.model_type}; "
            "only causal language models can be compared"
        )


def _tokenizer(path: Path, trust: bool) -> Any:
    if not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        return None
    with _explained(f"the tokenizer in {path} could not be opened"):
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust)


def _check_weights(network: Any, name: str) -> None:
    for part, weight in network.named_parameters():
        if not weight.is_floating_point() or bool(torch.isfinite(weight).all()):
            continue
        if weight.dtype == torch.float16 and not bool(torch.isnan(weight).any()):
            raise PrunelensError(f"{name}: the weights {part} exceed the range of float16; use --dtype bfloat16")
        raise PrunelensError(f"{name}: the weights {part} hold NaN or infinite values; the file is damaged")


@contextmanager
def _explained(what: str) -> Iterator[None]:
    try:
        yield
    except PrunelensError:
        raise
    except Exception as error:  # libraries raise anything when they read a damaged or hostile file
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
            raise
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        hint = "; pass --trust-remote-code to run it" if "trust_remote_code" in str(error) else ""
        raise PrunelensError(f"{what}: {reason}{hint}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' progress bars and remarks off the terminal while a model opens."""
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
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()
