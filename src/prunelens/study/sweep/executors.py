"""Run many independent jobs in worker processes, on this machine or on Ray; a lost worker loses no job."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from prunelens.errors import PrunelensError
from prunelens.study.sweep.local_crew import LocalCrew
from prunelens.study.sweep.ray_crew import RayCrew
from prunelens.study.sweep.worker import Reply, Setup, Work

MAX_ATTEMPTS = 3
"""So many times a job is begun, and so many workers in a row may be lost in their setup, before that is an error."""
LOST_JOB = f"the worker was lost {MAX_ATTEMPTS} times while running this (killed, or out of memory)"
LOST_SETUP = f"a worker could not start: it was lost {MAX_ATTEMPTS} times (killed, or out of memory); use fewer workers"


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
        yield from _run(jobs, (given, setup, work), LocalCrew(sorted(modules)), workers)


def run_ray(
    jobs: Sequence[Any], given: Any, setup: Setup, work: Work, workers: int = 1, address: str | None = None
) -> Iterator[Outcome]:
    """Run jobs in Ray actors, a GPU each where the cluster has some, and yield how each one ended; see `run_local`.

    With no address it uses the cluster that this process is connected to, or starts one on this machine and ends it.

    Raises:
        PrunelensError: as in `run_local`, or there is no Ray, here or at the address.
    """
    if jobs:
        yield from _run(jobs, (given, setup, work), RayCrew(workers, address), workers)


EXECUTORS: dict[str, Callable[..., Iterator[Outcome]]] = {"local": run_local, "ray": run_ray}


def _run(jobs: Sequence[Any], start: Any, crew: LocalCrew | RayCrew, workers: int) -> Iterator[Outcome]:
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

    def __init__(self, jobs: Sequence[Any], crew: LocalCrew | RayCrew, start: bytes, workers: int) -> None:
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

    def note_setup(self, reply: Reply) -> None:
        self.lost_in_setup = self.lost_in_setup + 1 if reply.lost else 0
        error = LOST_SETUP if self.lost_in_setup == MAX_ATTEMPTS else reply.error
        if error is not None:
            self.failure = PrunelensError(error)
            if reply.traceback:
                self.failure.add_note(reply.traceback)
