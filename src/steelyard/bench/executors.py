"""Where runs are carried out: worker processes of this machine, or Ray tasks on this machine or a cluster.

Both give `concurrent.futures.Future`s, so that whoever waits need not know which it is. `stop` asks every running job
to write a checkpoint and end; jobs that have not begun are dropped.
"""

from __future__ import annotations

import _thread
import multiprocessing
import multiprocessing.connection
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, ProcessPoolExecutor, wait
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, Self, TypeVar

from steelyard.errors import ConfigError, SteelyardError, require
from steelyard.train.loop import Interrupted

ExecutorName = Literal["local", "ray"]
T = TypeVar("T")
POLL_SECONDS = 1.0
STOP_SECONDS = 120.0  # for the checkpoints of interrupted Ray tasks
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "RAY_USAGE_STATS_ENABLED": "0"}
"""One thread a job, no spinning threads, and Ray sends no usage statistics."""


class Executor(Protocol):
    """Carries out jobs in other processes; a context manager that leaves no process behind."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def submit(self, work: Callable[[T], str | None], job: T) -> Future[str | None]:
        """Begin `work(job)` as soon as there is room for it."""
        ...

    def stop(self) -> None:
        """Ask running jobs to end as after ctrl-C, and drop the others."""
        ...


def work_off(
    tasks: Iterable[T],
    work: Callable[[T], str | None],
    pool: Executor | None,
    on_end: Callable[[T, str | None], None],
    meanwhile: Callable[[], None] = lambda: None,
) -> None:
    """Carry out `work(task)` for every task: in a pool, which is closed at the end, or in this process, in order.

    Args:
        tasks: what to do.
        work: a function of a module, for other processes must find it.
        pool: where; None: here.
        on_end: called in this process with each task that has ended and its result.
        meanwhile: called in this process after every end and at least every `POLL_SECONDS` while others work.

    Raises:
        Interrupted: ctrl-C, after the running tasks were asked to stop.
        SteelyardError: a worker process was lost.
    """
    try:
        if pool is None:
            for task in tasks:
                on_end(task, work(task))
                meanwhile()
            return
        with pool:
            waiting: dict[Future[str | None], T] = {pool.submit(work, task): task for task in tasks}
            while waiting:
                for future in wait(waiting, POLL_SECONDS, FIRST_COMPLETED).done:
                    on_end(waiting.pop(future), future.result())
                meanwhile()
    except (KeyboardInterrupt, Interrupted):
        raise Interrupted from None
    except BrokenExecutor:
        raise SteelyardError(
            "a worker process died (killed, or out of memory); the same command goes on where it stopped"
        ) from None


class LocalExecutor:
    """Worker processes of this machine.

    Workers do not hear ctrl-C themselves, wherever it comes from (a terminal sends it to all processes, `kill` to one):
    they wait for the end of a pipe that this process holds. It ends when `stop` closes it, and when this process dies,
    however that happens, so that no worker goes on writing to a run that a later process resumes.
    """

    def __init__(self, workers: int) -> None:
        context = multiprocessing.get_context("spawn")
        reader, self._writer = context.Pipe(duplex=False)
        self._pool = ProcessPoolExecutor(workers, context, _listen, (reader,))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.stop()
        try:
            self._pool.shutdown(wait=True, cancel_futures=kind is not None)
        except KeyboardInterrupt:  # a second ctrl-C: at once
            for child in multiprocessing.active_children():
                child.kill()
            raise
        self._writer.close()

    def submit(self, work: Callable[[T], str | None], job: T) -> Future[str | None]:
        """Begin `work(job)` in a worker."""
        # the variables must be there before a worker imports torch; spawned processes inherit them
        before = {name: os.environ.get(name) for name in ENVIRONMENT}
        os.environ.update(ENVIRONMENT)
        try:
            return self._pool.submit(_interruptible, work, job)  # starts a worker where one is missing
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})

    def stop(self) -> None:
        """End the pipe: every worker interrupts its job."""
        self._writer.close()


# of a worker process: whether it has a job now, and whether it should have no other
_busy, _stopping = threading.Event(), threading.Event()


def _listen(reader: multiprocessing.connection.Connection) -> None:
    """Prepare a worker: deaf to the terminal's ctrl-C, interrupted when the pipe ends, gone when its parent dies."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})

    def wait() -> None:
        multiprocessing.connection.wait([reader])
        if multiprocessing.connection.wait([parent.sentinel], timeout=0.1):
            os._exit(1)
        _stopping.set()
        if _busy.is_set():
            _thread.interrupt_main()  # runs Python's handler; the signal itself stays blocked
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _interruptible(work: Callable[[T], str | None], job: T) -> str | None:
    _busy.set()
    try:
        if _stopping.is_set():  # the pool hands out jobs before there is a worker for them
            raise Interrupted
        return work(job)
    finally:
        _busy.clear()


class RayExecutor:
    """Ray tasks, one CPU and one thread each: as many at a time as Ray has CPUs.

    Args:
        workers: CPUs of a local Ray, which is started where there is no address, and stopped at the end.
        address: of a running cluster ("auto", "ray://host:10001", ...); default is the variable RAY_ADDRESS.
        shared: directory that all nodes must see, for the runs are written below it.

    Raises:
        MissingExtraError: Ray is not installed.
    """

    def __init__(self, workers: int, address: str | None, shared: Path) -> None:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        self._ray: Any = require("ray", "ray")
        self._shared = shared
        self._references: list[Any] = []
        self._owns = not self._ray.is_initialized()
        if self._owns:
            address = address or os.environ.get("RAY_ADDRESS")
            local = {"num_cpus": workers, "include_dashboard": False, "object_store_memory": 80 << 20}
            try:
                self._ray.init(
                    address=address or "local",
                    log_to_driver=False,
                    logging_level="ERROR",
                    runtime_env={"env_vars": ENVIRONMENT},
                    **({} if address else local),
                )
            except Exception as error:  # Ray raises bare ones too, where its processes come up too slowly
                where = f"cluster {address!r}" if address else "local Ray"
                reason = str(error).strip().splitlines()[0]
                raise ConfigError(f"the {where} cannot be reached or started: {reason}") from None
        self._probe = shared / f".seen-by-{socket.gethostname()}-{os.getpid()}"

    def __enter__(self) -> Self:
        self._shared.mkdir(parents=True, exist_ok=True)
        self._probe.touch()
        self._task = self._ray.remote(num_cpus=1, max_retries=3)(_on_node)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and self._references:
            self.stop()
            self._ray.wait(self._references, num_returns=len(self._references), timeout=STOP_SECONDS)
        self._probe.unlink(missing_ok=True)
        if self._owns:
            self._ray.shutdown()

    def submit(self, work: Callable[[T], str | None], job: T) -> Future[str | None]:
        """Begin `work(job)` as a Ray task; a task whose node is lost is begun again and resumes its run."""
        reference = self._task.remote(work, job, str(Path.cwd()), str(self._probe.absolute()))
        self._references.append(reference)
        result: Future[str | None] = Future()

        def hand_on(source: Future[str | None]) -> None:
            error = source.exception()
            if error is None:
                result.set_result(source.result())
            elif getattr(error, "cause", None) is not None:
                result.set_exception(error.cause)  # type: ignore[attr-defined]  # what the task itself raised
            else:
                result.set_exception(BrokenExecutor(str(error)))  # its process or node was lost

        reference.future().add_done_callback(hand_on)
        return result

    def stop(self) -> None:
        """Interrupt every task."""
        for reference in self._references:
            self._ray.cancel(reference)


def _on_node(work: Callable[[T], str | None], job: T, directory: str, probe: str) -> str | None:
    """Carry out one job on a node of a cluster, if that node sees the directory of the runs."""
    if not Path(probe).is_file():
        raise ConfigError(
            f"{Path(probe).parent}: not visible from node {socket.gethostname()}; on a cluster the runs and their data "
            "must lie on a file system that all nodes share (choose it with --out)"
        )
    if Path(directory).is_dir():
        os.chdir(directory)  # paths in configs are relative to where the command was given
    return work(job)
