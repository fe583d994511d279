"""Where a sweep's runs are carried out: on processes of this machine, on Slurm, or on a Ray cluster.

Each launcher takes a function and a list of arguments and gives a ``concurrent.futures.Future`` for each.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from holdfast.component import nearest

Work = Callable[[Any], Any]
LAUNCHERS = ("pool", "slurm", "local", "ray")
POLL_SECONDS = 2.0


class WorkerDied(RuntimeError):
    """A worker was killed, or its machine gave up; what it had done is in the run's folder."""


class Launcher(ABC):
    """Carries out a function for many arguments, as many at once as it has workers."""

    @abstractmethod
    def submit(self, work: Work, arguments: Sequence[Any]) -> list[Future[Any]]:
        """One future for each argument; ``work`` is a function of a module. A future that ends in an exception is a
        worker that died: ``work`` itself must raise none."""

    @abstractmethod
    def stop(self, now: bool) -> None:
        """Start nothing more.

        Args:
            now: end what is under way, too.
        """


def launcher(
    on: str, workers: int, *, folder: Path, address: str | None = None, resources: Mapping[str, Any] | None = None
) -> Launcher:
    """The launcher of this name.

    Args:
        on: ``pool``, ``slurm``, ``local`` (submitit on this machine, to try out a Slurm set-up) or ``ray``.
        workers: runs at once; 0 works in this process. Slurm takes it as the limit of the job array.
        folder: where submitit keeps its scripts and logs, seen by all machines.
        address: of the Ray cluster; a new one on this machine by default.
        resources: submitit's parameters (``timeout_min``, ``gpus_per_node``, ``slurm_partition``) or Ray's options
            (``num_gpus=0.25``, ``num_cpus=2``).

    Raises:
        ValueError: no such launcher, or its package is not installed.
    """
    resources = dict(resources or {})
    if on not in LAUNCHERS:
        raise ValueError(f"{on!r} is not where runs can be launched; {nearest(on, LAUNCHERS)}")
    if on == "pool":
        if resources or address:
            raise ValueError("resources and an address are for slurm, local and ray")
        return Here() if workers == 0 else Pool(workers)
    if on == "ray":
        return Ray(workers, address, resources)
    if address:
        raise ValueError("an address is for ray")
    return Slurm(workers, folder, on, resources)


class Stopped(BaseException):
    """Work in this process is to end."""


class Here(Launcher):
    """In this process, one after the other, in a thread beside the display."""

    stopping = threading.Event()
    """Set when the work is to end: whoever works here raises ``Stopped`` at its next step."""

    def __init__(self) -> None:
        self.stopping.clear()
        self._threads = ThreadPoolExecutor(1)

    def submit(self, work: Work, arguments: Sequence[Any]) -> list[Future[Any]]:
        return [self._threads.submit(work, argument) for argument in arguments]

    def stop(self, now: bool) -> None:
        if now:
            self.stopping.set()
        self._threads.shutdown(wait=True, cancel_futures=True)


class Pool(Launcher):
    """Processes of this machine. Each thread owns one, so that a killed process fails its own run alone."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._threads = ThreadPoolExecutor(workers)
        self._own = threading.local()
        self._pools: list[ProcessPoolExecutor] = []
        self._stopped = False

    def submit(self, work: Work, arguments: Sequence[Any]) -> list[Future[Any]]:
        return [self._threads.submit(self._in_own_process, work, argument) for argument in arguments]

    def _in_own_process(self, work: Work, argument: Any) -> Any:
        if self._stopped:
            raise WorkerDied("stopped")
        if getattr(self._own, "pool", None) is None:
            place = len(self._pools)
            self._own.pool = ProcessPoolExecutor(
                1, multiprocessing.get_context("spawn"), _settle, (os.getpid(), place, self.workers)
            )
            self._pools.append(self._own.pool)
        try:
            return self._own.pool.submit(work, argument).result()
        except BrokenProcessPool as fault:
            self._own.pool = None
            raise WorkerDied("the worker process was killed, perhaps for want of memory") from fault

    def stop(self, now: bool) -> None:
        self._stopped = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        for pool in self._pools:
            for process in list((pool._processes or {}).values()) if now else ():
                process.kill()
            pool.shutdown(wait=True, cancel_futures=True)


def _settle(parent: int, place: int, workers: int) -> None:
    """In a new worker: share the cores, take one of several GPUs, and die with the parent."""
    import torch

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else [str(device) for device in range(torch.cuda.device_count())]
    if len(devices) > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[place % len(devices)]

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class Slurm(Launcher):
    """Jobs of one Slurm array, by submitit. The folder of runs must be seen by all machines."""

    def __init__(self, workers: int, folder: Path, cluster: str, parameters: Mapping[str, Any]) -> None:
        try:
            import submitit
        except ImportError as fault:
            raise ValueError("submitit is not installed: pip install 'holdfast[slurm]'") from fault
        more = {"slurm_array_parallelism": max(1, workers)} if cluster == "slurm" else {}
        try:
            self._executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
            self._executor.update_parameters(name="holdfast", **more, **parameters)
        except (NameError, RuntimeError, TypeError, ValueError) as fault:
            raise ValueError(f"submitit: {fault}") from fault
        self._stopped = False
        self._jobs: list[Any] = []

    def submit(self, work: Work, arguments: Sequence[Any]) -> list[Future[Any]]:
        jobs = self._executor.map_array(work, arguments)
        waiting: dict[Future[Any], Any] = {Future(): job for job in jobs}
        self._jobs += jobs
        futures = list(waiting)
        threading.Thread(target=self._follow, args=(waiting,), daemon=True).start()
        return futures

    def _follow(self, waiting: dict[Future[Any], Any]) -> None:
        while waiting and not self._stopped:
            for future, job in [(future, job) for future, job in waiting.items() if job.done()]:
                del waiting[future]
                try:
                    future.set_result(job.result())
                except Exception as fault:  # whatever ended the job ends the run alone
                    future.set_exception(WorkerDied(str(fault).strip().splitlines()[-1]))
            time.sleep(POLL_SECONDS)

    def stop(self, now: bool) -> None:
        self._stopped = True
        for job in self._jobs if now else ():
            with contextlib.suppress(Exception):
                job.cancel()


class Ray(Launcher):
    """Tasks of a Ray cluster; a task may take a part of a GPU."""

    def __init__(self, workers: int, address: str | None, options: Mapping[str, Any]) -> None:
        try:
            import ray
        except ImportError as fault:
            raise ValueError("Ray is not installed: pip install 'holdfast[ray]'") from fault
        self._ray = ray
        local: dict[str, Any] = {} if address else {"num_cpus": max(1, workers)}
        try:
            ray.init(
                address=address, ignore_reinit_error=True, log_to_driver=False, logging_level=logging.ERROR, **local
            )
        except (ConnectionError, ValueError) as fault:
            raise ValueError(f"Ray: {fault}") from fault
        self._options = {"num_cpus": 1, "max_retries": 0, **options}
        self._references: list[Any] = []

    def submit(self, work: Work, arguments: Sequence[Any]) -> list[Future[Any]]:
        try:
            task = self._ray.remote(work).options(**self._options)
        except ValueError as fault:
            raise ValueError(f"Ray: {fault}") from fault
        references = [task.remote(argument) for argument in arguments]
        self._references += references
        return [reference.future() for reference in references]

    def stop(self, now: bool) -> None:
        for reference in self._references if now else ():
            self._ray.cancel(reference, force=True)
        self._ray.shutdown()
