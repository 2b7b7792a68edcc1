"""The JSON files of a checkpoint, which anybody may have written: objects of a bounded size, or one sentence."""

from pathlib import Path
from typing import Any

from prunelens.documents import read_json
from prunelens.errors import PrunelensError, shown

WHAT = "an object in JSON"


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a checkpoint, in which NaN and Infinity may stand.

    Raises:
        PrunelensError: as `read_json`, or something else than an object.
    """
    try:
        found = read_json(path, WHAT, finite=False)
    except PrunelensError as error:
        raise PrunelensError(f"{error}; download it again") from error
    if not isinstance(found, dict):
        raise PrunelensError(f"{path}: expected {WHAT}, found {shown(found)}; download it again")
    return found
