"""Commands in processes of their own that need not import anything: forked from one that has imported everything.

Importing torch and transformers costs seconds, far more than a command on a tiny checkpoint. A test of signals, kills
or limits needs a real process and its real end, not a fresh interpreter; one that needs that starts it itself.
"""

import array
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

COMMAND = "from prunelens.cli.main import main; main()"
LIBRARIES = """torch transformers transformers.models.llama.modeling_llama transformers.models.auto.modeling_auto
    transformers.models.auto.tokenization_auto transformers.generation safetensors.torch pyarrow.parquet
    plotly.graph_objects jinja2 yaml rich.console rich.table tokenizers numpy""".split()


class Forked:
    """A process as `subprocess.Popen` gives it; its output goes to files, so that nothing waits for a reader."""

    def __init__(self, keeper: socket.socket, stdout: IO[bytes], stderr: IO[bytes]) -> None:
        self._keeper, self._files = keeper.makefile("r"), (stdout, stderr)
        self.returncode: int | None = None
        self.pid = int(self._keeper.readline())
        self._socket = keeper

    def poll(self) -> int | None:
        """Its exit status, negative for a signal that killed it; None while it runs."""
        if self.returncode is None:
            self._socket.setblocking(False)
            try:
                waiting = self._socket.recv(1, socket.MSG_PEEK)
            except BlockingIOError:
                return None
            finally:
                self._socket.setblocking(True)
            assert waiting, "the process that waits for this one is gone"
            self.returncode = int(self._keeper.readline())
        return self.returncode

    def communicate(self) -> tuple[str, str]:
        """What it wrote to stdout and stderr, once it has ended."""
        if self.returncode is None:
            self.returncode = int(self._keeper.readline())
        said = []
        for file in self._files:
            file.seek(0)
            said.append(file.read().decode())
        for file in (self._keeper, self._socket, *self._files):
            file.close()
        return said[0], said[1]

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Forker:
    """The process that has imported everything; it forks one that does so and no more for each command."""

    def __init__(self, door: socket.socket) -> None:
        self._door = door

    def start(self, place: Path, *argv: str, code: str = COMMAND, **environment: str) -> Forked:
        """Run `prunelens argv` in a folder, or other code with these arguments."""
        ours, theirs = socket.socketpair()
        files = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115 (closed by `communicate`)
        asked = {"place": str(place), "argv": ["prunelens", *argv], "code": code}
        asked["environment"] = dict(os.environ) | environment
        with theirs:
            descriptors = array.array("i", [theirs.fileno(), *(file.fileno() for file in files)])
            self._door.sendmsg(
                [json.dumps(asked).encode()], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors.tobytes())]
            )
        return Forked(ours, *files)


@contextmanager
def forker() -> Iterator[Forker]:
    """A forker, which ends with the block."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    here = str(Path(__file__).parent)
    code = f"import sys; sys.path.insert(0, {here!r}); import forked; forked.serve()"
    with ours:
        process = subprocess.Popen([sys.executable, "-c", code], stdin=theirs.fileno())
        theirs.close()
        yield Forker(ours)
    process.wait()


def serve() -> None:
    """Fork a process for each message on stdin, until there are no more."""
    import importlib

    for name in [*LIBRARIES, *_own_modules()]:
        importlib.import_module(name)
    door = socket.socket(fileno=os.dup(0))
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        message, descriptors, *_ = socket.recv_fds(door, 2**20, 3)
        if not message:
            return
        if os.fork() == 0:
            door.close()
            return _keep(json.loads(message), *descriptors)
        for descriptor in descriptors:
            os.close(descriptor)


def _own_modules() -> list[str]:
    import prunelens

    root = Path(prunelens.__file__).parent
    paths = sorted(path.relative_to(root.parent).with_suffix("") for path in root.rglob("*.py"))
    return [".".join(path.parts) for path in paths if not path.name.startswith("__")]


def _keep(asked: dict[str, Any], keeper: int, stdout: int, stderr: int) -> None:
    """Fork the command, say its id and wait for its end; in the command itself, return."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    child = os.fork()
    if child:
        os.write(keeper, f"{child}\n".encode())
        os.write(keeper, f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n".encode())
        os._exit(0)
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)
    for descriptor in (keeper, stdout, stderr):
        os.close(descriptor)
    heed_signals()
    os.chdir(asked["place"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    sys.argv = asked["argv"]
    exec(asked["code"], {"__name__": "__main__"})


def heed_signals() -> None:
    """Whatever the tests themselves ignore (in the background of a script, or under nohup)."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)
