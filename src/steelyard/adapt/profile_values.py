"""Values as JSON that a profile can hold: exact numbers, a canonical form, its hash, the settings of a method."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from steelyard.adapt.base import Floats, Method


def settings_of(method: Method) -> dict[str, Any]:
    """Return a method's settings as plain values: {"name": "HyRe", "eta": 1, "loss": "bt", "loss_noise": 0, ...}."""
    found: dict[str, Any] = {"name": method.name}
    any_method: Any = method
    if dataclasses.is_dataclass(any_method):
        for part in dataclasses.fields(any_method):
            value = getattr(any_method, part.name)
            if dataclasses.is_dataclass(value) and hasattr(value, "name"):  # a loss
                found[part.name] = value.name
                found |= {
                    f"{part.name}_{own.name}": getattr(value, own.name)
                    for own in dataclasses.fields(value)
                    if own.name != "name"
                }
            elif value is not None:
                found[part.name] = value
    result: dict[str, Any] = plain(found)
    return result


def packed(values: Floats) -> dict[str, Any]:
    """Return an array exactly: its shape, and its float64 numbers, little-endian, in base64."""
    return {"shape": list(values.shape), "f8": base64.b64encode(np.ascontiguousarray(values, "<f8").tobytes()).decode()}


def unpacked(value: Any, name: str) -> Floats:
    """Return the array again; `ValueError` where it is none, or holds a number that is not finite."""
    if set(value) != {"shape", "f8"} or not all(isinstance(size, int) and size >= 0 for size in value["shape"]):
        raise ValueError(f"{name}: expected shape and f8")
    data = base64.b64decode(value["f8"], validate=True)
    if not 1 <= len(value["shape"]) <= 3 or len(data) != 8 * math.prod(value["shape"]):
        raise ValueError(f"{name}: its numbers do not fit the shape {value['shape']}")
    array = np.frombuffer(data, "<f8").astype(np.float64).reshape(value["shape"])
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: a number that is not finite")
    return array


def number(content: Mapping[str, Any], name: str, least: float = 0.0) -> float:
    """Return a finite number that is at least `least`, or raise `ValueError`."""
    value = content[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < least:
        raise ValueError(f"{name} is {value!r:.40}")
    return float(value)


def plain(value: Any) -> Any:
    """Return plain JSON values in which equal numbers are written alike: 1.0, -0.0 become 1, 0.

    Raises:
        ValueError: a number that is not finite.
        TypeError: something that is no JSON value.
    """
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError("a number that is not finite")
        return int(value) if value.is_integer() and abs(value) < 2**53 else value
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {part.name: plain(getattr(value, part.name)) for part in dataclasses.fields(value)}
    raise TypeError(f"{type(value).__name__} is no setting that a profile can hold")


def content_hash(content: Mapping[str, Any]) -> str:
    """Return "sha256:..." of the canonical JSON: sorted keys, no blanks, equal numbers written alike."""
    canonical = json.dumps(plain(content), sort_keys=True, separators=(",", ":"))
    return f"sha256:{hashlib.sha256(canonical.encode()).hexdigest()}"


def words(error: Exception) -> str:
    """Return what an error says in one line."""
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    return f"{text} is missing" if isinstance(error, KeyError) else text
