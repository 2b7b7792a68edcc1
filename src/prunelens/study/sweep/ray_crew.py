"""Workers on Ray: actors of a cluster, which is left as it was found."""

import os
import signal
import socket
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from prunelens.errors import PrunelensError
from prunelens.study.sweep.worker import GRACE_SECONDS, Reply, Worker, one_line

RAY_WORDS = ("auto", "local")
"""Addresses that name no place: a cluster that is found here, and a new one."""


class RayCrew:
    """Actors of a Ray cluster, which is left as it was found."""

    def __init__(self, workers: int, address: str | None) -> None:
        ray = _ray()
        self.ray, self.pack = ray, ray.cloudpickle.dumps
        self.promises: dict[Any, Any] = {}
        self.started = address is not None or not ray.is_initialized()
        if self.started:
            _connect(ray, workers, address)
        gpus = 1 if ray.cluster_resources().get("GPU") else 0
        self.kind = ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=0)(Worker)

    def hire(self, start: bytes) -> Any:
        """Start a worker with its setup; returns what it is known by."""
        actor = self.kind.remote()
        self.ask(actor, start)
        return actor

    def ask(self, actor: Any, message: bytes) -> None:
        """Give a worker a message; a lost one is found by `wait`."""
        self.promises[actor.answer.remote(message)] = actor

    def wait(self) -> list[tuple[Any, Reply]]:
        """Wait until at least one worker has replied or was lost."""
        kept, _ = self.ray.wait(list(self.promises))
        actor = self.promises.pop(kept[0])
        try:
            return [(actor, self.ray.get(kept[0]))]
        except self.ray.exceptions.RayError as error:  # the actor, its process or its machine is gone
            return [(actor, Reply(traceback=str(error), lost=True))]

    def dismiss(self, actor: Any) -> None:
        """Let a worker go."""
        self.ray.kill(actor)

    def close(self) -> None:
        """Let all workers go."""
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
            f"({one_line(str(error))}); check that it runs, or use --executor local"
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
