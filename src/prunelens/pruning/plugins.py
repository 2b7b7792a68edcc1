"""Find methods from outside: in a file that the user names, in a module of theirs, or in an installed package.

Nothing is run unasked: a file is loaded when it is named, a package when a recipe names its method. A file named inside
a checkpoint, a run or a study that somebody else made is never loaded by reading it.
"""

import importlib.util
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import ModuleType

from prunelens.errors import PrunelensError, nearest, one_line, shown
from prunelens.pruning import methods
from prunelens.pruning.faults import fault_in, is_stop
from prunelens.pruning.methods import Kind, Method, Reference, method_named, registered
from prunelens.reading import checked_path, read_bytes

GROUP = "prunelens.methods"
"""The group of entry points: each is named as its method, and its value is the module or function to import."""
WHAT = "a file of methods"
LARGEST_FILE = 4 * 2**20


def load_plugins(paths: Iterable[str | Path]) -> None:
    """Run Python files and keep the methods that they register.

    Raises:
        PrunelensError: as `load_plugin`.
    """
    for path in paths:
        load_plugin(path)


def load_plugin(path: str | Path) -> None:
    """Run a Python file and keep the methods that it registers; none where it fails.

    Raises:
        PrunelensError: no such file, no .py, a syntax error, an exception while it runs, or no method in it.
    """
    place = checked_path(path, WHAT).absolute()
    if place.suffix != ".py":
        raise PrunelensError(f"expected {WHAT} whose name ends in .py, found {shown(str(path))}")
    text = read_bytes(place, WHAT, LARGEST_FILE)
    before = methods.snapshot()
    methods.forget(str(place))
    rest = methods.snapshot()
    try:
        _run(place, text)
    except BaseException:
        methods.restore(before)
        raise
    if methods.snapshot() == rest:
        raise PrunelensError(
            f'{one_line(place)} registers no method; put @prunelens.mask("name") or @prunelens.ranking("name") in '
            "front of a function"
        )


def load_again(references: Iterable[Reference]) -> None:
    """Make what another process uses known in this one: a package or module is imported, a file is run.

    Raises:
        PrunelensError: it is not there, it fails, or it has changed meanwhile.
    """
    for wanted in references:
        if _is_here(wanted):
            continue
        if wanted.source.distribution is not None:
            _find(wanted.kind, wanted.name)
        else:
            with suppress(ImportError):
                importlib.import_module(wanted.source.module)
            if method_named(wanted.kind, wanted.name) is None:
                load_plugin(wanted.source.file)
        if not _is_here(wanted):
            place = one_line(wanted.source.file)
            raise PrunelensError(f"{place} has changed since its method {wanted.name} was loaded; start again")


def check_loadable(references: Iterable[Reference]) -> None:
    """Refuse methods that another process could not find.

    Raises:
        PrunelensError: one that was written into a notebook or a prompt.
    """
    for wanted in references:
        if not wanted.source.is_file:
            raise PrunelensError(
                f"expected the {wanted.kind} {wanted.name} in a file, so that workers can load it, found it in "
                f"{one_line(wanted.source.file)}; put it into a .py file and import that"
            )


def _is_here(wanted: Reference) -> bool:
    found = method_named(wanted.kind, wanted.name)
    return found is not None and found.source is not None and found.source.sha256 == wanted.source.sha256


def _run(place: Path, text: bytes) -> None:
    module = ModuleType(f"prunelens_plugin_{place.stem}")
    module.__file__ = str(place)
    sys.modules[module.__name__] = module  # where dataclasses and pickle look for it
    try:
        exec(compile(text, str(place), "exec", dont_inherit=True), vars(module))
    except BaseException as error:
        if is_stop(error):
            raise
        raise PrunelensError(f"{fault_in(error, str(place))}; nothing of this file is used") from error


def _all() -> tuple[Method, ...]:
    return (*registered("mask"), *registered("ranking"))


def known(kind: Kind) -> tuple[str, ...]:
    """The names of all methods of a kind, with those that installed packages offer."""
    names = [method.name for method in registered(kind)]
    loaded = [method.name for method in _all()]
    return tuple(dict.fromkeys([*names, *(point.name for point in _entry_points() if point.name not in loaded)]))


def outside(kind: Kind) -> tuple[Method, ...]:
    """The registered methods of a kind that prunelens does not bring along."""
    return tuple(method for method in registered(kind) if method.source is not None)


def is_known(kind: Kind, name: str) -> bool:
    """Whether there is a method of that name, loaded or offered by an installed package."""
    return method_named(kind, name) is not None or any(point.name == name for point in _entry_points())


def from_outside(kind: Kind, name: str | None) -> tuple[Method, ...]:
    """The method of that name, if it is one that prunelens does not bring along."""
    return tuple(method for method in outside(kind) if method.name == name)


def find_mask(name: str) -> Method:
    """A mask; a package that offers it is imported now.

    Raises:
        PrunelensError: no such mask, or a package that cannot be imported.
    """
    return _find("mask", name)


def find_ranking(name: str) -> Method:
    """A ranking; a package that offers it is imported now.

    Raises:
        PrunelensError: no such ranking, or a package that cannot be imported.
    """
    return _find("ranking", name)


def _find(kind: Kind, name: str) -> Method:
    found = method_named(kind, name)
    if found is None:
        for point in _entry_points():
            if point.name == name:
                _import(point)
                found = method_named(kind, name)
    if found is not None:
        return found
    other: Kind = "ranking" if kind == "mask" else "mask"
    if method_named(other, name) is not None:
        use = f"drop-attention:8,by={name}" if other == "ranking" else f"{name}:0.5"
        raise PrunelensError(f"{name} is a {other}, not a {kind}; use it as in {use}")
    names = known(kind)
    raise PrunelensError(f"there is no {kind} {shown(name)}{nearest(name, names)}; {kind}s: {', '.join(names)}")


def _entry_points() -> Sequence[metadata.EntryPoint]:
    return tuple(metadata.entry_points(group=GROUP))


def _import(point: metadata.EntryPoint) -> None:
    package = one_line(point.dist.name if point.dist is not None else point.module)
    before = methods.snapshot()
    try:
        point.load()
    except BaseException as error:
        methods.restore(before)
        if is_stop(error):
            raise
        raise PrunelensError(
            f"the package {package} offers the method {shown(point.name)} and cannot be imported: "
            f"{fault_in(error, _file_of(point))}"
        ) from error
    if not any(method.name == point.name for method in _all()):
        raise PrunelensError(
            f"the package {package} offers the method {shown(point.name)}, but {one_line(point.value)} registers none "
            "of that name; install another version of it"
        )
    if point.dist is not None:
        _credit(point.dist, before)


def _file_of(point: metadata.EntryPoint) -> str:
    """The file of the module that an entry point names; the module where it cannot be found."""
    with suppress(ImportError, ValueError):
        spec = importlib.util.find_spec(point.module)
        if spec is not None and spec.origin is not None:
            return spec.origin
    return point.module


def _credit(distribution: metadata.Distribution, before: dict[tuple[str, str], Method]) -> None:
    """Note the package of the methods that have come since."""
    found = methods.snapshot()
    for key, method in found.items():
        if key not in before and method.source is not None:
            found[key] = replace(method, source=method.source.of_package(distribution))
    methods.restore(found)
