"""Errors of code that is not ours, as one sentence that names the file and the line."""

import traceback

from prunelens.errors import PrunelensError, cut, one_line
from prunelens.memory import is_out_of_memory

LONGEST_REASON = 300


def is_stop(error: BaseException) -> bool:
    """Whether an exception is no fault of the code that it came out of: a signal, or memory that ran out."""
    return isinstance(error, KeyboardInterrupt | GeneratorExit) or is_out_of_memory(error)


def fault_in(error: BaseException, file: str) -> str:
    """`FILE, line 7: KeyError: 'x'`, with the last line of that file that was at work; FILE alone where none was."""
    return f"{place_in(error, file)}: {reason(error)}"


def place_in(error: BaseException, file: str) -> str:
    """`FILE, line 7`, as in `fault_in`."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    if isinstance(error, SyntaxError) and error.filename == file:
        lines.append(error.lineno)
    return f"{one_line(file)}, line {lines[-1]}" if lines and lines[-1] else one_line(file)


def reason(error: BaseException) -> str:
    """Name and text of an exception, on one line."""
    said = (error.msg if isinstance(error, SyntaxError) else str(error)) or "no reason given"
    if not isinstance(error, PrunelensError):
        said = f"{type(error).__name__}: {said}"
    return cut(one_line(said), LONGEST_REASON)
