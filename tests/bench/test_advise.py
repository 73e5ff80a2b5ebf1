"""Advice: every measure against its definition, and planted cases that it must tell apart."""

from __future__ import annotations

import importlib.util
import itertools
import json
import shlex
from collections import Counter

import numpy as np
import pytest
import torch
import tyro

from steelyard.bench.advise import NEAR_PEAK, Names, advise, as_json, place, side
from steelyard.bench.evidence import (
    Evidence,
    Measure,
    Observations,
    PairObservations,
    best_of,
    edit_distance,
    measure,
    share_estimate,
    shared_tokens,
    two_sample_test,
)
from steelyard.bench.stats import Estimate
from steelyard.data.preferences import TextData, TextRow, tokenize
from steelyard.envs.bandit import TARGETS, BanditProblem, reference_bins
from steelyard.envs.length import (
    EOS,
    PAD,
    LengthLanguageConfig,
    LengthScorer,
    LengthTokenizer,
    contrast_pairs,
    draw_prompts,
    label_pairs,
    sft_data,
)
from steelyard.envs.samplers import LanguageModelSampler
from steelyard.errors import DataError
from steelyard.nets.lm import LanguageModelConfig
from steelyard.nets.tiny_lm import TinyLM
from steelyard.nets.transformer import TransformerConfig
from steelyard.rng import torch_generator
from steelyard.workflows.advise import AdviseConfig, observe, some_rows, write_advice
from steelyard.workflows.reward_model import RewardModelRun

NAMES = Names("smollm2", "pairs.jsonl", "contains:yes")


# --- the measures ---------------------------------------------------------------------------------------------------


def test_best_of_is_the_mean_over_all_subsets():
    rewards = np.array([[3.0, -1.0, 2.0, 2.0, 7.0], [0.0, 1.0, 0.0, 0.0, 5.0]])
    for k in range(1, 6):
        wanted = [np.mean([max(subset) for subset in itertools.combinations(row, k)]) for row in rewards]
        np.testing.assert_allclose(best_of(rewards, k), wanted)


def test_edit_distance_equals_the_table():
    def slow(a, b):
        row = list(range(len(b) + 1))
        for i, x in enumerate(a, 1):
            new = [i]
            for j, y in enumerate(b, 1):
                new.append(min(row[j] + 1, new[-1] + 1, row[j - 1] + (x != y)))
            row = new
        return row[-1]

    generator = np.random.default_rng(0)
    for _ in range(300):
        a, b = (generator.integers(0, 4, generator.integers(0, 90)).tolist() for _ in range(2))
        assert edit_distance(a, b) == slow(a, b)
    assert edit_distance([], [1, 2]) == edit_distance([1, 2], []) == 2


def test_shared_tokens_counts_repetitions():
    assert shared_tokens([1, 1, 2], [2, 1, 3]) == 2 * 2 / 6
    assert shared_tokens([1, 1], [1]) == 2 / 3
    assert shared_tokens([1], [2]) == 0


def test_shares_of_prompts_that_agree_with_themselves_are_worth_fewer_samples():
    """8 equal samples of each of 40 prompts are 40 samples, 320 independent ones are 320."""
    generator = np.random.default_rng(0)
    of_prompt = generator.random(40) < 0.5
    groups = np.repeat(np.arange(40), 8)
    copied = share_estimate(np.repeat(of_prompt, 8).astype(float), groups)
    alone = share_estimate(of_prompt.astype(float), np.arange(40))
    free = share_estimate((generator.random(320) < 0.5).astype(float), groups)
    assert copied.value == alone.value
    assert abs((copied.high - copied.low) / (alone.high - alone.low) - 1) < 0.1
    assert free.high - free.low < 0.45 * (copied.high - copied.low)
    nobody = share_estimate(np.zeros(20), np.arange(20))
    assert nobody.low == 0
    assert 0.1 < nobody.high < 0.2


def test_the_two_sample_test_keeps_its_level_and_finds_a_shift():
    generator = np.random.default_rng(0)
    groups = np.concatenate([np.repeat(np.arange(20), 2), np.repeat(np.arange(20), 6)])
    foreign = np.arange(160) < 40
    prompts = generator.normal(size=20) * 3  # prompts that differ make no difference
    values = [two_sample_test(prompts[groups] + generator.normal(size=160), foreign, groups, s)[1] for s in range(60)]
    assert sum(p <= 0.1 for p in values) <= 13  # binomial(60, 0.1): more has probability 0.004
    assert sum(p > 0.5 for p in values) >= 15
    distance, p = two_sample_test(prompts[groups] + generator.normal(size=160) + 2.0 * foreign, foreign, groups)
    assert p == 0.001
    assert distance > 0.2


def test_the_distance_is_kolmogorov_smirnovs():
    stats = pytest.importorskip("scipy.stats")
    generator = np.random.default_rng(0)
    a, b = generator.integers(0, 6, 30).astype(float), generator.integers(1, 7, 50).astype(float)
    groups = np.zeros(80, np.int64)
    distance, _ = two_sample_test(np.concatenate([a, b]), np.arange(80) < 30, groups)
    assert distance == pytest.approx(stats.ks_2samp(a, b).statistic)


# --- the paper's bandits --------------------------------------------------------------------------------------------


def bandit(scenario, prompts=32, samples=8, seed=0):
    problem = BanditProblem(TARGETS[scenario])
    drawn = problem.foreign_experience(torch.zeros(prompts, 100), samples, torch_generator(seed, "bandit"))
    shape = (prompts, samples)
    return Observations(
        np.ones(shape),
        drawn.sampler_token_logps.double().sum(1).view(shape).numpy(),
        np.zeros(shape, bool),
        drawn.rewards.double().view(shape).numpy(),
        peak=1.0,
    )


def test_the_threshold_lies_between_the_papers_bandits():
    """The exact shares near the peak under the reference: target 20 well above the threshold, target 70 well below."""
    shares = {}
    for scenario, target in TARGETS.items():
        rewards, reference = BanditProblem(target).rewards(torch.arange(100)[:, None]).numpy(), reference_bins().numpy()
        spread = np.sqrt(reference @ rewards**2 - (reference @ rewards) ** 2)
        shares[scenario] = float(reference[rewards >= 1 - 0.5 * spread].sum())
    assert shares["aligned"] > 3 * NEAR_PEAK
    assert shares["misaligned"] < NEAR_PEAK / 3


@pytest.mark.parametrize("scenario", ["aligned", "misaligned"])
def test_bandits_are_told_apart(scenario):
    verdicts = [place(measure(bandit(scenario, seed=seed)))[:2] for seed in range(10)]
    assert all(where == scenario for where, _ in verdicts)
    assert sum(confidence == "clear" for _, confidence in verdicts) >= 8


def test_few_samples_cannot_tell():
    """None of six samples near the peak: the share may still be a third, and the advice is to try both."""
    evidence = measure(bandit("misaligned", prompts=3, samples=2))
    assert place(evidence)[1] == "cannot tell"
    assert len(advise(evidence, NAMES)[0].commands) == 2
    assert any("only 3 prompts" in warning for warning in evidence.warnings)


# --- planted cases with a language model ----------------------------------------------------------------------------

LANGUAGE = LengthLanguageConfig(std_length=2.5)


class Letters(LengthTokenizer):
    """The language's tokenizer with what `tokenize` asks for."""

    def __init__(self, config):
        super().__init__(config)
        self.counts = Counter()

    def record(self):
        return {"name": "letters"}


@pytest.fixture(scope="module")
def model():
    """A tiny model of answers of 13 tokens, plus or minus 2.5."""
    size = TransformerConfig(vocab_size=LANGUAGE.vocab_size, width=32, layers=1, heads=2, context=32)
    model = TinyLM(size, torch_generator(0, "weights"), reference="none")
    data = sft_data(LANGUAGE, 2048, torch_generator(0, "sft"))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(150):
        batch = data.of_prompts(torch.arange(64) + 64 * (step % 32))
        loss = -batch.mean_over_tokens(model.outputs(batch).token_logps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def answers(prompts, seed):
    """Two answers of the language to each prompt: completions [P, 2, T] and lengths [P, 2]."""
    from steelyard.envs.length import draw_lengths, write_answers

    generator = torch_generator(seed, "answers")
    lengths = draw_lengths(LANGUAGE, 2 * len(prompts), generator)
    written = write_answers(LANGUAGE, prompts.repeat_interleave(2, 0), lengths, generator)
    return written.view(len(prompts), 2, -1), lengths.view(-1, 2)


def case(model, task, kind="independent", prompts=32, task_of_pairs=None, with_pairs=True, with_scorer=True):
    """Observe a planted case: the model, pairs of the language labelled by the task, and the task's reward."""
    generator = torch_generator(1, "case")
    asked = draw_prompts(LANGUAGE, prompts, generator)
    written, lengths = answers(asked, 2)
    if kind == "independent":
        pairs = label_pairs(LANGUAGE, task_of_pairs or task, asked, written, lengths)
    else:
        pairs = contrast_pairs(LANGUAGE, kind == "similar", asked, written, lengths, generator)
    tokenizer = Letters(LANGUAGE)
    rows = [TextRow(row["prompt"], (row["chosen"], row["rejected"]), pairs=((0, 1),)) for row in pairs.rows(tokenizer)]
    if not with_pairs:
        rows = [TextRow(row.prompt) for row in rows]
    data = tokenize(TextData("preference" if with_pairs else "prompt", rows, "planted"), tokenizer)
    config = AdviseConfig(num_prompts=prompts, max_new_tokens=LANGUAGE.cap, batch_prompts=16)
    scorer = LengthScorer(task, LANGUAGE.mode) if with_scorer else None
    if scorer is not None:
        scorer.name = f"length:{task}"
    seen, shown = observe(
        model, LanguageModelSampler(model, config.sampling, EOS, PAD), data, scorer, config, quiet=True
    )
    evidence = measure(seen)
    names = Names("tiny", "pairs.jsonl", "contains:x" if with_scorer else None, preferences=with_pairs)
    return evidence, {advice.topic: advice for advice in advise(evidence, names)}, shown


def test_mode_length_is_aligned(model):
    evidence, advice, _ = case(model, "mode")
    assert place(evidence)[:2] == ("aligned", "clear")
    assert "supervised fine-tuning on winners" in advice["method"].verdict
    assert "--objective pref_ft" in advice["method"].commands[0]
    assert "--source dataset" in advice["method"].commands[0]


def test_max_length_is_misaligned(model):
    evidence, advice, _ = case(model, "max")
    assert place(evidence)[0] == "misaligned"
    assert advice["method"].confidence != "cannot tell"
    assert "on-policy samples with a negative gradient" in advice["method"].verdict
    assert "--source policy" in advice["method"].commands[0]
    assert "--scorer contains:x" in advice["method"].commands[0]


def test_a_known_peak_out_of_reach_is_clearly_misaligned(model):
    from dataclasses import replace

    generator = torch_generator(1, "case")
    asked = draw_prompts(LANGUAGE, 32, generator)
    tokenizer = Letters(LANGUAGE)
    data = tokenize(TextData("prompt", [TextRow(tokenizer.decode(p.tolist())) for p in asked], "planted"), tokenizer)
    config = AdviseConfig(max_new_tokens=LANGUAGE.cap, batch_prompts=16, peak=-1.0)
    scorer = LengthScorer("min", LANGUAGE.mode)
    scorer.name = "length:min"
    sampler = LanguageModelSampler(model, config.sampling, EOS, PAD)
    seen, _ = observe(model, sampler, data, scorer, config, quiet=True)
    assert place(measure(seen))[:2] == ("misaligned", "clear")
    assert place(measure(replace(seen, peak=-13.0)))[:2] == ("aligned", "clear")


def test_near_duplicates_ask_for_an_anchor_and_distinct_pairs_do_not(model):
    _, similar, _ = case(model, "min", "similar")
    assert similar["loss"].confidence == "clear"
    assert "displacement" in similar["loss"].verdict
    assert "nll-weight" in similar["loss"].commands[0]
    _, distinct, _ = case(model, "min", "distinct")
    assert distinct["loss"].confidence == "clear"
    assert "distinct enough" in distinct["loss"].verdict


def test_the_languages_own_answers_are_nearly_on_policy_and_long_ones_are_not(model):
    evidence, advice, _ = case(model, "mode")
    assert evidence.find("overlap").estimate.value > 0.8
    assert abs(evidence.find("log_ratio").estimate.value) < 0.3
    assert "foreign" not in advice["data"].verdict
    seen = evidence.find("chosen_atypical").estimate
    assert seen.value < 0.75
    # text of another kind: letters that the language never puts side by side
    asked = draw_prompts(LANGUAGE, 32, torch_generator(5, "case"))
    tokenizer = Letters(LANGUAGE)
    rows = [TextRow(tokenizer.decode(p.tolist()), ("vusqom", "vtrqjaa"), pairs=((0, 1),)) for p in asked]
    data = tokenize(TextData("preference", rows, "foreign"), tokenizer)
    config = AdviseConfig(max_new_tokens=LANGUAGE.cap, batch_prompts=16)
    seen, _ = observe(model, LanguageModelSampler(model, config.sampling, EOS, PAD), data, None, config, quiet=True)
    evidence = measure(seen)
    foreign = {a.topic: a for a in advise(evidence, Names("tiny", "foreign.jsonl"))}
    assert "foreign to the model" in foreign["data"].verdict
    assert foreign["data"].confidence == "clear"
    assert evidence.find("log_prob_test").estimate.value == 0.001
    # without a reward the method is never clear, and a reward model comes first
    assert foreign["method"].confidence == "weak"
    assert foreign["method"].commands[0].startswith("steelyard train reward_model")


def test_pairs_that_another_reward_labelled_are_not_used(model):
    """Pairs that prefer long answers with a reward for short ones: an offline method would learn the opposite."""
    evidence, advice, _ = case(model, "min", task_of_pairs="max")
    assert evidence.find("agreement").estimate.value == 0.0
    assert "not labelled by this reward" in advice["reward"].verdict
    assert advice["reward"].confidence == "clear"
    assert all("--source dataset" not in command for command in advice["method"].commands)


def test_prompts_alone_with_a_reward(model):
    evidence, advice, shown = case(model, "mode", with_pairs=False)
    assert set(advice) == {"method", "reuse"}
    assert evidence.find("overlap") is None
    assert "--objective best_of_n" in advice["method"].commands[0]
    assert len(shown) == 3
    assert shown[0].texts[0][0].startswith("best of 8, reward")


def test_an_observation_does_not_depend_on_its_batches(model):
    generator = torch_generator(1, "case")
    asked = draw_prompts(LANGUAGE, 10, generator)
    tokenizer = Letters(LANGUAGE)
    rows = [TextRow(tokenizer.decode(p.tolist()), ("abc", "bcde"), pairs=((0, 1),)) for p in asked]
    data = tokenize(TextData("preference", rows, "planted"), tokenizer)
    found = []
    for size in (3, 10):
        config = AdviseConfig(num_prompts=8, max_new_tokens=LANGUAGE.cap, batch_prompts=size)
        found.append(
            observe(model, LanguageModelSampler(model, config.sampling, EOS, PAD), data, None, config, quiet=True)
        )
    (first, _), (second, _) = found
    np.testing.assert_array_equal(first.lengths, second.lengths)
    np.testing.assert_allclose(first.logps, second.logps, atol=1e-4)
    np.testing.assert_allclose(first.pairs.logps, second.pairs.logps, atol=1e-4)
    np.testing.assert_array_equal(first.pairs.prompt, np.arange(8))


def test_a_large_set_is_not_tokenised_whole():
    data = TextData("prompt", [TextRow(str(k)) for k in range(500)], "large")
    some = some_rows(data, AdviseConfig(num_prompts=10))
    numbers = [int(row.prompt) for row in some.rows]
    assert len(numbers) == 20
    assert numbers == sorted(set(numbers))
    assert max(numbers) > 250
    assert some_rows(data, AdviseConfig(num_prompts=10, seed=1)).rows != some.rows
    assert len(some_rows(TextData("prompt", data.rows[:5]), AdviseConfig())) == 5


# --- the rules ------------------------------------------------------------------------------------------------------


def test_data_of_a_colder_distribution_are_foreign_too():
    """Text that the model finds likelier than its own samples was not drawn from it either."""
    for ratio in ((0.6, 0.8, 1.0), (-1.0, -0.8, -0.6)):
        found = {a.topic: a for a in advise(planted(overlap=HIGH, log_ratio=ratio), NAMES)}
        assert "foreign" in found["data"].verdict
        assert found["data"].confidence == "clear"
    near = {a.topic: a for a in advise(planted(overlap=HIGH, log_ratio=(-0.2, 0.0, 0.2)), NAMES)}
    assert "own samples" in near["data"].verdict


def test_long_data_are_compared_with_cut_samples_on_as_many_tokens(model):
    """A limit below every length: lengths are alike then, and the head's log-probs decide."""
    generator = torch_generator(1, "case")
    asked = draw_prompts(LANGUAGE, 16, generator)
    written, lengths = answers(asked, 2)
    tokenizer = Letters(LANGUAGE)
    pairs = label_pairs(LANGUAGE, "min", asked, written, lengths)
    rows = [TextRow(row["prompt"], (row["chosen"], row["rejected"]), pairs=((0, 1),)) for row in pairs.rows(tokenizer)]
    data = tokenize(TextData("preference", rows, "planted"), tokenizer)
    config = AdviseConfig(max_new_tokens=4, batch_prompts=16)
    seen, _ = observe(model, LanguageModelSampler(model, config.sampling, EOS, PAD), data, None, config, quiet=True)
    assert seen.pairs.lengths.max() > 10
    assert (seen.pairs.head_lengths <= 4).all()
    assert (seen.pairs.head_logps >= seen.pairs.logps).all()
    assert measure(seen).find("length_test").estimate.value > 0.05


@pytest.mark.parametrize(
    ("low", "value", "high", "said"),
    [
        (0.6, 0.7, 0.8, (True, "clear")),
        (0.45, 0.6, 0.8, (True, "weak")),
        (0.3, 0.55, 0.8, (True, "cannot tell")),
        (0.2, 0.45, 0.55, (False, "weak")),
        (0.1, 0.2, 0.3, (False, "clear")),
    ],
)
def test_confidence(low, value, high, said):
    assert side(Estimate(value, low, high, 9), 0.5) == said


def planted(**values):
    """Evidence with given (low, value, high)."""
    measures = [Measure(key, key, Estimate(v[1], v[0], v[2], 50)) for key, v in values.items()]
    return Evidence({"planted": tuple(measures)})


HIGH, LOW = (0.85, 0.9, 0.95), (0.0, 0.01, 0.02)


def test_the_reward_decides_where_log_probs_disagree_and_confidence_falls():
    both = place(planted(near_peak=LOW, chosen_atypical=HIGH))
    assert both[:2] == ("misaligned", "clear")
    against = place(planted(near_peak=LOW, chosen_atypical=LOW))
    assert against[:2] == ("misaligned", "weak")
    assert "disagree" in against[3]
    # pairs that the scorer does not order that way have no say
    assert place(planted(near_peak=LOW, chosen_atypical=LOW, agreement=LOW))[:2] == ("misaligned", "clear")


def test_data_beyond_the_models_reach_are_mixed_in():
    found = advise(
        planted(near_peak=LOW, chosen_atypical=HIGH, agreement=HIGH, chosen_quantile=(0.93, 0.97, 1.0)), NAMES
    )
    assert "--source mixture" in found[0].commands[0]
    assert "--experience.offline-share 0.5" in found[0].commands[0]


def test_a_reward_model_that_guesses_sends_back_to_collecting_pairs():
    found = advise(planted(near_peak=LOW, coverage=(0.2, 0.4, 0.6), agreement=HIGH), NAMES, learned=True)
    reward = next(advice for advice in found if advice.topic == "reward")
    assert "collect on-policy pairs" in reward.verdict
    assert reward.commands[0].startswith("steelyard data pairs")
    coin = advise(planted(near_peak=LOW, agreement=(0.45, 0.5, 0.55)), NAMES, learned=True)
    assert any("hardly better than a coin" in advice.verdict for advice in coin)


def test_length_bias_is_said_both_ways_and_not_of_a_reward_that_is_length():
    for value, word in ((HIGH, "longer"), (LOW, "shorter")):
        found = {a.topic: a for a in advise(planted(longer_chosen=value), NAMES)}
        assert word in found["length"].verdict
    own = advise(planted(longer_chosen=LOW), Names("m", "d", "length:min"))
    assert "length" not in {a.topic for a in own}
    assert "length" not in {a.topic for a in advise(planted(longer_chosen=(0.4, 0.5, 0.6)), NAMES)}


def test_cut_samples_are_never_clear():
    seen = bandit("aligned")
    cut = Observations(seen.lengths, seen.logps, np.ones_like(seen.cut), seen.rewards, peak=1.0)
    evidence = measure(cut)
    assert any("were cut at the limit" in warning for warning in evidence.warnings)
    assert advise(measure(seen), NAMES)[0].confidence == "clear"
    assert advise(evidence, NAMES)[0].confidence == "weak"


def test_a_constant_reward_says_nothing():
    shape = (24, 4)
    seen = Observations(np.ones(shape), -np.ones(shape), np.zeros(shape, bool), np.full(shape, 3.0))
    evidence = measure(seen)
    assert evidence.find("near_peak") is None
    assert any("same reward" in warning for warning in evidence.warnings)
    assert advise(evidence, Names("m", "d", "contains:x", preferences=False))[0].confidence == "cannot tell"


def test_unscorable_samples_leave_their_prompt_out_and_all_of_them_is_an_error():
    seen = bandit("aligned")
    rewards = seen.rewards.copy()
    rewards[3, 2] = np.nan
    evidence = measure(Observations(seen.lengths, seen.logps, seen.cut, rewards))
    assert evidence.find("reward").estimate.n == 31
    assert any("1 prompts with unscorable samples" in warning for warning in evidence.warnings)
    with pytest.raises(DataError, match="nothing to measure"):
        measure(Observations(seen.lengths, seen.logps, seen.cut, np.full_like(rewards, np.nan)))


def test_rewards_of_a_reward_model_are_compared_within_prompts():
    """A constant added to each prompt changes nothing for a learned reward, and a lot for a known one."""
    seen = bandit("aligned")
    shift = np.random.default_rng(0).normal(size=(32, 1)) * 50
    moved = [
        measure(Observations(seen.lengths, seen.logps, seen.cut, rewards, learned=True)).find("near_peak").estimate
        for rewards in (seen.rewards, seen.rewards + shift)
    ]
    assert moved[0] == moved[1]


def pair_observations(chosen_logp, count=32):
    shape = (count, 2)
    logps = np.full(shape, -10.0)
    logps[:, 0] = chosen_logp
    lengths, half = np.full(shape, 5.0), np.full(count, 0.5)
    return PairObservations(np.arange(count), lengths, logps, lengths, logps, half, half)


def test_log_probs_alone_give_a_weak_answer():
    generator = np.random.default_rng(0)
    shape = (32, 8)
    own = Observations(np.full(shape, 5.0), generator.normal(-8, 1, shape), np.zeros(shape, bool))
    for logp, wanted in ((-8.0 + generator.normal(0, 1, 32), "aligned"), (-30.0, "misaligned")):
        seen = Observations(own.lengths, own.logps, own.cut, pairs=pair_observations(logp))
        where, confidence, _, remark = place(measure(seen))
        assert (where, confidence) == (wanted, "weak")
        assert "without a scorer" in remark


def test_json_and_page(tmp_path, model):
    evidence, advice, shown = case(model, "mode")
    page = write_advice(tmp_path / "advice.json", "Advice", evidence, list(advice.values()), shown, {"model": "tiny"})
    content = json.loads((tmp_path / "advice.json").read_text())
    assert content["measures"]["near_peak"]["low"] <= content["measures"]["near_peak"]["value"]
    assert content["thresholds"]["NEAR_PEAK"] == NEAR_PEAK
    assert content["advice"][0]["topic"] == "method"
    text = page.read_text()
    assert "share of samples near the best reward known" in text
    if importlib.util.find_spec("matplotlib") is not None:
        assert "<svg" in text or "data:image/png" in text  # the best-of-N curve
    assert advice["method"].commands[0] in page.with_suffix(".md").read_text().replace("\\", "")
    assert as_json(evidence, [])["advice"] == []


def all_commands():
    cases = [
        planted(near_peak=HIGH, chosen_atypical=LOW, edit_distance=LOW, overlap=LOW, log_ratio=(-2, -1, -0.8)),
        planted(near_peak=LOW, longer_chosen=HIGH, coverage=LOW),
        planted(near_peak=LOW, agreement=HIGH, chosen_quantile=(0.93, 0.97, 1.0)),
        planted(chosen_atypical=HIGH), planted(chosen_atypical=(0.5, 0.76, 0.9)), planted(near_peak=(0.0, 0.05, 0.1)),
    ]  # fmt: skip
    found = set()
    for evidence, scorer, preferences in itertools.product(cases, ("1*length:min:characters", None), (True, False)):
        for advice in advise(evidence, Names("tiny", "data file.jsonl", scorer, preferences)):
            found |= set(advice.commands)
    return sorted(found)


@pytest.fixture
def few_pairs(tmp_path, monkeypatch):
    """Six pairs in "data file.jsonl" of the working directory."""
    rows = [{"prompt": f"Say {k}", "chosen": "no" * k + "!", "rejected": "yes, yes" + "s" * k} for k in range(1, 7)]
    (tmp_path / "data file.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)


@pytest.mark.lm
def test_every_command_line_is_one(few_pairs, capsys):
    """What is printed can be run: the command's own parser reads it, and builds and updates a tiny model."""
    pytest.importorskip("peft")
    from steelyard.cli import pairs, train_preference

    small = ["--sampling.max-new-tokens", "8", "--experience.num-generations", "2", "--dry-run", "4"]
    for command in all_commands():
        words = shlex.split(command)
        if words[:3] == ["steelyard", "data", "pairs"]:
            arguments = tyro.cli(pairs.PairsArguments, args=words[3:], config=(tyro.conf.OmitArgPrefixes,))
            assert arguments.prompts == "data file.jsonl"
        elif words[:3] == ["steelyard", "train", "reward_model"]:
            assert train_preference.with_model(LanguageModelConfig(), words[3:])[0].name == "tiny"
            options = tyro.cli(RewardModelRun, args=["--data.path", words[words.index("--data") + 1]])
            assert options.data.path in ("data file.jsonl", "pairs.jsonl")
        else:
            assert words[:3] == ["steelyard", "train", "preference"]
            assert train_preference.read(words[3:]).model.name == "tiny"
            if "reward_model:runs/reward" not in words:  # which the command before it makes
                assert train_preference.main([*words[3:], *small]) == 0, command
    capsys.readouterr()
