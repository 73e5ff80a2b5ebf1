"""Promises P6 and P8: never less than one valid checkpoint, damage always noticed, nothing in it can run code."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch

from steelyard import artefact
from steelyard.config import plain
from steelyard.data.store import Store
from steelyard.errors import CheckpointError, DataError
from steelyard.objectives import build_learner
from steelyard.objectives.actor_critic import DataStatistics
from steelyard.rng import torch_generator
from steelyard.train import checkpoint
from steelyard.train.optim import OptimConfig, Optimizers

from .tiny import OBJECTIVES, POINT, point_store


def content(step: int) -> dict:
    return {
        "config": {"objective": {"kind": "line"}, "note": "é ▲"},
        "model": {"weight": torch.full((3, 2), float(step)), "count": torch.tensor(step)},
        "optimizers": {"line/0/exp_avg": torch.randn(3, 2, generator=torch.Generator().manual_seed(step))},
        "source": {"buffer.rewards": torch.arange(step, dtype=torch.float64)},
        "state": {"update_step": step, "stage": "offline", "logs": {"metrics.jsonl": 7 * step}},
    }


def save(folder: Path, step: int, score: float | None = None) -> Path:
    return checkpoint.save(folder, step, score=score, **content(step))


def assert_holds(found: checkpoint.Checkpoint, step: int) -> None:
    expected = content(step)
    assert found.step == step
    assert (found.config, found.state) == (expected["config"], expected["state"])
    for part in ("model", "optimizers", "source"):
        tensors = getattr(found, part)
        assert tensors.keys() == expected[part].keys()
        for name, value in tensors.items():
            torch.testing.assert_close(value, expected[part][name], rtol=0, atol=0)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def files_of(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file())


# ---------------------------------------------------------------------------------------------- writing


def test_what_is_saved_is_loaded(tmp_path):
    path = save(tmp_path, 12, 0.5)
    assert path == tmp_path / "step_00000012"
    found = checkpoint.load(checkpoint.last(tmp_path))
    assert_holds(found, 12)
    assert found.score == 0.5
    assert [str(file.relative_to(path)) for file in files_of(path)] == [
        "manifest.json",
        "pretrained/config.json",
        "pretrained/model.safetensors",
        "training_state/optimizers.safetensors",
        "training_state/source.safetensors",
        "training_state/state.json",
    ]


def test_the_last_and_the_best_are_kept(tmp_path):
    scores = {1: None, 2: 0.3, 3: 0.9, 4: None, 5: 0.9, 6: 0.1, 7: None}
    kept = {1: [1], 2: [2], 3: [3], 4: [3, 4], 5: [5], 6: [5, 6], 7: [5, 7]}  # of equals the newest is the best
    for step, score in scores.items():
        save(tmp_path, step, score)
        assert names(tmp_path) == [f"step_{number:08d}" for number in kept[step]], step
    assert checkpoint.best(tmp_path).name == "step_00000005"
    assert checkpoint.last(tmp_path).name == "step_00000007"


def test_without_a_score_there_is_no_best(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint in it"):
        checkpoint.last(tmp_path)
    save(tmp_path, 1)
    with pytest.raises(CheckpointError, match="no checkpoint with an evaluation score in it"):
        checkpoint.best(tmp_path)


def test_a_step_can_be_saved_again(tmp_path):
    save(tmp_path, 3)
    save(tmp_path, 3, 0.5)
    assert names(tmp_path) == ["step_00000003"]
    assert checkpoint.load(checkpoint.last(tmp_path)).score == 0.5


def test_leftovers_of_a_killed_run_are_removed(tmp_path):
    save(tmp_path, 1)
    for leftover in (".staging-step_00000002", ".staging-step_00000009", ".trash-step_00000001"):
        (tmp_path / leftover / "pretrained").mkdir(parents=True)
        (tmp_path / leftover / "pretrained/model.safetensors").write_text("half")
    assert checkpoint.last(tmp_path).name == "step_00000001"
    save(tmp_path, 2)
    assert names(tmp_path) == ["step_00000002"]


class KilledError(BaseException):
    """Stands for a kill: nothing may catch it and tidy up."""


class FaultyDisk:
    """Counts the calls that change the disk, and fails at one of them, before or after it takes effect."""

    def __init__(self, patch: pytest.MonkeyPatch, error: BaseException, fail_at: int = -1, after: bool = False) -> None:
        self.calls: list[str] = []
        for owner, name in (
            (os, "replace"),
            (os, "fsync"),
            (os, "unlink"),
            (os, "rmdir"),
            (os, "mkdir"),
            (Path, "write_text"),
            (safetensors.torch, "save_file"),
        ):
            inner = getattr(owner, name)

            def outer(*args, inner=inner, name=name, **kwargs):
                if name == "mkdir" and (os.path.exists(args[0]) or not os.path.exists(os.path.dirname(args[0]))):
                    return inner(*args, **kwargs)  # pathlib only looks whether it is there
                self.calls.append(name)
                fails = len(self.calls) - 1 == fail_at
                if fails and not after:
                    raise error
                result = inner(*args, **kwargs)
                if fails:
                    raise error
                return result

            patch.setattr(owner, name, outer)


def prepared(folder: Path) -> None:
    """Two checkpoints, best and last, and a leftover: the next save cleans, writes, renames and removes."""
    save(folder, 1, 0.9)
    save(folder, 2)
    (folder / ".staging-step_00000002").mkdir()
    (folder / ".staging-step_00000002/half").write_text("half")


@pytest.mark.parametrize(
    ("error", "after"),
    [(KilledError(), False), (KilledError(), True), (OSError(28, "No space left on device"), False)],
    ids=["killed before", "killed after", "disk full"],
)
def test_a_stop_at_any_step_of_writing_leaves_a_valid_checkpoint(error, after, tmp_path, monkeypatch):
    prepared(tmp_path / "before")
    shutil.copytree(tmp_path / "before", tmp_path / "count")
    with monkeypatch.context() as patch:
        disk = FaultyDisk(patch, error)
        save(tmp_path / "count", 3)
    kinds = Counter(disk.calls)
    assert kinds["write_text"] == 3
    assert kinds["save_file"] == 3
    assert kinds["fsync"] >= 9  # six files and the directories that hold them
    assert kinds["replace"] == 2
    assert kinds["unlink"] >= 6
    found = Counter()
    for fail_at in range(len(disk.calls)):
        folder = tmp_path / str(fail_at)
        shutil.copytree(tmp_path / "before", folder)
        with monkeypatch.context() as patch:
            FaultyDisk(patch, error, fail_at, after)
            with pytest.raises(type(error)):  # a disk that fails is never passed over
                save(folder, 3)
        last = checkpoint.load(checkpoint.last(folder))
        assert_holds(last, last.step)
        found[last.step] += 1
        for path in checkpoint.steps(folder):
            checkpoint.load(path)
        assert checkpoint.load(checkpoint.best(folder)).step == 1
        save(folder, 4)
        assert names(folder) == ["step_00000001", "step_00000004"]
        shutil.rmtree(folder)
    assert found.keys() == {2, 3}  # stops before and after the rename were both tried


def test_files_reach_the_disk_before_the_rename(tmp_path, monkeypatch):
    """A power cut must not leave a complete name with incomplete files: everything is synced first."""
    events = []
    fsync, replace = os.fsync, os.replace

    def note_sync(handle):
        events.append(os.readlink(f"/proc/self/fd/{handle}"))
        fsync(handle)

    def note_rename(source, target):
        events.append("rename")
        replace(source, target)

    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc")
    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "replace", note_rename)
    final = save(tmp_path, 1)
    staging = str(tmp_path / ".staging-step_00000001")
    synced = set(events[: events.index("rename")])
    expected = {staging + str(file)[len(str(final)) :] for file in files_of(final)}
    assert expected | {staging, staging + "/pretrained", staging + "/training_state"} <= synced
    assert events[-1] == str(tmp_path)  # the rename itself


# ---------------------------------------------------------------------------------------------- reading


def test_nothing_is_pickled(tmp_path):
    path = save(tmp_path, 3)
    for file in files_of(path):
        raw = file.read_bytes()
        assert not raw.startswith((b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")), file
        if file.suffix == ".json":
            json.loads(raw)
        else:
            length = int.from_bytes(raw[:8], "little")
            header = json.loads(raw[8 : 8 + length])
            payload = sum(
                entry["data_offsets"][1] - entry["data_offsets"][0] for entry in header.values() if "dtype" in entry
            )
            assert 8 + length + payload == len(raw), f"{file} holds more than tensors"
            with safetensors.safe_open(file, "np") as tensors:
                assert set(tensors.keys()) == header.keys() - {"__metadata__"}


def test_loading_uses_no_pickle(tmp_path, monkeypatch):
    import pickle

    path = save(tmp_path, 3)

    def forbidden(*args, **kwargs):
        raise AssertionError("a pickle was opened")

    for owner, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(owner, name, forbidden)
    assert_holds(checkpoint.load(path), 3)


@pytest.mark.parametrize("name", ["pretrained/config.json", "training_state/source.safetensors", "manifest.json"])
def test_a_missing_file_is_named(name, tmp_path):
    path = save(tmp_path, 3)
    (path / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name}: missing"):
        checkpoint.load(path)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("manifest.json", '"step": 12', '"step": 13'),
        ("manifest.json", '"score": 0.5', '"score": 0.6'),
        ("manifest.json", '"score": 0.5', '"score": 5e-1'),
        ("manifest.json", ",\n", ", "),
        ("manifest.json", '"bytes"', '"bytfs"'),
        ("manifest.json", "steelyard-checkpoint-1", "steelyard-checkpoint-2"),
        ("pretrained/config.json", '"line"', '"lime"'),
        ("training_state/state.json", "84", "85"),
    ],
)
def test_a_change_that_is_valid_json_is_noticed(name, old, new, tmp_path):
    file = save(tmp_path, 12, 0.5) / name
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))
    with pytest.raises(CheckpointError, match=name):
        checkpoint.load(file.parents[0] if name == "manifest.json" else file.parents[1])


@pytest.mark.parametrize("text", ["", "[]", "null", "3", '{"format": "steelyard-checkpoint-1"}', "{", "\x00"])
def test_what_is_no_manifest_is_refused(text, tmp_path):
    path = save(tmp_path, 1)
    (path / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"manifest.json: not a manifest; altered or damaged"):
        checkpoint.load(path)


def damage(file: Path, rng: random.Random) -> str:
    """Flip one random byte, or cut the file at a random place; say what was done."""
    raw = bytearray(file.read_bytes())
    place = rng.randrange(len(raw))
    if rng.random() < 0.7:
        mask = rng.randrange(1, 256)
        raw[place] ^= mask
        what = f"byte {place} of {file} xor {mask:#x}"
    else:
        del raw[place:]
        what = f"{file} cut to {place} bytes"
    file.write_bytes(raw)
    return what


def assert_damage_is_noticed(whole: Path, read, error: type[Exception], times: int, rng: random.Random) -> Counter[str]:
    """Damage every file of a copy in turn, `times` in all; reading must raise `error`, with one sentence."""
    seen: Counter[str] = Counter()
    targets = [file.relative_to(whole) for file in files_of(whole)]
    for number in range(times):
        copy = whole.with_name("damaged")
        shutil.copytree(whole, copy)
        target = targets[number % len(targets)]
        what = damage(copy / target, rng)
        sentence = None
        try:
            read(copy)
        except error as noticed:
            sentence = str(noticed)
        assert sentence is not None, f"{what}: not noticed"
        assert "\n" not in sentence, what
        seen[str(target)] += 1
        shutil.rmtree(copy)
    read(whole)
    return seen


@pytest.fixture(scope="module")
def policy_folder(tmp_path_factory):
    """A checkpoint of a real policy, for artefact.load."""
    from steelyard.envs.gym import make, spec_of

    spec = spec_of(make(POINT), POINT)
    statistics = DataStatistics(torch.zeros(2), torch.ones(2), 0.0)
    learner = build_learner(spec, OBJECTIVES["iql"], statistics, torch_generator(0, "initial weights"))
    parts = content(5) | {
        "config": plain(artefact.ControlArtefact(OBJECTIVES["iql"], spec, POINT)),
        "model": learner.state_dict(),
        "optimizers": Optimizers(learner, OptimConfig()).state_tensors(),
    }
    return checkpoint.save(tmp_path_factory.mktemp("policy"), 5, score=0.25, **parts)


def test_60_damages_are_noticed(tmp_path, policy_folder):
    rng = random.Random(0)
    seen = assert_damage_is_noticed(save(tmp_path, 3, 0.5), checkpoint.load, CheckpointError, 30, rng)
    assert len(seen) == 6
    assert_damage_is_noticed(policy_folder, artefact.load, CheckpointError, 18, rng)
    point_store(tmp_path / "store", episodes=4)
    assert_damage_is_noticed(tmp_path / "store", Store.open, DataError, 12, rng)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_200_damages_of_each_kind_are_noticed(tmp_path, policy_folder):
    """200 each of checkpoints, policies and data sets; then all single-byte flips of a manifest to a blank."""
    rng = random.Random(1)
    point_store(tmp_path / "store", episodes=4)
    for what, whole, read, error in (
        ("checkpoint", save(tmp_path, 3, 0.5), checkpoint.load, CheckpointError),
        ("policy", policy_folder, artefact.load, CheckpointError),
        ("data set", tmp_path / "store", Store.open, DataError),
    ):
        seen = assert_damage_is_noticed(whole, read, error, 200, rng)
        print(f"\n200 damages of a {what}, 200 {error.__name__}: {dict(seen)}")
    # the hard case: a blank for another blank leaves the JSON as it was
    for file, read, error in (
        (tmp_path / "step_00000003/manifest.json", checkpoint.load, CheckpointError),
        (tmp_path / "store/store.json", Store.open, DataError),
    ):
        raw = file.read_bytes()
        blanks = [place for place, byte in enumerate(raw) if byte in b" \n"]
        for place in blanks:
            changed = bytearray(raw)
            changed[place] = ord("\t")
            file.write_bytes(changed)
            with pytest.raises(error):
                read(file.parent)
        file.write_bytes(raw)
        read(file.parent)
        print(f"{len(blanks)} blanks of {file.name} changed, {len(blanks)} {error.__name__}")


# ---------------------------------------------------------------------------------------------- into a module


def test_weights_that_do_not_fit_are_named():
    module = torch.nn.Linear(2, 3)
    good = {name: value + 1 for name, value in module.state_dict().items()}
    checkpoint.load_into(module, good, "here")
    assert torch.equal(module.weight, good["weight"])
    for bad in (
        {"weight": good["weight"]},
        good | {"extra": torch.zeros(1)},
        good | {"bias": torch.zeros(4)},
    ):
        with pytest.raises(
            CheckpointError, match=r"^here: weights do not fit the config; first mismatch: '(bias|extra)'$"
        ):
            checkpoint.load_into(module, bad, "here")
    assert torch.equal(module.weight, good["weight"])


def test_tensors_of_all_types_survive(tmp_path):
    """Views, shared storage and scalars: what a learner or a buffer may hand over."""
    base = np.arange(12, dtype=np.float32).reshape(3, 4)
    tensors = {
        "view": torch.from_numpy(base)[:, ::2],
        "same": torch.from_numpy(base),
        "scalar": torch.tensor(5),
        "empty": torch.zeros(0, 3),
        "half": torch.ones(2, dtype=torch.bfloat16),
        "flags": torch.tensor([True, False]),
        "graph": torch.nn.Parameter(torch.ones(2)),
    }
    path = checkpoint.save(tmp_path, 1, **(content(1) | {"source": tensors}))
    found = checkpoint.load(path).source
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name
