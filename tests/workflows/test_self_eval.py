"""Self-evaluation from end to end: it learns, resumes exactly, is read back, saved, loaded, and has a command."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch

from steelyard.cli.main import main
from steelyard.data.prefixes import PrefixSource
from steelyard.data.sample_pool import PromptSamples, SamplePool
from steelyard.errors import CheckpointError, ConfigError, DataError
from steelyard.nets.lm import LanguageModelConfig, LoRAConfig, load_language_model
from steelyard.nets.self_eval import ProbeConfig, SlotConfig, SuffixConfig, build_evaluator
from steelyard.nets.tiny_lm import TinyLM
from steelyard.nets.transformer import TransformerConfig
from steelyard.objectives.self_eval import SelfEvalConfig
from steelyard.rng import numpy_generator, torch_generator
from steelyard.train.loop import Interrupted, LoopConfig
from steelyard.workflows import self_eval
from steelyard.workflows.self_eval import (
    SelfEvalTraining,
    drift,
    is_self_eval_run,
    load_self_eval,
    save_self_eval,
    score_pool,
    train_self_eval,
)

SIZE = TransformerConfig(vocab_size=12, width=16, layers=2, heads=2, context=20)
READERS = {
    "suffix": SuffixConfig(tokens=(8,), yes_token=9, no_token=10, reserved=(8, 9, 10)),
    "slot": SlotConfig(yes_token=9, no_token=10),
    "probe": ProbeConfig(hidden=(16,)),
}


def pool(prompts: int, seed: int) -> SamplePool:
    """Samples of six tokens and EOS (0); a 5 in one makes it wrong; prompt token 6: many are, token 7: all are."""
    g = numpy_generator(seed, "pool")
    items = []
    for number in range(prompts):
        kind = number % 2
        tokens = g.integers(1, 5, (8, 6))
        bad = g.random((8, 6)) < 0.08
        bad[:, 0] |= kind == 1
        tokens = np.where(bad, 5, tokens)
        items.append(
            PromptSamples(
                "", (~bad.any(1)).astype(float), np.full(8, 7), tokens=tuple((*row, 0) for row in tokens.tolist()),
                prompt_tokens=(6 + kind,), finished=np.ones(8, bool),
            )
        )  # fmt: skip
    return SamplePool(tuple(items), source="toy")


TRAIN, HELD_OUT = pool(40, 0), pool(20, 1)


def model(seed: int = 0) -> TinyLM:
    return TinyLM(SIZE, torch_generator(seed, "model"))


def training(reader: str = "suffix", **changes) -> SelfEvalTraining:
    config = SelfEvalTraining(
        objective=SelfEvalConfig(reader=READERS[reader], learning_rate=3e-3),
        steps=12, evaluate_every=6, checkpoints=(3,), loop=LoopConfig(log_every=1, checkpoint_every=4),
    )  # fmt: skip
    return replace(config, **changes)


def rows(run, name: str) -> list[dict]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def test_it_learns_and_says_how_well():
    out = train_self_eval(model(), TRAIN, HELD_OUT, training("suffix", steps=120, evaluate_every=0))
    end, middle, prompt = out.report.at("end"), out.report.at("3"), out.report.at("prompt")
    assert end.within.value > 0.9
    assert 0.55 < middle.within.value < end.within.value  # half of the faults come later
    assert prompt.within is None
    assert prompt.across.value > 0.6  # hopeless prompts are known
    assert end.ece < 0.1
    assert [row.samples for row in out.report.rows] == [20, 160, 160]
    assert out.report.drift.tokens == 20 * 2 * 7
    assert 0 <= out.report.drift.kl < 0.5
    again = drift(out.model, HELD_OUT, reserved=out.evaluator.reserved)
    assert again.kl == pytest.approx(out.report.drift.kl, rel=1e-3)
    scored = score_pool(out.model, out.evaluator, HELD_OUT, (3,))
    assert scored.checkpoints == (3,)
    right = HELD_OUT.rewards() == 1
    assert scored.array("scores")[right].mean() > scored.array("scores")[::2][~right[::2]].mean() + 0.2


@pytest.mark.parametrize("reader", list(READERS))
def test_a_stopped_run_goes_on_exactly(reader, tmp_path, monkeypatch):
    config = training(reader)
    whole = train_self_eval(model(), TRAIN, HELD_OUT, config, tmp_path / "whole")
    source = self_eval.StateSource if reader == "probe" else PrefixSource
    batch = source.batch

    def stop(self, step):
        if step == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return batch(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(source, "batch", stop)
        with pytest.raises(Interrupted):
            train_self_eval(model(), TRAIN, HELD_OUT, config, tmp_path / "stopped")
    stopped = train_self_eval(model(), TRAIN, HELD_OUT, config, tmp_path / "stopped")
    for name in ("eval.jsonl", "self_eval.jsonl"):
        assert rows(tmp_path / "whole", name) == rows(tmp_path / "stopped", name)
    assert whole.report == stopped.report
    for one, other in zip(whole.evaluator.state_dict().values(), stopped.evaluator.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(whole.model.state_dict().values(), stopped.model.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_a_finished_run_is_read_back_and_another_one_refused(tmp_path):
    config = training()
    first = train_self_eval(model(), TRAIN, HELD_OUT, config, tmp_path / "run")
    size = (tmp_path / "run/metrics.jsonl").stat().st_size
    again = train_self_eval(model(), TRAIN, HELD_OUT, config, tmp_path / "run")
    assert (tmp_path / "run/metrics.jsonl").stat().st_size == size
    assert again.report == first.report
    scores = [score_pool(one.model, one.evaluator, HELD_OUT, ()).array("scores") for one in (first, again)]
    np.testing.assert_array_equal(*scores)
    with pytest.raises(ConfigError, match="another config"):
        train_self_eval(model(), TRAIN, HELD_OUT, replace(config, steps=13), tmp_path / "run")
    with pytest.raises(DataError, match="other samples"):
        train_self_eval(model(), HELD_OUT, HELD_OUT, config, tmp_path / "run")


def test_the_artefact_is_loaded_without_the_data(tmp_path):
    out = train_self_eval(model(), TRAIN, HELD_OUT, training("slot"), tmp_path / "run")
    assert is_self_eval_run(tmp_path / "run")
    assert not is_self_eval_run(tmp_path)
    loaded = load_self_eval(tmp_path / "run")
    assert loaded.report == out.report
    expected = score_pool(out.model, out.evaluator, HELD_OUT, (3,)).array("scores")
    np.testing.assert_allclose(score_pool(loaded.model, loaded.evaluator, HELD_OUT, (3,)).array("scores"), expected)
    saved = save_self_eval(tmp_path / "saved", out.model, out.evaluator, SelfEvalConfig(reader=READERS["slot"]))
    assert is_self_eval_run(saved)
    loaded = load_self_eval(saved)
    np.testing.assert_allclose(score_pool(loaded.model, loaded.evaluator, HELD_OUT, ()).array("scores"), expected)
    bare = TinyLM(SIZE, torch_generator(3, "bare"), reference="none")
    probe = build_evaluator(READERS["probe"], bare, torch_generator(3, "probe"))
    loaded = load_self_eval(save_self_eval(tmp_path / "probe", bare, probe, SelfEvalConfig(reader=READERS["probe"])))
    assert loaded.model.reference is None
    expected = score_pool(bare, probe, HELD_OUT, ()).array("scores")
    np.testing.assert_allclose(score_pool(loaded.model, loaded.evaluator, HELD_OUT, ()).array("scores"), expected)
    file = saved / "pretrained/model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match="SHA-256"):
        load_self_eval(saved)


def test_nothing_held_out_is_nothing_known():
    out = train_self_eval(model(), TRAIN, None, training("probe"))
    assert out.report is None
    assert (float(out.evaluator.scale), float(out.evaluator.offset)) == (1.0, 0.0)


def test_evaluation_never_changes_training(tmp_path):
    often, never = (
        train_self_eval(model(), TRAIN, held, training(evaluate_every=1, steps=6, calibration="none"), tmp_path / name)
        for name, held in (("often", HELD_OUT), ("never", None))
    )
    names = [{k: v for k, v in row.items() if "time" not in k} for row in rows(tmp_path / "often", "metrics.jsonl")]
    others = [{k: v for k, v in row.items() if "time" not in k} for row in rows(tmp_path / "never", "metrics.jsonl")]
    assert names == others
    assert often.report is not None
    assert never.report is None


# ------------------------------------------------------------------------------------------ language models


def words(prompts: int, seed: int) -> SamplePool:
    """Texts in bytes: an answer with a z in it is wrong."""
    g = numpy_generator(seed, "words")
    items = []
    for number in range(prompts):
        texts = tuple("".join(g.choice(list("abcz"), 4, p=[0.3, 0.3, 0.25, 0.15])) for _ in range(6))
        rewards = np.array([float("z" not in text) for text in texts])
        items.append(PromptSamples(f"say {number}", rewards, np.full(6, 5), texts=texts))
    return SamplePool(tuple(items), source="words")


@pytest.mark.lm
@pytest.mark.parametrize("reader", [SuffixConfig(question="Better?"), SlotConfig(), ProbeConfig()])
@pytest.mark.parametrize("lora", [True, False])
def test_models_of_the_hub(reader, lora, tmp_path):
    pytest.importorskip("transformers")
    settings = LanguageModelConfig("tiny", adapter=LoRAConfig(rank=4) if lora else None)
    lm = load_language_model(settings, torch_generator(0, "initial weights"))
    before = {name: p.detach().clone() for name, p in lm.network.named_parameters()}
    config = training(objective=SelfEvalConfig(reader=reader, learning_rate=1e-3), steps=3, checkpoints=(2,))
    out = train_self_eval(lm, words(8, 0), words(4, 1), config, tmp_path / "run")
    moved = {name for name, p in lm.network.named_parameters() if not torch.equal(p, before[name])}
    if reader.kind == "probe":
        assert not moved
        assert out.report.drift is None
    else:
        assert moved
        assert all("lora" in name for name in moved) is lora
        assert out.report.drift.kl > 0
    if reader.kind != "probe" or not lora:  # a probe's model is the one of its name: "tiny", drawn again
        loaded = load_self_eval(tmp_path / "run")
        scores = [score_pool(one.model, one.evaluator, words(4, 1), (2,)).array("scores") for one in (out, loaded)]
        np.testing.assert_allclose(*scores, atol=1e-6)
    if reader.kind != "probe":
        with lm.as_reference():
            now = {name: p.detach() for name, p in lm.network.named_parameters() if "lora" not in name}
            assert all(torch.equal(value, before[name]) for name, value in now.items())


@pytest.mark.lm
def test_the_command(tmp_path, capsys):
    pytest.importorskip("transformers")
    words(8, 0).save(tmp_path / "pool")
    given = [
        "train", "self_eval", "--pool", str(tmp_path / "pool"), "--model", "tiny", "--reader", "slot", "--kl-weight",
        "2", "--steps", "2", "--checkpoints", "2", "--out", str(tmp_path / "run"),
    ]  # fmt: skip
    assert main(given) == 0
    printed = capsys.readouterr().out
    assert "AUC within" in printed
    assert "policy: KL" in printed
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["objective"]["kl_weight"] == 2.0
    assert config["objective"]["reader"]["kind"] == "slot"
    assert load_self_eval(tmp_path / "run").report is not None
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0
    for wrong, sentence in (
        (["--reader", "sufix"], "suffix"),
        (["--kl-weight", "much"], "number"),
        ([], "--pool"),
    ):
        assert main(["train", "self_eval", "--model", "tiny", *wrong]) == 2
        assert sentence in capsys.readouterr().err
    assert main(given) == 2  # the directory holds a run
    shutil.rmtree(tmp_path / "run")
    assert main([*given, "--lora", "2", "--reader", "probe"]) == 0
