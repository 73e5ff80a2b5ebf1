"""Evaluators: what they read while sampling is what training reads in whole passes; ids and suffixes of tokenizers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from steelyard.data.sample_pool import PromptSamples, SamplePool
from steelyard.data.tokenizer import ByteChat
from steelyard.errors import ConfigError
from steelyard.nets.lm import LanguageModelConfig, LoRAConfig, load_language_model
from steelyard.nets.self_eval import ProbeConfig, SlotConfig, SuffixConfig, build_evaluator, suffix_tokens
from steelyard.nets.tiny_lm import TinyLM
from steelyard.nets.transformer import TransformerConfig
from steelyard.rng import torch_generator
from steelyard.workflows.self_eval_evaluation import score_pool

READERS = [SuffixConfig(tokens=(8, 3), yes_token=9, no_token=10), SlotConfig(yes_token=9, no_token=10), ProbeConfig(),
           ProbeConfig(confidence=False)]  # fmt: skip


def tiny_lm() -> TinyLM:
    model = TinyLM(TransformerConfig(vocab_size=12, width=16, layers=2, heads=2, context=24), torch_generator(0, "m"))
    with torch.no_grad():
        for parameter in model.transformer.parameters():
            parameter.mul_(6.0 if parameter.ndim > 1 else 1.0)
    return model


def causal_lm(lora: bool = False):
    pytest.importorskip("transformers")
    adapter = LoRAConfig(rank=4) if lora else None
    model = load_language_model(LanguageModelConfig("tiny", adapter=adapter), torch_generator(0, "m"))
    if lora:
        with torch.no_grad():
            for name, parameter in model.network.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.1, generator=torch_generator(1, name))
    return model


@pytest.mark.parametrize("config", READERS, ids=lambda config: config.kind)
@pytest.mark.parametrize("which", ["tiny", "hub", "lora"])
def test_live_scores_are_those_of_whole_passes(which, config):
    """One prefill, tokens one by one, a score after each: the same as reading the finished sample."""
    model = tiny_lm() if which == "tiny" else causal_lm(which == "lora")
    evaluator = build_evaluator(config, model, torch_generator(0, "e"))
    evaluator.calibrate(0.7, -0.3)
    prompts = [(1, 2, 3), (4,)]
    samples = (((1, 5, 6, 7), (2, 2, 4, 0)), ((3, 1, 6, 2), (7, 5, 1, 1)))
    ended = np.array([[False, True], [False, False]])
    items = tuple(
        PromptSamples("", np.zeros(2), np.full(2, 4), tokens=of, prompt_tokens=prompt, finished=end)
        for prompt, of, end in zip(prompts, samples, ended, strict=True)
    )
    whole = score_pool(model, evaluator, SamplePool(items), (1, 2, 3))
    padded, mask = torch.tensor([[1, 2, 3], [0, 0, 4]]), torch.tensor([[1.0, 1, 1], [0, 0, 1]])
    reader = model.reader(padded, mask, 2, 4)
    tokens = torch.tensor(samples).view(4, 4)
    live = []
    logps = []
    for step in range(4):
        logps.append(reader.logits.log_softmax(1).gather(1, tokens[:, step, None])[:, 0])
        reader.read(tokens[:, step])
        so_far = torch.stack(logps, 1)
        drawn = torch.stack([torch.full((4,), step + 1.0), so_far.sum(1), so_far.min(1).values], 1)
        live.append(evaluator.score(reader, drawn))
    live = torch.stack(live, 1).double().numpy().reshape(2, 2, 4)
    np.testing.assert_allclose(whole.array("checkpoint_scores"), live[..., :3], atol=1e-5)
    ends = np.where(ended, live[..., 2], live[..., 3])  # a sample that ended is read before its EOS
    np.testing.assert_allclose(whole.array("scores"), ends, atol=1e-5)
    assert np.ptp(ends) > 1e-4  # they do differ


def test_scores_stop_where_samples_do():
    item = PromptSamples(
        "", np.zeros(2), np.array([2, 4]), tokens=((1, 2), (1, 2, 3, 4)), prompt_tokens=(1,),
        finished=np.zeros(2, bool),
    )  # fmt: skip
    model = tiny_lm()
    evaluator = build_evaluator(READERS[1], model, torch_generator(0, "e"))
    found = score_pool(model, evaluator, SamplePool((item,)), (1, 2)).items[0]
    assert np.isnan(found.checkpoint_scores).tolist() == [[False, True], [False, False]]
    assert not np.isnan(found.scores).any()


def test_what_sampling_must_not_draw():
    model = tiny_lm()
    assert build_evaluator(READERS[1], model, torch_generator(0, "e")).reserved == (9, 10)
    assert build_evaluator(READERS[2], model, torch_generator(0, "e")).reserved == ()
    suffix = build_evaluator(SuffixConfig(tokens=(8,), yes_token=9, no_token=10, reserved=(8,)), model,
                             torch_generator(0, "e"))  # fmt: skip
    assert (suffix.reserved, suffix.extra_tokens) == ((8,), 1)


def test_bytes_have_a_chat_suffix_and_two_ids_that_no_text_holds():
    chat = ByteChat()
    suffix = suffix_tokens(chat, "Better?")
    turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "bc"}]
    asked = chat.prompt([*turn, {"role": "user", "content": "Better?"}])
    answered = [*chat.prompt(turn[:1]), *chat.completion(turn[:1], "bc")[:-1]]
    assert [*answered, *suffix] == asked  # the answer's own EOS is the suffix's first token
    assert suffix[0] == chat.eos
    model = causal_lm()
    slot = build_evaluator(SlotConfig(), model, torch_generator(0, "e"))
    assert slot.reserved == (0xFE, 0xFF)
    with pytest.raises(UnicodeDecodeError):
        bytes(slot.reserved).decode()
    asks = build_evaluator(SuffixConfig(), model, torch_generator(0, "e"))
    assert (asks.yes, asks.no) == (ord("Y"), ord("N"))


def test_without_ids_and_without_a_tokenizer_there_is_one_sentence():
    with pytest.raises(ConfigError, match="no two unused"):
        build_evaluator(SlotConfig(), tiny_lm(), torch_generator(0, "e"))
    with pytest.raises(ConfigError, match="give tokens, yes_token and no_token"):
        build_evaluator(SuffixConfig(tokens=(1,)), tiny_lm(), torch_generator(0, "e"))
