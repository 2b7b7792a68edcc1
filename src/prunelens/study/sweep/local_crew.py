"""Worker processes of this machine."""

import atexit
import multiprocessing
import os
import pickle
import signal
import threading
from contextlib import suppress
from multiprocessing import connection
from typing import Any

from prunelens.study.sweep.worker import GRACE_SECONDS, Reply, Worker


class LocalCrew:
    """Processes forked from a server that has imported what they need; the parent knows each one by its pipe."""

    pack = staticmethod(pickle.dumps)

    def __init__(self, modules: list[str]) -> None:
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(modules)
        self.hired: dict[Any, Any] = {}
        self.leaving: list[Any] = []
        atexit.register(self.close)  # not daemons, so that work may use processes: they must not outlast an exit

    def hire(self, start: bytes) -> Any:
        """Start a worker with its setup; returns what it is known by."""
        self.leaving = [process for process in self.leaving if process.is_alive()]  # frees the handles of the others
        pipe, end = self.context.Pipe()
        process = self.context.Process(target=_serve, args=(end,), name="prunelens-worker")
        process.start()
        end.close()
        self.hired[pipe] = process
        self.ask(pipe, start)
        return pipe

    def ask(self, pipe: Any, message: bytes) -> None:
        """Give a worker a message; a lost one is found by `wait`."""
        with suppress(OSError):  # wait finds the worker lost
            pipe.send_bytes(message)

    def wait(self) -> list[tuple[Any, Reply]]:
        """Wait until at least one worker has replied or was lost."""
        ready = connection.wait([sign for pair in self.hired.items() for sign in (pair[0], pair[1].sentinel)])
        told = [pipe for pipe, process in self.hired.items() if pipe in ready or process.sentinel in ready]
        return [(pipe, _last_reply(pipe)) for pipe in told]

    def dismiss(self, pipe: Any) -> None:
        """Let a worker go."""
        self.leaving.append(self.hired.pop(pipe))
        pipe.close()  # reading its end, the worker leaves

    def close(self) -> None:
        """Let all workers go."""
        for process in self.hired.values():
            process.kill()
        for pipe in list(self.hired):
            self.dismiss(pipe)
        for process in self.leaving:
            process.join(GRACE_SECONDS)
            process.kill()
            process.join()
        atexit.unregister(self.close)


def _last_reply(pipe: Any) -> Reply:
    with suppress(EOFError, OSError):
        if pipe.poll():
            return pipe.recv()
    return Reply(lost=True)


def _serve(pipe: Any) -> None:
    """A local worker's life; only its parent listens to Ctrl-C, and it ends with its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    worker = Worker()
    with suppress(EOFError, OSError):
        while True:
            pipe.send(worker.answer(pipe.recv_bytes()))


def _end_with_parent() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()
    os._exit(1)
