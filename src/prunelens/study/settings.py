"""Settings given by name: each known, each of its type."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from pydantic import TypeAdapter, ValidationError

from prunelens.errors import PrunelensError, nearest, shown

Chosen = TypeVar("Chosen")


def chosen_settings(kind: type[Chosen], values: Mapping[str, Any], others: tuple[str, ...] = ()) -> Chosen:
    """Settings of a kind from what was given by name; paths become text, lists tuples.

    Args:
        kind: a dataclass of settings.
        values: what was given.
        others: names that the caller takes himself, for the sentence.

    Raises:
        PrunelensError: an unknown name (with the nearest known one), or a value without meaning.
    """
    types = get_type_hints(kind)
    for name in values:
        if name not in types:
            hint = nearest(name, [*types, *others])
            raise PrunelensError(f"there is no setting {shown(name)}{hint}; settings: {', '.join(types)}")
    found = kind(**{name: _of_type(name, value, types[name]) for name, value in values.items()})
    found.check()  # type: ignore[attr-defined]
    return found


def _of_type(name: str, value: Any, kind: Any) -> Any:
    plain = str(value) if isinstance(value, Path) else tuple(value) if isinstance(value, list) else value
    try:
        return TypeAdapter(kind).validate_python(plain, strict=True)
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise PrunelensError(f"the setting {name}: {reason}, found {shown(value)}") from error
