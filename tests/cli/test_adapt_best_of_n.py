"""`steelyard adapt best_of_n`: what is written, resuming after a kill at any byte, every kind of scorer, mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from steelyard.adapt.artefact import HeadsArtefact, load_heads, save_heads
from steelyard.adapt.backbones import WordsConfig
from steelyard.adapt.best_of_n import sample
from steelyard.adapt.compute_policy import Budget, ComputePolicy, StopRule
from steelyard.data.tokenizer import ByteChat
from steelyard.envs.samplers import SamplingConfig
from steelyard.nets.ensemble import HeadsConfig
from steelyard.nets.self_eval import SuffixConfig, build_evaluator
from steelyard.nets.tiny_lm import TinyLM
from steelyard.nets.transformer import TransformerConfig
from steelyard.objectives.hyre import EnsembleConfig
from steelyard.objectives.self_eval import SelfEvalConfig
from steelyard.rng import torch_generator
from steelyard.workflows.best_of_n import open_answerer
from steelyard.workflows.self_eval import save_self_eval

PROMPTS = [f"prompt {number}" for number in range(7)]
SHORT = ("--sampling.max-new-tokens", 10, "--batch-prompts", 3)
ALL_OF_3 = ("--stop.kind", "never", "--budget.max-samples", 3)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A small model that writes letters and ends, with a question that it was never taught to answer."""
    config = TransformerConfig(width=16, layers=1, heads=2, context=64)
    model = TinyLM(config, torch_generator(0, "toy"))
    with torch.no_grad():
        direction = torch.full((16,), 0.25)
        model.transformer.token_embedding[97:123] += direction
        model.transformer.token_embedding[ByteChat.eos] = direction
        model.transformer.final_norm.bias.copy_(6 * direction)
    reader = SuffixConfig(tokens=(63,), yes_token=89, no_token=78)
    evaluator = build_evaluator(reader, model, torch_generator(0, "e"))
    return save_self_eval(tmp_path_factory.mktemp("trained"), model, evaluator, SelfEvalConfig(reader=reader))


@pytest.fixture
def prompts(tmp_path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n\n".join(PROMPTS) + "\n")
    return path


def answers(command, prompts, model, out, *words: object) -> list[dict]:
    status, _, said = command("adapt", "best_of_n", prompts, "--model", model, "--out", out, *SHORT, *words)
    assert status == 0, said
    return [json.loads(line) for line in Path(out).read_text().splitlines()]


def test_answers_are_the_librarys_and_the_cost_is_told(command, trained, prompts, tmp_path):
    out = tmp_path / "answers.jsonl"
    words = ("adapt", "best_of_n", prompts, "--model", trained, "--out", out, *SHORT, *ALL_OF_3, "--keep-samples")
    status, shown, said = command(*words)
    assert status == 0, said
    answerer = open_answerer(str(trained))
    tokens = [answerer.tokenizer.prompt(text) for text in PROMPTS]
    backend = answerer.backend(PROMPTS, tokens, SamplingConfig(max_new_tokens=10), 0)
    traces = sample(backend, 7, ComputePolicy(stop=StopRule("never"), budget=Budget(3)))
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == PROMPTS
    for row, trace in zip(rows, traces, strict=True):
        chosen = trace.draws[trace.chosen]
        assert row["answer"] == chosen.text
        assert row["score"] == pytest.approx(chosen.score, abs=1e-5)
        assert (row["samples"], row["decoded"], row["evaluated"]) == (3, trace.decoded, 3)
        assert [draw["text"] for draw in row["draws"]] == [draw.text for draw in trace.draws]
        assert [draw["temperature"] for draw in row["draws"]] == [0.0, 0.5, 0.75]
    assert {trace.chosen for trace in traces} > {0}  # choosing did something
    assert "samples a prompt" in shown
    assert "max_samples 7" in shown
    assert f"{np.mean([trace.decoded for trace in traces]):.2f}" in shown


def test_a_kill_at_any_byte_changes_nothing(command, trained, prompts, tmp_path):
    options = ("--stop.kind", "never", "--budget.max-samples", 2)
    answers(command, prompts, trained, tmp_path / "whole.jsonl", *options)
    whole = (tmp_path / "whole.jsonl").read_bytes()
    state = (tmp_path / "whole.jsonl.state.json").read_text()
    for cut in np.linspace(0, len(whole), 7).astype(int):
        path = tmp_path / f"cut_{cut}.jsonl"
        path.write_bytes(whole[:cut])
        path.with_name(path.name + ".state.json").write_text(state)
        answers(command, prompts, trained, path, *options)
        assert path.read_bytes() == whole, cut


def test_another_limit_goes_on_and_other_settings_are_refused(command, trained, prompts, tmp_path):
    out = tmp_path / "a.jsonl"
    assert len(answers(command, prompts, trained, out, "--limit", 2)) == 2
    assert len(answers(command, prompts, trained, out)) == 7
    status, _, said = command("adapt", "best_of_n", prompts, "--model", trained, "--out", out, *SHORT, "--seed", 1)
    assert status == 2
    assert "seed was 0, now 1" in said
    prompts.write_text("another\n")
    status, _, said = command("adapt", "best_of_n", prompts, "--model", trained, "--out", out, *SHORT)
    assert status == 2
    assert "prompts was" in said


def test_thresholds_stop(command, trained, prompts, tmp_path):
    rows = answers(command, prompts, trained, tmp_path / "a.jsonl", "--stop.threshold", 0.0)
    assert {(row["samples"], row["stopped"]) for row in rows} == {(1, "threshold")}


@pytest.mark.parametrize("scorer", ["logp", "certainty", "length:min", "contains:e"])
def test_scorers_of_many_kinds_choose(command, trained, prompts, tmp_path, scorer):
    """All samples are drawn, and the one with the highest score is the answer."""
    rows = answers(command, prompts, trained, tmp_path / "a.jsonl", "--scorer", scorer, *ALL_OF_3, "--keep-samples")
    for row in rows:
        scores = [draw["score"] for draw in row["draws"]]
        assert len(scores) == 3
        assert row["answer"] == row["draws"][int(np.argmax(scores))]["text"]
        assert row["evaluated"] == 0
        if scorer == "contains:e":
            assert scores == ["e" in draw["text"] for draw in row["draws"]]
        if scorer == "length:min":
            assert scores == [-draw["tokens"] for draw in row["draws"]]
    assert len({row["answer"] for row in rows}) > 1


def test_a_profile_chooses(command, trained, prompts, tmp_path):
    """HyRe: the scores are those of the head set."""
    artefact = HeadsArtefact(EnsembleConfig(heads=HeadsConfig(num_heads=5)), WordsConfig(16), width=16)
    folder = save_heads(tmp_path / "heads", artefact)
    out = tmp_path / "a.jsonl"
    rows = answers(command, prompts, trained, out, "--scorer", f"hyre:{folder}", *ALL_OF_3, "--keep-samples")
    heads = load_heads(folder)
    for row in rows:
        texts = [draw["text"] for draw in row["draws"]]
        members = heads.members(heads.features([row["prompt"]] * 3, texts))
        np.testing.assert_allclose([draw["score"] for draw in row["draws"]], members.mean(1)[:, 0], rtol=1e-4)


def test_random_pruning_needs_no_scores(command, trained, prompts, tmp_path):
    words = ("--scorer", "logp", "--waves", 4, "--budget.max-samples", 4, "--prune.kind", "random", "--prune.at", 2)
    rows = answers(command, prompts, trained, tmp_path / "a.jsonl", *words, "--keep-samples")
    assert any(draw["pruned_at"] == 2 for row in rows for draw in row["draws"])


def test_conversations_from_jsonl(command, trained, tmp_path):
    prompts = tmp_path / "p.jsonl"
    talk = [{"role": "user", "content": "hi"}]
    prompts.write_text(json.dumps({"prompt": talk}) + "\n" + json.dumps({"prompt": talk}) + "\n")
    rows = answers(command, prompts, trained, tmp_path / "a.jsonl", "--temperatures.kind", "constant", *ALL_OF_3)
    assert [row["prompt"] for row in rows] == [talk, talk]
    assert rows[0]["answer"] != rows[1]["answer"]  # the same prompt twice is two prompts


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--model", "tiny"), "tiny: has no self-evaluation (steelyard train self_eval); name what chooses"),
        (("--model", "tiny", "--scorer", "self"), "tiny: has no self-evaluation"),
        ((), "--model is missing"),
        (("--model", "M", "--scorer", "logp", "--stop.kind", "threshold"), "stop 'threshold' needs a self-evaluation"),
        (("--model", "M", "--scorer", "logp", "--prune.kind", "quantile"), "prune 'quantile' needs a self-evaluation"),
        (("--model", "M", "--scorer", "lenght:min"), "lenght"),
        (("--model", "M", "--stop.threshold", "7"), "threshold must be between 0 and 1.01, found 7"),
        (("--model", "M", "--budget.max-tokens", "3"), "max_tokens is 3, but one sample may take 10"),
        (("--model", "M", "--sampling.max-new-tokens", "60"), "expected at most 64"),
        (("--model", "M", "--out", "a.csv"), "expected a name that ends in .jsonl"),
        (("--model", "M", "--out", "no/a.jsonl"), "there is no folder no"),
    ],
)
def test_mistakes_are_told_in_one_sentence(command, trained, prompts, tmp_path, monkeypatch, words, sentence):
    monkeypatch.chdir(tmp_path)
    words = tuple(str(trained) if word == "M" else word for word in words)
    short = () if "64" in sentence else SHORT
    out = () if "--out" in words else ("--out", "a.jsonl")
    status, _, said = command("adapt", "best_of_n", prompts, *short, *words, *out)
    assert status == 2
    assert sentence in said
    assert len(said.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("content", "sentence"),
    [(b"", "expected one prompt a line, found an empty file"), (b"\xff\n", "expected UTF-8, found byte 0xff")],
)
def test_prompts_that_cannot_be_read(command, trained, tmp_path, content, sentence):
    path = tmp_path / "p.txt"
    path.write_bytes(content)
    status, _, said = command("adapt", "best_of_n", path, "--model", trained, "--out", tmp_path / "a.jsonl")
    assert status == 2
    assert sentence in said
    status, _, said = command(
        "adapt", "best_of_n", tmp_path / "x.txt", "--model", trained, "--out", tmp_path / "a.jsonl"
    )
    assert status == 2
    assert "No such file" in said


def test_help(command):
    status, shown, _ = command("adapt", "best_of_n", "--help")
    assert status == 0
    for option in ("--scorer", "--stop.threshold", "--budget.max-samples", "--prune.at", "--waves", "--keep-samples"):
        assert option in shown
