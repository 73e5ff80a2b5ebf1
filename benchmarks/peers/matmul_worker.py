"""The machine's matrix product as a contender of `benchmarks/updates.py`: what any update is measured against."""

from __future__ import annotations

import time
from typing import Any

import torch
from worker import parser, prepare, serve

LIMIT = 1.0
"""Seconds that one product may take; a machine without bf16 arithmetic would need minutes for the full size."""


def best(dtype: torch.dtype, shape: tuple[int, int, int], repeats: int) -> float:
    """Return GFLOP/s of the fastest of some [m, k] x [k, n] products."""
    m, k, n = shape
    a, b = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)
    fastest = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        a @ b
        fastest = min(fastest, time.perf_counter() - start)
    return 2e-9 * m * k * n / fastest


def peak(dtype: str, precision: str, size: int) -> dict[str, Any]:
    """Return GFLOP/s at `size`^3, or at the largest smaller power of two that keeps within the time limit."""
    torch.set_float32_matmul_precision(precision)
    kind = getattr(torch, dtype)
    used = 128
    rate = best(kind, (used, used, used), 3)
    while used < size and 2e-9 * (2 * used) ** 3 / rate < LIMIT:
        used *= 2
        rate = best(kind, (used, used, used), 2)
    return {"gflops": best(kind, (used, used, used), 4), "size": used}


def main() -> None:
    options = parser(__doc__).parse_args()
    prepare(options)
    serve(lambda step: None, {}, {"peak": peak})


if __name__ == "__main__":
    main()
