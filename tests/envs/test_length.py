"""The language of the length problems: lengths, rewards, pairs that never tie, cuts that follow the given law."""

import numpy as np
import pytest
import torch

from steelyard.envs.length import (
    ANSWER,
    EOS,
    NUM_SPECIALS,
    PAD,
    LengthLanguageConfig,
    LengthScorer,
    LengthTokenizer,
    contrast_pairs,
    draw_lengths,
    draw_prompts,
    edit_distances,
    label_pairs,
    length_rewards,
    recut,
    sft_data,
    skew_pairs,
    skewed_lengths,
)
from steelyard.errors import ConfigError, DataError
from steelyard.rng import torch_generator

LANGUAGE = LengthLanguageConfig()


@pytest.fixture(scope="module")
def drawn():
    """400 prompts with two answers each: prompts [P, L], completions [P, 2, T], lengths [P, 2]."""
    generator = torch_generator(0, "test")
    data = sft_data(LANGUAGE, 800, generator)
    prompts = data.prompts[:400]
    lengths = data.lengths.long().view(2, 400).T
    completions = data.completions.view(2, 400, -1).transpose(0, 1)
    return prompts, completions, lengths


def test_answers_have_the_lengths_of_the_language():
    data = sft_data(LANGUAGE, 4000, torch_generator(0, "test"))
    lengths = data.lengths
    assert abs(float(lengths.mean()) - 13) < 0.3
    assert abs(float(lengths.std()) - 3.5) < 0.2
    assert int(lengths.max()) <= LANGUAGE.cap == data.completions.shape[1]
    last = data.completions.gather(1, lengths.long()[:, None] - 1).squeeze(1)
    assert (last == EOS).all()
    inside = torch.arange(LANGUAGE.cap) < lengths[:, None] - 1
    assert (data.completions[inside] >= NUM_SPECIALS).all()
    assert (data.completions[inside] < LANGUAGE.vocab_size).all()
    assert (data.completions[data.scored_mask == 0] == PAD).all()
    assert (data.prompts[:, -1] == ANSWER).all()
    assert data.prompts.shape[1] == LANGUAGE.prompt_length


def test_answers_depend_on_the_prompt_and_follow_the_vocabulary():
    data = sft_data(LANGUAGE, 2000, torch_generator(1, "test"))
    words = data.completions - NUM_SPECIALS
    inside = torch.arange(LANGUAGE.cap - 1) < data.lengths[:, None] - 2  # both this word and the next
    follows = (words[:, :-1] + 1) % LANGUAGE.words == words[:, 1:]
    from_prompt = (data.completions[:, 1:, None] == data.prompts[:, None, : LANGUAGE.prompt_words]).any(-1)
    assert abs(float(follows[inside].float().mean()) - (0.6 + 0.4 / 22)) < 0.03
    assert bool((follows | from_prompt)[inside].all())


def test_rewards_of_every_task():
    lengths = torch.tensor([1, 13, 24])
    assert length_rewards("min", lengths, 13).tolist() == [-1, -13, -24]
    assert length_rewards("skew", lengths, 13).tolist() == [-1, -13, -24]
    assert length_rewards("max", lengths, 13).tolist() == [1, 13, 24]
    assert length_rewards("mode", lengths, 13).tolist() == [-12, 0, -11]
    ids = [[EOS], [5, 6, EOS]]
    assert LengthScorer("min", 13, scale=2.0).score(["", ""], ["", "cd"], ids, {}).tolist() == [-0.5, -1.5]


@pytest.mark.parametrize("task", ["min", "mode", "max"])
def test_pairs_never_tie_and_the_better_comes_first(task, drawn):
    pairs = label_pairs(LANGUAGE, task, *drawn)
    ties = length_rewards(task, drawn[2], LANGUAGE.mode)
    assert len(pairs) == int((ties[:, 0] != ties[:, 1]).sum()) < 400
    batch = pairs.batch()
    rewards = length_rewards(task, batch.lengths, LANGUAGE.mode)
    chosen, rejected = batch.pairs.T
    assert (rewards[chosen] > rewards[rejected]).all()
    assert torch.equal(batch.margins, rewards[chosen] - rewards[rejected])
    assert torch.equal(batch.rewards, rewards)
    assert batch.labels[chosen].all()
    assert not batch.labels[rejected].any()
    some = pairs.batch(torch.tensor([3, 1]))
    assert torch.equal(some.completions[0], pairs.completions[3, 0])
    assert torch.equal(some.prompts[some.prompt_of[3]], pairs.prompts[1])


@pytest.mark.parametrize("rate", [-0.3, 0.0, 0.3])
def test_skewed_lengths_follow_the_truncated_exponential(rate):
    drawn = skewed_lengths(LANGUAGE, 40_000, rate, torch_generator(0, "test")).numpy()
    law = np.exp(rate * np.arange(1, LANGUAGE.cap + 1))
    law /= law.sum()
    found = np.bincount(drawn, minlength=LANGUAGE.cap + 1)[1:] / len(drawn)
    assert drawn.min() == 1
    assert drawn.max() == LANGUAGE.cap
    assert np.abs(found - law).max() < 0.01


def test_the_sign_of_the_skew_decides_where_pairs_pile_up(drawn):
    long = skew_pairs(LANGUAGE, 0.3, *drawn, torch_generator(0, "test"))
    short = skew_pairs(LANGUAGE, -0.3, *drawn, torch_generator(0, "test"))
    assert float(long.lengths.float().mean()) > 18
    assert float(short.lengths.float().mean()) < 7
    for pairs in (long, short):  # Min Length's reward, whatever the skew
        assert (pairs.lengths[:, 0] < pairs.lengths[:, 1]).all()
    # winners of the long skew are still longer than what people write
    assert float(long.lengths[:, 0].float().mean()) > 13.5


def test_a_recut_keeps_the_words_and_ends_once(drawn):
    prompts, completions, lengths = (x[:, 0] if x.ndim > 1 and number else x for number, x in enumerate(drawn))
    new_lengths = draw_lengths(LANGUAGE, len(prompts), torch_generator(3, "test"))
    new = recut(LANGUAGE, prompts, completions, lengths, new_lengths, torch_generator(4, "test"))
    columns = torch.arange(LANGUAGE.cap)
    kept = columns < torch.minimum(lengths, new_lengths)[:, None] - 1
    assert torch.equal(new[kept], completions[kept])
    assert ((new == EOS).sum(1) == 1).all()
    assert (new.gather(1, new_lengths[:, None] - 1) == EOS).all()
    assert (new[columns >= new_lengths[:, None]] == PAD).all()
    added = (columns < new_lengths[:, None] - 1) & ~kept
    assert added.any()
    assert (new[added] >= NUM_SPECIALS).all()


def test_similar_and_distinct_pairs_differ_in_nothing_but_the_words(drawn):
    similar = contrast_pairs(LANGUAGE, True, *drawn, torch_generator(0, "test"))
    distinct = contrast_pairs(LANGUAGE, False, *drawn, torch_generator(0, "test"))
    assert torch.equal(similar.lengths, distinct.lengths)
    assert torch.equal(similar.completions[:, 1], distinct.completions[:, 1])
    distance = {
        name: edit_distances(pairs.completions[:, 0], pairs.completions[:, 1], *pairs.lengths.T)
        for name, pairs in (("similar", similar), ("distinct", distinct))
    }
    gaps = similar.lengths[:, 1] - similar.lengths[:, 0]
    assert torch.equal(distance["similar"], gaps)  # the words that were cut
    assert float(distance["distinct"].float().mean()) > 2 * float(distance["similar"].float().mean())


def test_edit_distances_by_hand():
    def row(text):
        return [ord(letter) for letter in text.ljust(7)]

    first = torch.tensor([row("kitten"), row("abc"), row(""), row("same")])
    second = torch.tensor([row("sitting"), row("acb"), row("ab"), row("same")])
    lengths = (torch.tensor([6, 3, 0, 4]), torch.tensor([7, 3, 2, 4]))
    assert edit_distances(first, second, *lengths).tolist() == [3, 2, 2, 0]


def test_text_goes_there_and_back(drawn):
    tokenizer = LengthTokenizer(LANGUAGE)
    pairs = label_pairs(LANGUAGE, "min", *drawn)
    row = pairs.rows(tokenizer)[0]
    assert tokenizer.prompt(row["prompt"]) == pairs.prompts[0].tolist()
    ids = tokenizer.completion(row["prompt"], row["chosen"])
    assert ids == pairs.completions[0, 0, : pairs.lengths[0, 0]].tolist()
    with pytest.raises(DataError, match="expected letters up to 'v', found 'z'"):
        tokenizer.prompt("abz")


def test_a_pure_function_of_the_seed():
    first, second = (sft_data(LANGUAGE, 50, torch_generator(seed, "test")) for seed in (5, 5))
    assert torch.equal(first.completions, second.completions)
    assert not torch.equal(first.prompts, draw_prompts(LANGUAGE, 50, torch_generator(6, "test")))


def test_impossible_languages_are_refused():
    with pytest.raises(ConfigError, match="words must be between 2 and 52, found 90"):
        LengthLanguageConfig(words=90)
    with pytest.raises(ConfigError, match="at most cap = 8, found 9"):
        LengthLanguageConfig(cap=8, mean_length=9)
