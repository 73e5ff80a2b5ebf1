"""`steelyard eval winrate` and `steelyard eval reward_model`, from the command line to the numbers."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch

from steelyard.cli.main import main
from steelyard.config import plain
from steelyard.data.experience import ExperienceBatch
from steelyard.envs.model_scorers import (
    ModelScorer,
    RewardModelArtefact,
    build_reward_model,
    implicit_scorer,
    load_implicit,
    load_reward_model,
    token_batch,
)
from steelyard.envs.samplers import SamplingConfig
from steelyard.errors import CheckpointError, ConfigError
from steelyard.nets.transformer import TransformerConfig
from steelyard.objectives.preference import DPOConfig
from steelyard.objectives.reward_model import RewardModelConfig
from steelyard.rng import torch_generator
from steelyard.train import checkpoint
from steelyard.workflows.preference import PreferenceArtefact, build, load_policy

TINY = TransformerConfig(width=16, layers=1, heads=2, context=64)


def noise(model, scale, seed=0):
    """Move weights away from where they begin, so that policy and reference differ."""
    g = torch_generator(seed, "noise")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=g) * scale)


def save(folder, config, learner):
    state = {"pretrained": config, "logs": {}}
    checkpoint.save(
        folder / "checkpoints", 1, config=config, model=learner.state_dict(), optimizers={}, source={}, state=state
    )
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of a reward model and a preference run, as their workflows leave them."""
    folder = tmp_path_factory.mktemp("runs")
    artefact = RewardModelArtefact(RewardModelConfig(), TINY, max_tokens=64, seed=3)
    reward, _ = build_reward_model(artefact)
    noise(reward, 0.3)
    save(folder / "reward", plain(artefact), reward)
    config = PreferenceArtefact(
        DPOConfig(beta=0.5),
        TINY,
        SamplingConfig(max_new_tokens=8),
        max_prompt_tokens=40,
        max_completion_tokens=16,
        seed=4,
    )
    learner, _ = build(config.objective, 1.0, TINY, 4, "cpu")
    noise(learner.model, 0.3)
    save(folder / "dpo", {"format": config.format, "steelyard": plain(config)}, learner)
    return folder


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def files(tmp_path):
    """Two files of completions: on five prompts the first is the longer on three, ties one, loses one."""
    texts = [("aaa", "a"), ("aaa", "a"), ("aaa", "a"), ("aa", "bb"), ("a", "aaaa")]
    rows = [[{"prompt": f"p{k}", "completion": pair[side]} for k, pair in enumerate(texts)] for side in (0, 1)]
    return lines(tmp_path / "a.jsonl", rows[0]), lines(tmp_path / "b.jsonl", rows[1])


def run(capsys, *argv):
    status = main(["eval", *map(str, argv)])
    captured = capsys.readouterr()
    return status, " ".join(captured.out.split()), captured.err


def said(capsys, *argv):
    status, _, err = run(capsys, *argv)
    assert status == 2
    assert err.count("\n") == 1, err
    return err


# ------------------------------------------------------------------------------------------------------ win rates


def test_files_against_each_other(capsys, files, tmp_path):
    out = tmp_path / "w.json"
    argv = ("winrate", files[0], "--against", files[1], "--scorer", "length:max:characters", "--out", out)
    status, text, _ = run(capsys, *argv)
    assert status == 0
    assert "0.700" in text
    found = json.loads(out.read_text())
    assert found["win_rate"]["value"] == pytest.approx(0.7)
    assert found["ties"] == pytest.approx(0.2)
    assert found["win_rate"]["n"] == found["prompts"] == 5
    assert found["mean_scores"][0]["value"] == pytest.approx(12 / 5)
    assert len(found["rows"]) == 10
    assert found["rows"][0] == {"side": files[0], "prompt": "p0", "completion": "aaa", "score": 3.0}
    mirrored = tmp_path / "m.json"
    run(capsys, "winrate", files[1], "--against", files[0], "--scorer", "length:max:characters", "--out", mirrored)
    back = json.loads(mirrored.read_text())
    for name in ("win_rate", "length_controlled_win_rate"):
        assert found[name]["value"] == pytest.approx(1 - back[name]["value"], abs=1e-6)


def test_a_file_against_itself_is_one_half(capsys, files, tmp_path):
    out = tmp_path / "w.json"
    run(capsys, "winrate", files[0], "--against", files[0], "--scorer", "contains:aa", "--out", out)
    found = json.loads(out.read_text())
    assert found["win_rate"]["value"] == 0.5
    assert found["length_controlled_win_rate"]["value"] == pytest.approx(0.5)


def test_prompts_on_one_side_only_are_counted(capsys, files, tmp_path):
    some = lines(tmp_path / "c.jsonl", [{"prompt": "p0", "completion": "x"}, {"prompt": "p9", "completion": "x"}])
    _, text, _ = run(capsys, "winrate", files[0], "--against", some, "--scorer", "length:max:words")
    assert re.search(r"one side only │ 5 ", text)


def test_columns_reach_the_users_function(capsys, tmp_path):
    rows = [{"prompt": "p", "completion": "4", "answer": "4"}, {"prompt": "q", "completion": "5", "answer": "6"}]
    other = [row | {"completion": "no"} for row in rows]
    (tmp_path / "r.py").write_text(
        "def right(completions, answer, **_): return [c == a for c, a in zip(completions, answer)]\n"
    )
    status, text, _ = run(
        capsys, "winrate", lines(tmp_path / "a.jsonl", rows), "--against", lines(tmp_path / "b.jsonl", other),
        "--scorer", f"python:{tmp_path}/r.py:right",
    )  # fmt: skip
    assert status == 0
    assert "0.750" in text


def test_tokens_of_files_need_a_tokenizer(capsys, files):
    assert "length:max:words" in said(capsys, "winrate", files[0], "--against", files[1], "--scorer", "length:max")
    argv = ("winrate", files[0], "--against", files[1], "--scorer", "length:max", "--tokenizer", "byte")
    assert "0.700" in run(capsys, *argv)[1]


def test_a_run_against_its_reference(capsys, runs, tmp_path):
    prompts = lines(tmp_path / "p.jsonl", [{"prompt": f"prompt {k}"} for k in range(6)])
    out = tmp_path / "w.json"
    argv = (
        "winrate", runs / "dpo", "--against", "reference", "--scorer", f"implicit:{runs / 'dpo'}", "--prompts", prompts,
        "--samples", 3, "--out", out, "--batch-size", 4,
    )  # fmt: skip
    assert run(capsys, *argv)[0] == 0
    found = json.loads(out.read_text())
    assert found["prompts"] == 6
    assert len(found["rows"]) == 36
    # what a policy writes is, by its own lights, better than what its reference writes (the sum of two KLs)
    assert found["mean_scores"][0]["value"] > found["mean_scores"][1]["value"]
    assert found["win_rate"]["value"] > 0.5
    again = tmp_path / "again.json"
    run(capsys, *argv[:-4], "--out", again, "--batch-size", 1)
    texts, others = ([row["completion"] for row in json.loads(f.read_text())["rows"]] for f in (out, again))
    assert texts == others
    assert texts[:18] != texts[18:]


def test_a_run_against_a_file_takes_the_files_prompts(capsys, runs, files, tmp_path):
    out = tmp_path / "w.json"
    argv = ("winrate", runs / "dpo", "--against", files[0], "--scorer", f"reward_model:{runs / 'reward'}")
    assert run(capsys, *argv, "--max-prompts", 3, "--out", out)[0] == 0
    found = json.loads(out.read_text())
    assert found["prompts"] == 3
    assert found["prompts_on_one_side"] == 2


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (("--scorer", "lenght:min"), "found 'lenght'"),
        (("--against", "nowhere.jsonl"), "nowhere.jsonl: expected a preference run or a file"),
        (("--against", "reference"), "needs a run"),
        (("--out", "/nowhere/x.json"), "no folder"),
        (("--samples", "0"), "--samples must be at least 1"),
    ],
)
def test_faults_of_win_rates_are_one_sentence(capsys, files, change, expected):
    argv = {"--against": files[1], "--scorer": "length:max:words"} | dict([change])
    assert expected in said(capsys, "winrate", files[0], *[word for pair in argv.items() for word in pair])


def test_a_nan_reward_is_one_sentence(capsys, files, tmp_path):
    (tmp_path / "r.py").write_text("def f(completions, **_): return [float('nan')] * len(completions)\n")
    err = said(capsys, "winrate", files[0], "--against", files[1], "--scorer", f"python:{tmp_path}/r.py:f")
    assert "row 0 (prompt 'p0'): expected a finite number, or None for unscorable, found nan" in err


def test_a_run_without_prompts_asks_for_them(capsys, runs):
    assert "config.json" in said(capsys, "winrate", runs / "dpo", "--against", "reference", "--scorer", "contains:x")


@pytest.mark.parametrize(("kind", "command"), [("dpo", "winrate"), ("reward", "reward_model")])
def test_the_evaluation_of_policies_that_act_points_here(capsys, runs, kind, command):
    assert f"steelyard eval {command} {runs / kind} --" in said(capsys, runs / kind)


# -------------------------------------------------------------------------------------- accuracy of reward models

ROWS = [
    {"prompt": "p", "chosen": "long answer", "rejected": "short", "subset": "hep-cpp", "id": 1},
    {"prompt": "p", "chosen": "brief", "rejected": "long answer", "subset": "hep-cpp", "id": 2},
    {"prompt": "p", "chosen": "a long answer", "rejected": "no", "subset": "other", "id": 3},
]


def test_accuracy_of_a_scorer(capsys, tmp_path):
    data, out = lines(tmp_path / "d.jsonl", ROWS), tmp_path / "o.json"
    status, text, _ = run(capsys, "reward_model", "length:max:words", "--data", data, "--out", out)
    assert status == 0
    assert "Reasoning (1/7 subsets) │ 2 │ 0.500" in text
    found = json.loads(out.read_text())
    assert found["subsets"]["hep-cpp"]["value"] == 0.5
    assert found["subsets"]["other"]["value"] == 1.0
    assert found["score"] is None
    assert [row["results"] for row in found["rows"]] == [1.0, 0.0, 1.0]


@pytest.mark.parametrize("kind", ["reward", "dpo"])
def test_accuracy_of_runs(capsys, runs, tmp_path, kind):
    """A folder means what is in it: a reward model, or the implicit reward of a preference run."""
    data, out = lines(tmp_path / "d.jsonl", ROWS), tmp_path / "o.json"
    assert run(capsys, "reward_model", runs / kind, "--data", data, data, "--out", out)[0] == 0
    found = json.loads(out.read_text())
    scorer = (load_reward_model if kind == "reward" else load_implicit)(runs / kind)
    expected = scorer.score(["p", "p"], ["long answer", "short"], [], {}).tolist()
    row = found["rows"][0]
    assert [*row["scores_chosen"], *row["scores_rejected"]] == pytest.approx(expected, abs=1e-4)
    assert len(found["rows"]) == 6


def test_chat_wraps_plain_prompts(capsys, tmp_path):
    """The scorer sees a conversation, and a completion that is a message."""
    (tmp_path / "r.py").write_text(
        "def f(prompts, completions, **_): return [p[0]['content'] == 'p' and len(c[0]['content']) for p, c in "
        "zip(prompts, completions)]\n"
    )
    data, out = lines(tmp_path / "d.jsonl", ROWS), tmp_path / "o.json"
    scorer = f"python:{tmp_path}/r.py:f"
    assert run(capsys, "reward_model", scorer, "--data", data, "--chat", "--out", out)[0] == 0
    assert json.loads(out.read_text())["rows"][0]["scores_chosen"] == [len("long answer")]
    assert "row 0" in said(capsys, "reward_model", scorer, "--data", data)


def test_faults_of_reward_models_are_one_sentence(capsys, runs, tmp_path):
    data = lines(tmp_path / "d.jsonl", ROWS)
    assert "no such file" in said(capsys, "reward_model", "contains:x", "--data", tmp_path / "none.jsonl")
    assert "neither a run" in said(capsys, "reward_model", tmp_path, "--data", data)
    assert "expected a reward model" in said(capsys, "reward_model", f"reward_model:{runs / 'dpo'}", "--data", data)


def test_damaged_runs_are_one_sentence(capsys, runs, tmp_path):
    data = lines(tmp_path / "d.jsonl", ROWS)
    for kind in ("reward", "dpo"):
        for file, content in (("config.json", "{"), ("model.safetensors", "x")):
            broken = tmp_path / f"{kind}-{file}"
            shutil.copytree(runs / kind, broken)
            next(broken.rglob(f"pretrained/{file}")).write_text(content)
            said(capsys, "reward_model", broken, "--data", data)
            said(capsys, broken)


# -------------------------------------------------------------------------------------------- models as scorers


def test_a_reward_model_is_saved_and_loaded(runs):
    scorer = load_reward_model(runs / "reward")
    artefact = RewardModelArtefact(RewardModelConfig(), TINY, max_tokens=64, seed=3)
    model, tokenizer = build_reward_model(artefact)
    noise(model, 0.3)
    prompts, texts = ["one", "two words", "one"], ["yes", "a longer answer", ""]
    rows = [(tokenizer.prompt(p), tokenizer.completion(p, t)) for p, t in zip(prompts, texts, strict=True)]
    expected = model.score(token_batch(rows, tokenizer.pad))
    torch.testing.assert_close(scorer.score(prompts, texts, [], {}), expected, atol=1e-5, rtol=1e-5)
    alone = torch.cat([scorer.score([p], [t], [], {}) for p, t in zip(prompts, texts, strict=True)])
    torch.testing.assert_close(alone, expected, atol=1e-5, rtol=1e-5)
    assert scorer.cut == 0


def test_long_texts_are_cut_and_counted(runs, capsys, tmp_path):
    scorer = load_reward_model(runs / "reward")
    prompt = "x" * 100
    found = scorer.score([prompt, prompt[-10:]], ["answer", "answer"], [], {})
    assert scorer.cut == 1
    # 64 tokens: the prompt's last 57, and 7 of the completion with its EOS
    assert torch.allclose(found[0], scorer.score_batch(token_batch([(list(b"x" * 57), [*b"answer", 257])], 258))[0])
    data = lines(tmp_path / "d.jsonl", [{"prompt": prompt, "chosen": "a", "rejected": "b"}])
    assert "2 texts were cut to 64 tokens" in run(capsys, "reward_model", runs / "reward", "--data", data)[1]


def test_the_implicit_reward_by_hand(runs):
    learner, _ = load_policy(runs / "dpo")
    prompts, texts = ["one", "another one"], ["yes", "no, thank you"]
    found = load_implicit(runs / "dpo").score(prompts, texts, [], {})
    tokens = [torch.tensor([[256, *p.encode(), *t.encode(), 257]]) for p, t in zip(prompts, texts, strict=True)]
    expected = []
    for row, prompt in zip(tokens, prompts, strict=True):
        logps = []
        for net in (learner.model.transformer, learner.model.reference):
            every = net(row[:, :-1]).log_softmax(-1).gather(2, row[:, 1:, None])[0, :, 0]
            logps.append(every[len(prompt) :].sum())
        expected.append(0.5 * (logps[0] - logps[1]))
    torch.testing.assert_close(found, torch.stack(expected).detach(), atol=1e-4, rtol=1e-4)
    assert found.abs().min() > 0.1


def test_untrained_policies_imply_no_reward():
    learner, tokenizer = build(DPOConfig(), 1.0, TINY, 4, "cpu")
    scorer = implicit_scorer("i", learner.model, tokenizer, 1.0, 64)
    assert scorer.score(["a", "b"], ["c", "d"], [], {}).tolist() == [0.0, 0.0]


def test_other_artefacts_are_refused(runs):
    with pytest.raises(CheckpointError, match="expected a reward model"):
        load_reward_model(runs / "dpo")
    with pytest.raises(CheckpointError, match="expected a preference run"):
        load_implicit(runs / "reward")
    with pytest.raises(ConfigError, match="context"):
        build_reward_model(RewardModelArtefact(RewardModelConfig(), TINY, max_tokens=65))
    with pytest.raises(ConfigError, match="vocab_size"):
        build_reward_model(RewardModelArtefact(RewardModelConfig(), TransformerConfig(vocab_size=7, context=1024)))


def test_model_scorers_keep_the_order():
    """Rows are sorted by length inside; scores come back in the order of the texts."""

    def lengths(batch: ExperienceBatch) -> torch.Tensor:
        return batch.lengths

    from steelyard.data.tokenizer import ByteChat

    scorer = ModelScorer("m", lengths, ByteChat(), 64, "cpu")
    texts = ["a" * k for k in (5, 1, 9, 3, *range(20))]
    prompts = ["p" * (1 + 7 * k % 5) for k in range(24)]
    assert scorer.score(prompts, texts, [], {}).tolist() == [len(t) + 1 for t in texts]


@pytest.mark.lm
def test_language_models_as_reward_models(tmp_path):
    """LoRA and full training save what is needed; frozen parts are drawn or loaded again."""
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    from steelyard.nets.lm import LanguageModelConfig, LoRAConfig

    for name, adapter, frozen in (("full", None, False), ("lora", LoRAConfig(rank=2), False), ("head", None, True)):
        config = LanguageModelConfig("tiny", adapter=adapter, reference="none")
        artefact = RewardModelArtefact(RewardModelConfig(frozen=frozen), config, max_tokens=64, seed=5)
        model, tokenizer = build_reward_model(artefact)
        noise(model, 0.2)
        assert (model.groups.keys() == {"head"}) == frozen
        folder = save(tmp_path / name, plain(artefact), model)
        prompts, texts = [[{"role": "user", "content": "hi"}], "two"], ["yes", "longer answer"]
        rows = [(tokenizer.prompt(p), tokenizer.completion(p, t)) for p, t in zip(prompts, texts, strict=True)]
        expected = model.score(token_batch(rows, tokenizer.pad))
        found = load_reward_model(folder).score(prompts, texts, [], {})
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        alone = load_reward_model(folder).score(prompts[:1], texts[:1], [], {})
        torch.testing.assert_close(alone, expected[:1], atol=1e-4, rtol=1e-4)


@pytest.mark.lm
@pytest.mark.parametrize("adapter", [False, True])
def test_language_models_imply_rewards(tmp_path, adapter):
    """Whatever the reference is: a frozen copy, or the model without its adapter."""
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    from steelyard.nets.lm import LanguageModelConfig, LoRAConfig

    model = LanguageModelConfig("tiny", adapter=LoRAConfig(rank=2) if adapter else None)
    config = PreferenceArtefact(DPOConfig(beta=0.5), model, SamplingConfig(max_new_tokens=4), seed=4)
    learner, tokenizer = build(config.objective, 1.0, model, 4, "cpu")
    prompts, texts = [[{"role": "user", "content": "hi"}], "two"], ["yes", "longer answer"]
    fresh = implicit_scorer("i", learner.model, tokenizer, 0.5, 64).score(prompts, texts, [], {})
    torch.testing.assert_close(fresh, torch.zeros(2), atol=1e-4, rtol=0)
    noise(learner.model, 0.2)
    rows = [(tokenizer.prompt(p), tokenizer.completion(p, t)) for p, t in zip(prompts, texts, strict=True)]
    batch = token_batch(rows, tokenizer.pad)
    with torch.no_grad():
        gap = learner.model.outputs(batch).token_logps - learner.model.reference_token_logps(batch)
    folder = save(tmp_path / "run", {"format": config.format, "steelyard": plain(config)}, learner)
    found = load_implicit(folder).score(prompts, texts, [], {})
    torch.testing.assert_close(found, 0.5 * gap.sum(1), atol=1e-4, rtol=1e-4)
    assert found.abs().min() > 0.01
