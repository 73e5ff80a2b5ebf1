"""Checkpoints: staged write, then rename; a manifest with hashes; safetensors and JSON only; last and best kept.

    checkpoints/step_00012000/
        pretrained/config.json          what the artefact is: objective, spec, environment
        pretrained/model.safetensors    all weights and normalisers: enough to act, score and adapt
        training_state/optimizers.safetensors
        training_state/source.safetensors   replay buffer, environments: whatever is no function of the step
        training_state/state.json       update step, phase, lengths of the log files
        manifest.json                   step, score, size and SHA-256 of every file, and its own

A directory named step_* is complete: it was renamed into place after everything in it had reached the disk. There is
never less than one, once the first is written.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from steelyard.errors import CheckpointError

MANIFEST = "manifest.json"
FORMAT = "steelyard-checkpoint-1"


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint's content.

    Attributes:
        path: its directory.
        step: update step it was taken after.
        score: score of the evaluation at that step, if there was one.
        config: pretrained/config.json.
        model, optimizers, source: tensors by name.
        state: training_state/state.json.
    """

    path: Path
    step: int
    score: float | None
    config: dict[str, Any]
    model: dict[str, Tensor]
    optimizers: dict[str, Tensor]
    source: dict[str, Tensor]
    state: dict[str, Any]


def save(
    folder: Path,
    step: int,
    *,
    config: dict[str, Any],
    model: dict[str, Tensor],
    optimizers: dict[str, Tensor],
    source: dict[str, Tensor],
    state: dict[str, Any],
    score: float | None = None,
    also: Callable[[Path], None] | None = None,
) -> Path:
    """Write checkpoint `step` under `folder`, then remove all but the last and the best. Return its directory.

    `also` may write further files into pretrained/, whose path it is given, before ours.

    Errors of the file system are never swallowed: they stop the run and leave the earlier checkpoints as they are.
    """
    folder.mkdir(parents=True, exist_ok=True)
    prune(folder)
    final = folder / f"step_{step:08d}"
    staging = folder / f".staging-{final.name}"
    if also is not None:
        also(staging / "pretrained")
    write_files(
        staging,
        {
            "pretrained/config.json": config,
            "pretrained/model.safetensors": model,
            "training_state/optimizers.safetensors": optimizers,
            "training_state/source.safetensors": source,
            "training_state/state.json": state,
        },
        {"step": step, "score": score},
    )
    if final.exists():
        _remove(final)
    os.replace(staging, final)
    _sync(folder)
    prune(folder)
    return final


def prune(folder: Path) -> None:
    """Remove what a kill has left half written or half removed, and all checkpoints but the last and the best."""
    for leftover in (*folder.glob(".staging-*"), *folder.glob(".trash-*")):
        shutil.rmtree(leftover)
    keep = set(steps(folder)[-1:])
    scored = {path: read_manifest(path)["score"] for path in steps(folder)}
    best = [path for path, value in scored.items() if value is not None]
    if best:
        keep.add(max(best, key=lambda path: (scored[path], path.name)))
    for path in scored:
        if path not in keep:
            _remove(path)


def write_files(target: Path, files: dict[str, dict[str, Any]], header: dict[str, Any]) -> None:
    """Write JSON and safetensors files into the directory `target`, a manifest of all that is there, and sync them."""
    for name, content in files.items():
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".json":
            path.write_text(_text(content))
        else:
            safetensors.torch.save_file({k: v.detach().contiguous().clone() for k, v in content.items()}, path)
    entries = {}
    there = (path.relative_to(target).as_posix() for path in sorted(target.rglob("*")) if path.is_file())
    for name in dict.fromkeys([*files, *there]):
        path = target / name
        _sync(path)
        entries[name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    manifest = {"format": FORMAT, **header, "files": entries}
    manifest["manifest_sha256"] = _plain_hash(manifest)
    (target / MANIFEST).write_text(_text(manifest))
    _sync(target / MANIFEST)
    for inner in {(target / name).parent for name in entries} | {target}:
        _sync(inner)


def read_manifest(path: Path) -> dict[str, Any]:
    """Return the checked manifest of a checkpoint directory."""
    file = path / MANIFEST
    try:
        text = file.read_text()
        manifest: dict[str, Any] = json.loads(text)
        same = _text(manifest) == text  # a flipped blank leaves the JSON equal, but is damage all the same
        expected = manifest.pop("manifest_sha256")
        known = manifest["format"] == FORMAT
    except FileNotFoundError:
        raise CheckpointError(f"{file}: missing; {path} is not a checkpoint") from None
    except (ValueError, KeyError, TypeError, AttributeError):  # also undecodable bytes
        raise CheckpointError(f"{file}: not a manifest; altered or damaged") from None
    if not known:
        raise CheckpointError(f"{file}: format is {manifest['format']!r}, expected {FORMAT!r}")
    if not same or _plain_hash(manifest) != expected:
        raise CheckpointError(f"{file}: does not match its own SHA-256; altered or damaged")
    return manifest


def verify(path: Path) -> dict[str, Any]:
    """Compare every file of a checkpoint with its manifest and return the manifest.

    Raises:
        CheckpointError: a file is missing, truncated or altered.
    """
    manifest = read_manifest(path)
    for name, entry in manifest["files"].items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{file}: missing; the manifest lists it")
        if file.stat().st_size != entry["bytes"]:
            raise CheckpointError(
                f"{file}: has {file.stat().st_size} bytes, expected {entry['bytes']}; truncated or altered"
            )
        if _sha256(file) != entry["sha256"]:
            raise CheckpointError(f"{file}: does not match its SHA-256; altered or damaged")
    return manifest


def load(path: Path) -> Checkpoint:
    """Verify and read a checkpoint directory."""
    manifest = verify(path)

    def tensors(name: str) -> dict[str, Tensor]:
        return safetensors.torch.load_file(path / name)

    return Checkpoint(
        path=path,
        step=manifest["step"],
        score=manifest["score"],
        config=json.loads((path / "pretrained/config.json").read_text()),
        model=tensors("pretrained/model.safetensors"),
        optimizers=tensors("training_state/optimizers.safetensors"),
        source=tensors("training_state/source.safetensors"),
        state=json.loads((path / "training_state/state.json").read_text()),
    )


def steps(folder: Path) -> list[Path]:
    """Return the complete checkpoints under `folder`, oldest first."""
    return sorted(path for path in folder.glob("step_*") if path.is_dir())


def last(folder: Path) -> Path:
    """Return the newest checkpoint under `folder`."""
    found = steps(folder)
    if not found:
        raise CheckpointError(f"{folder}: no checkpoint in it")
    return found[-1]


def best(folder: Path) -> Path:
    """Return the checkpoint with the highest evaluation score; the newest of equals."""
    scored = [(read_manifest(path)["score"], path) for path in steps(folder)]
    scored = [(score, path) for score, path in scored if score is not None]
    if not scored:
        raise CheckpointError(f"{folder}: no checkpoint with an evaluation score in it")
    path: Path = max(scored, key=lambda item: (item[0], item[1].name))[1]
    return path


def load_into(module: torch.nn.Module, tensors: dict[str, Tensor], where: str) -> None:
    """Load weights, or raise one sentence that names what is missing, unexpected or of another shape."""
    own = module.state_dict()
    wrong = sorted(own.keys() ^ tensors.keys()) or sorted(k for k in own if own[k].shape != tensors[k].shape)
    if wrong:
        raise CheckpointError(f"{where}: weights do not fit the config; first mismatch: {wrong[0]!r}")
    module.load_state_dict(tensors)


def _text(plain: dict[str, Any]) -> str:
    return json.dumps(plain, indent=2) + "\n"  # unsorted: the order of a spec's observations has a meaning


def _remove(path: Path) -> None:
    trash = path.with_name(f".trash-{path.name}")
    os.replace(path, trash)  # a kill in the middle of rmtree must not leave half a checkpoint under a valid name
    shutil.rmtree(trash)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _plain_hash(plain: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
