import json

import numpy as np
import pytest

from steelyard.cli.data import main
from steelyard.data.formats import open_dataset, write_dataset
from steelyard.data.store import Store

from .make import example_stores, walk


@pytest.fixture
def good(tmp_path):
    path = tmp_path / "good.npz"
    write_dataset(Store.from_episodes([walk(40, i) for i in range(4)]), path, "flat")
    return path


def test_check_exit_codes(good, tmp_path, capsys):
    assert main(["check", str(good)]) == 0
    bad = walk(40, 9)
    bad.observations[3] = np.nan
    write_dataset(Store.from_episodes([bad]), tmp_path / "bad")
    assert main(["check", str(tmp_path / "bad"), "--json"]) == 1
    report = json.loads(capsys.readouterr().out.split("\n{", 1)[-1].join(["{", ""]))
    assert report["findings"][0]["code"] == "not-finite"
    good.write_bytes(good.read_bytes()[:-100])
    assert main(["check", str(good)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert "good.npz" in error
    assert main(["check", str(tmp_path / "absent")]) == 2


def test_check_with_given_bounds(good, capsys):
    assert main(["check", str(good), "--low", "-0.5", "--high", "0.5"]) == 1
    assert main(["check", str(good), "--low", "-0.5"]) == 2
    assert "--low and --high" in capsys.readouterr().err


def test_inspect(tmp_path, capsys):
    write_dataset(example_stores()["plain"], tmp_path / "s")
    assert main(["inspect", str(tmp_path / "s"), "--episode", "1"]) == 0
    text = capsys.readouterr().out
    for words in ("x, y, z", "-1 to 1", "episodes: 4 (2 terminated, 2 truncated), steps: 17", "delta", "reach the ▲",
                  example_stores()["plain"].content_hash, "made for a test"):  # fmt: skip
        assert words in text
    assert main(["inspect", str(tmp_path / "s"), "--episode", "4"]) == 2
    assert "episodes 0..3" in capsys.readouterr().err


def test_convert_round_trip(good, tmp_path, capsys):
    chain = [good, tmp_path / "a", tmp_path / "b", tmp_path / "c.hdf5", tmp_path / "d.h5", tmp_path / "e.npz"]
    for src, dst, name in zip(chain, chain[1:], ("steelyard", "minari", "robomimic", "flat", "flat"), strict=False):
        assert main(["convert", str(src), str(dst), "--to", name]) == 0
        assert open_dataset(dst).content_hash == open_dataset(good).content_hash
    assert main(["convert", str(good), str(chain[1]), "--to", "steelyard"]) == 2
    assert "already exists" in capsys.readouterr().err
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_large_sources_go_through_disk(good, monkeypatch):
    monkeypatch.setattr("steelyard.cli.data.MEMORY_LIMIT", 10)
    assert main(["check", str(good)]) == 0


def test_progress_without_a_terminal_is_plain_lines(good, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("steelyard.cli.data.PLAIN_INTERVAL", 0.0)
    assert main(["convert", str(good), str(tmp_path / "x"), "--to", "steelyard", "--from", "flat"]) == 0
    captured = capsys.readouterr()
    assert "read 4 episodes, 160 steps\n" in captured.err
    assert "\x1b" not in captured.err + captured.out


def test_mistakes_on_the_command_line(good, capsys):
    assert main([]) == 2
    assert main(["frobnicate"]) == 2
    assert main(["--help"]) == 0
    assert main(["check", "--help"]) == 0
    capsys.readouterr()
    assert main(["inspect", str(good), "--epsode", "1"]) == 2
    captured = capsys.readouterr()
    assert "--episode" in captured.err + captured.out
    assert main(["check", str(good), "--mask", "x"]) == 2
    assert "format 'flat' has no option 'mask'" in capsys.readouterr().err
    assert main(["generate", "moon_rocks", "x"]) == 2


@pytest.mark.sim
def test_generate(tmp_path):
    pytest.importorskip("gymnasium_robotics")
    assert main(["generate", "point_maze", str(tmp_path / "m"), "--steps", "400", "--size", "UMaze"]) == 0
    assert Store.open(tmp_path / "m").num_steps >= 400
