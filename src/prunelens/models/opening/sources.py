"""What a model's name means: a folder, a GGUF file, the built-in model, or a hub id."""

from pathlib import Path

from prunelens.errors import PrunelensError
from prunelens.models.opening import builtin

HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken"]


def resolve_name(name: str) -> Path:
    """The folder or GGUF file that a name means; hub files are downloaded without any pickle.

    Raises:
        PrunelensError: nothing there, and the hub does not give it.
    """
    if not name.strip():
        raise PrunelensError("expected a checkpoint folder, a .gguf file, a hub id or smollm2, found an empty name")
    path = _expanded(name)
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


def _expanded(name: str) -> Path:
    try:
        return Path(name).expanduser()
    except RuntimeError:  # ~somebody, whom the system does not know, or a user without a home
        return Path(name)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name too long for a path
        return False


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
