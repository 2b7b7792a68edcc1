"""Reading files that users and strangers wrote: paths, bytes, text, lines and arrays, bounded in size.

No reader waits for a pipe or runs what a file names.
"""

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from prunelens.errors import PrunelensError, shown

if TYPE_CHECKING:
    import numpy as np

MIB = 1 << 20
MAX_TEXT = 64 * MIB
"""Bytes of a file of prompts, calibration texts or token ids."""


def checked_path(name: str | os.PathLike[str], what: str) -> Path:
    """A path as the operating system can take it.

    Raises:
        PrunelensError: an empty name, or one with a NUL character.
    """
    text = os.fspath(name)
    if not text or "\0" in text:
        found = "a NUL character in it" if text else "an empty name"
        raise PrunelensError(f"expected the path of {what}, found {found}; give another path")
    return Path(text)


def is_directory(name: str | os.PathLike[str]) -> bool:
    """Whether there is a folder; what no file system takes as a name is none."""
    try:
        return Path(name).is_dir()
    except (OSError, ValueError):
        return False


def is_file(name: str | os.PathLike[str]) -> bool:
    """Whether there is a regular file; what no file system takes as a name is none."""
    try:
        return Path(name).is_file()
    except (OSError, ValueError):
        return False


def read_bytes(name: str | os.PathLike[str], what: str, limit: int = MAX_TEXT) -> bytes:
    """The content of a regular file.

    Args:
        name: its path.
        what: what is expected there, in words.
        limit: bytes it may have.

    Raises:
        PrunelensError: no such file, a folder, pipe or device, no rights, or more bytes than `limit`.
    """
    path = checked_path(name, what)
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            raise PrunelensError(f"expected {what} at {path}, found {_kind_of(mode)}; name a regular file")
        with path.open("rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise PrunelensError(f"expected {what} at {path}: {error.strerror or error}") from error
    if len(content) > limit:
        raise PrunelensError(
            f"expected {what} of at most {limit / MIB:g} MiB at {path}, found more; split it or take a part of it"
        )
    return content


def _kind_of(mode: int) -> str:
    kinds = ((stat.S_ISDIR, "a directory"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"))
    return next((name for test, name in kinds if test(mode)), "a device")


def read_text(name: str | os.PathLike[str], what: str, limit: int = MAX_TEXT) -> str:
    """The content of a UTF-8 file, without a byte order mark, every line ended by a line feed.

    Raises:
        PrunelensError: as `read_bytes`, or bytes that are no UTF-8 text.
    """
    content = read_bytes(name, what, limit)
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise PrunelensError(f"expected {what} at {name}, found UTF-16; save it as UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise PrunelensError(
            f"expected {what} at {name}, found the byte 0x{content[error.start]:02x} in line {line} "
            f"({error.reason}); save it as UTF-8"
        ) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_lines(name: str | os.PathLike[str], what: str, limit: int = MAX_TEXT) -> Iterator[tuple[str, str]]:
    """(file:number, line) of the lines that are not blank.

    Raises:
        PrunelensError: as `read_text`, or a NUL character, which no text has.
    """
    for number, line in enumerate(read_text(name, what, limit).split("\n"), 1):
        if "\0" in line:
            raise PrunelensError(f"{name}:{number}: expected text, found a NUL character; take it out")
        if line.strip():
            yield f"{name}:{number}", line


def read_array(name: str | os.PathLike[str], what: str) -> "np.ndarray":
    """The array of numbers in a .npy file; nothing is allocated or unpickled before its header agrees with its size.

    Raises:
        PrunelensError: as `read_bytes`; no .npy, an archive, Python objects, a size that the header does not tell.
    """
    import numpy as np

    path = checked_path(name, what)
    content = read_bytes(path, what)
    if content.startswith(b"PK"):
        raise PrunelensError(f"expected {what} at {path}, found an archive; save one array with numpy.save")
    shape, dtype, fortran, start = _npy_header(content, path, what)
    if dtype.hasobject or dtype.itemsize == 0:
        raise PrunelensError(f"expected {what} at {path}, found Python objects, which are not opened; save numbers")
    num_bytes = dtype.itemsize
    for size in shape:
        num_bytes *= size
    if num_bytes != len(content) - start:
        raise PrunelensError(
            f"expected {what} at {path} with {shown(num_bytes)} bytes of numbers as its header tells, found "
            f"{len(content) - start}; it was cut or joined, save it again"
        )
    numbers = np.frombuffer(content, dtype, offset=start)
    return numbers.reshape(shape, order="F" if fortran else "C")


def _npy_header(content: bytes, path: Path, what: str) -> tuple[tuple[int, ...], "np.dtype", bool, int]:
    """(shape, dtype, whether the first axis runs fastest, first byte of the numbers)."""
    import io

    from numpy.lib import format as npy

    stream = io.BytesIO(content)
    readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    try:
        version = npy.read_magic(stream)
        if version not in readers:
            raise ValueError(f"format version {version[0]}.{version[1]}")
        shape, fortran, dtype = readers[version](stream)
    except Exception as error:  # a header is a Python literal: anything may be wrong with it
        reason = f"{type(error).__name__}: {error}"
        raise PrunelensError(f"expected {what} at {path}, found a header that is no .npy ({shown(reason)})") from error
    if not all(type(size) is int and size >= 0 for size in shape):
        raise PrunelensError(f"expected {what} at {path}, found the shape {shown(str(shape))}")
    return shape, dtype, fortran, stream.tell()
