"""Building a pool: what is kept, the same pool after any kill, refusals, and its description."""

from __future__ import annotations

import os
import signal
import traceback
from dataclasses import replace

import numpy as np
import pytest
import torch

from steelyard.adapt.compute_policy import TemperatureSchedule
from steelyard.data import sample_pool_files
from steelyard.data.preferences import TextData, TextRow, tokenize
from steelyard.data.sample_pool import PromptSamples, SamplePool
from steelyard.data.tokenizer import ByteChat
from steelyard.envs.samplers import SamplingConfig
from steelyard.envs.scorers import FunctionScorer, scorer_from_name
from steelyard.errors import ConfigError, DataError
from steelyard.nets.self_eval import SlotEvaluator
from steelyard.nets.tiny_lm import TinyLM
from steelyard.nets.transformer import TransformerConfig
from steelyard.rng import torch_generator
from steelyard.workflows.sample_pool import PoolPrompt, SamplePoolConfig, build_pool, prompts_of
from steelyard.workflows.sample_pool_facts import facts, selection_rows

CHAT = ByteChat()
CONFIG = SamplePoolConfig(
    3, TemperatureSchedule("greedy_first"), SamplingConfig(max_new_tokens=6), checkpoints=(2,), batch_prompts=2, seed=5
)
LENGTH = scorer_from_name("length:max")
WHO = {"model": "tiny"}


@pytest.fixture(scope="module")
def model():
    model = TinyLM(
        TransformerConfig(width=16, layers=1, heads=2, context=64), torch_generator(0, "w"), reference="none"
    )
    with torch.no_grad():  # about a quarter of the tokens end: completions of all lengths
        end = torch.full((16,), 0.25)
        model.transformer.token_embedding[ByteChat.eos] = end
        model.transformer.final_norm.bias.copy_(4.5 * end)
    return model


PROMPTS = [
    PoolPrompt(f"p{k}", tuple(CHAT.prompt(f"p{k}")), "even" if k % 2 == 0 else "odd", {"k": k}) for k in range(7)
]


def built(path, model, prompts=PROMPTS, config=CONFIG, scorer=LENGTH, identity=WHO):
    return build_pool(
        path, prompts, model, scorer, config, identity,
        evaluator=SlotEvaluator(250, 251), answer=lambda text: text[:1], eos=CHAT.eos, decode=CHAT.decode, quiet=True,
    )  # fmt: skip


def same(left: SamplePool, right: SamplePool, but: float = 0.0) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        for name in a.__dataclass_fields__:
            one, other = getattr(a, name), getattr(b, name)
            if but and name in ("logps", "certainty", "scores", "checkpoint_scores"):
                np.testing.assert_allclose(other, one, atol=but)
            else:
                np.testing.assert_equal(other, one, name)


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "pool"
    return built(folder, model), folder


def test_everything_is_kept(whole):
    pool, folder = whole
    same(pool, SamplePool.load(folder))
    item = pool.items[3]
    assert (item.prompt, item.stratum, item.columns) == ("p3", "odd", {"k": 3})
    assert item.prompt_tokens == PROMPTS[3].tokens
    assert item.temperatures.tolist() == [0, 1, 1]
    for k in range(3):
        assert item.lengths[k] == len(item.tokens[k])
        assert item.texts[k] == CHAT.decode(item.tokens[k])
        assert item.finished[k] == (item.tokens[k][-1] == CHAT.eos)
        assert item.rewards[k] == item.lengths[k]
        assert item.answers[k] == item.texts[k][:1]
        assert np.isnan(item.checkpoint_scores[k, 0]) == (item.lengths[k] <= 2)
    assert np.isfinite(pool.array("scores")).all()
    assert (pool.array("logps") < 0).all()
    assert (pool.array("certainty") > 0).all()
    lengths = pool.array("lengths")
    assert lengths.min() == 1
    assert lengths.max() == 6


def test_the_log_probs_are_the_models(model, whole):
    """At temperature 1 whatever the sample was drawn at; a slot that is never drawn has no part in them."""
    for item in whole[0].items[:2]:
        for row, tokens in enumerate(item.tokens):
            ids = torch.tensor([[*item.prompt_tokens, *tokens]])
            with torch.no_grad():
                logits = model.transformer.features(ids)[0] @ model.transformer.token_embedding.T
            logits[:, [250, 251]] = -torch.inf
            logps = logits.log_softmax(-1)
            first = len(item.prompt_tokens) - 1
            expected = sum(logps[first + t, token].item() for t, token in enumerate(tokens))
            assert item.logps[row] == pytest.approx(expected, abs=1e-4)


def test_pieces_change_nothing(model, whole):
    same(whole[0], built(None, model, config=replace(CONFIG, batch_prompts=7)), but=1e-5)


def test_a_longer_list_goes_on(model, whole, tmp_path):
    short = built(tmp_path / "pool", model, PROMPTS[:3])
    assert len(short) == 3
    same(whole[0], built(tmp_path / "pool", model), but=1e-5)
    assert len(built(tmp_path / "pool", model, PROMPTS[:3])) == 3
    assert len(built(tmp_path / "pool", model, config=replace(CONFIG, limit=2))) == 2


def killed(path, model, place, number):
    """Build in a child that kills itself -9 the `number`-th time it is at `place`; return whether it did."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            visits = 0

            def visit():
                nonlocal visits
                visits += 1
                if visits == number:
                    os.kill(os.getpid(), signal.SIGKILL)

            def scored(prompts, completions, completion_ids, **columns):
                if place == "scoring":
                    visit()
                return [float(len(ids)) for ids in completion_ids]

            replace_file = os.replace

            def replaced(source, target):
                if place == "before the rename":
                    visit()
                replace_file(source, target)
                if place == "after the rename":
                    visit()

            sample_pool_files.os.replace = replaced
            built(path, model, scorer=FunctionScorer(scored, "python:length"))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


@pytest.mark.parametrize("place", ["scoring", "before the rename", "after the rename"])
def test_a_kill_changes_nothing(model, whole, tmp_path, place):
    kills = 0
    for number in (1, 2, 1, 3, 2):
        kills += killed(tmp_path / "pool", model, place, number)
        if (tmp_path / "pool/pool.json").exists():
            SamplePool.load(tmp_path / "pool")  # never a pool that cannot be read
    assert not killed(tmp_path / "pool", model, place, 99)
    assert kills >= 3
    same(whole[0], SamplePool.load(tmp_path / "pool"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"config": replace(CONFIG, seed=6)}, "seed was 5, now 6"),
        ({"config": replace(CONFIG, num_samples=4)}, "num_samples was 3, now 4"),
        ({"config": replace(CONFIG, checkpoints=(3,))}, r"checkpoints was \[2\], now \[3\]"),
        ({"config": replace(CONFIG, temperatures=TemperatureSchedule("constant"))}, "temperatures was"),
        ({"scorer": scorer_from_name("length:min")}, "scorer was 'length:max', now 'length:min'"),
        ({"identity": {"model": "other"}}, "model was 'tiny', now 'other'"),
        ({"prompts": [replace(PROMPTS[0], text="other"), *PROMPTS[1:]]}, "prompt 0 is 'p0' there and 'other' now"),
    ],
)
def test_other_settings_are_refused(model, whole, change, said):
    with pytest.raises(DataError, match=said):
        built(whole[1], model, **change)


def test_impossible_settings(model):
    with pytest.raises(ConfigError, match="nothing reads samples there"):
        build_pool(None, PROMPTS, model, LENGTH, CONFIG)
    with pytest.raises(ConfigError, match="the schedule of temperatures decides"):
        SamplePoolConfig(sampling=SamplingConfig(temperature=0.7))
    with pytest.raises(ConfigError, match="increasing"):
        SamplePoolConfig(checkpoints=(4, 2))
    with pytest.raises(DataError, match="expected prompts"):
        built(None, model, [])


def test_prompts_of_text_data():
    talk = [{"role": "user", "content": "hi"}]
    rows = [TextRow("one", columns={"stratum": "hard", "k": 1}), TextRow(talk, columns={"k": 2})]
    found = prompts_of(tokenize(TextData("prompt", rows, "two"), CHAT))
    assert [prompt.stratum for prompt in found] == ["hard", ""]
    assert [dict(prompt.columns) for prompt in found] == [{"k": 1}, {"k": 2}]
    assert found[1].tokens == tuple(CHAT.prompt(talk))


def test_conversations_are_kept(model):
    talk = [{"role": "user", "content": "hi"}]
    item = built(None, model, [PoolPrompt(talk, tuple(CHAT.prompt(talk)))]).items[0]
    assert (item.prompt, item.columns) == ("hi", {"messages": talk})


def test_what_cannot_be_scored_is_unknown(model):
    def some(prompts, completions, **columns):
        return [None if k % 3 == 0 else 1.0 for k in range(len(prompts))]

    pool = built(None, model, scorer=FunctionScorer(some, "python:some"))
    assert np.isnan(pool.rewards()[:, 0]).all()
    assert {fact.what: fact.value for fact in facts(pool)}["unknown"] == 7


def test_facts():
    rewards = np.array([[1, 1, 1, 1], [0, 0, 0, 0], [0, 1, 1, 0], [1, 0, 0, 0.0]])
    temperatures = np.array([0, 1, 1, 1.0])
    items = tuple(
        PromptSamples(
            str(k), row, np.array([1, 2, 3, 6]), ("a", "b", " ", "a"), temperatures=temperatures, scores=row / 2 + 0.1,
            finished=np.array([True, True, True, False]), columns={"rm": [0, 0, 0, 1]},
        )
        for k, row in enumerate(rewards)
    )  # fmt: skip
    pool = SamplePool(items)
    found = {fact.what: getattr(fact.value, "value", fact.value) for fact in facts(pool)}
    assert found == pytest.approx(
        {
            "prompts": 4, "samples": 4, "unknown": 0, "empty": 4, "unfinished": 4, "length": 3, "distinct": 0.75,
            "reward": 0.4375, "greedy": 0.5, "ties": (1 + 1 + 1 / 3 + 1 / 2) / 4, "all right": 0.25, "all wrong": 0.25,
            "AUC within": 1, "AUC across": found["AUC across"],
        }
    )  # fmt: skip
    rows = {(rule, k): value.value for rule, k, value in selection_rows(pool)}
    assert {rule for rule, _ in rows} == {"first", "score", "oracle", "rm"}
    assert {k for _, k in rows} == {1, 2, 4}
    assert rows["oracle", 4] == 0.75
    assert rows["rm", 4] == 0.25
