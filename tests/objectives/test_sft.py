"""Supervised fine-tuning: the loss by hand, its mask, its invariances; it learns and it resumes bit for bit."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from steelyard.bench.rows import read_run
from steelyard.config import from_json, to_json
from steelyard.data.batch import TokenBatch
from steelyard.data.text import ByteTokenizer, TextSource, completion_batch
from steelyard.errors import DataError
from steelyard.nets.transformer import TransformerConfig
from steelyard.objectives.sft import SFT, SFTConfig
from steelyard.rng import torch_generator
from steelyard.train import checkpoint
from steelyard.train.loop import LoopConfig, Stage, fit, update
from steelyard.train.optim import OptimConfig, Optimizers
from steelyard.train.rundir import RunDir

TINY = TransformerConfig(vocab_size=7, width=16, layers=2, heads=2, context=10)
BYTES = TransformerConfig(width=48, layers=2, heads=4, context=32)
NAMES = ("straight", "resumed")
GENERATOR = torch_generator(0, "unused")


def make(config: TransformerConfig = TINY, spread: float = 8.0) -> SFT:
    learner = SFT(SFTConfig(transformer=config, learning_rate=3e-3), torch_generator(0, "init"))
    with torch.no_grad():
        for parameter in learner.groups["matrices"].parameters:
            parameter.mul_(spread)  # far from uniform, so that mistakes show
    return learner


def random_batch(rows: int, length: int, seed: int) -> TokenBatch:
    generator = torch_generator(seed, "batch")
    tokens = torch.randint(TINY.vocab_size, (rows, length), generator=generator)
    scored_mask = torch.randint(2, (rows, length), generator=generator).float()
    scored_mask[:, 0], scored_mask[0, 1] = 0.0, 1.0  # the first token is never a target; at least one is
    return TokenBatch(tokens, scored_mask)


class Bigram(nn.Module):
    """A model whose predictions are read from a table of probabilities: row = token now, column = next token."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.tensor([[0.5, 0.25, 0.25], [0.125, 0.125, 0.75], [0.2, 0.3, 0.5]]).log())

    def forward(self, tokens: Tensor) -> Tensor:
        return self.table[tokens]


GOLDEN = TokenBatch(
    tokens=torch.tensor([[0, 1, 2, 0], [0, 2, 2, 1]]),
    scored_mask=torch.tensor([[0.0, 1.0, 1.0, 0.0], [0.0, 0.0, 1.0, 1.0]]),
)


def test_golden_bigram() -> None:
    learner = make()
    learner.model = Bigram()  # type: ignore[assignment]
    loss, metrics = learner.loss_sft(GOLDEN, GENERATOR)
    # Scored: 1 after 0 (1/4), 2 after 1 (3/4); 2 after 2 (1/2), 1 after 2 (3/10).
    assert loss.item() == pytest.approx((1.386294 + 0.287682 + 0.693147 + 1.203973) / 4, abs=1e-6)
    assert metrics["loss/nll"].item() == loss.item()
    assert metrics["loss/bits_per_token"].item() == pytest.approx(1.287996, abs=1e-5)
    assert metrics["loss/accuracy"].item() == 0.5  # the likeliest are 0, 2; 2, 2
    assert metrics["data/scored_tokens"].item() == 4
    expected = torch.tensor([-1.386294 - 0.287682, -0.693147 - 1.203973])
    torch.testing.assert_close(learner.score(GOLDEN), expected, rtol=0, atol=1e-5)


def test_golden_transformer_with_weights_set_by_hand() -> None:
    learner = make(TransformerConfig(vocab_size=3, width=2, layers=1, heads=1, context=4))
    with torch.no_grad():  # features are (1, 0) everywhere, so the logits are the embeddings' first column
        learner.model.final_norm.weight.zero_()
        learner.model.final_norm.bias.copy_(torch.tensor([1.0, 0.0]))
        learner.model.token_embedding[:, 0] = torch.tensor([1.0, 2.0, 5.0]).log()  # p = 1/8, 1/4, 5/8
    loss, metrics = learner.loss_sft(GOLDEN, GENERATOR)
    # Scored targets 1, 2; 2, 1: two at 1/4 and two at 5/8.
    assert loss.item() == pytest.approx((1.386294 + 0.470004) / 2, abs=1e-6)
    assert metrics["loss/accuracy"].item() == 0.5


@pytest.mark.parametrize("vocab_size", [3, 259])
def test_uniform_logits_cost_log_v(vocab_size: int) -> None:
    learner = make(TransformerConfig(vocab_size=vocab_size, width=16, layers=1, heads=2, context=10))
    with torch.no_grad():
        learner.model.final_norm.weight.zero_()
        learner.model.final_norm.bias.zero_()
    batch = TokenBatch(torch.arange(10).view(1, 10) % vocab_size, torch.ones(1, 10))
    assert learner.loss_sft(batch, GENERATOR)[0].item() == pytest.approx(math.log(vocab_size), abs=1e-6)


LEARNER = make()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(2, 10), st.integers(0, 10**6))
def test_loss_is_the_mean_over_scored_tokens(rows: int, length: int, seed: int) -> None:
    batch = random_batch(rows, length, seed)
    with torch.no_grad():
        logps = LEARNER.model(batch.tokens).log_softmax(dim=-1)
        total, count = 0.0, 0
        for row in range(rows):
            for t in range(1, length):
                if batch.scored_mask[row, t] == 1:
                    total -= logps[row, t - 1, batch.tokens[row, t]].item()
                    count += 1
        loss, metrics = LEARNER.loss_sft(batch, GENERATOR)
    assert loss.item() == pytest.approx(total / count, rel=1e-5)
    assert metrics["data/scored_tokens"].item() == count
    assert -LEARNER.score(batch).sum().item() == pytest.approx(total, rel=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(2, 7), st.integers(0, 3), st.integers(0, 10**6))
def test_padding_and_batch_order_change_nothing(rows: int, length: int, padding: int, seed: int) -> None:
    batch = random_batch(rows, length, seed)
    generator = torch_generator(seed, "padding")
    pad = torch.randint(TINY.vocab_size, (rows, padding), generator=generator)
    order = torch.randperm(rows, generator=generator)
    padded = TokenBatch(
        torch.cat([batch.tokens, pad], dim=1)[order],
        torch.cat([batch.scored_mask, torch.zeros(rows, padding)], dim=1)[order],
    )
    with torch.no_grad():
        plain, changed = LEARNER.loss_sft(batch, GENERATOR)[0], LEARNER.loss_sft(padded, GENERATOR)[0]
    torch.testing.assert_close(plain, changed, rtol=1e-5, atol=1e-6)
    one_by_one = torch.cat(
        [LEARNER.score(TokenBatch(t[None], m[None])) for t, m in zip(*padded.tensors().values(), strict=True)]
    )
    together = LEARNER.score(batch)
    torch.testing.assert_close(together[order], one_by_one, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pieces", [[6], [3, 3], [1, 2, 3], [1] * 6])
def test_gradients_do_not_depend_on_micro_batches(pieces: list[int]) -> None:
    batch = random_batch(6, 10, seed=5)
    batch.scored_mask[:, 1] = 1.0  # every row has a target
    parameters = list(LEARNER.parameters())
    whole = torch.autograd.grad(LEARNER.loss_sft(batch, GENERATOR)[0], parameters)
    total = batch.scored_mask.sum()
    summed = [torch.zeros_like(p) for p in parameters]
    for tokens, mask in zip(torch.split(batch.tokens, pieces), torch.split(batch.scored_mask, pieces), strict=True):
        loss, metrics = LEARNER.loss_sft(TokenBatch(tokens, mask), GENERATOR)
        for value, part in zip(summed, torch.autograd.grad(loss, parameters), strict=True):
            value += part * metrics["data/scored_tokens"] / total
    for a, b in zip(whole, summed, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_batch_without_targets_is_not_a_silent_zero() -> None:
    batch = TokenBatch(torch.zeros(2, 5, dtype=torch.int64), torch.zeros(2, 5))
    assert torch.isnan(LEARNER.loss_sft(batch, GENERATOR)[0])
    with pytest.raises(DataError, match="expected at least one scored token"):
        LEARNER.evaluate([batch])


def test_groups_hold_every_parameter_once() -> None:
    learner = make()
    grouped = [id(p) for group in learner.groups.values() for p in group.parameters]
    assert sorted(grouped) == sorted(id(p) for p in learner.parameters())
    assert [learner.groups[name].weight_decay for name in ("matrices", "vectors")] == [0.01, 0.0]
    assert {name for phase in learner.plan for name in phase.groups} == set(learner.groups)
    assert learner.loss("sft") == learner.loss_sft


def test_config_round_trips() -> None:
    config = SFTConfig(transformer=TINY, learning_rate=1e-4)
    assert from_json(SFTConfig, to_json(config)) == config


def test_evaluation_weighs_tokens_equally_and_counts_bytes() -> None:
    learner = make(BYTES)
    batches = [
        completion_batch([("1+1=", "2"), ("10+10=", "20")], ByteTokenizer()),
        completion_batch([("", "a longer row of targets")], ByteTokenizer()),
    ]
    metrics = learner.evaluate(batches)
    nll_sum = -sum(learner.score(batch).sum().item() for batch in batches)
    scored, num_bytes = 2 + 3 + 24, 1 + 2 + 23  # each completion and its EOS; the bytes alone
    assert metrics["eval/nll"] == pytest.approx(nll_sum / scored, rel=1e-5)
    assert metrics["eval/perplexity"] == pytest.approx(math.exp(nll_sum / scored), rel=1e-4)
    assert metrics["eval/bits_per_byte"] == pytest.approx(nll_sum / math.log(2) / num_bytes, rel=1e-5)
    assert "eval/bits_per_byte" not in make().evaluate([random_batch(2, 5, 0)])


def test_evaluation_rows_speak_of_episodes() -> None:
    learner = make()
    learner.model = Bigram()  # type: ignore[assignment]
    mask = torch.cat([GOLDEN.scored_mask, torch.zeros(2, 4)])  # two texts with nothing to score
    with_blank = TokenBatch(GOLDEN.tokens.repeat(2, 1), mask)
    rows = learner.evaluation_rows([with_blank])
    assert [row["episode"] for row in rows] == [0, 1]
    assert [row["length"] for row in rows] == [2, 2]
    assert rows[0]["return"] == pytest.approx(-1.673976, abs=1e-5)
    assert rows[0]["score"] == pytest.approx(1 - 1.673976 / (2 * math.log(7)), abs=1e-5)


def write_text(directory: Path) -> Path:
    path = directory / "text.txt"
    path.write_text("a small weight balances a heavy load. " * 200)
    return path


def test_learns_repetitive_text_and_continues_it(tmp_path: Path) -> None:
    source = TextSource(write_text(tmp_path), context=32, batch_size=16, seed=0)
    learner = make(BYTES, spread=1.0)
    optimizers = Optimizers(learner, OptimConfig())
    before = learner.evaluate(source.validation_batches())
    for step in range(200):
        update(learner, optimizers, source.batch(step), seed=0, step=step)
    after = learner.evaluate(source.validation_batches())
    assert before["eval/bits_per_byte"] == pytest.approx(math.log2(259), abs=0.3)
    assert after["eval/bits_per_byte"] < 0.5
    assert after["eval/accuracy"] > 0.9
    tokenizer = ByteTokenizer()
    prompt = torch.tensor([tokenizer.encode("a small wei", bos=True)])
    assert tokenizer.decode(learner.sample(prompt, 18, torch_generator(0, "eval"), 0.0)[0]) == "ght balances a hea"


def test_learns_completions_of_prompts() -> None:
    tokenizer = ByteTokenizer()
    batch = completion_batch([("capital of France: ", "Paris"), ("capital of Peru: ", "Lima")], tokenizer)
    learner = make(BYTES, spread=1.0)
    optimizers = Optimizers(learner, OptimConfig())
    for _ in range(60):
        optimizers.step(learner.plan[0], learner.loss_sft(batch, GENERATOR)[0])
    for prompt, completion in [("capital of France: ", "Paris"), ("capital of Peru: ", "Lima")]:
        tokens = torch.tensor([tokenizer.encode(prompt, bos=True)])
        sampled = learner.sample(tokens, 8, torch_generator(0, "eval"), 0.0, stop_token=tokenizer.eos)
        assert tokenizer.decode(sampled[0]) == completion


def run_fit(directory: Path, path: Path, first: int, stop: int, looks: list[float]) -> None:
    """Train updates first..stop - 1 in `directory`, going on from its last checkpoint if there is one."""
    source = TextSource(path, context=32, batch_size=4, seed=3)
    run = RunDir(directory)
    # Other weights at a resume: all of them must come from the checkpoint.
    learner = SFT(SFTConfig(transformer=BYTES), torch_generator(0, "init", first))
    optimizers = Optimizers(learner, OptimConfig(max_grad_norm=1.0))
    if first == 0:
        run.create()
    else:
        saved = checkpoint.load(checkpoint.last(run.checkpoints))
        assert saved.step == first
        checkpoint.load_into(learner, saved.model, str(saved.path))
        optimizers.load_state_tensors(saved.optimizers)
        source.load_state_tensors(saved.source)

    def evaluate(step: int) -> float:
        looks.append(learner.evaluate(source.validation_batches(max_batches=1))["eval/bits_per_byte"])
        rows = learner.evaluation_rows(source.validation_batches(max_batches=1))
        known = {"phase": "offline", "update_step": step, "env_step": 0, "episode_seed": 0}
        run.append("eval.jsonl", [known | row for row in rows])
        learner.sample(torch.tensor([[ByteTokenizer.bos]]), 4, torch_generator(0, "eval", step))
        return -looks[-1]

    stage = Stage("offline", first=0, stop=stop, evaluate_every=1 if directory.name == "resumed" else 0)
    config = LoopConfig(log_every=1, checkpoint_every=100)
    artefact = {"objective": json.loads(to_json(learner.config))}
    fit(
        learner, source, optimizers, stage, config, run,
        seed=3, start=first, artefact=artefact, evaluate=evaluate, quiet=True,
    )  # fmt: skip


@pytest.mark.parametrize("stop_at", [1, 4])
def test_the_house_loop_resumes_bit_for_bit_and_evaluation_changes_nothing(tmp_path: Path, stop_at: int) -> None:
    path = write_text(tmp_path)
    looks: list[float] = []
    run_fit(tmp_path / "straight", path, 0, 7, looks)
    assert looks == []
    run_fit(tmp_path / "resumed", path, 0, stop_at, looks)
    run_fit(tmp_path / "resumed", path, stop_at, 7, looks)
    assert len(looks) == 1 + 7
    straight, resumed = (checkpoint.load(checkpoint.last(tmp_path / name / "checkpoints")) for name in NAMES)
    assert straight.step == resumed.step == 7
    for expected, found in [(straight.model, resumed.model), (straight.optimizers, resumed.optimizers)]:
        assert expected.keys() == found.keys()
        assert all(torch.equal(value, found[key]) for key, value in expected.items())
    rows = [[json.loads(line) for line in (tmp_path / name / "metrics.jsonl").open()] for name in NAMES]
    assert [row["loss/nll"] for row in rows[0]] == [row["loss/nll"] for row in rows[1]]
    assert [row["update_step"] for row in rows[1]] == list(range(1, 8))


def test_a_language_run_is_read_as_any_other(tmp_path: Path) -> None:
    directory, looks = tmp_path / "resumed", list[float]()
    run_fit(directory, write_text(tmp_path), 0, 5, looks)
    run = RunDir(directory)
    case = {"recipe": "text", "case": "sft", "label": "SFT", "seed": 3, "config_hash": "0", "data_hash": "0"}
    for name, content in {"case.json": case, "config.json": {}, "environment.json": {}}.items():
        run.write_json(name, content)
    run.status("done")
    found = read_run(directory)
    points = found.points("offline")
    assert points.step.tolist() == list(range(6))
    assert points.score[-1] > points.score[0]
    assert found.metrics["loss/nll"].update_step.tolist() == [1, 2, 3, 4, 5]
    bits = (1 - points.score) * math.log2(BYTES.vocab_size)
    assert bits.tolist() == pytest.approx(looks, rel=1e-4)  # windows of equal length: the mean of rows is the mean
