"""The JSON files of a checkpoint, which anybody may have written: objects of a bounded size, or one sentence."""

from pathlib import Path
from typing import Any

from prunelens.errors import PrunelensError, shown
from prunelens.reading import read_json

WHAT = "an object in JSON"


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a checkpoint, in which NaN and Infinity may stand.

    Raises:
        PrunelensError: as `read_json`, or something else than an object.
    """
    found = read_json(path, WHAT, finite=False)
    if not isinstance(found, dict):
        raise PrunelensError(f"expected {WHAT} in {path}, found {shown(found)}; download it again")
    return found
