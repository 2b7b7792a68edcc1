"""Reading JSON and YAML that users and strangers wrote, bounded in size, depth and expansion.

Nothing that a document refers to is followed or run, and of two equal keys none is lost.
"""

import json
import os
import re
from collections.abc import Sequence
from typing import Any

import yaml

from prunelens.errors import PrunelensError, has_half_pair, shown
from prunelens.reading import MIB, read_text

MAX_YAML = MIB // 4
"""Bytes of a study or a recipe: some ten thousand lines."""
MAX_JSON = 256 * MIB
"""Bytes of a run.json or another record."""
MAX_DEPTH = 50
"""Lists and objects inside one another."""
MAX_DIGITS = 100
"""Of a number."""


def read_json(name: str | os.PathLike[str], what: str, limit: int = MAX_JSON, finite: bool = True) -> Any:
    """The value in a JSON file.

    Raises:
        PrunelensError: as `read_text` and `parse_json`.
    """
    return parse_json(read_text(name, what, limit), str(name), what, finite)


def parse_json(text: str, where: str, what: str = "JSON", finite: bool = True) -> Any:
    """The value of a JSON text.

    Args:
        text: what was read.
        where: of which file and line, for the sentence.
        what: what is expected there, in words.
        finite: refuse NaN and Infinity, which are no JSON.

    Raises:
        PrunelensError: no JSON, a key given twice, values nested deeper than 50, a number of more than 100 digits or
            beyond float64, NaN, or half of a surrogate pair.
    """
    if text.count("[") + text.count("{") > MAX_DEPTH and _json_depth(text) > MAX_DEPTH:
        raise PrunelensError(f"{where}: expected {what} nested at most {MAX_DEPTH} deep, found more; flatten it")
    try:
        found = json.loads(
            text,
            object_pairs_hook=lambda pairs: _without_doubles(pairs, where),
            parse_int=lambda digits: _whole(digits, where),
            parse_float=lambda digits: _real(digits, where),
            parse_constant=(lambda name: _no_number(name, where)) if finite else float,
        )
    except json.JSONDecodeError as error:
        place = f" in line {error.lineno}" if "\n" in text.strip() else ""
        found = shown(text.strip(), 60)
        raise PrunelensError(f"{where}: expected {what}, found {found} ({error.msg}{place})") from error
    if re.search(r"\\u[dD][89a-fA-F]", text) and _any_half_pair(found):
        raise PrunelensError(
            f"{where}: expected {what} in whole characters, found half of a surrogate pair (\\ud800 to \\udfff)"
        )
    return found


def _json_depth(text: str) -> int:
    depth = deepest = 0
    for sign in re.findall(r'"(?:[^"\\]|\\.)*"?|[][{}]', text, re.DOTALL):
        depth += (sign in "[{") - (sign in "]}")
        deepest = max(deepest, depth)
    return deepest


def _without_doubles(pairs: Sequence[tuple[str, Any]], where: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise PrunelensError(f"{where}: the key {shown(key)} is given twice; keep one of them")
        found[key] = value
    return found


def _whole(digits: str, where: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise PrunelensError(f"{where}: expected numbers of at most {MAX_DIGITS} digits, found one of {len(digits)}")
    return int(digits)


def _real(digits: str, where: str) -> float:
    value = float(digits) if len(digits) <= MAX_DIGITS else float("inf")
    if value in (float("inf"), float("-inf")):
        raise PrunelensError(
            f"{where}: expected numbers of at most {MAX_DIGITS} digits below 1.8e308, found {shown(digits, 40)}"
        )
    return value


def _no_number(name: str, where: str) -> float:
    raise PrunelensError(f"{where}: expected a number or null, found {name}, which is no JSON")


def _any_half_pair(value: Any) -> bool:
    """Whether a text in a value, a key too, holds half of a surrogate pair; the value is not deep."""
    if isinstance(value, str):
        return has_half_pair(value)
    if isinstance(value, dict):
        return any(_any_half_pair(item) for pair in value.items() for item in pair)
    return isinstance(value, list) and any(map(_any_half_pair, value))


def read_yaml(name: str | os.PathLike[str], what: str) -> Any:
    """The value in a YAML file of plain values: texts, numbers, true and false, null, lists and mappings.

    2:4, 012, 2024-01-01 and .inf are texts, as in YAML 1.2.

    Raises:
        PrunelensError: as `read_text`; no YAML, several documents, a key given twice or one that is no text, anchors,
            aliases, merge keys, tags, values nested deeper than 50, or a number of more than 100 digits.
    """
    text = read_text(name, f"{what} in YAML", MAX_YAML)
    try:
        node = _Composer(text).get_single_node()
        return None if node is None else _plain(node, str(name))
    except yaml.YAMLError as error:
        raise PrunelensError(f"expected {what} in YAML at {name}: {_fault(error, text)}") from error


def _fault(error: yaml.YAMLError, text: str) -> str:
    """What PyYAML says, in one line."""
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        place = f" in line {mark.line + 1}" if mark is not None else ""
        return ", ".join(part for part in (error.context, error.problem) if part) + place
    if isinstance(error, yaml.reader.ReaderError):
        code = error.character if isinstance(error.character, int) else ord(error.character)
        line = text.count("\n", 0, error.position) + 1
        return f"the character U+{code:04X} is not allowed, found in line {line}"
    return str(error).splitlines()[0]


class _Composer(yaml.SafeLoader):
    """Composes nodes; refuses what multiplies, refers or names a type before anything is made of it."""

    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            self._refuse(event, "expected no anchors (&) and aliases (*); write the value out each time")
        if getattr(event, "tag", None):
            self._refuse(event, "expected no tags (!); write a plain value, in quotes if it begins with !")
        if self._depth >= MAX_DEPTH:
            self._refuse(event, f"expected values nested at most {MAX_DEPTH} deep")
        self._depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1

    @staticmethod
    def _refuse(event: Any, problem: str) -> None:
        raise yaml.MarkedYAMLError(problem=f"{problem}, found", problem_mark=event.start_mark)


_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_WORDS = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **{word: True for name in ("true", "yes", "on") for word in (name, name.title(), name.upper())},
    **{word: False for name in ("false", "no", "off") for word in (name, name.title(), name.upper())},
}


def _plain(node: yaml.Node, name: str) -> Any:
    """The value of a node."""
    where = f"{name}:{node.start_mark.line + 1}"
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, name) for item in node.value]
    if isinstance(node, yaml.MappingNode):
        return _without_doubles([(_key(key, name), _plain(value, name)) for key, value in node.value], where)
    if getattr(node, "style", None) is not None:  # in quotes, or a block of text
        return node.value
    if node.value in _WORDS:
        return _WORDS[node.value]
    if _INTEGER.fullmatch(node.value):
        return _whole(node.value, where)
    return _real(node.value, where) if _FLOAT.fullmatch(node.value) else node.value


def _key(node: yaml.Node, name: str) -> str:
    where = f"{name}:{node.start_mark.line + 1}"
    key = _plain(node, name) if isinstance(node, yaml.ScalarNode) else None
    if not isinstance(key, str):
        found = shown(node.value) if isinstance(node, yaml.ScalarNode) else "a list or mapping"
        raise PrunelensError(f"{where}: expected text as a key, found {found}; put it in quotes if it is meant")
    if key == "<<" and getattr(node, "style", None) is None:
        raise PrunelensError(f"{where}: expected no merge keys (<<); write the keys out")
    return key
