"""Does `Store.gather` cost the same at 10^5, 10^6 and 10^7 transitions on disk?

Builds three stores (observations 29 x float32, actions 8 x float32) in a temporary directory, then times gathers of
256 random steps, interleaving the sizes so that noise of the machine hits all of them alike. "gather" is the gather
alone, "batch" adds what a training step adds: drawing the indices and making float32 tensors. A plain `np.take` of
the same records is timed beside them: what it loses from the smallest to the largest size (which no longer fits in
the processor's cache) is the memory system's part. Needs about 2 GB of disk.

    python benchmarks/store.py --out store.json
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from steelyard.data.episode import Episode
from steelyard.data.sampler import UniformSampler
from steelyard.data.store import Steps, Store

LENGTH = 1000
BATCH = 256


def episodes(steps: int) -> Iterator[Episode]:
    rng = np.random.default_rng(0)
    for _ in range(steps // LENGTH):
        yield Episode(
            observations=rng.random((LENGTH + 1, 29), np.float32),
            actions=rng.random((LENGTH, 8), np.float32),
            rewards=rng.random(LENGTH),
            terminated=False,
            truncated=True,
        )


def tensors(steps: Steps) -> list[torch.Tensor]:
    arrays = [*steps.observations.values(), steps.actions, steps.rewards, *steps.next_observations.values()]
    return [torch.from_numpy(values).float() for values in arrays]


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def timed(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return (time.perf_counter() - start) * 1e6


def anonymous_mib() -> float:
    """Memory that belongs to the process itself, without mapped files: what "bounded memory" means."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["RssAnon"].split()[0]) / 1024


def measure(sizes: list[int], repeats: int, folder: Path) -> dict[str, object]:
    stores, build = {}, {}
    for size in sizes:
        start = time.perf_counter()
        stores[size] = Store.from_episodes(episodes(size), folder / str(size))
        build[size] = time.perf_counter() - start
    peak_build = peak_mib()
    rng = np.random.default_rng(1)
    gather: dict[int, list[float]] = {size: [] for size in sizes}
    batch: dict[int, list[float]] = {size: [] for size in sizes}
    take: dict[int, list[float]] = {size: [] for size in sizes}
    samplers = {size: UniformSampler(size, BATCH, seed=2) for size in sizes}
    plain = {}
    for size, store in stores.items():
        store.episode_returns()  # maps every page: "warm page cache"
        plain[size] = np.memmap(folder / str(size) / "records.bin", np.uint8, "r")
        plain[size] = np.asarray(plain[size]).view(np.float32).reshape(-1, store.records.itemsize // 4)
    for repeat in range(repeats + 50):
        for size, store in stores.items():
            indices, others = rng.integers(size, size=BATCH), rng.integers(size, size=BATCH)
            elapsed = timed(lambda store=store, indices=indices: store.gather(indices))
            sampler = samplers[size]
            whole = timed(lambda store=store, s=sampler, step=repeat: tensors(store.gather(s.indices(step))))
            baseline = timed(lambda size=size, others=others: plain[size].take(others, 0))
            if repeat >= 50:
                gather[size].append(elapsed)
                batch[size].append(whole)
                take[size].append(baseline)
    medians = {size: float(np.median(gather[size])) for size in sizes}
    batches = {size: float(np.median(batch[size])) for size in sizes}
    takes = {size: float(np.median(take[size])) for size in sizes}
    return {
        "batch": BATCH,
        "repeats": repeats,
        "build_seconds": build,
        "gather_median_us": medians,
        "gather_ratio": {size: medians[size] / medians[sizes[0]] for size in sizes},
        "batch_median_us": batches,
        "batch_ratio": {size: batches[size] / batches[sizes[0]] for size in sizes},
        "plain_take_median_us": takes,
        "plain_take_ratio": {size: takes[size] / takes[sizes[0]] for size in sizes},
        "peak_rss_after_build_mib": peak_build,
        "anonymous_memory_mib": anonymous_mib(),
        "disk_mib": {size: (folder / str(size) / "records.bin").stat().st_size / 2**20 for size in sizes},
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "processor": platform.processor() or platform.machine(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=None, help="write the result here as JSON")
    parser.add_argument("--sizes", type=int, nargs="+", default=[10**5, 10**6, 10**7])
    parser.add_argument("--repeats", type=int, default=2000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        text = json.dumps(measure(options.sizes, options.repeats, Path(folder)), indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
