"""Whole preference runs on tiny models: they learn, resume exactly, share work, and leave readable artefacts."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._dynamo
import torch.distributed as dist

from steelyard.envs.samplers import SamplingConfig
from steelyard.errors import CheckpointError, ConfigError, DataError
from steelyard.nets.lm import LanguageModelConfig, LoRAConfig
from steelyard.nets.transformer import TransformerConfig
from steelyard.objectives.preference import DPOConfig, KTOConfig, PPOConfig, RLOOConfig
from steelyard.train.experience import ExperienceConfig
from steelyard.train.loop import Interrupted, LoopConfig
from steelyard.train.optim import OptimConfig
from steelyard.workflows import preference
from steelyard.workflows.preference import PreferenceEvaluation, PreferenceRun, TextDataConfig
from train.test_distributed import Ranks

from .kill import differences, everything

MODEL = TransformerConfig(width=16, layers=1, heads=2, context=48)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """The chosen completion says yes, the rejected one no; 40 prompts."""
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rows = [{"prompt": f"q{i}", "chosen": f"yes {i % 7}", "rejected": f"no {i % 5}"} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def small(path: Path, **changes) -> PreferenceRun:
    """12 updates of RLOO on fresh samples: refreshes of 4 updates, checkpoints within them."""
    config = PreferenceRun(
        objective=RLOOConfig(learning_rate=1e-2),
        model=MODEL,
        data=TextDataConfig(path=str(path), held_out_fraction=0.2),
        experience=ExperienceConfig(
            source="policy", minibatch_prompts=4, prompts_per_refresh=8, num_generations=4, reuse=2
        ),
        sampling=SamplingConfig(max_new_tokens=8),
        scorer="length:min",
        evaluation=PreferenceEvaluation(prompts=4, pairs=6, every=6),
        steps=12,
        loop=LoopConfig(log_every=1, checkpoint_every=3),
    )
    return replace(config, **changes)


def rows(run: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def whole(run: Path) -> dict:
    """Everything of a finished run, with this workflow's own logs."""
    found = everything(run)
    return found | {name: rows(run, name) for name in preference.LOGS}


# ---------------------------------------------------------------------------------------------- it learns


def test_rloo_on_fresh_samples_shortens_them(data, tmp_path):
    config = small(
        data,
        experience=ExperienceConfig(source="policy", minibatch_prompts=8, num_generations=8),
        objective=RLOOConfig(learning_rate=3e-2, beta=0.0),
        evaluation=PreferenceEvaluation(prompts=8, samples=4, pairs=0),
        steps=40,
        loop=LoopConfig(log_every=20, checkpoint_every=40),
    )
    run = preference.start(config, tmp_path / "run", quiet=True)
    before, after = ([row for row in rows(run, "eval.jsonl") if row["update_step"] == step] for step in (0, 40))
    assert np.mean([row["return"] for row in before]) < -7
    assert np.mean([row["return"] for row in after]) > -3
    assert np.mean([row["score"] for row in after]) > 0.9  # win rate against the reference's samples
    assert np.mean([row["kl_to_reference"] for row in after]) > 1
    assert {row["length"] == -row["return"] for row in after} == {True}
    assert {row["completion"] for row in rows(run, "samples.jsonl") if row["update_step"] == 40} == {""}


def test_dpo_raises_held_out_accuracy(data, tmp_path):
    config = small(
        data,
        objective=DPOConfig(learning_rate=3e-3),
        experience=ExperienceConfig(minibatch_prompts=8),
        scorer=None,
        evaluation=PreferenceEvaluation(prompts=2, pairs=8, every=30),
        steps=30,
    )
    run = preference.start(config, tmp_path / "run", quiet=True)
    before, after = ([row for row in rows(run, "pairs.jsonl") if row["update_step"] == step] for step in (0, 30))
    assert len(before) == len(after) == 8
    assert {row["accuracy"] for row in before} == {0.5}  # the policy is the reference
    assert {row["chosen_ratio"] for row in before} == {0.0}
    assert np.mean([row["accuracy"] for row in after]) == 1
    # without a scorer, evaluation rows are pairs
    assert [row["return"] for row in rows(run, "eval.jsonl")] == [row["margin"] for row in rows(run, "pairs.jsonl")]
    held_out = {row["prompt"] for row in rows(run, "samples.jsonl")}
    parts = preference.Parts(config)
    assert held_out <= set(parts.held_out.texts(range(len(parts.held_out))))
    assert not set(parts.held_out.texts(range(8))) & set(parts.data.texts(range(len(parts.data))))


@pytest.mark.parametrize("objective", [DPOConfig(learning_rate=3e-3), KTOConfig(learning_rate=3e-3)])
def test_a_reference_cache_changes_nothing(objective, data, tmp_path):
    config = small(data, objective=objective, experience=ExperienceConfig(minibatch_prompts=8), scorer=None, steps=6)
    cached = replace(config, data=replace(config.data, reference_cache=str(tmp_path / "cache")))
    plain = preference.start(config, tmp_path / "plain", quiet=True)
    for name in ("first", "second"):  # written by the one, read by the other
        run = preference.start(cached, tmp_path / name, quiet=True)
        for mine, other in zip(rows(run, "metrics.jsonl"), rows(plain, "metrics.jsonl"), strict=True):
            assert mine["loss/preference"] == pytest.approx(other["loss/preference"], rel=1e-4)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_no_steps_means_epochs(data, tmp_path):
    config = small(data, steps=None, objective=DPOConfig(), experience=ExperienceConfig(minibatch_prompts=8, epochs=2))
    run = preference.start(config, tmp_path / "run", quiet=True)
    assert rows(run, "metrics.jsonl")[-1]["update_step"] == 8  # 32 training prompts


# ---------------------------------------------------------------------------------------------- resume


class Child:
    """A run in a forked process that is killed after an update."""

    def __init__(self, config: PreferenceRun, folder: Path, step: int) -> None:
        pid = os.fork()
        if pid == 0:
            try:
                inner = preference.ExperienceSource.batch

                def batch(source, now):
                    if now == step:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return inner(source, now)

                preference.ExperienceSource.batch = batch
                if (folder / "config.json").exists():
                    preference.resume(folder, quiet=True)
                else:
                    preference.start(config, folder, quiet=True)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"objective": PPOConfig(learning_rate=1e-2, value_learning_rate=1e-2)},
        {"objective": DPOConfig(learning_rate=1e-2), "sync": 2, "source": "mixture"},
    ],
    ids=["rloo", "ppo", "semi-online mixture of dpo"],
)
def test_a_killed_run_resumes_bit_for_bit(changes, data, tmp_path):
    experience = small(data).experience
    experience = replace(experience, source=changes.pop("source", "policy"), sync_every=changes.pop("sync", 1), reuse=2)
    config = small(data, experience=experience, **changes)
    preference.start(config, tmp_path / "whole", quiet=True)
    Child(config, tmp_path / "run", 2)  # before the first checkpoint
    Child(config, tmp_path / "run", 7)  # in the middle of the second buffer, one update after a checkpoint
    Child(config, tmp_path / "run", 11)
    preference.resume(tmp_path / "run", quiet=True)
    assert differences(whole(tmp_path / "whole"), whole(tmp_path / "run")) == []


def test_ctrl_c_writes_a_checkpoint(data, tmp_path, monkeypatch):
    config = small(data)
    inner = preference.ExperienceSource.batch

    def pressed(source, step):
        if step == 5:
            signal.raise_signal(signal.SIGINT)
        return inner(source, step)

    with monkeypatch.context() as patch:
        patch.setattr(preference.ExperienceSource, "batch", pressed)
        with pytest.raises(Interrupted):
            preference.start(config, tmp_path / "run", quiet=True)
    assert (tmp_path / "run/checkpoints/step_00000006").is_dir()
    preference.resume(tmp_path / "run", quiet=True)
    preference.start(config, tmp_path / "whole", quiet=True)
    assert differences(whole(tmp_path / "whole"), whole(tmp_path / "run")) == []


def test_evaluation_changes_nothing(data, tmp_path):
    runs = []
    for name, evaluation in {
        "none": PreferenceEvaluation(prompts=0, pairs=0),
        "much": PreferenceEvaluation(prompts=8, samples=3, pairs=8, every=1, scorer="length:max"),
    }.items():
        found = whole(preference.start(small(data, evaluation=evaluation), tmp_path / name, quiet=True))
        runs.append({k: v for k, v in found.items() if k.split()[0] in ("model", "optimizers", "source")})
        runs[-1]["metrics"] = found["metrics.jsonl"]
    assert differences(*runs) == []


def test_a_proxy_and_a_gold_reward_are_told_apart(data, tmp_path):
    config = small(data, evaluation=PreferenceEvaluation(prompts=4, pairs=0, scorer="length:max"))
    run = preference.start(config, tmp_path / "run", quiet=True)
    assert all(row["return"] == row["length"] == -row["proxy"] for row in rows(run, "eval.jsonl"))


# ---------------------------------------------------------------------------------------------- several processes


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch without gloo")
@pytest.mark.parametrize("kind", ["rloo", "dpo"])
def test_two_processes_make_the_run_of_one_with_two_parts(kind, data, tmp_path):
    """Bit for bit: samples, losses, weights, the buffer, evaluations; and a resume with another number of processes."""
    objective = {"rloo": RLOOConfig(learning_rate=1e-2), "dpo": DPOConfig(learning_rate=1e-2)}[kind]
    config = small(data, objective=objective)
    alone = replace(config, optim=replace(config.optim, shards=2))
    preference.start(alone, tmp_path / "one", quiet=True)
    Ranks(tmp_path / "ranks", lambda rank: preference.start(config, tmp_path / "two", quiet=True)).finish()
    assert differences(whole(tmp_path / "one"), whole(tmp_path / "two")) == []
    assert (tmp_path / "one/config.json").read_text() == (tmp_path / "two/config.json").read_text()
    Child(alone, tmp_path / "run", 7)
    Ranks(tmp_path / "again", lambda rank: preference.resume(tmp_path / "run", quiet=True)).finish()
    assert differences(whole(tmp_path / "one"), whole(tmp_path / "run")) == []


def test_parts_and_prompts_must_fit(data, tmp_path):
    with pytest.raises(ConfigError, match=r"batch_size \(4\) must be a multiple of optim.shards \(3\)"):
        preference.start(small(data, optim=OptimConfig(shards=3)), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------- what is refused


def test_sentences(data, tmp_path):
    cases = [
        (small(data, data=TextDataConfig()), "no data: give a file of prompts or preferences with --data"),
        (small(data, scorer=None), "objective 'rloo' needs rewards"),
        (small(data, scorer="python:x.py:f"), "never taken from a file: state it on the command line"),
        (small(data, model=replace(MODEL, vocab_size=300)), "needs vocab_size 259, found 300"),
        (
            small(data, data=TextDataConfig(path=str(data), max_prompt_tokens=2)),
            "expected a prompt of at most 2 tokens",
        ),
        (small(data, sampling=SamplingConfig(temperature=0)), "sampling.temperature is 0"),
    ]
    for config, sentence in cases:
        with pytest.raises((ConfigError, DataError), match=sentence):
            preference.start(config, tmp_path / "run", quiet=True)
        assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match="negative must be at least 0, found -1"):
        small(data, negative=-1.0)
    with pytest.raises(ConfigError, match="steps must be above 0"):
        small(data, steps=0)


def test_code_of_a_scorer_runs_only_when_it_was_asked_for(data, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("def f(completions, **rest):\n    return [-float(len(c)) for c in completions]\n")
    name = f"python:{tmp_path / 'mine.py'}:f"
    config = small(data, scorer=name, steps=4)
    inner = preference.ExperienceSource.batch

    def pressed(source, step):
        if step == 1:
            signal.raise_signal(signal.SIGINT)
        return inner(source, step)

    with monkeypatch.context() as patch:
        patch.setattr(preference.ExperienceSource, "batch", pressed)
        with pytest.raises(Interrupted):
            preference.start(config, tmp_path / "run", quiet=True, trusted={name})
    with pytest.raises(ConfigError, match="never taken from a file: state it on the command line"):
        preference.resume(tmp_path / "run", quiet=True)
    preference.resume(tmp_path / "run", quiet=True, trusted={name})
    assert rows(tmp_path / "run", "metrics.jsonl")[-1]["update_step"] == 4


def test_other_data_are_noticed(data, tmp_path, monkeypatch):
    own = tmp_path / "own.jsonl"
    shutil.copy(data, own)
    Child(small(own), tmp_path / "run", 5)
    own.write_text(own.read_text().replace("yes", "aye"))
    with pytest.raises(DataError, match="its content hash has changed"):
        preference.resume(tmp_path / "run", quiet=True)


# ---------------------------------------------------------------------------------------------- artefacts


def test_a_policy_is_read_back(data, tmp_path):
    config = small(data, steps=4)
    run = preference.start(config, tmp_path / "run", quiet=True)
    learner, artefact = preference.load_policy(run)
    assert artefact.objective == config.objective
    parts = preference.Parts(config)
    batch = parts.held_out.batch(np.arange(4))
    assert torch.equal(learner.model.reference_token_logps(batch), parts.learner.model.reference_token_logps(batch))
    assert not torch.equal(learner.model.outputs(batch).token_logps, learner.model.reference_token_logps(batch))
    file = next(run.glob("checkpoints/*/pretrained/config.json"))
    file.write_text(file.read_text().replace("steelyard-preference-1", "other"))
    with pytest.raises(CheckpointError):
        preference.load_policy(run)


def test_a_dry_run_writes_nothing(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said: list[str] = []
    preference.dry_run(small(data), 8, say=said.append)
    text = "\n".join(said)
    assert "batch.sampler_token_logps: [16, " in text
    assert "scored  EOS" in text or "scored " in text
    assert "loss/preference" in text
    assert "peak of this process" in text
    assert said[-1] == "nothing was written"
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError, match="at least 2 rows"):
        preference.dry_run(small(data), 1)


@pytest.mark.lm
def test_a_fully_trained_model_is_a_folder_of_transformers(data, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = small(data, model=LanguageModelConfig(name="tiny"), steps=3, evaluation=PreferenceEvaluation(2, 1, 2))
    run = preference.start(config, tmp_path / "run", quiet=True)
    folder = next(run.glob("checkpoints/*/pretrained"))
    network, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    learner, _ = preference.load_policy(run)
    tokens = torch.arange(20)[None]
    torch.testing.assert_close(network(tokens).logits, learner.model.network(tokens).logits, atol=1e-5, rtol=0)
    fresh = preference.Parts(config).learner.model.network
    assert not torch.allclose(network(tokens).logits, fresh(tokens).logits, atol=1e-3)


@pytest.mark.lm
def test_an_adapter_is_a_folder_of_peft_and_a_checkpoint_holds_no_base(data, tmp_path):
    pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    model = LanguageModelConfig(name="tiny", adapter=LoRAConfig(rank=2, alpha=4.0))
    config = small(data, model=model, steps=6, evaluation=PreferenceEvaluation(2, 1, 2))
    run = preference.start(config, tmp_path / "run", quiet=True)
    folder = next(run.glob("checkpoints/*/pretrained"))
    learner, _ = preference.load_policy(run)
    trained = sum(p.numel() for group in learner.groups.values() for p in group.parameters)
    assert (folder / "model.safetensors").stat().st_size < 4 * trained + 20_000
    assert trained < sum(p.numel() for p in learner.parameters()) / 2
    base = preference.Parts(replace(config, model=LanguageModelConfig(name="tiny"))).learner.model.network
    tokens = torch.arange(20)[None]
    expected = learner.model.network(tokens).logits
    assert not torch.allclose(base(tokens).logits, expected, atol=1e-4)
    found = peft.PeftModel.from_pretrained(base, str(folder))
    torch.testing.assert_close(found(tokens).logits, expected, atol=1e-5, rtol=0)


@pytest.mark.lm
@pytest.mark.parametrize("full", [False, True])
def test_a_language_model_resumes_bit_for_bit(full, data, tmp_path):
    """Adapters; and all weights with a value head, under the names that transformers gives them."""
    pytest.importorskip("transformers")
    model = LanguageModelConfig(name="tiny", adapter=None if full else LoRAConfig(rank=2, alpha=4.0))
    config = small(data, model=model, steps=6, evaluation=PreferenceEvaluation(2, 1, 2))
    if full:
        config = replace(config, objective=PPOConfig(learning_rate=1e-3, value_learning_rate=1e-2))
    preference.start(config, tmp_path / "whole", quiet=True)
    Child(config, tmp_path / "run", 5)
    preference.resume(tmp_path / "run", quiet=True)
    assert differences(whole(tmp_path / "whole"), whole(tmp_path / "run")) == []
