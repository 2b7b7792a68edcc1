"""The fingerprint of a checkpoint's files without opening the model."""

import json
from pathlib import Path
from typing import Any

from prunelens.errors import PrunelensError
from prunelens.models.checkpoint import check_files, weight_files
from prunelens.models.fingerprint import fingerprint_files
from prunelens.models.sources import resolve_name
from prunelens.reading import read_text


class _Plain:
    """A configuration as its file says, of which one entry is looked up."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.transformers_weights = values.get("transformers_weights")


def identify(name: str) -> str:
    """A name for the content of a checkpoint, from its configuration file and its weights.

    It differs from `Model.fingerprint`, for which the configuration is completed by transformers.

    Raises:
        PrunelensError: nothing there, or a damaged checkpoint.
    """
    path = resolve_name(name)
    if path.suffix == ".gguf":
        return fingerprint_files([path], {})
    check_files(path)
    values = _read_config(path)
    return fingerprint_files(weight_files(path, _Plain(values)), values)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(read_text(path / "config.json", "a configuration"))
    except (ValueError, RecursionError) as error:
        raise PrunelensError(f"expected a configuration in {path / 'config.json'}, found {error}") from error
    if not isinstance(found, dict):
        raise PrunelensError(f"expected a configuration in {path / 'config.json'}, found {type(found).__name__}")
    return found
