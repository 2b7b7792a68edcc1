"""Where a method from outside comes from, so that a stored result can be traced to it and never mixes two versions."""

import hashlib
import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Source:
    """The source of one function.

    Attributes:
        file: its file as Python names it; `<stdin>` and the like where there is none.
        line: where the function begins.
        module, qualname: what Python calls it.
        sha256: of the file's bytes, or of the function's own text where there is no file.
        distribution, version: the installed package that it was found through.
    """

    file: str
    line: int
    module: str
    qualname: str
    sha256: str
    distribution: str | None = None
    version: str | None = None

    @property
    def is_file(self) -> bool:
        """Whether another process can load it from its file."""
        return Path(self.file).is_file()

    def replaces(self, earlier: "Source") -> bool:
        """Whether it is the same function again: its file loaded twice or edited meanwhile, or a notebook's cell."""
        if self.file == earlier.file:
            return self.sha256 != earlier.sha256 or self.line == earlier.line
        same_name = (self.module, self.qualname) == (earlier.module, earlier.qualname)
        return same_name and not (self.is_file and earlier.is_file)

    def record(self) -> dict[str, Any]:
        """For run.json: the name of the file without its folder, and what tells versions apart."""
        found = {"file": Path(self.file).name, "sha256": self.sha256}
        package = {"distribution": self.distribution, "version": self.version}
        return found | (package if self.distribution else {})

    def of_package(self, distribution: metadata.Distribution) -> "Source":
        """The same, found through an installed package."""
        return replace(self, distribution=distribution.name, version=distribution.version)


def source_of(function: Callable[..., Any]) -> Source:
    """Where a function comes from; what wraps it, as `torch.no_grad()` does, is looked through."""
    function = inspect.unwrap(function)
    code = function.__code__
    module = function.__module__ or ""  # code that is run in a bare dictionary has none
    return Source(code.co_filename, code.co_firstlineno, module, function.__qualname__, _sha256(function))


def _sha256(function: Callable[..., Any]) -> str:
    code = function.__code__
    try:
        text = Path(code.co_filename).read_bytes()
    except (OSError, ValueError):
        try:
            text = inspect.getsource(function).encode()
        except (OSError, TypeError):
            text = code.co_code + json.dumps([code.co_names, list(map(str, code.co_consts))]).encode()
    return hashlib.sha256(text).hexdigest()
