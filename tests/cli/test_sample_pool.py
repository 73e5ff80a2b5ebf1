"""`steelyard data pool`: build, import, score, describe, and sentences instead of tracebacks."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from steelyard.cli.sample_pool import answer_of_pattern
from steelyard.data.sample_pool import SamplePool
from steelyard.errors import ConfigError
from steelyard.nets.self_eval import SlotConfig, SlotEvaluator
from steelyard.nets.tiny_lm import TinyLM
from steelyard.nets.transformer import TransformerConfig
from steelyard.objectives.self_eval import SelfEvalConfig
from steelyard.rng import torch_generator
from steelyard.workflows.self_eval import save_self_eval


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "say e", "stratum": "easy"}, {"prompt": "say o", "stratum": "hard"}, {"prompt": "3"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def self_eval(tmp_path_factory):
    """A run of train self_eval, without the training."""
    model = TinyLM(TransformerConfig(width=16, layers=1, heads=2, context=64), torch_generator(0, "w"))
    with torch.no_grad():
        model.transformer.token_embedding.mul_(20)
    folder = tmp_path_factory.mktemp("runs") / "mine"
    return save_self_eval(
        folder, model, SlotEvaluator(250, 251), SelfEvalConfig(reader=SlotConfig(yes_token=250, no_token=251))
    )


def test_build_and_describe(command, tmp_path, prompts, self_eval):
    words = ("data", "pool", "build", tmp_path / "pool", "--prompts", prompts, "--scorer", "length:max:characters",
             "--model", self_eval, "--num-samples", 4, "--max-new-tokens", 6, "--checkpoints", 2, "--answer", "(.)",
             "--kind", "annealed", "--batch-prompts", 2)  # fmt: skip
    status, out, err = command(*words)
    assert status == 0, err
    assert "chosen by" in out
    pool = SamplePool.load(tmp_path / "pool")
    assert [item.stratum for item in pool] == ["easy", "hard", ""]
    assert pool.items[0].temperatures.tolist() == [0, 0.5, 0.75, 0.875]
    assert np.isfinite(pool.array("scores")).all()
    assert pool.checkpoints == (2,)
    assert command(*words)[0] == 0  # finished: nothing to do
    status, _, err = command(*words, "--seed", 3)
    assert status == 2
    assert "made_by.seed was 0, now 3" in err
    status, out, _ = command("data", "pool", "describe", tmp_path / "pool", "--strata")
    assert status == 0
    assert out.count("mean reward of what is chosen") == 3  # all, easy, hard


def test_import_and_score(command, tmp_path, self_eval):
    file = tmp_path / "samples.jsonl"
    rows = [{"prompt": p, "completions": ["ab", "c", "defg"], "rewards": [0, 1, 0]} for p in ("x", "y")]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("data", "pool", "import", "jsonl", file, tmp_path / "pool", "--tokenizer", "byte", "--samples", 2)
    status, out, err = command(*words)
    assert (status, err) == (0, "")
    assert "oracle" in out
    pool = SamplePool.load(tmp_path / "pool")
    assert pool.rewards().tolist() == [[0, 1], [0, 1]]
    status, _, err = command(*words)
    assert (status, "already exists" in err) == (2, True)
    status, _, err = command(
        "data", "pool", "score", tmp_path / "pool", tmp_path / "scored", "--model", self_eval, "--checkpoints", 1
    )
    assert status == 0, err
    scored = SamplePool.load(tmp_path / "scored")
    assert np.isfinite(scored.array("scores")).all()
    assert scored.rewards().tolist() == pool.rewards().tolist()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "usage: steelyard data pool COMMAND"),
        (("describe", "nowhere"), "holds no sample pool"),
        (("import", "game24", "nowhere", "out"), "expected samples.jsonl.gz"),
        (("import", "gsm8k", "nowhere", "out", "--samples", 2), "of jsonl only"),
        (("import", "nonsense", "nowhere", "out"), "invalid choice"),
        (("score", "pool", "out", "--model", "tiny"), "expected a run of `steelyard train self_eval`"),
        (("build", "out", "--prompts", "p.jsonl", "--scorer", "nonsense:"), "expected one of length:"),
        (
            ("build", "out", "--prompts", "p.jsonl", "--scorer", "length:min", "--answer", "("),
            "not a regular expression",
        ),
    ],
)
def test_mistakes(command, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    status, _, err = command("data", "pool", *words)
    assert status == 2
    assert said in err.replace("\n", " ")
    assert not (tmp_path / "out").exists()


def test_answers():
    assert answer_of_pattern(r"answer: (\w+)")("answer: 3, no, answer: 4") == "4"
    assert answer_of_pattern(r"\d+")("3 and 14 ") == "14"
    assert answer_of_pattern(r"\d+")("none") == ""
    assert answer_of_pattern(r"a(b)?")("a") == ""
    with pytest.raises(ConfigError, match="not a regular expression"):
        answer_of_pattern("(")
