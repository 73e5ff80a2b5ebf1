"""Work of many requests done together by one thread: texts through the backbone, updates into one commit."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Generic, TypeVar

JobT = TypeVar("JobT")
ResultT = TypeVar("ResultT")


@dataclass
class _Waiting(Generic[JobT, ResultT]):
    job: JobT
    size: int
    future: Future[ResultT] = field(default_factory=Future)


class Batcher(Generic[JobT, ResultT]):
    """One thread that takes what has been submitted meanwhile and works it as one batch.

    How many may wait is bounded by whoever admits requests (`app.Admission`).

    Args:
        name: of the thread.
        work: jobs -> one result each; a result that is an exception is raised for its job alone.
        max_size: of a batch; a larger job is worked alone.
        wait: seconds that the first job of a batch waits for others.
        retry: where `work` itself raises, try every job alone, so that one bad job does not spoil the others.
    """

    def __init__(
        self,
        name: str,
        work: Callable[[Sequence[JobT]], Sequence[ResultT | Exception]],
        max_size: int,
        wait: float = 0.0,
        retry: bool = False,
    ) -> None:
        self._work, self._max_size, self._wait, self._retry = work, max_size, wait, retry
        self._queue: deque[_Waiting[JobT, ResultT]] = deque()
        self._changed, self._closed = threading.Condition(), False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def __call__(self, job: JobT, size: int = 1) -> ResultT:
        """Have a job done and return its result, or raise what went wrong; blocks the calling thread."""
        waiting: _Waiting[JobT, ResultT] = _Waiting(job, size)
        with self._changed:
            if self._closed:
                raise RuntimeError(f"{self._thread.name} is closed")
            self._queue.append(waiting)
            self._changed.notify_all()
        return waiting.future.result()

    def close(self) -> None:
        """Finish what was submitted and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        while batch := self._take():
            self._carry_out(batch)

    def _take(self) -> list[_Waiting[JobT, ResultT]]:
        """Return the next batch; an empty one at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closed)
            if self._wait:
                self._changed.wait_for(lambda: self._closed or self._full(), self._wait)
            batch: list[_Waiting[JobT, ResultT]] = []
            size = 0
            while self._queue and (not batch or size + self._queue[0].size <= self._max_size):
                batch.append(self._queue.popleft())
                size += batch[-1].size
            return batch

    def _full(self) -> bool:
        return sum(waiting.size for waiting in self._queue) >= self._max_size

    def _carry_out(self, batch: list[_Waiting[JobT, ResultT]]) -> None:
        try:
            results = self._work([waiting.job for waiting in batch])
        except Exception as error:
            if self._retry and len(batch) > 1:
                for waiting in batch:
                    self._carry_out([waiting])
                return
            results = [error] * len(batch)
        for waiting, result in zip(batch, results, strict=True):
            if isinstance(result, Exception):
                waiting.future.set_exception(result)
            else:
                waiting.future.set_result(result)
