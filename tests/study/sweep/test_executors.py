"""Jobs in worker processes: each one once, whatever happens to the workers."""

import fcntl
import functools
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from prunelens.errors import PrunelensError
from prunelens.study.sweep.executors import EXECUTORS, LOST_JOB, LOST_SETUP, MAX_ATTEMPTS, Outcome, run_local, run_ray

Run = Callable[..., Iterator[Outcome]]
PATIENCE = 60.0
"""Seconds after which a wait for another process is a failure."""


@pytest.fixture(scope="module", autouse=True)
def _findable() -> Iterator[None]:
    """Ray's workers find this module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        yield


@pytest.fixture(scope="module")
def one_ray(_findable: None) -> Iterator[None]:
    """A Ray that the tests share, since it takes seconds to start; it believes in two GPUs."""
    import ray

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ray.init("local", num_cpus=2, num_gpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(params=["local", "ray"])
def run(request: pytest.FixtureRequest) -> Run:
    if request.param == "ray":
        request.getfixturevalue("one_ray")
    return EXECUTORS[request.param]


class Unreadable:
    """A job that no worker can unpickle."""

    def __reduce__(self) -> tuple[Any, ...]:
        return int, ("not a number",)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def note(folder: Path, kind: str, text: str) -> None:
    """One small file an event, so that processes cannot disturb one another."""
    (folder / f"{kind} {uuid.uuid4().hex}").write_text(text, encoding="utf-8")


def noted(folder: Path, kind: str) -> list[str]:
    return sorted(path.read_text(encoding="utf-8") for path in folder.glob(f"{kind} *"))


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def note_setup(folder: Path) -> Path:
    note(folder, "setup", str(os.getpid()))
    return folder


def note_job(folder: Path, job: object) -> None:
    note(folder, "job", f"{job}")
    note(folder, "worker", str(os.getpid()))


def meet(folder: Path, job: int) -> None:
    """A job that ends when another one has begun."""
    note(folder, "gpu", os.environ.get("CUDA_VISIBLE_DEVICES", "none"))
    note_job(folder, job)
    wait_until(lambda: len(noted(folder, "worker")) == 2)


def note_usage(folder: Path, job: int) -> None:
    """Whether the worker's Ray would report that it is used."""
    from ray._common.usage.usage_lib import usage_stats_enabled

    note(folder, "usage", str(usage_stats_enabled()))


def fail_at_times(folder: Path, job: int) -> None:
    note_job(folder, job)
    if job == 1:
        raise ValueError("two\nlines")
    if job == 2:
        raise PrunelensError("expected this, found that; do\n  something")
    if job == 3:
        raise KeyError


def die_once(folder: Path, job: int) -> None:
    note_job(folder, job)
    if job % 2 == 0 and noted(folder, "job").count(str(job)) == 1:
        die()


def die_at_2(folder: Path, job: int) -> None:
    note_job(folder, job)
    if job == 2:
        die()


def fail_setup(folder: Path) -> None:
    raise PrunelensError("expected a model, found none; name one")


def crash_setup(folder: Path) -> None:
    raise OSError("no\nroom")


def die_in_setup(folder: Path) -> None:
    note_setup(folder)
    die()


def die_in_two_setups(folder: Path) -> Path:
    note_setup(folder)
    if len(noted(folder, "setup")) < MAX_ATTEMPTS:
        die()
    return folder


def interrupt_itself(folder: Path, job: int) -> None:
    os.kill(os.getpid(), signal.SIGINT)


def use_a_process(folder: Path, job: int) -> None:
    import multiprocessing

    child = multiprocessing.get_context("fork").Process(target=note_job, args=(folder, job))
    child.start()
    child.join()


@functools.cache
def locked(path: Path) -> Any:
    """A file that stays locked for as long as this process lives."""
    file = path.open("w")
    fcntl.flock(file, fcntl.LOCK_EX)
    return file


def stay(folder: Path, job: int) -> None:
    """Job 0 ends when the others are there; they never end by themselves."""
    if job == 0:
        wait_until(lambda: len(noted(folder, "stays")) == 2)
    else:
        locked(folder / f"lock{job}")
        note(folder, "stays", str(job))
        time.sleep(10 * PATIENCE)


def is_free(path: Path) -> bool:
    """Whether the process that locked the file is gone."""
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def only_error(outcomes: list[Outcome]) -> dict[Any, str | None]:
    assert len({outcome.job for outcome in outcomes}) == len(outcomes)
    return {outcome.job: outcome.error for outcome in outcomes}


def test_ray_starts_here_and_ends_again(tmp_path: Path) -> None:
    import ray

    assert not ray.is_initialized()
    assert only_error(list(run_ray([1, 2], tmp_path, note_setup, note_job))) == {1: None, 2: None}
    assert not ray.is_initialized()
    assert noted(tmp_path, "job") == ["1", "2"]


def test_ray_reports_to_nobody_that_it_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither here nor in its workers; left to itself it would."""
    from ray._common.usage.usage_lib import usage_stats_enabled

    monkeypatch.delenv("RAY_USAGE_STATS_ENABLED", raising=False)
    monkeypatch.setattr("ray._common.usage.usage_lib._usage_stats_config_path", lambda: str(tmp_path / "none.json"))
    assert usage_stats_enabled()
    assert only_error(list(run_ray([1], tmp_path, note_setup, note_usage))) == {1: None}
    assert not usage_stats_enabled()
    assert noted(tmp_path, "usage") == ["False"]


def test_every_job_runs_once_and_setup_once(run: Run, tmp_path: Path) -> None:
    jobs = ["a", "b", "b", ("c", 1), "e"]
    outcomes = list(run(jobs, tmp_path, note_setup, note_job))
    assert [outcome.job for outcome in outcomes] == jobs
    assert {(outcome.error, outcome.traceback) for outcome in outcomes} == {(None, None)}
    assert noted(tmp_path, "job") == sorted(str(job) for job in jobs)
    (setup,) = noted(tmp_path, "setup")
    assert noted(tmp_path, "worker") == [setup] * len(jobs)
    assert setup != str(os.getpid())


def test_workers_run_at_the_same_time(run: Run, tmp_path: Path) -> None:
    assert only_error(list(run([1, 2], tmp_path, note_setup, meet, 2))) == {1: None, 2: None}
    assert noted(tmp_path, "setup") == noted(tmp_path, "worker")
    assert len(set(noted(tmp_path, "setup"))) == 2
    if run is run_ray:
        assert noted(tmp_path, "gpu") == ["0", "1"]


def test_no_more_workers_than_jobs(tmp_path: Path) -> None:
    assert len(list(run_local([1], tmp_path, note_setup, note_job, 9))) == 1
    assert len(noted(tmp_path, "setup")) == 1


@pytest.mark.parametrize("name", EXECUTORS)
def test_no_jobs_need_no_workers(name: str, tmp_path: Path) -> None:
    assert list(EXECUTORS[name]([], tmp_path, die_in_setup, note_job)) == []
    assert noted(tmp_path, "setup") == []


def test_an_error_stays_with_its_job(run: Run, tmp_path: Path) -> None:
    outcomes = list(run([0, 1, 2, 3, 4], tmp_path, note_setup, fail_at_times))
    assert only_error(outcomes) == {
        0: None,
        1: "ValueError: two lines",
        2: "expected this, found that; do something",
        3: "KeyError",
        4: None,
    }
    for outcome in outcomes:
        assert (outcome.traceback is None) == (outcome.error is None)
    assert "in fail_at_times" in outcomes[1].traceback
    assert outcomes[1].traceback.endswith("ValueError: two\nlines\n")
    assert len(noted(tmp_path, "setup")) == 1


def test_a_job_that_cannot_be_read_is_an_error_of_this_job(run: Run, tmp_path: Path) -> None:
    outcomes = list(run([Unreadable(), 1], tmp_path, note_setup, note_job))
    assert [outcome.error for outcome in outcomes] == [
        "ValueError: invalid literal for int() with base 10: 'not a number'",
        None,
    ]


def test_a_lost_worker_loses_nothing(run: Run, tmp_path: Path) -> None:
    assert only_error(list(run(range(4), tmp_path, note_setup, die_once, 2))) == dict.fromkeys(range(4))
    assert noted(tmp_path, "job") == ["0", "0", "1", "2", "2", "3"]
    assert len(noted(tmp_path, "setup")) <= 4


def test_a_job_that_kills_its_workers_is_given_up(run: Run, tmp_path: Path) -> None:
    outcomes = list(run([1, 2, 3], tmp_path, note_setup, die_at_2, 2))
    assert only_error(outcomes) == {1: None, 2: LOST_JOB, 3: None}
    assert LOST_JOB == "the worker was lost 3 times while running this (killed, or out of memory)"
    assert noted(tmp_path, "job") == ["1", *["2"] * MAX_ATTEMPTS, "3"]


def test_a_failing_setup_reaches_the_caller(run: Run, tmp_path: Path) -> None:
    with pytest.raises(PrunelensError) as caught:
        list(run([1, 2], tmp_path, fail_setup, note_job, 2))
    assert str(caught.value) == "expected a model, found none; name one"
    with pytest.raises(PrunelensError) as caught:
        list(run([1, 2], tmp_path, crash_setup, note_job))
    assert str(caught.value) == "a worker could not start: OSError: no room"
    assert "in crash_setup" in caught.value.__notes__[0]
    assert noted(tmp_path, "job") == []


def test_workers_lost_in_setup(run: Run, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    assert only_error(list(run([1, 2], tmp_path / "other", die_in_two_setups, note_job))) == {1: None, 2: None}
    with pytest.raises(PrunelensError) as caught:
        list(run([1, 2], tmp_path, die_in_setup, note_job))
    assert str(caught.value) == LOST_SETUP
    assert len(noted(tmp_path, "setup")) == MAX_ATTEMPTS


def test_at_least_one_worker(run: Run, tmp_path: Path) -> None:
    with pytest.raises(PrunelensError, match="expected at least 1 worker, found 0"):
        list(run([1], tmp_path, note_setup, note_job, 0))


def test_local_workers_leave_interrupts_to_the_parent(tmp_path: Path) -> None:
    assert only_error(list(run_local([1, 2], tmp_path, note_setup, interrupt_itself))) == {1: None, 2: None}
    assert len(noted(tmp_path, "setup")) == 1


def test_work_may_use_processes(tmp_path: Path) -> None:
    assert only_error(list(run_local([1], tmp_path, note_setup, use_a_process))) == {1: None}
    assert noted(tmp_path, "job") == ["1"]


@pytest.mark.parametrize("stop", ["close", "interrupt"])
def test_stopping_ends_the_workers(stop: str, run: Run, tmp_path: Path) -> None:
    workers = 3 if run is run_local else 2
    outcomes = run([1, 2, 0][-workers:], tmp_path, note_setup, stay, workers)
    if workers == 2:
        note(tmp_path, "stays", "stands in for the third worker")
    assert next(outcomes) == Outcome(0)
    locks = sorted(tmp_path.glob("lock*"))
    assert len(locks) == workers - 1
    assert not any(is_free(lock) for lock in locks)
    if stop == "close":
        outcomes.close()
    else:
        with pytest.raises(KeyboardInterrupt):
            outcomes.throw(KeyboardInterrupt)
    if run is run_local:
        assert all(is_free(lock) for lock in locks)
    wait_until(lambda: all(is_free(lock) for lock in locks))


PARENT = """
import sys
from pathlib import Path

from prunelens.study.sweep.executors import run_local
from test_executors import note_setup, stay

if __name__ == "__main__":
    running = run_local([1, 2, 0], Path(sys.argv[1]), note_setup, stay, 3)
    print(next(running), flush=True)
    if sys.argv[2] == "exit":
        raise SystemExit(5)
    next(running)
"""
JOINER = """
import sys
from pathlib import Path

from prunelens.study.sweep.executors import run_ray
from test_executors import note_job, note_setup

if __name__ == "__main__":
    print(list(run_ray([1], Path(sys.argv[1]), note_setup, note_job, address=sys.argv[2])))
"""


@contextmanager
def started(script: str, folder: Path, argument: str) -> Iterator[subprocess.Popen[str]]:
    path = folder / "script.py"
    path.write_text(script, encoding="utf-8")
    process = subprocess.Popen([sys.executable, path, folder, argument], stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.parametrize(("end", "status"), [("kill", -signal.SIGKILL), ("exit", 5)])
def test_workers_end_with_their_parent(end: str, status: int, tmp_path: Path) -> None:
    with started(PARENT, tmp_path, end) as parent:
        assert parent.stdout.readline() == "Outcome(job=0, error=None, traceback=None)\n"
        locks = sorted(tmp_path.glob("lock*"))
        assert len(locks) == 2
        if end == "kill":
            assert not any(is_free(lock) for lock in locks)
            parent.kill()
        assert parent.wait(PATIENCE) == status
    wait_until(lambda: all(is_free(lock) for lock in locks))


@pytest.mark.usefixtures("one_ray")
def test_ray_joins_the_cluster_at_an_address(tmp_path: Path) -> None:
    import ray

    address = ray.get_runtime_context().gcs_address
    with started(JOINER, tmp_path, address) as joiner:
        assert joiner.communicate(timeout=PATIENCE)[0] == "[Outcome(job=1, error=None, traceback=None)]\n"
    assert ray.get(ray.put(1)) == 1


@pytest.mark.usefixtures("one_ray")
def test_ray_joins_no_second_cluster(tmp_path: Path) -> None:
    import ray

    with pytest.raises(PrunelensError, match="expected Ray at auto, found no way to it"):
        list(run_ray([1], tmp_path, note_setup, note_job, address="auto"))
    assert ray.is_initialized()


def test_ray_is_not_at_the_address(tmp_path: Path) -> None:
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unheard.getsockname()[1]}"
        for asked in (address, f"ray://{address}", "nowhere"):
            with pytest.raises(PrunelensError, match=f"^expected Ray at {asked}, found no way to it .*; check"):
                list(run_ray([1], tmp_path, note_setup, note_job, address=asked))


def test_ray_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(PrunelensError) as caught:
        list(run_ray([1], tmp_path, note_setup, note_job))
    assert str(caught.value) == (
        "running on Ray needs the ray package; pip install 'prunelens[ray]', or use --executor local"
    )
