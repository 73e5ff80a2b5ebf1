"""`steelyard data pairs`: what is written, resuming after a kill at any byte, refusals, and both layouts."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest
import torch

from steelyard.data.preferences import TextData, TextRow, read_text_data, tokenize
from steelyard.data.tokenizer import ByteChat
from steelyard.envs.samplers import LanguageModelSampler, SamplingConfig
from steelyard.envs.scorers import FunctionScorer, scorer_from_name
from steelyard.errors import ConfigError, DataError
from steelyard.nets.tiny_lm import TinyLM
from steelyard.nets.transformer import TransformerConfig
from steelyard.rng import torch_generator
from steelyard.workflows.pairs import (
    PairsConfig,
    Pool,
    fill_pool,
    make_pairs,
    pair_pool,
    prompts_only,
    read_pool,
    rows_of_pairs,
    summary,
)

CONFIG = PairsConfig(num_generations=3, rule="all", sampling=SamplingConfig(max_new_tokens=6), batch_prompts=2)
LENGTH = scorer_from_name("length:max:characters")
WHO = {"model": "tiny", "prompts": "seven"}


@pytest.fixture(scope="module")
def sampler():
    model = TinyLM(
        TransformerConfig(width=16, layers=1, heads=2, context=64), torch_generator(0, "w"), reference="none"
    )
    with torch.no_grad():  # about a quarter of the tokens end: completions of all lengths, empty ones too
        end = torch.full((16,), 0.25)
        model.transformer.token_embedding[ByteChat.eos] = end
        model.transformer.final_norm.bias.copy_(4.5 * end)
    return LanguageModelSampler(model, CONFIG.sampling, ByteChat.eos, ByteChat.pad)


@pytest.fixture(scope="module")
def data():
    rows = [TextRow(f"prompt {k}" + "!" * k, columns={"number": k}) for k in range(7)]
    return tokenize(TextData("prompt", rows, "seven"), ByteChat())


def filled(path, data, sampler, config=CONFIG, scorer=LENGTH, who=WHO):
    fill_pool(path, who, data, sampler, scorer, config, quiet=True)
    return path.read_bytes()


def test_a_kill_at_any_byte_changes_nothing(tmp_path, data, sampler):
    """The pool only grows, so a kill leaves a beginning of it: go on from many such beginnings."""
    whole = filled(tmp_path / "whole.jsonl", data, sampler)
    assert whole.count(b"\n") == 21
    state = (tmp_path / "whole.jsonl.state.json").read_text()
    for cut in np.linspace(0, len(whole), 23).astype(int):
        path = tmp_path / f"cut_{cut}.jsonl"
        path.write_bytes(whole[:cut])
        (tmp_path / f"{path.name}.state.json").write_text(state)
        assert filled(path, data, sampler) == whole, cut


def test_no_batch_is_drawn_twice(tmp_path, data, sampler):
    """An interruption in the third batch costs that batch only."""
    asked = []

    def reward(prompts, completions, **columns):
        asked.append(columns["number"][0])
        if len(asked) == 3:
            raise KeyboardInterrupt
        return [float(len(text)) for text in completions]

    scorer = FunctionScorer(reward, "python:own.py:reward")
    path = tmp_path / "pool.jsonl"
    with pytest.raises(KeyboardInterrupt):
        filled(path, data, sampler, scorer=scorer)
    assert path.read_bytes().count(b"\n") == 12
    got = filled(path, data, sampler, scorer=scorer)
    assert asked == [0, 2, 4, 4, 6]
    undisturbed = FunctionScorer(lambda completions, **_: [float(len(text)) for text in completions], scorer.name)
    assert got == filled(tmp_path / "other.jsonl", data, sampler, scorer=undisturbed)


def test_more_prompts_go_on_and_fewer_read_less(tmp_path, data, sampler):
    rows = data.data.rows
    some = tokenize(TextData("prompt", rows[:5], "seven"), ByteChat())
    filled(tmp_path / "pool.jsonl", some, sampler)
    grown = filled(tmp_path / "pool.jsonl", data, sampler)
    assert grown == filled(tmp_path / "whole.jsonl", data, sampler)
    assert filled(tmp_path / "pool.jsonl", some, sampler) == grown
    assert len(read_pool(tmp_path / "pool.jsonl", 5)) == 15


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"config": PairsConfig(num_generations=4, batch_prompts=2)}, "num_generations was 3, now 4"),
        (
            {"scorer": scorer_from_name("length:min:words")},
            "scorer was 'length:max:characters', now 'length:min:words'",
        ),
        ({"who": {"model": "other", "prompts": "seven"}}, "model was 'tiny', now 'other'"),
    ],
)
def test_a_pool_of_other_settings_is_refused(tmp_path, data, sampler, changed, said):
    whole = filled(tmp_path / "pool.jsonl", data, sampler)
    with pytest.raises(DataError, match=said):
        filled(tmp_path / "pool.jsonl", data, sampler, **changed)
    assert (tmp_path / "pool.jsonl").read_bytes() == whole


def test_a_file_of_another_kind_is_never_appended_to(tmp_path, data, sampler):
    (tmp_path / "mine.jsonl").write_text('{"precious": 1}\n')
    with pytest.raises(DataError, match=r"already exists and is no file of this command"):
        filled(tmp_path / "mine.jsonl", data, sampler)
    assert (tmp_path / "mine.jsonl").read_text() == '{"precious": 1}\n'


def test_rows_hold_what_best_of_n_needs(tmp_path, data, sampler):
    filled(tmp_path / "pool.jsonl", data, sampler)
    rows = [json.loads(line) for line in (tmp_path / "pool.jsonl").read_text().splitlines()]
    assert [(row["prompt_id"], row["sample"]) for row in rows] == [(p, s) for p in range(7) for s in range(3)]
    for row in rows:
        assert row["completion"] == ByteChat().decode(row["token_ids"])
        assert row["reward"] == len(row["completion"])
        assert row["finished"] == (row["token_ids"][-1] == ByteChat.eos)
    one = sampler.sample(*data.prompts([4]), 3, seed=0, step=0, keys=torch.tensor([4]))
    np.testing.assert_allclose([row["log_prob"] for row in rows[12:15]], one.token_logps.sum(1).numpy(), atol=1e-4)


def test_pairs_are_those_of_the_rewards(tmp_path, data, sampler):
    out = tmp_path / "pairs.jsonl"
    _, pairing = make_pairs(out, WHO, data, sampler, LENGTH, CONFIG, quiet=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pairs.jsonl"]  # nothing but what was asked for
    found = read_text_data(out)
    assert found.kind == "preference"
    assert len(found) == len(pairing) > 3
    for row, margin in zip(found.rows, pairing.margins.tolist(), strict=True):
        chosen, rejected = row.completions
        assert len(chosen) - len(rejected) == margin > 0
        assert row.prompt == f"prompt {row.columns['number']}" + "!" * row.columns["number"]
    with pytest.raises(DataError, match="already exists"):
        make_pairs(out, WHO, data, sampler, LENGTH, CONFIG, quiet=True)


def made_pool(rewards, texts=None, finished=None):
    rewards = np.array(rewards, np.float64)
    count = rewards.size
    return Pool(
        np.repeat(np.arange(len(rewards)), rewards.shape[1]), ["p"] * count, texts or ["text"] * count,
        np.arange(count, dtype=np.float64) + 1, rewards.ravel(),
        np.ones(count, bool) if finished is None else np.array(finished),
    )  # fmt: skip


def test_empty_and_unfinished_completions_join_no_pair_and_are_counted():
    pool = made_pool([[1.0, 2.0, 3.0]], ["a", "b", ""], [True, False, True])
    assert pair_pool(pool, PairsConfig(rule="all")).pairs.tolist() == [[1, 0]]
    strict = pair_pool(pool, PairsConfig(rule="all", drop_unfinished=True))
    assert len(strict) == 0
    assert strict.unscorable == 0
    lines = {line.what: line.value for line in summary(pool, strict, PairsConfig(drop_unfinished=True))}
    assert lines["empty"] == 1
    assert lines["unfinished"] == 1


def test_the_summary_tells_ties_unscorable_spread_and_length_bias():
    nan = float("nan")
    config = PairsConfig(rule="all", min_gap=1.5)
    pool = made_pool([[1.0, 1.0, 4.0], [2.0, 3.0, nan], [0.0, 2.0, 4.0]])
    lines = {line.what: line.value for line in summary(pool, pair_pool(pool, config), config)}
    assert lines["prompts"] == 3
    assert lines["completions"] == 9
    assert lines["pairs"] == 2 + 0 + 3
    assert lines["ties"] == 1
    assert lines["too close"] == 1
    assert lines["unscorable"] == 1
    assert lines["reward"].value == pytest.approx(np.mean([2.0, 2.5, 2.0]))
    assert lines["reward spread"].value == pytest.approx(np.mean([np.sqrt(3), np.sqrt(0.5), 2.0]))
    assert lines["longer chosen"].value == 1.0  # lengths rise with the row, and so do the rewards
    assert lines["length gap"].value > 0


def test_noise_flips_labels_reproducibly():
    pool = made_pool(np.random.default_rng(0).normal(size=(50, 4)))
    config = PairsConfig(rule="all", noise=1.0)
    first, second = pair_pool(pool, config), pair_pool(pool, config)
    assert torch.equal(first.pairs, second.pairs)
    assert 0 < first.flipped < len(first) / 2
    assert any(line.what == "flipped" for line in summary(pool, first, config))


def test_prompts_are_taken_once_from_any_kind_but_plain_text():
    chat = [{"role": "user", "content": "hi"}]
    rows = [TextRow("a", ("x", "y"), pairs=((0, 1),)), TextRow("b", ("x",)), TextRow("a", ("z",)), TextRow(chat)]
    found = prompts_only(TextData("preference", rows, "f"))
    assert found.kind == "prompt"
    assert [row.prompt for row in found.rows] == ["a", "b", chat]
    assert all(row.completions == () for row in found.rows)
    with pytest.raises(DataError, match="f: expected rows with a prompt, found plain text"):
        prompts_only(TextData("text", [TextRow("", ("x",))], "f"))


def test_columns_of_the_data_do_not_overwrite_the_pairs():
    rows = [TextRow("p", columns={"margin": 7.0, "chosen": "no", "topic": "sky"})]
    data = tokenize(TextData("prompt", rows, "f"), ByteChat())
    pool = made_pool([[1.0, 2.0]], ["low", "high"])
    row = rows_of_pairs(pool, pair_pool(pool, CONFIG), data)[0]
    assert row.completions == ("high", "low")
    assert row.columns == {"topic": "sky"}
    assert row.margin == 1.0


def test_conversations_get_messages(tmp_path):
    chat = [{"role": "user", "content": "hi"}]
    data = tokenize(TextData("prompt", [TextRow(chat)], "f"), ByteChat())
    pool = made_pool([[1.0, 2.0]], ["low", "high"])
    pool.prompts[:] = [chat, chat]
    row = rows_of_pairs(pool, pair_pool(pool, CONFIG), data)[0]
    assert row.completions[0] == [{"role": "assistant", "content": "high"}]


@pytest.mark.parametrize(
    "options", [{"num_generations": 1}, {"min_gap": -1.0}, {"noise": -0.1}, {"batch_prompts": 0}, {"limit": 0}]
)
def test_ranges(options):
    with pytest.raises(ConfigError):
        PairsConfig(**options)


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Say {k}.", "id": k}) + "\n" for k in range(5)))
    return path


SHORT = ("--model", "tiny", "--max-new-tokens", 9, "--num-generations", 3, "--batch-prompts", 2)


@pytest.mark.lm
def test_the_command(command, prompts, tmp_path):
    pytest.importorskip("transformers")
    words = ["data", "pairs", *SHORT, "--prompts", prompts, "--scorer", "length:max:characters", "--rule", "all"]
    pool = tmp_path / "pool.jsonl"
    status, out, err = command(*words, "--out", tmp_path / "a.jsonl", "--pool", pool)
    assert (status, err.count("error")) == (0, 0)
    assert "pairs" in out
    assert "longer chosen" in out
    drawn = pool.read_bytes()
    # other pairs from the same pool: nothing is drawn again; the other layout; Parquet where it is there
    status, out, _ = command(
        *words, "--out", tmp_path / "b.jsonl.gz", "--pool", pool, "--min-gap", 1.5, "--layout", "openrlhf"
    )
    assert status == 0
    assert pool.read_bytes() == drawn
    all_pairs = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    wide = [json.loads(line) for line in gzip.decompress((tmp_path / "b.jsonl.gz").read_bytes()).splitlines()]
    assert len(wide) == sum(row["margin"] >= 1.5 for row in all_pairs)
    assert set(all_pairs[0]) == {"prompt", "chosen", "rejected", "score_chosen", "score_rejected", "margin", "id"}
    assert command(*words, "--out", tmp_path / "a.jsonl", "--pool", pool)[0] == 2


@pytest.mark.lm
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--scorer", "lenght:min", "--out", "a.jsonl"), "expected one of length:"),
        (("--scorer", "length:min", "--out", "a.csv"), "expected a name that ends in .jsonl, .jsonl.gz, .parquet"),
        (
            ("--scorer", "length:min", "--out", "a.jsonl", "--num-generations", "1"),
            "num_generations must be at least 2",
        ),
        (("--scorer", "length:min", "--out", "a.jsonl", "--max-prompt-tokens", "3"), "a prompt of at most 3 tokens"),
        (("--scorer", "contains:NOBODY SAYS THIS", "--out", "a.jsonl"), "no pair came out of 15 completions (15 ties"),
    ],
)
def test_mistakes_are_one_sentence(command, prompts, tmp_path, monkeypatch, words, said):
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    status, _, err = command("data", "pairs", *SHORT, "--prompts", prompts, "--rule", "all", *words)
    assert status == 2
    assert said in " ".join(err.split())


@pytest.fixture
def preferences(tmp_path):
    path = tmp_path / "preferences.jsonl"
    rows = [{"prompt": f"Say {k}.", "chosen": "yes" * (k % 3 + 1), "rejected": "no, no" + "o" * k} for k in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.lm
def test_models_and_rewards_that_were_trained_here(command, preferences, tmp_path):
    """A preference run samples, a reward model scores: for pairs and for advice."""
    pytest.importorskip("peft")
    small = ("--data", preferences, "--model", "tiny")
    run, judge = tmp_path / "run", tmp_path / "judge"
    assert command("train", "preference", *small, "--steps", 1, "--evaluation.pairs", 2, "--out", run,
                   "--sampling.max-new-tokens", 4)[0] == 0  # fmt: skip
    assert command("train", "reward_model", *small, "--steps", 1, "--out", judge)[0] == 0
    words = ("--model", run, "--scorer", f"reward_model:{judge}", "--max-new-tokens", 5, "--num-generations", 3)
    status, out, err = command("data", "pairs", *words, "--prompts", preferences, "--out", tmp_path / "own.jsonl")
    assert status == 0, err
    assert read_text_data(tmp_path / "own.jsonl").kind == "preference"
    status, out, err = command("advise", *words, "--data", preferences, "--out", tmp_path / "advice.json")
    assert status == 0, err
    assert "steelyard train preference" in out
    content = json.loads((tmp_path / "advice.json").read_text())
    assert {"near_peak", "chosen_atypical", "overlap", "agreement", "coverage", "edit_distance"} <= set(
        content["measures"]
    )
    assert content["settings"]["scorer"] == f"reward_model:{judge}"
    assert {"method", "reuse"} <= {advice["topic"] for advice in content["advice"]}
    assert "What was compared" in (tmp_path / "advice.md").read_text()


@pytest.mark.lm
@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "holds no pairs (it is of kind 'prompt'), so a reward is needed: --scorer"),
        (("--scorer", "length:min", "--out", "advice.txt"), "--out: expected the name of a .json file"),
        (("--scorer", "length:min", "--num-prompts", "1"), "num_prompts must be at least 2, found 1"),
    ],
)
def test_mistakes_in_asking_for_advice(command, prompts, words, said):
    pytest.importorskip("transformers")
    status, _, err = command("advise", "--model", "tiny", "--data", prompts, *words)
    assert status == 2
    assert said in " ".join(err.split())


def test_the_helps(command):
    status, out, _ = command("data", "pairs", "--help")
    assert status == 0
    assert "--num-generations" in out
    assert "pairs" in command("data", "--help")[1]
