"""Data-parallel training: one run in several processes, started by `torchrun` or `accelerate launch`.

The batch of an update is cut into `OptimConfig.shards` equal parts: part k holds rows k, k + shards, ..., so that a
mixed batch keeps its shares in each. A process works the parts rank, rank + world, ... in turn; gradients and losses
are averaged over all parts. One process with as many parts does the same sums: it is gradient accumulation, and the
reference that several processes are tested against.

Only rank 0 (the main process) writes, evaluates, shows progress and acts in environments. What it collects online it
sends to the others, batch by batch: nothing then depends on whether two machines simulate alike. The others wait in the
next exchange while it evaluates or saves.

Gradients are taken with respect to a phase's parameters (`optim.py`), which DistributedDataParallel does not know; what
is exchanged is one flat buffer a phase. Without the launchers' variables (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT)
every function here is the identity for one process.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn

from steelyard.data.batch import TransitionBatch
from steelyard.data.source import Source
from steelyard.errors import ConfigError, SteelyardError
from steelyard.train.optim import Optimizers
from steelyard.train.rundir import RunDir

P = ParamSpec("P")
T = TypeVar("T")
TIMEOUT_MINUTES = 30.0
"""Longest wait for another process; an evaluation must fit into it. The variable STEELYARD_TIMEOUT_MINUTES sets it."""


class LostProcessError(SteelyardError):
    """Another process of the run ended or does not answer."""


def world() -> int:
    """Return the number of processes of this run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def is_main() -> bool:
    """Return whether this process writes, evaluates and shows progress; also true to the launcher after the run."""
    return rank() == 0 if world() > 1 else os.environ.get("RANK", "0") == "0"


def launched(work: Callable[P, T]) -> Callable[P, T]:
    """Decorate a whole run: join the processes that a launcher has started with this one, and leave them at the end."""

    @functools.wraps(work)
    def joined(*args: P.args, **kwargs: P.kwargs) -> T:
        if int(os.environ.get("WORLD_SIZE", "1")) < 2 or dist.is_initialized():
            return work(*args, **kwargs)
        cuda = torch.cuda.is_available()
        if cuda:  # "cuda" then means this process's own device
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        minutes = float(os.environ.get("STEELYARD_TIMEOUT_MINUTES", TIMEOUT_MINUTES))
        with _lost_peers("at the start"):
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(minutes=minutes))
        try:
            return work(*args, **kwargs)
        finally:
            dist.destroy_process_group()

    return joined


def run_dir(path: str | Path, more_logs: tuple[str, ...] = ()) -> RunDir:
    """Return the run directory, which only the main process writes to."""
    return (RunDir if is_main() else _ReadOnly)(path, more_logs)


def shards_of(shards: int, batch_size: int, begun: bool = False) -> int:
    """Return the number of parts of a batch: as configured, or one for each process.

    Args:
        shards: `OptimConfig.shards`.
        batch_size: rows of a batch.
        begun: the run has begun, so the number is fixed.

    Raises:
        ConfigError: the processes cannot share the parts, or the parts the rows, equally.
    """
    count = world() if shards == 1 and not begun else shards
    if count % world():
        raise ConfigError(f"optim.shards ({count}) must be a multiple of the number of processes ({world()})")
    if batch_size % count:
        raise ConfigError(f"batch_size ({batch_size}) must be a multiple of optim.shards ({count})")
    return count


def parts(batch: Any, shards: int) -> list[tuple[int, Any]]:
    """Return (number, part) of this process's parts of a batch."""
    return [(part, batch.part(part, shards)) for part in range(rank(), shards, world())]


def add_up(buffer: Tensor) -> Tensor:
    """Return the sum of a buffer over all processes, the same bits in each."""
    if world() > 1:
        with _lost_peers("while gradients were exchanged"):
            dist.all_reduce(buffer)
    return buffer


def any_of(flag: bool) -> bool:
    """Return whether the flag is set in any process."""
    return flag if world() == 1 else bool(add_up(torch.tensor(float(flag))) > 0)


def gather(values: Any) -> list[Any]:
    """Return the plain JSON values of every process, in the order of ranks."""
    return [json.loads(_broadcast(json.dumps(values).encode(), source)) for source in range(world())]


def share(tensors: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """Return the main process's tensors in every process, on the CPU; the others' argument does not matter."""
    if world() == 1:
        return tensors or {}
    packed = b"" if tensors is None or not is_main() else safetensors.torch.save(_packable(tensors))
    return safetensors.torch.load(_broadcast(packed, 0))


def exchange(tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Return every process's tensors in every process, on the CPU, in the order of ranks."""
    if world() == 1:
        return [tensors]
    packed = safetensors.torch.save(_packable(tensors))
    return [safetensors.torch.load(_broadcast(packed, source)) for source in range(world())]


def share_state(learner: nn.Module, optimizers: Optimizers, step: int) -> int:
    """Give every process the main one's weights, optimiser state and update step; return the step."""
    if world() > 1:
        weights, moments = share(learner.state_dict()), share(optimizers.state_tensors())
        step = int(gather(step)[0])
        if not is_main():
            learner.load_state_dict(weights)
            optimizers.load_state_tensors(moments)
    return step


def require_same(learner: nn.Module, step: int) -> None:
    """Compare the weights of all processes.

    Raises:
        SteelyardError: they differ; a loss that changes buffers by what its own part of the batch shows would do that.
    """
    if world() == 1:
        return
    digest = hashlib.sha256()
    for value in learner.state_dict().values():
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    if len(set(gather(digest.hexdigest()))) > 1:
        raise SteelyardError(f"the weights of the {world()} processes differ at update {step}; the run cannot go on")


def shared(source: Source) -> Source:
    """Return a source that asks the main process's `source` and gives its batches to all processes."""
    return source if world() == 1 else _Shared(source)


class _Shared:
    """The main process's batches, in every process."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def batch(self, step: int) -> TransitionBatch:
        return TransitionBatch(**share(self.source.batch(step).tensors() if is_main() else None))

    def counters(self) -> dict[str, Any]:
        return self.source.counters()

    def state_tensors(self) -> dict[str, Tensor]:
        return self.source.state_tensors()

    def load_state_tensors(self, state: dict[str, Tensor]) -> None:
        self.source.load_state_tensors(state)


class _ReadOnly(RunDir):
    """A run directory for the processes that do not write."""

    def create(self) -> None:
        pass

    def write_json(self, name: str, content: Any) -> None:
        pass

    def append(self, name: str, rows: list[dict[str, Any]]) -> None:
        pass

    def event(self, sentence: str) -> None:
        pass


def _packable(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}


def _broadcast(data: bytes, source: int) -> bytes:
    """Return the bytes of process `source` in every process."""
    if world() == 1:
        return data
    with _lost_peers("while data were exchanged"):
        size = torch.tensor(len(data))
        dist.broadcast(size, source)
        if rank() == source:
            buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        else:
            buffer = torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(buffer, source)
    return buffer.numpy().tobytes()


@contextmanager
def _lost_peers(when: str) -> Iterator[None]:
    """Turn the errors of a broken exchange into one sentence."""
    try:
        yield
    except (RuntimeError, ValueError) as error:  # torch.distributed raises its own kinds of RuntimeError
        reason = str(error).strip().splitlines()[0][:160]
        raise LostProcessError(
            f"process {os.environ.get('RANK', '0')} lost another process of this run {when} ({reason}); the last "
            "checkpoint stays: start all processes again with --resume"
        ) from None
