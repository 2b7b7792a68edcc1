"""Run many independent jobs in worker processes, on this machine or on Ray; a lost worker loses no job."""

import atexit
import multiprocessing
import os
import pickle
import signal
import socket
import threading
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import connection
from typing import Any
from urllib.parse import urlsplit

from prunelens.errors import PrunelensError
from prunelens.memory import is_out_of_memory, memory_sentence

MAX_ATTEMPTS = 3
"""So many times a job is begun, and so many workers in a row may be lost in their setup, before that is an error."""
LOST_JOB = f"the worker was lost {MAX_ATTEMPTS} times while running this (killed, or out of memory)"
LOST_SETUP = f"a worker could not start: it was lost {MAX_ATTEMPTS} times (killed, or out of memory); use fewer workers"
GRACE_SECONDS = 10.0
"""So long a worker without work may take to leave, and a Ray cluster to answer."""
RAY_WORDS = ("auto", "local")
"""Addresses that name no place: a cluster that is found here, and a new one."""

Setup = Callable[[Any], Any]
"""Called once in each worker with `given`; what it returns is the context of the worker's jobs."""
Work = Callable[[Any, Any], None]
"""Called with the context and a job; stores its own result."""


@dataclass(frozen=True)
class Outcome:
    """How one job ended; `error`, one sentence for people, is None when it finished."""

    job: Any
    error: str | None = None
    traceback: str | None = None


def run_local(jobs: Sequence[Any], given: Any, setup: Setup, work: Work, workers: int = 1) -> Iterator[Outcome]:
    """Run jobs in processes of this machine and yield how each one ended, in the order in which they end.

    Setup and work are top-level functions of a module. The processes see the environment variables of the first
    call and begin in the folder in which this process was started.

    Args:
        jobs: what to run; each one is pickled.
        given: what the setup of every worker gets; pickled.
        setup: called once in each worker with `given`.
        work: called with what setup returned and a job.
        workers: at most so many processes at a time.

    Raises:
        PrunelensError: setup failed, or workers were lost in it again and again; all of them are ended.
    """
    if jobs:
        modules = {__name__, setup.__module__, work.__module__} - {"__main__"}
        yield from _run(jobs, (given, setup, work), _LocalCrew(sorted(modules)), workers)


def run_ray(
    jobs: Sequence[Any], given: Any, setup: Setup, work: Work, workers: int = 1, address: str | None = None
) -> Iterator[Outcome]:
    """Run jobs in Ray actors, a GPU each where the cluster has some, and yield how each one ended; see `run_local`.

    With no address it uses the cluster that this process is connected to, or starts one on this machine and ends it.

    Raises:
        PrunelensError: as in `run_local`, or there is no Ray, here or at the address.
    """
    if jobs:
        yield from _run(jobs, (given, setup, work), _RayCrew(workers, address), workers)


EXECUTORS: dict[str, Callable[..., Iterator[Outcome]]] = {"local": run_local, "ray": run_ray}


@dataclass(frozen=True)
class _Reply:
    """What came back from a worker for its setup or for a job."""

    error: str | None = None
    traceback: str | None = None
    lost: bool = False


class _Bench:
    """The worker's side: the first message sets it up, every other one is a job."""

    def __init__(self) -> None:
        self.context: Any = None
        self.work: Work | None = None

    def answer(self, message: bytes) -> _Reply:
        prefix = "a worker could not start: " if self.work is None else ""
        try:
            if self.work is None:
                given, setup, work = pickle.loads(message)
                self.context, self.work = setup(given), work
            else:
                self.work(self.context, pickle.loads(message))
        except PrunelensError as error:
            return _Reply(_one_line(str(error)), traceback.format_exc())
        except Exception as error:
            text = _one_line(f"{type(error).__name__}: {error}").removesuffix(":")
            if is_out_of_memory(error):
                text = memory_sentence(error, "ask for fewer workers, a smaller batch_size or a smaller dtype")
            return _Reply(prefix + text, traceback.format_exc())
        return _Reply()


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _run(jobs: Sequence[Any], start: Any, crew: "_LocalCrew | _RayCrew", workers: int) -> Iterator[Outcome]:
    try:
        if workers < 1:
            raise PrunelensError(f"expected at least 1 worker, found {workers}; ask for 1 or more")
        schedule = _Schedule(jobs, crew, crew.pack(start), workers)
        schedule.hire()
        while schedule.rows:
            ended = schedule.listen()
            if schedule.failure is None:
                schedule.hire()
            yield from ended
            if schedule.failure is not None:
                raise schedule.failure
    finally:
        crew.close()


class _Schedule:
    """Which job waits and which worker does what; a worker without a job leaves at once, and its memory with it."""

    def __init__(self, jobs: Sequence[Any], crew: "_LocalCrew | _RayCrew", start: bytes, workers: int) -> None:
        self.jobs, self.crew, self.start, self.workers = jobs, crew, start, workers
        self.waiting = deque(range(len(jobs)))
        self.attempts = [0] * len(jobs)
        self.rows: dict[Any, int | None] = {}  # what each worker does: the row of a job, or None for its setup
        self.lost_in_setup = 0
        self.failure: PrunelensError | None = None

    def hire(self) -> None:
        """Start workers for the jobs that wait."""
        starting = list(self.rows.values()).count(None)
        for _ in range(min(self.workers - len(self.rows), len(self.waiting) - starting)):
            self.rows[self.crew.hire(self.start)] = None

    def listen(self) -> list[Outcome]:
        """Wait until workers reply, give them their next jobs, and return what ended."""
        ended = []
        for worker, reply in self.crew.wait():
            row = self.rows.pop(worker)
            if row is None:
                self.note_setup(reply)
            elif not reply.lost:
                ended.append(Outcome(self.jobs[row], reply.error, reply.traceback))
            elif self.attempts[row] == MAX_ATTEMPTS:
                ended.append(Outcome(self.jobs[row], LOST_JOB))
            else:
                self.waiting.append(row)
            if reply.lost or self.failure or not self.waiting:
                self.crew.dismiss(worker)
            else:
                self.assign(worker, self.waiting.popleft())
        return ended

    def assign(self, worker: Any, row: int) -> None:
        self.rows[worker] = row
        self.attempts[row] += 1
        self.crew.ask(worker, self.crew.pack(self.jobs[row]))

    def note_setup(self, reply: _Reply) -> None:
        self.lost_in_setup = self.lost_in_setup + 1 if reply.lost else 0
        error = LOST_SETUP if self.lost_in_setup == MAX_ATTEMPTS else reply.error
        if error is not None:
            self.failure = PrunelensError(error)
            if reply.traceback:
                self.failure.add_note(reply.traceback)


class _LocalCrew:
    """Processes forked from a server that has imported what they need; the parent knows each one by its pipe."""

    pack = staticmethod(pickle.dumps)

    def __init__(self, modules: list[str]) -> None:
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(modules)
        self.hired: dict[Any, Any] = {}
        self.leaving: list[Any] = []
        atexit.register(self.close)  # not daemons, so that work may use processes: they must not outlast an exit

    def hire(self, start: bytes) -> Any:
        self.leaving = [process for process in self.leaving if process.is_alive()]  # frees the handles of the others
        pipe, end = self.context.Pipe()
        process = self.context.Process(target=_serve, args=(end,), name="prunelens-worker")
        process.start()
        end.close()
        self.hired[pipe] = process
        self.ask(pipe, start)
        return pipe

    def ask(self, pipe: Any, message: bytes) -> None:
        with suppress(OSError):  # wait finds the worker lost
            pipe.send_bytes(message)

    def wait(self) -> list[tuple[Any, _Reply]]:
        ready = connection.wait([sign for pair in self.hired.items() for sign in (pair[0], pair[1].sentinel)])
        told = [pipe for pipe, process in self.hired.items() if pipe in ready or process.sentinel in ready]
        return [(pipe, _last_reply(pipe)) for pipe in told]

    def dismiss(self, pipe: Any) -> None:
        self.leaving.append(self.hired.pop(pipe))
        pipe.close()  # reading its end, the worker leaves

    def close(self) -> None:
        for process in self.hired.values():
            process.kill()
        for pipe in list(self.hired):
            self.dismiss(pipe)
        for process in self.leaving:
            process.join(GRACE_SECONDS)
            process.kill()
            process.join()
        atexit.unregister(self.close)


def _last_reply(pipe: Any) -> _Reply:
    with suppress(EOFError, OSError):
        if pipe.poll():
            return pipe.recv()
    return _Reply(lost=True)


def _serve(pipe: Any) -> None:
    """A local worker's life; only its parent listens to Ctrl-C, and it ends with its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    bench = _Bench()
    with suppress(EOFError, OSError):
        while True:
            pipe.send(bench.answer(pipe.recv_bytes()))


def _end_with_parent() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()
    os._exit(1)


class _RayCrew:
    """Actors of a Ray cluster, which is left as it was found."""

    def __init__(self, workers: int, address: str | None) -> None:
        ray = _ray()
        self.ray, self.pack = ray, ray.cloudpickle.dumps
        self.promises: dict[Any, Any] = {}
        self.started = address is not None or not ray.is_initialized()
        if self.started:
            _connect(ray, workers, address)
        gpus = 1 if ray.cluster_resources().get("GPU") else 0
        self.kind = ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=0)(_Bench)

    def hire(self, start: bytes) -> Any:
        actor = self.kind.remote()
        self.ask(actor, start)
        return actor

    def ask(self, actor: Any, message: bytes) -> None:
        self.promises[actor.answer.remote(message)] = actor

    def wait(self) -> list[tuple[Any, _Reply]]:
        kept, _ = self.ray.wait(list(self.promises))
        actor = self.promises.pop(kept[0])
        try:
            return [(actor, self.ray.get(kept[0]))]
        except self.ray.exceptions.RayError as error:  # the actor, its process or its machine is gone
            return [(actor, _Reply(traceback=str(error), lost=True))]

    def dismiss(self, actor: Any) -> None:
        self.ray.kill(actor)

    def close(self) -> None:
        for actor in self.promises.values():
            self.ray.kill(actor)
        if self.started:
            self.ray.shutdown()


def check_ray(address: str | None) -> None:
    """Find out before anything is opened whether there is Ray, here or at an address.

    Raises:
        PrunelensError: as said.
    """
    _ray()
    with _at(address):
        _probe(address)


def _ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        advice = "pip install 'prunelens[ray]', or use --executor local"
        raise PrunelensError(f"running on Ray needs the ray package; {advice}") from error
    return ray


@contextmanager
def _at(address: str | None) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        raise PrunelensError(
            f"expected Ray at {address or 'this machine'}, found no way to it "
            f"({_one_line(str(error))}); check that it runs, or use --executor local"
        ) from error


def _probe(address: str | None) -> None:
    """Ask whether somebody listens at an address; Ray itself would try for minutes."""
    if address is None or address in RAY_WORDS:
        return
    place = urlsplit(address if "://" in address else f"//{address}")
    if place.port:
        socket.create_connection((place.hostname, place.port), GRACE_SECONDS).close()
    elif not place.scheme:
        raise ValueError(f"an address is HOST:PORT, ray://HOST:PORT or {RAY_WORDS[0]}")


def _connect(ray: Any, workers: int, address: str | None) -> None:
    options: dict[str, Any] = {"address": address}
    if address is None:
        options = {"address": "local", "num_cpus": max(workers, 1), "include_dashboard": False}
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with _at(address), warnings.catch_warnings():
            _probe(address)
            warnings.simplefilter("ignore")  # Ray tells its own plans
            ray.init(**options, logging_level="ERROR", log_to_driver=False)
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # Ray puts its own there, which exits without a word
