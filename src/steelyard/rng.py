"""Random streams: every draw is a pure function of (seed, stream name, step).

No generator state is ever saved: to resume at step `k` one needs only `k`. Streams with different names are
independent, so evaluation ("eval") can never disturb training ("train/..."), and adding a stream changes no other.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch


def derive_seed(seed: int, stream: str, step: int = 0) -> int:
    """Return a 63-bit seed for one step of one named stream."""
    digest = hashlib.blake2b(f"{seed}/{stream}/{step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def torch_generator(seed: int, stream: str, step: int = 0, device: str | torch.device = "cpu") -> torch.Generator:
    """Return a torch generator on `device` for one step of one named stream."""
    return torch.Generator(device=device).manual_seed(derive_seed(seed, stream, step))


def numpy_generator(seed: int, stream: str, step: int = 0) -> np.random.Generator:
    """Return a numpy generator (Philox, cheap to create) for one step of one named stream."""
    return np.random.Generator(np.random.Philox(key=derive_seed(seed, stream, step)))
