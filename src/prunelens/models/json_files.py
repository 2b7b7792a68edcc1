"""The JSON files of a checkpoint, which anybody may have written: objects of a bounded size, or one sentence."""

import json
from pathlib import Path
from typing import Any

from prunelens.errors import PrunelensError

MAX_BYTES = 1 << 28
"""Of a file; the index of a checkpoint with half a million tensors is smaller."""


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a checkpoint.

    Raises:
        PrunelensError: the file cannot be read, is larger than 256 MiB, or holds something else than an object.
    """
    try:
        if not path.is_file():
            raise PrunelensError(f"expected the file {path}, found none; download the checkpoint again")
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise PrunelensError(f"expected at most 256 MiB in {path}, found {size} bytes; download it again")
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PrunelensError(f"{path} cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, or nested too deep
        deep = isinstance(error, RecursionError)
        reason = "values nested too deep" if deep else " ".join(str(error).split())[:120]
        raise PrunelensError(f"expected an object in JSON in {path}, found {reason}; download it again") from error
    if not isinstance(found, dict):
        kinds = {type(None): "null", str: "a text", list: "a list", bool: str(found).lower()}
        kind = kinds.get(type(found), "a number")
        raise PrunelensError(f"expected an object in JSON in {path}, found {kind}; download it again")
    return found
