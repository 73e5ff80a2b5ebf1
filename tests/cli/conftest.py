from __future__ import annotations

from pathlib import Path

import pytest

from steelyard.cli.main import main
from steelyard.data.store import Store
from steelyard.envs.gym import EnvConfig, make, spec_of

from .toy_point import ENV_ID, recorded

SMALL = ("--objective.network.actor-hidden", "8", "--objective.network.critic-hidden", "8")
SAMPLES = ("--objective.num-samples", "2")
OFTEN = ("--loop.log-every", "10", "--loop.checkpoint-every", "10", "--batch-size", "8")


@pytest.fixture(scope="session")
def prior(tmp_path_factory) -> Path:
    """A store of 12 short episodes."""
    path = tmp_path_factory.mktemp("prior") / "toy"
    config = EnvConfig(ENV_ID)
    Store.from_episodes((recorded(seed) for seed in range(12)), path, spec=spec_of(make(config), config))
    return path


@pytest.fixture
def command(capsys):
    """Run the command in this process: (exit status, standard output, standard error)."""

    def run(*words: object) -> tuple[int, str, str]:
        try:
            status = main([str(word) for word in words])
        except SystemExit as stop:  # tyro's, after --help or a mistake
            status = stop.code if isinstance(stop.code, int) else 2
        captured = capsys.readouterr()
        assert "Traceback" not in captured.out + captured.err
        return status, captured.out, captured.err

    return run


@pytest.fixture(scope="session")
def offline_run(prior, tmp_path_factory) -> Path:
    """A finished offline run of IQL, without an environment."""
    out = tmp_path_factory.mktemp("runs") / "iql"
    assert main(["train", "iql", "--data", str(prior), "--out", str(out), "--offline-steps", "20", *SMALL, *OFTEN]) == 0
    return out


@pytest.fixture(scope="session")
def online_run(prior, tmp_path_factory) -> Path:
    """A finished Cal-QL run with an online phase, and its report."""
    pytest.importorskip("matplotlib")
    out = tmp_path_factory.mktemp("runs") / "cal_ql"
    words = [
        "train", "cal_ql", "--data", str(prior), "--env", ENV_ID, "--env.success", "info", "--out", str(out),
        "--offline-steps", "20", "--online.env-steps", "30", "--evaluation.episodes", "3", "--evaluation.parallel", "3",
        "--evaluation.every-offline", "10", "--evaluation.every-online", "15", *SMALL, *SAMPLES, *OFTEN,
    ]  # fmt: skip
    assert main(words) == 0
    return out
