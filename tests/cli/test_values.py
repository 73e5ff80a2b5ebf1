"""Values of the right type that cannot be: one sentence that names the key, status 2, nothing left behind."""

from __future__ import annotations

import pytest

from .conftest import OFTEN, SAMPLES, SMALL
from .toy_point import ENV_ID

REFUSED = [
    (["--runtime.device", "cuda:99"], "cuda:99"),
    (["--data.format", "zzz"], "unknown format 'zzz'"),
    (["--data.observation-keys", "zzz"], "the data have no observation 'zzz'"),
    (["--env.observation-keys", "zzz"], "observation_keys must be null"),
    (["--env.action-repeat", "0"], "action_repeat must be above 0, found 0"),
    (["--initial", "nowhere"], "nowhere: neither a run nor a checkpoint"),
    (["--objective.penalty-num-critics", "5"], "penalty_num_critics must lie in 1..2"),
    (["--objective.state-fraction", "0"], "state_fraction must be above 0, found 0"),
    (["--runtime.device", "cudaa"], "cudaa"),
    (["--runtime.threads", "0"], "threads"),
    (["--batch-size", "0"], "batch_size"),
    (["--batch-size", "-3"], "batch_size"),
    (["--loop.log-every", "0"], "log_every"),
    (["--loop.checkpoint-every", "0"], "checkpoint_every"),
    (["--offline-steps", "-5"], "offline_steps"),
    (["--objective.num-samples", "0"], "num_samples"),
    (["--objective.network.num-critics", "0"], "num_critics"),
    (["--objective.network.num-min-critics", "5"], "num_min_critics"),
    (["--objective.network.actor-hidden", "0"], "actor_hidden"),
    (["--objective.critic-lr", "-1"], "critic_lr"),
    (["--objective.discount", "1.5"], "discount"),
    (["--objective.target-update-rate", "2"], "target_update_rate"),
    (["--online.utd-ratio", "0"], "utd_ratio"),
    (["--online.utd-ratio", "-1"], "utd_ratio"),
    (["--online.warmup-steps", "100"], "warmup_steps"),
    (["--evaluation.every-offline", "-1"], "every_offline"),
    (["--env.max-episode-steps", "0"], "max_episode_steps"),
    (["--env.kwargs", "speed", "3"], "speed"),
]


@pytest.mark.parametrize(
    ("words", "said"),
    REFUSED,
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_train_refuses(command, prior, tmp_path, words, said):
    status, _, err = command(
        "train", "cal_ql", "--data", prior, "--env", ENV_ID, "--env.success", "info", "--out", tmp_path / "run",
        "--offline-steps", 4, "--online.env-steps", 4, "--evaluation.episodes", 1, *SMALL, *SAMPLES, *OFTEN, *words,
    )  # fmt: skip
    assert status == 2
    assert said in err
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["train", "bc", "--data", "PRIOR", "--out", "FILE"],
        ["report", "RUN", "--out", "FILE"],
        ["eval", "RUN", "--episodes", "1", "--rows", "FILE/rows.jsonl"],
    ],
    ids=lambda words: words[0],
)
def test_places_that_cannot_be_written(command, prior, online_run, tmp_path, words):
    (tmp_path / "file").write_text("in the way")
    put = {"PRIOR": str(prior), "RUN": str(online_run)}
    status, _, err = command(*(put.get(word, word.replace("FILE", str(tmp_path / "file"))) for word in words))
    assert status == 2
    assert str(tmp_path / "file") in err


def test_a_config_file_that_is_not_text(command, tmp_path):
    (tmp_path / "run.json").write_bytes(b"\xff\xfe\x00\x80")
    status, _, err = command("train", "iql", "--config", tmp_path / "run.json")
    assert status == 2
    assert "run.json" in err
