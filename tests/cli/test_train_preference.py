"""Preference runs through the command: options, TRL's names, report, resume, dry run, export, reward models."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from steelyard.cli import train_preference
from steelyard.config import read_config, to_json
from steelyard.errors import ConfigError
from steelyard.nets.transformer import TransformerConfig
from steelyard.objectives.preference import PREFERENCE_OBJECTIVES
from steelyard.workflows import preference
from steelyard.workflows.preference import PreferenceRun
from steelyard.workflows.reward_model import RewardModelRun

TINY = TransformerConfig(width=16, layers=1, heads=2, context=64)
FAST = (
    "--evaluation.prompts", 3, "--evaluation.pairs", 3, "--loop.log-every", 2, "--sampling.max-new-tokens", 6,
    "--experience.minibatch-prompts", 4, "--objective.learning-rate", 0.01,
)  # fmt: skip


@pytest.fixture(scope="session")
def pairs(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "pairs.jsonl"
    rows = [{"prompt": f"q{i}", "chosen": f"yes {i}", "rejected": "no" * (1 + i % 3)} for i in range(30)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def config(tmp_path_factory) -> Path:
    """A config with a model that needs no extra."""
    path = tmp_path_factory.mktemp("config") / "config.json"
    path.write_text(to_json(PreferenceRun(model=TINY)))
    return path


def rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_one_command_trains_and_reports(command, pairs, config, tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "run"
    status, said, _ = command(
        "train", "preference", "--config", config, "--data", pairs, "--out", out, "--steps", 6, "--negative", 0.5,
        "--scorer", "length:min", *FAST,
    )  # fmt: skip
    assert status == 0
    assert f"report: {out / 'report.html'}" in said
    assert "win rate" in said
    page = (out / "report.html").read_text()
    for words in ("Samples before and after", "after 6 updates", "implicit reward accuracy", "change (paired)", "<svg"):
        assert words in page
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org", "")
    found = read_config(PreferenceRun, out / "config.json")
    assert (found.negative, found.steps, found.scorer) == (0.5, 6, "length:min")
    assert [row["update_step"] for row in rows(out / "metrics.jsonl")] == [2, 4, 6]
    assert command("train", "--resume", out)[0] == 0  # done: only the report again
    status, _, err = command("train", "preference", "--config", config, "--data", pairs, "--out", out, "--steps", 6)
    assert status == 2
    assert "holds a run already" in err
    status, _, err = command("export", out, "--out", tmp_path / "model")
    assert status == 2
    assert "plain transformer of this library" in err
    status, said, _ = command("report", out)  # the report of all runs reads it too
    assert status == 0


def test_interrupted_and_resumed(command, pairs, config, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("def f(completions, **rest):\n    return [float(len(c)) for c in completions]\n")
    scorer = f"python:{tmp_path / 'mine.py'}:f"
    inner = preference.ExperienceSource.batch

    def pressed(source, step):
        if step == 2:
            signal.raise_signal(signal.SIGINT)
        return inner(source, step)

    out = tmp_path / "run"
    words = (
        "train",
        "preference",
        "--config",
        config,
        "--data",
        pairs,
        "--out",
        out,
        "--steps",
        6,
        "--source",
        "policy",
    )
    with monkeypatch.context() as patch:
        patch.setattr(preference.ExperienceSource, "batch", pressed)
        status, _, err = command(*words, f"--scorer={scorer}", *FAST)
    assert status == 130
    assert f"Go on with: steelyard train --resume {out}" in err
    status, _, err = command("train", "--resume", out)
    assert status == 2
    assert "never taken from a file: state it on the command line" in err
    status, _, err = command("train", "--resume", out, "--steps", 9)
    assert (status, "--resume takes no other options" in err) == (2, True)
    assert command("train", "--resume", out, "--scorer", scorer)[0] == 0
    assert json.loads((out / "status.json").read_text())["status"] == "done"
    status, _, err = command(
        "train", "preference", "--config", out / "config.json", "--data", pairs, "--out", tmp_path / "other"
    )
    assert (status, "never taken from a file" in err) == (2, True)


def test_trl_names_and_short_options():
    words = (
        "--objective rloo --model some/model --lora 8 --source policy --reuse 3 --negative 0.25 --scorer length:min "
        "--beta 0.02 --num-generations 6 --per-device-train-batch-size 4 --steps-per-generation 5 --max-steps 7 "
        "--gradient-accumulation-steps 2 --max-completion-length 33 --max-prompt-length 44 --learning-rate 1e-4 "
        "--temperature 0.9 --epsilon 0.1 --experience.sync-every 2"
    )
    found = train_preference.read(words.split())
    assert (found.objective.kind, found.objective.beta, found.objective.epsilon) == ("rloo", 0.02, 0.1)
    assert (found.model.name, found.model.adapter.rank, found.model.adapter.alpha) == ("some/model", 8, 16.0)
    assert found.experience == preference.ExperienceConfig(
        source="policy", minibatch_prompts=4, prompts_per_refresh=20, num_generations=6, reuse=3, sync_every=2
    )
    assert (found.steps, found.optim.shards, found.negative) == (7, 2, 0.25)
    assert (found.sampling.max_new_tokens, found.data.max_prompt_tokens, found.sampling.temperature) == (33, 44, 0.9)
    assert found.objective.learning_rate == 1e-4
    assert (
        train_preference.read(["--objective", "grpo", "--max-completion-length", "33"]).objective.max_completion_tokens
        == 33
    )


def test_objectives_that_need_fresh_samples_draw_them():
    for kind in PREFERENCE_OBJECTIVES:
        config = train_preference.default_run(kind)
        needs = config.objective.needs
        assert (config.experience.source == "policy") == (needs.on_policy or needs.sampler)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--objective dbo", "unknown preference objective 'dbo'; did you mean 'dpo'?"),
        ("--reuse two", "--reuse: expected a whole number, found 'two'"),
        ("--source web", "--source: expected dataset, policy or mixture, found 'web'"),
        ("--lora many", "--lora: expected a whole number"),
        ("--objective sft --beta 1", "has no field 'beta'"),
        ("--scorer", "--scorer needs a value"),
    ],
)
def test_wrong_options(words, sentence):
    with pytest.raises(ConfigError) as caught:
        train_preference.read(words.split())
    assert sentence in str(caught.value)


def test_help_lists_everything(command):
    status, out, _ = command("train", "preference", "--help")
    assert status == 0
    for words in ("--experience.sync-every", "--objective.beta", "--num-iterations", "experience.reuse", "--dry-run"):
        assert words in out
    status, out, _ = command("train", "--help")
    assert "preference, reward_model" in out


def test_dry_run(command, pairs, config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, _ = command("train", "preference", "--config", config, "--data", pairs, "--dry-run", 4)
    assert status == 0
    assert "nothing was written" in out
    assert "EOS" in out
    assert list(tmp_path.iterdir()) == []
    status, _, err = command("train", "preference", "--config", config, "--data", pairs, "--dry-run", "some")
    assert (status, "expected a number of rows" in err) == (2, True)


def test_a_reward_model_trains_resumes_and_scores(command, pairs, tmp_path):
    pytest.importorskip("matplotlib")
    file = tmp_path / "reward.json"
    file.write_text(to_json(RewardModelRun(model=TransformerConfig(width=16, layers=1, heads=2, context=1024))))
    out = tmp_path / "reward"
    status, said, _ = command(
        "train", "reward_model", "--config", file, "--data", pairs, "--out", out, "--steps", 20,
        "--objective.learning-rate", 0.01, "--objective.head-learning-rate", 0.01,
    )  # fmt: skip
    assert status == 0
    assert "accuracy" in said
    assert (out / "report.html").is_file()
    after = [row["score"] for row in rows(out / "eval.jsonl") if row["update_step"] == 20]
    assert after == [1.0] * 3
    assert command("train", "--resume", out)[0] == 0
    config = tmp_path / "config.json"
    config.write_text(to_json(PreferenceRun(model=TINY)))
    status, _, _ = command(
        "train", "preference", "--config", config, "--data", pairs, "--source", "policy", "--steps", 2,
        "--scorer", f"reward_model:{out}", "--evaluation.scorer", "length:min", "--out", tmp_path / "policy", *FAST,
    )  # fmt: skip
    assert status == 0
    assert all(row["proxy"] is not None for row in rows(tmp_path / "policy/eval.jsonl"))
    status, _, err = command("train", "reward_model", "--config", file, "--out", tmp_path / "none")
    assert (status, "no data" in err) == (2, True)


@pytest.mark.lm
def test_language_models_are_exported_with_a_card(command, pairs, tmp_path):
    transformers = pytest.importorskip("transformers")
    import torch

    run, tokens = tmp_path / "run", torch.arange(20)[None]
    status, _, _ = command(
        "train", "preference", "--model", "tiny", "--lora", 2, "--data", pairs, "--out", run, "--steps", 4, *FAST
    )
    assert status == 0
    assert command("export", run, "--merged", "--out", tmp_path / "merged")[0] == 0
    assert command("export", run, "--adapter", "--out", tmp_path / "adapter")[0] == 0
    network, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info.values())
    learner, _ = preference.load_policy(run)
    torch.testing.assert_close(network(tokens).logits, learner.model.network(tokens).logits, atol=1e-5, rtol=0)
    assert (tmp_path / "adapter/adapter_model.safetensors").is_file()
    assert not (tmp_path / "adapter/model.safetensors").exists()
    card = (tmp_path / "merged/README.md").read_text()
    data_hash = json.loads((run / "case.json").read_text())["data_hash"]
    for words in (
        "`tiny`",
        "`dpo`",
        data_hash,
        "| implicit reward accuracy |",
        "## Limits",
        '"beta": 0.1',
        "4 updates",
    ):
        assert words in card
    status, _, err = command("export", run, "--out", tmp_path / "merged")
    assert (status, "exists already" in err) == (2, True)
    status, _, err = command("export", run, "--out", tmp_path / "x", "--merged", "--adapter")
    assert (status, "exclude each other" in err) == (2, True)
