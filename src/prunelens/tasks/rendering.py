"""Chat templates run apart: they are programs from a checkpoint, which may fail, loop for ever or fill the memory."""

import os
import signal
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

Chat = Sequence[Mapping[str, Any]]

SECONDS = 5.0
"""Processor time for one chat."""
PATIENCE = 120.0
"""Seconds without an answer after which the process is taken to be stuck."""
MEMORY = 1 << 30
"""Bytes beyond those in use."""
MAX_CHARACTERS = 1 << 24
ENDING = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class Unrendered:
    """Why there is no text; `stopped` where the template had to be stopped, so that it is not worth another try."""

    reason: str
    stopped: bool = False


def render(tokenizer: Any, chats: Sequence[Chat]) -> list[str | Unrendered]:
    """The text that the tokenizer's chat template makes of each chat, with the prompt for an answer at its end.

    The template runs in a forked process with bounds on its time, memory and output, so that nothing it does reaches
    this one; the chat at which it is stopped and those after it have no text. Systems that cannot fork run it here,
    unbounded.
    """
    with _forked() as (pid, reader, writer):
        if pid is None:
            return _filled(list(_each(tokenizer, chats)), len(chats))
        if pid == 0:
            _serve(tokenizer, chats, writer)
        writer.close()
        try:
            found = _received(reader, len(chats))
        finally:
            status = _end(pid)
    if len(found) < len(chats) and not (found and _stopped(found[-1])):
        slow = status is None or (os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGPROF, signal.SIGKILL))
        reason = f"it did not end within {SECONDS:g} s of processor time" if slow else "it crashed its process"
        found.append(Unrendered(reason, stopped=True))
    return _filled(found, len(chats))


def _filled(found: list[str | Unrendered], count: int) -> list[str | Unrendered]:
    """Where the template was stopped, what followed has no text for the same reason."""
    return found + found[-1:] * (count - len(found))


def _end(pid: int) -> int | None:
    """End the child, if it still runs; its exit status, None where something else has asked for it."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    with suppress(ChildProcessError):
        return os.waitpid(pid, 0)[1]
    return None


@contextmanager
def _forked() -> Iterator[tuple[int | None, Connection, Connection]]:
    """(0 in the child, its id in the parent, None where there is no child; and both ends of a pipe)."""
    reader, writer = Pipe(duplex=False)
    with reader, writer:
        yield _fork(), reader, writer


def _fork() -> int | None:
    if not hasattr(os, "fork"):
        return None
    import jinja2.sandbox  # noqa: F401  # imported here, so that no import of the child waits for a lock of a thread

    name, before = "TOKENIZERS_PARALLELISM", os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ.setdefault(name, "false")  # else tokenizers warns of the fork
    held = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)  # until the child has let go of this process's handlers
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads: the child needs none
            pid = os.fork()
        if pid == 0:
            for number in (*ENDING, signal.SIGPROF):
                signal.signal(number, signal.SIG_DFL)
        return pid
    except OSError:
        return None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
        if before is None:
            del os.environ[name]


def _serve(tokenizer: Any, chats: Sequence[Chat], writer: Connection) -> None:
    """The child: answer, then leave without any clean-up of the parent's."""
    try:
        _limit_memory()
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        for answer in _each(tokenizer, chats):
            writer.send(answer)
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
    finally:
        os._exit(0)


def _limit_memory() -> None:
    import resource

    with suppress(OSError, ValueError):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        wanted, hard = pages * os.sysconf("SC_PAGE_SIZE") + MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _each(tokenizer: Any, chats: Sequence[Chat]) -> Iterator[str | Unrendered]:
    """What becomes of each chat, up to the first at which the template is stopped."""
    for chat in chats:
        found = _rendered(tokenizer, chat)
        yield found
        if _stopped(found):
            return


def _stopped(found: str | Unrendered) -> bool:
    return isinstance(found, Unrendered) and found.stopped


def _rendered(tokenizer: Any, chat: Chat) -> str | Unrendered:
    try:
        found = tokenizer.apply_chat_template(list(chat), tokenize=False, add_generation_prompt=True)
    except MemoryError:
        return Unrendered(f"it needs more than {MEMORY >> 20} MiB", stopped=True)
    except Exception as error:  # a template, or a tokenizer's own code, raises anything
        reason = " ".join(str(error).split())[:200]
        return Unrendered(reason or type(error).__name__)
    if len(found) > MAX_CHARACTERS:
        return Unrendered(f"it writes more than {MAX_CHARACTERS:,} characters", stopped=True)
    return str(found)


def _received(reader: Connection, count: int) -> list[str | Unrendered]:
    found: list[str | Unrendered] = []
    with suppress(EOFError, OSError):
        while len(found) < count and reader.poll(PATIENCE):
            found.append(reader.recv())
    return found
