"""Text: exact round trips, windows that are pure functions of (seed, step), validation kept apart."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steelyard.data.text import ByteTokenizer, TextSource, completion_batch
from steelyard.errors import ConfigError, DataError

TOKENIZER = ByteTokenizer()


def write(directory: Path, data: bytes) -> Path:
    path = directory / "text.txt"
    path.write_bytes(data)
    return path


@given(st.text(), st.booleans(), st.booleans())
def test_text_round_trips(text: str, bos: bool, eos: bool) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text, bos, eos)) == text


@given(st.binary(), st.booleans(), st.booleans())
def test_bytes_round_trip(data: bytes, bos: bool, eos: bool) -> None:
    assert TOKENIZER.decode_bytes(TOKENIZER.encode(data, bos, eos)) == data


def test_specials_are_put_once_and_bad_bytes_are_printable() -> None:
    assert TOKENIZER.encode("é", bos=True, eos=True) == [256, 0xC3, 0xA9, 257]
    assert (TOKENIZER.bos, TOKENIZER.eos, TOKENIZER.pad, TOKENIZER.vocab_size) == (256, 257, 258, 259)
    assert TOKENIZER.decode(torch.tensor([0xC3, 65])) == "\ufffdA"
    with pytest.raises(DataError, match=r"expected an id in 0\.\.258, found 259"):
        TOKENIZER.decode([65, 259])


def test_a_window_is_bos_and_consecutive_bytes_all_scored(tmp_path: Path) -> None:
    source = TextSource(write(tmp_path, bytes(range(100))), context=7, batch_size=5, seed=0)
    batch = source.batch(3)
    assert batch.tokens.shape == batch.scored_mask.shape == (5, 8)
    assert batch.tokens.dtype == torch.int64
    assert batch.scored_mask.dtype == torch.float32
    assert torch.equal(batch.tokens[:, 0], torch.full((5,), TOKENIZER.bos))
    assert torch.equal(batch.tokens[:, 1:].diff(dim=1), torch.ones(5, 6, dtype=torch.int64))
    assert batch.scored_mask[:, 0].sum() == 0
    assert batch.scored_mask[:, 1:].min() == 1


def test_batches_are_pure_functions_of_seed_and_step(tmp_path: Path) -> None:
    path = write(tmp_path, np.random.default_rng(0).bytes(5000))
    first, second = TextSource(path, 16, 8, seed=1), TextSource(path, 16, 8, seed=1)
    forwards = [first.batch(step).tokens for step in range(5)]
    backwards = [second.batch(step).tokens for step in reversed(range(5))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(forwards, backwards, strict=True))
    assert not torch.equal(forwards[0], forwards[1])
    assert not torch.equal(forwards[0], TextSource(path, 16, 8, seed=2).batch(0).tokens)


def test_training_reaches_every_training_byte_and_no_validation_byte(tmp_path: Path) -> None:
    source = TextSource(write(tmp_path, bytes(range(100))), context=7, batch_size=64, seed=0, validation_fraction=0.2)
    seen = {int(token) for step in range(20) for token in source.batch(step).tokens[:, 1:].flatten()}
    assert seen == set(range(80))


def test_validation_scores_each_byte_once_in_order(tmp_path: Path) -> None:
    source = TextSource(write(tmp_path, bytes(range(100))), context=7, batch_size=2, seed=0, validation_fraction=0.31)
    batches = list(source.validation_batches())
    scored = torch.cat([batch.tokens[batch.scored_mask > 0] for batch in batches])
    assert scored.tolist() == list(range(69, 100))
    assert [len(batch) for batch in batches] == [2, 2, 1]
    assert batches[-1].tokens[0].tolist() == [256, 97, 98, 99, 258, 258, 258, 258]
    assert len(list(source.validation_batches(max_batches=2))) == 2
    assert list(TextSource(source.path, 7, 2, 0, validation_fraction=0.0).validation_batches()) == []


def test_a_text_as_long_as_the_context_is_enough(tmp_path: Path) -> None:
    source = TextSource(write(tmp_path, b"steelyard"), context=9, batch_size=2, seed=0, validation_fraction=0.0)
    assert TOKENIZER.decode(source.batch(0).tokens[1]) == "steelyard"


def test_the_file_is_memory_mapped_and_identified_by_its_hash(tmp_path: Path) -> None:
    path = write(tmp_path, b"load and counterweight " * 20)
    source = TextSource(path, 8, 2, seed=0)
    assert isinstance(source._bytes, np.memmap)
    assert source.content_hash == hashlib.sha256(path.read_bytes()).hexdigest()


def test_errors_are_one_sentence_that_names_the_file(tmp_path: Path) -> None:
    missing = tmp_path / "absent.txt"
    with pytest.raises(DataError, match=r"absent\.txt: no such text file"):
        TextSource(missing, 8, 2, seed=0)
    with pytest.raises(DataError, match=r"text\.txt: expected text, found an empty file"):
        TextSource(write(tmp_path, b""), 8, 2, seed=0)
    with pytest.raises(DataError, match=r"expected at least 8 bytes of training text .* found 7 of 7 bytes"):
        TextSource(write(tmp_path, b"1234567"), 8, 2, seed=0)
    with pytest.raises(ConfigError, match=r"validation_fraction must lie in \[0, 1\), found 1\.0"):
        TextSource(write(tmp_path, b"12345678"), 8, 2, seed=0, validation_fraction=1.0)
    with pytest.raises(ConfigError, match="context and batch_size must be at least 1, found 0 and 2"):
        TextSource(write(tmp_path, b"12345678"), 0, 2, seed=0)


def test_completions_are_scored_with_their_eos_and_prompts_are_not() -> None:
    batch = completion_batch([("ab", "c"), ("", "de")], TOKENIZER, length=6)
    assert batch.tokens.tolist() == [[256, 97, 98, 99, 257, 258], [256, 100, 101, 257, 258, 258]]
    assert batch.scored_mask.tolist() == [[0, 0, 0, 1, 1, 0], [0, 1, 1, 1, 0, 0]]
    assert completion_batch([("ab", "c"), ("", "de")], TOKENIZER).tokens.shape == (2, 5)
    with pytest.raises(DataError, match="text pair 1: expected at most 4 tokens, found 5"):
        completion_batch([("a", "b"), ("ab", "c")], TOKENIZER, length=4)
