"""The machine underneath: threads, matmul precision, device, and a record of all of it."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

import steelyard
from steelyard.config import Config, require_positive
from steelyard.errors import ConfigError

PACKAGES = (
    "torch", "numpy", "safetensors", "gymnasium", "gymnasium-robotics", "mujoco", "minari", "tyro", "pydantic",
    "transformers", "tokenizers", "peft",
)  # fmt: skip


@dataclass(frozen=True)
class RuntimeConfig(Config):
    """How the machine is used."""

    device: str = "cpu"
    """torch device: "cpu", "cuda", "cuda:1", ..."""
    threads: int = 1
    """CPU threads; two runs side by side with one thread each beat one run with two."""
    matmul_precision: Literal["highest", "high", "medium"] = "medium"
    """float32 matrix products. On CPUs without matrix units "medium" is as exact as "highest" and up to twice as fast;
    where a probe finds it inexact, "highest" is used and said so."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require_positive(self, "threads")


def prepare(config: RuntimeConfig) -> str:
    """Apply threads and precision; return the matmul precision that is in force.

    Raises:
        ConfigError: the device is not there.
    """
    torch.set_num_threads(config.threads)
    keep_memory()
    try:
        device = torch.device(config.device)
    except RuntimeError:
        raise ConfigError(f"device {config.device!r} is not one that torch knows, e.g. 'cpu' or 'cuda:0'") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {config.device!r} was asked for, but torch sees no CUDA device")
    precision: str = config.matmul_precision
    torch.set_float32_matmul_precision(precision)
    if device.type == "cpu" and precision != "highest" and matmul_error() > 1e-5:
        precision = "highest"  # a CPU whose matrix units really round to bfloat16
        torch.set_float32_matmul_precision(precision)
    return precision


def require_bf16(device: str) -> None:
    """Refuse bf16 on a CPU that would emulate it: measured at a thirteenth of float32's speed.

    Raises:
        ConfigError: the flags that Linux reports name neither avx512_bf16 nor amx_bf16 (nor an ARM bf16).
    """
    if torch.device(device).type != "cpu" or not Path("/proc/cpuinfo").is_file():
        return
    flags = set(Path("/proc/cpuinfo").read_text().split())
    if not flags & {"avx512_bf16", "amx_bf16", "bf16"}:
        raise ConfigError(
            "optim.autocast is 'bf16', but this CPU has no bf16 instructions and would emulate them; use 'off'"
        )


def keep_memory() -> None:
    """Let glibc keep freed memory (Linux only): each update frees and asks again for blocks of many megabytes.

    By default such blocks go back to the system and are faulted in anew, page by page: measured at a quarter of the
    CPU time of an update with 256-wide critics. Elsewhere this does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        trim_threshold, top_pad, mmap_threshold = -1, -2, -3
        mallopt(mmap_threshold, 32 << 20)  # larger is not allowed
        mallopt(trim_threshold, 1 << 30)
        mallopt(top_pad, 64 << 20)


def matmul_error() -> float:
    """Return the relative error of a float32 matrix product on the CPU against float64, with the present setting."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 256, generator=generator) for _ in range(2))
    exact = a.double() @ b.double()
    return float(((a @ b).double() - exact).norm() / exact.norm())


def describe() -> dict[str, Any]:
    """Return versions, threads, precision, hardware and commit: what a number depends on."""
    return {
        "steelyard": steelyard.__version__,
        "commit": _commit(),
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "packages": {name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def _commit() -> str | None:
    """Return the commit of the source tree this package runs from, or None for an installed package."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        result = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()
