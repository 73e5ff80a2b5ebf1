"""The library's errors. Each carries one sentence: the file or key, what was expected, what was found."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType


class SteelyardError(Exception):
    """Base class; the command line prints its sentence and exits with status 2."""


class DataError(SteelyardError):
    """Prior data that is missing, damaged or inconsistent."""


class ConfigError(SteelyardError):
    """A configuration file, key or value that cannot be used."""


class CheckpointError(SteelyardError):
    """A checkpoint that is missing, incomplete or damaged."""


class NonFiniteError(SteelyardError):
    """A loss, gradient, action or observation that is NaN or infinite."""


class MissingExtraError(SteelyardError):
    """An optional dependency that is not installed."""


def near(word: str, known: Iterable[str]) -> str:
    """Return what helps after a name that is not known: "did you mean 'cql'?", or "there are: awac, bc, ..."."""
    names = list(known)
    found = difflib.get_close_matches(word, names, n=1)
    return f"did you mean {found[0]!r}?" if found else f"there are: {', '.join(names)}"


def require(module: str, extra: str) -> ModuleType:
    """Import an optional module, or raise one sentence with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        root = module.split(".", maxsplit=1)[0]
        if error.name is not None and error.name.split(".", maxsplit=1)[0] != root:
            raise  # the module is there; something it needs is not
        raise MissingExtraError(f"{root} is not installed; install it with: pip install 'steelyard[{extra}]'") from None
