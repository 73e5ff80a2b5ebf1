"""Many clients on one language model: they take turns step by step, and a cancelled one stops at the next step.

Every request has a thread of its own, and one thread at a time computes. After each decode step (one token of all the
samples that a request is drawing) it passes the turn on to whoever has waited longest. So a short request is not held
up by a long one, and what a request gets does not depend on the others: batches are never made across requests.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Annotated

import torch
import tyro

from steelyard.adapt.best_of_n import Event, stream
from steelyard.adapt.compute_policy import ComputePolicy, Request
from steelyard.config import require_positive
from steelyard.data.tokenizer import Text
from steelyard.envs.samplers import SamplingConfig
from steelyard.errors import SteelyardError
from steelyard.serve.config import HttpConfig, RefusedError
from steelyard.serve.web import fault
from steelyard.workflows.best_of_n import Answerer

CANCELLED = 499
"""Status of a request that the client has left; nobody reads it."""


@dataclass(frozen=True)
class LMServeConfig(HttpConfig):
    """Where to listen, and how much to sample."""

    policy: Annotated[ComputePolicy, tyro.conf.arg(name="")] = field(default_factory=ComputePolicy)
    """How to sample where a request does not say."""
    max_samples: int = 16
    """Most samples that a request may ask for."""
    new_tokens: int = 256
    """Longest answer where a request does not say, in tokens."""
    max_new_tokens: int = 1024
    """Longest answer that a request may ask for, in tokens."""
    max_prompt_tokens: int = 4096
    """Longest prompt."""
    parallel: int = 8
    """Requests that take turns on the model."""
    max_waiting: int = 32
    """Requests that wait for a place among those; further ones are answered with 429 at once."""

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        require_positive(self, "max_samples", "new_tokens", "max_new_tokens", "max_prompt_tokens", "parallel")
        require_positive(self, "max_waiting")


class Turns:
    """A lock that is handed over in the order in which threads asked for it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._queue: deque[object] = deque()

    def __enter__(self) -> None:
        ticket = object()
        with self._changed:
            self._queue.append(ticket)
            self._changed.wait_for(lambda: self._queue[0] is ticket)

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._queue.popleft()
            self._changed.notify_all()

    def pass_on(self) -> None:
        """Let those who wait go first; the caller holds the lock, and holds it again afterwards."""
        if len(self._queue) > 1:
            self.__exit__()
            self.__enter__()


@dataclass(frozen=True)
class Order:
    """What a client asked for.

    Attributes:
        prompt: text or conversation, for scorers that read texts.
        tokens: of the prompt.
        policy: how to sample.
        sampling: limits and top-p.
        seed: of the samples.
    """

    prompt: Text
    tokens: tuple[int, ...]
    policy: ComputePolicy
    sampling: SamplingConfig
    seed: int


Told = Event | SteelyardError | int | None
"""What a job tells: a decision, a token of its only sample, an error, and None at its end."""


class Job:
    """An order at work, or waiting for a place.

    Args:
        order: what to do.
        tell: called from the job's thread; must return at once.
    """

    def __init__(self, order: Order, tell: Callable[[Told], None]) -> None:
        self.order, self.tell = order, tell
        self.future: Future[None] | None = None
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """Give up the place in the queue, or stop decoding at the next step; nothing happens where it has ended."""
        self._cancelled.set()
        if self.future is not None:
            self.future.cancel()

    def require_wanted(self) -> None:
        """Raise where the client has left."""
        if self._cancelled.is_set():
            raise RefusedError(CANCELLED, "the client has left")


class Engine:
    """Carries orders out.

    Args:
        answerer: the model and what chooses among its samples.
        config: how many at a time.
    """

    def __init__(self, answerer: Answerer, config: LMServeConfig) -> None:
        self.answerer, self.config = answerer, config
        self._turns = Turns()
        self._threads = ThreadPoolExecutor(config.parallel, "decode")
        self._lock, self._jobs, self._steps = threading.Lock(), 0, 0
        self._merged = contextlib.ExitStack()
        self._merged.enter_context(answerer.merged())

    @property
    def jobs(self) -> int:
        """Orders that have not ended."""
        return self._jobs

    @property
    def steps(self) -> int:
        """Decode steps since the start."""
        return self._steps

    def submit(self, order: Order, tell: Callable[[Told], None]) -> Job:
        """Begin an order, or let it wait for a place.

        Raises:
            RefusedError: too many wait already.
        """
        most = self.config.parallel + self.config.max_waiting
        with self._lock:
            if self._jobs >= most:
                raise RefusedError(429, f"{most} requests are at work or wait already; try again later")
            self._jobs += 1
        job = Job(order, tell)
        job.future = self._threads.submit(self._work, job)
        job.future.add_done_callback(lambda _: self._end(job))
        return job

    def close(self) -> None:
        """Finish what was accepted and end the threads."""
        self._threads.shutdown()
        self._merged.close()

    def _work(self, job: Job) -> None:
        try:
            job.require_wanted()
            with self._turns, torch.no_grad():
                self._carry_out(job)
        except SteelyardError as error:
            job.tell(error)
        except Exception as error:
            job.tell(fault(error))

    def _end(self, job: Job) -> None:
        with self._lock:
            self._jobs -= 1
        job.tell(None)

    def _carry_out(self, job: Job) -> None:
        order = job.order
        single = order.policy.budget.max_samples == 1

        def after_step(_: Sequence[Request], tokens: Sequence[int]) -> None:
            self._steps += 1
            if single:
                job.tell(int(tokens[0]))
            self._turns.pass_on()
            job.require_wanted()

        job.require_wanted()
        backend = self.answerer.backend(
            [order.prompt], [list(order.tokens)], order.sampling, order.seed, on_step=after_step
        )
        for event in stream(backend, 1, order.policy):
            job.tell(event)
            job.require_wanted()
