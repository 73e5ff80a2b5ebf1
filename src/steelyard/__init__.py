"""Steelyard: turn broad prior data into values, then adapt them with very little."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from steelyard.artefact import load
    from steelyard.data.episode import Episode
    from steelyard.data.formats import open_dataset
    from steelyard.data.store import Store
    from steelyard.workflows.control import ControlRun, resume, start

__version__ = "0.1.0"

# name -> (module, name there); imported on first use, so that `import steelyard` stays light
_PUBLIC = {
    "ControlRun": ("steelyard.workflows.control", "ControlRun"),
    "Episode": ("steelyard.data.episode", "Episode"),
    "Store": ("steelyard.data.store", "Store"),
    "load": ("steelyard.artefact", "load"),
    "open_dataset": ("steelyard.data.formats", "open_dataset"),
    "resume": ("steelyard.workflows.control", "resume"),
    "start": ("steelyard.workflows.control", "start"),
}

__all__ = ["ControlRun", "Episode", "Store", "__version__", "load", "open_dataset", "resume", "start"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'steelyard' has no attribute {name!r}")
    module, there = _PUBLIC[name]
    return getattr(importlib.import_module(module), there)
